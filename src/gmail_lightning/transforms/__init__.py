"""Transforms of images and texts, from what a data set holds to what an encoder takes; hashes of pixels."""

from gmail_lightning.transforms.image import resize
from gmail_lightning.transforms.image_hash import exact_hash, near_matches, perceptual_hash
from gmail_lightning.transforms.text import fill, prompt_class_names, prompt_templates

__all__ = [
    "exact_hash",
    "fill",
    "near_matches",
    "perceptual_hash",
    "prompt_class_names",
    "prompt_templates",
    "resize",
]
