"""BLIP-2's second stage: queries of a Q-Former before a frozen language model (arXiv 2301.12597); InstructBLIP."""
