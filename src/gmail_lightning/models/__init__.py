"""Encoders, and the adaptation that gives one tower two branches; heavy packages load in the constructors."""

from gmail_lightning.models.base import DualEncoder, ImageEncoder, ImageReader, LoRATarget
from gmail_lightning.models.branches.adapters import FullCopy, LoRA
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.lora import add_lora, merge_lora
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.models.captioners.llava import Llava
from gmail_lightning.models.captioners.prefix_captioner import ClipCap
from gmail_lightning.models.encoders.hf_clip import HFCLIPEncoder
from gmail_lightning.models.encoders.hf_tower import HFImageEncoder
from gmail_lightning.models.encoders.long_text import stretch_context, stretch_positional_embedding
from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder
from gmail_lightning.models.encoders.readers import PatchTokens, PooledFeatures, TokenCodes
from gmail_lightning.models.generative import Captioner, GeneratedImages, ImageGenerator, ImageTokenizer
from gmail_lightning.models.generators.consistency import ReciprocalConsistency
from gmail_lightning.models.generators.diffusion import DiffusersGenerator

__all__ = [
    "Branch",
    "Captioner",
    "ClipCap",
    "DiffusersGenerator",
    "DualEncoder",
    "FullCopy",
    "GeneratedImages",
    "HFCLIPEncoder",
    "HFImageEncoder",
    "ImageEncoder",
    "ImageGenerator",
    "ImageReader",
    "ImageTokenizer",
    "Llava",
    "LoRA",
    "LoRATarget",
    "ModalityEncoder",
    "OpenCLIPEncoder",
    "PatchTokens",
    "PooledFeatures",
    "ReciprocalConsistency",
    "TokenCodes",
    "add_lora",
    "merge_lora",
    "stretch_context",
    "stretch_positional_embedding",
]
