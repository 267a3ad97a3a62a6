"""The interface of loaded models, the same for every system: forward, generate, classify, retrieve."""
