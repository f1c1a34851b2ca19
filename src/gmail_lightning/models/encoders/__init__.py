"""Encoders of open_clip and transformers."""
