"""A vision tower, a connector and a language model as one network: LLaVA, and those that follow it."""
