"""BLIP-2's first stage: bootstrapping with frozen image encoders (arXiv 2301.12597)."""
