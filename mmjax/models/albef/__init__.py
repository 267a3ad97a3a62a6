"""ALBEF: align before fuse (arXiv 2107.07651)."""
