"""Decoder-only language models: LLaMA, Qwen2, SmolLM2, Phi-3, OPT, GPT-2, GPT-NeoX, MPT as one configured decoder."""
