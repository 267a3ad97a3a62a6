"""CLIP: an image tower and a text tower trained to agree (OpenAI CLIP, open_clip, Hugging Face)."""
