"""Transforms of images and texts, from what a data set holds to what an encoder takes."""

from gmail_lightning.transforms.image import resize

__all__ = ["resize"]
