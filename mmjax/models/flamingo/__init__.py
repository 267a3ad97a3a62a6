"""Flamingo: a frozen language model with cross attention to images (arXiv 2204.14198; OpenFlamingo: 2308.01390)."""
