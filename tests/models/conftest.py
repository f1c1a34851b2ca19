"""Tiny dual encoders of every kind, built offline; a fresh one at each call, the same weights for the same seed."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_encoders import MERGES, hf_config, open_clip_config, timm_config

from gmail_lightning.models import DualEncoder, HFCLIPEncoder, OpenCLIPEncoder


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
