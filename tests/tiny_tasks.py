"""Tiny encoders, trainers and data for the tests of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import OpenCLIPEncoder

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 2, "layers": 1},
}


def tiny_encoder(seed: int = 0) -> OpenCLIPEncoder:
    torch.manual_seed(seed)
    return OpenCLIPEncoder(config=TINY, merges="emoji")


def quiet_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    usual = {"enable_checkpointing": False, "max_epochs": -1, "check_val_every_n_epoch": None}
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **{**usual, **settings},
    )  # fmt: skip


def emoji_data(classes: str = "group", **settings: Any) -> MixedModalityDataModule:
    """Generated and real drawings of ``novel``, one evaluation set of both."""
    datasets = [EmojiDataset(hand, "novel", classes=classes) for hand in ("fluent_flat", "noto")]
    alike = AllowedOverlap(["caption", "image_id", "pixels"], "the same drawings")
    settings = {"mode": "mixture", "generated_fraction": 1.0, "batch_size": 16, "eval_batch_size": 128, **settings}
    return MixedModalityDataModule(datasets, {"novel": datasets}, allow_overlap={"novel": alike}, **settings)
