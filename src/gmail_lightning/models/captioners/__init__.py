"""Captioners: ClipCap, LLaVA, and the language models in them."""
