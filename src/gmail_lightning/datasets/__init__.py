"""Data sets of images and captions. Each row says whether its image is real or generated."""

from gmail_lightning.datasets.base import DataError, ImageDecodeError, ImageTextDataset
from gmail_lightning.datasets.emoji import EmojiDataset

__all__ = ["DataError", "EmojiDataset", "ImageDecodeError", "ImageTextDataset"]
