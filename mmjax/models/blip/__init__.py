"""BLIP: bootstrapping language-image pre-training (arXiv 2201.12086)."""
