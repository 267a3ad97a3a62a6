"""xGen-MM (BLIP-3, arXiv 2408.08872): SigLIP's tokens of any-resolution tiles through a resampler, before Phi-3."""
