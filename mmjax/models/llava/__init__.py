"""LLaVA: images as a prefix of features in the prompt of a language model."""
