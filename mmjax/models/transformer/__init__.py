"""The Transformer: an encoder and a decoder for translation (Vaswani et al. 2017, torch.nn.Transformer, Marian)."""
