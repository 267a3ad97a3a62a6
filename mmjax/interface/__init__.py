"""What a loaded model offers, whatever its system: forward, generate, classify, retrieve."""
