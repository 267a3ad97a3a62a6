"""T5 and Flan-T5: an encoder and a decoder with relative positions, text to text."""
