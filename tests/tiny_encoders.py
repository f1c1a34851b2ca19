"""Configurations of tiny dual encoders of every kind, with a vocabulary cut to 64 merges."""

from __future__ import annotations

from typing import Any

from gmail_lightning.models import ImageEncoder, LoRA, ModalityEncoder

MERGES = 64
VOCABULARY = 512 + MERGES + 2
TEXT = {"context_length": 16, "vocab_size": VOCABULARY, "width": 64, "heads": 4, "layers": 2}


def open_clip_config(**extra: Any) -> dict[str, Any]:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": dict(TEXT), **extra}


def timm_config() -> dict[str, Any]:
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": dict(TEXT), "custom_text": True, "init_logit_bias": -10}


def hf_config(family: str) -> dict[str, Any]:
    width = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    text = {**width, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    vision = {**width, "image_size": 32, "patch_size": 8}
    extra = {"projection_dim": 32} if family == "clip" else {}
    return {"model_type": family, "text_config": text, "vision_config": vision, **extra}


def routed(
    encoder: ImageEncoder, rank: int = 4, alpha: float = 8.0, targets: Any = ("q", "v"), **settings: Any
) -> ModalityEncoder:
    """A router with LoRA, of rank 0 without."""
    return ModalityEncoder(encoder, branch=LoRA(rank, alpha, targets) if rank else None, **settings)
