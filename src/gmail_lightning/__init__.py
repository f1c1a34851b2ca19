"""Learning from generated images: a second modality of CLIP, aligned, trained on, and used on real images."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gmail_lightning")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
