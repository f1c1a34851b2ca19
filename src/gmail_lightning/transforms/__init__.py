"""Transforms of images and texts, from what a data set holds to what an encoder takes; hashes of pixels."""

from gmail_lightning.transforms.image import resize
from gmail_lightning.transforms.image_hash import exact_hash, near_matches, perceptual_hash

__all__ = ["exact_hash", "near_matches", "perceptual_hash", "resize"]
