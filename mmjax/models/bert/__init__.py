"""BERT (arXiv 1810.04805): masked language modelling, its heads, and the sentence encoders made from it."""
