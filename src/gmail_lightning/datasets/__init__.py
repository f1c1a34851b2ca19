"""Data sets of images and captions. Each row says whether its image is real or generated."""

from gmail_lightning.datasets.base import DataError, ImageDecodeError, ImageTextDataset
from gmail_lightning.datasets.classification import ClassificationDataset
from gmail_lightning.datasets.coco import CocoCaptions
from gmail_lightning.datasets.emoji import EmojiDataset
from gmail_lightning.datasets.fashion_mnist import FashionMNIST
from gmail_lightning.datasets.features import FeatureStore
from gmail_lightning.datasets.flickr30k import Flickr30k
from gmail_lightning.datasets.image_folder import ImageFolder
from gmail_lightning.datasets.science_qa import ScienceQA
from gmail_lightning.datasets.sharegpt4v import ShareGPT4V, Urban1k
from gmail_lightning.datasets.tables.manifest import ManifestDataset
from gmail_lightning.datasets.tars.dataset import TarShards
from gmail_lightning.datasets.tars.filter import Filter

__all__ = [
    "ClassificationDataset",
    "CocoCaptions",
    "DataError",
    "EmojiDataset",
    "FashionMNIST",
    "FeatureStore",
    "Filter",
    "Flickr30k",
    "ImageDecodeError",
    "ImageFolder",
    "ImageTextDataset",
    "ManifestDataset",
    "ScienceQA",
    "ShareGPT4V",
    "TarShards",
    "Urban1k",
]
