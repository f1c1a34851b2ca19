"""Encoders, and the adaptation that gives one tower two branches; heavy packages load in the constructors."""

from gmail_lightning.models.base import (
    Captioner,
    DualEncoder,
    GeneratedImages,
    ImageEncoder,
    ImageGenerator,
    LoRATarget,
)
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.hf_clip import HFCLIPEncoder
from gmail_lightning.models.hf_tower import HFImageEncoder
from gmail_lightning.models.llava import Llava
from gmail_lightning.models.long_text import stretch_context, stretch_positional_embedding
from gmail_lightning.models.lora import add_lora, merge_lora
from gmail_lightning.models.modality import ModalityEncoder
from gmail_lightning.models.open_clip import OpenCLIPEncoder
from gmail_lightning.models.prefix_captioner import ClipCap

__all__ = [
    "Captioner",
    "ClipCap",
    "DiffusersGenerator",
    "DualEncoder",
    "GeneratedImages",
    "HFCLIPEncoder",
    "HFImageEncoder",
    "ImageEncoder",
    "ImageGenerator",
    "Llava",
    "LoRATarget",
    "ModalityEncoder",
    "OpenCLIPEncoder",
    "add_lora",
    "merge_lora",
    "stretch_context",
    "stretch_positional_embedding",
]
