"""Tiny dual encoders of every kind, built offline; a fresh one at each call, the same weights for the same seed."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmail_lightning.models import DualEncoder, HFCLIPEncoder, OpenCLIPEncoder

MERGES = 64
VOCABULARY = 512 + MERGES + 2
TEXT = {"context_length": 16, "vocab_size": VOCABULARY, "width": 64, "heads": 4, "layers": 2}


@pytest.fixture(scope="session")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 64 merges of CLIP's vocabulary."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: MERGES + 1]
    path = tmp_path_factory.mktemp("merges") / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture(scope="session")
def hf_tokenizer(merges: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same vocabulary as a tokenizer of transformers."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    symbols = list(bytes_to_unicode().values())
    pairs = [tuple(line.split()) for line in gzip.decompress(merges.read_bytes()).decode().split("\n")[1:]]
    words = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(p) for p in pairs), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=pairs)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


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


@pytest.fixture(scope="session")
def tiny(merges: Path, hf_tokenizer: str) -> Callable[..., DualEncoder]:
    """``tiny(kind, seed=0, grad_checkpointing=False)`` with kind open_clip, quick_gelu, timm, hf_clip or hf_siglip."""

    def build(kind: str = "open_clip", seed: int = 0, grad_checkpointing: bool = False) -> DualEncoder:
        torch.manual_seed(seed)
        encoder: DualEncoder
        if kind.startswith("hf_"):
            config = hf_config(kind.removeprefix("hf_"))
            encoder = HFCLIPEncoder(config=config, tokenizer=hf_tokenizer, grad_checkpointing=grad_checkpointing)
        else:
            config = timm_config() if kind == "timm" else open_clip_config(quick_gelu=kind == "quick_gelu")
            encoder = OpenCLIPEncoder(config=config, merges=str(merges), grad_checkpointing=grad_checkpointing)
        return encoder.eval()

    return build


@pytest.fixture
def pixels() -> Callable[[DualEncoder, int], torch.Tensor]:
    """``pixels(encoder, n)``: random images of the encoder's size."""
    return lambda encoder, n: torch.rand(n, 3, *encoder.image_spec.size, generator=torch.Generator().manual_seed(1))
