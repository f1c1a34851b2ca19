"""Transforms of images and texts, from what a data set holds to what an encoder takes; hashes of pixels."""

from gmail_lightning.transforms.decode import ImageDecodeError, decode_image
from gmail_lightning.transforms.image import resize
from gmail_lightning.transforms.image_hash import exact_hash, near_matches, perceptual_hash
from gmail_lightning.transforms.text import fill, prompt_class_names, prompt_templates

__all__ = [
    "ImageDecodeError",
    "decode_image",
    "exact_hash",
    "fill",
    "near_matches",
    "perceptual_hash",
    "prompt_class_names",
    "prompt_templates",
    "resize",
]
