"""Images of prompts by a joint fine-tuning: of the weights that are evaluated, under a name that tells them."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from test_unidiff import FAST, fit, make, rates

from gmail_lightning.callbacks import DatasetWriter
from gmail_lightning.datamodules import PromptDataModule
from gmail_lightning.datasets import TarShards
from gmail_lightning.models import DiffusersGenerator, OpenCLIPEncoder
from gmail_lightning.models.weights import weights_digest
from gmail_lightning.tasks import SynthesisScore, TextToImageTask, UniDiffTask
from gmail_lightning.types import Modality

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from generation_ranks import Captions


def joint(score: SynthesisScore | None = None) -> UniDiffTask:
    return rates(score=score)


def diffusion(score: SynthesisScore | None = None) -> TextToImageTask:
    constant = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # noqa: E731
    generator = DiffusersGenerator("emoji", num_inference_steps=2, guidance_scale=2.0)
    return TextToImageTask(generator, ema_decay=0.5, lora_rank=2, scheduler=constant)


def predict(task: UniDiffTask | TextToImageTask, folder: Path, ckpt_path: Path | None = None) -> list[dict[str, Any]]:
    """Rows of the manifest."""
    prompts = Captions(["a red heart", "a dog", "a slice of pizza", "a rocket"])
    data = PromptDataModule(prompts, evaluation={}, batch_size=3)
    writer = DatasetWriter(str(folder), image_format="png")
    trainer = pl.Trainer(default_root_dir=folder.parent, callbacks=[writer], **FAST)
    trainer.predict(task, data, ckpt_path=ckpt_path)
    return pq.read_table(folder / "manifest.parquet").to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("build", [joint, diffusion])
def test_the_writer_stores_the_images_of_a_checkpoint(tmp_path: Path, build: Any) -> None:
    trained = build()
    saved = ModelCheckpoint(tmp_path / "saved", filename="end")
    fit(trained, tmp_path, 2, callbacks=[saved])
    score = SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), 6, ("test",))
    found = predict(build(score), tmp_path / "set", tmp_path / "saved" / "end.ckpt")

    dataset = TarShards(tmp_path / "set")
    assert set(dataset.modality) == {Modality.GENERATED}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")  # of the averaged weights
    expected = pipeline(
        [row["prompt"] for row in found],
        generator=[torch.Generator().manual_seed(row["seed"]) for row in found],
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
    ).images
    for index, image in enumerate(expected):
        stored = dataset.image(index).permute(1, 2, 0).numpy() / 255
        assert np.abs(stored - image).max() <= 0.5 / 255 + 1e-5
    assert all((row["clip_score"] is not None) == (build is joint) for row in found)  # the other has no scorer

    before = predict(build(), tmp_path / "before")  # the recipe's name tells the weights, and so do the images' names
    assert {row["key"] for row in found}.isdisjoint(row["key"] for row in before)
    with pytest.raises(MisconfigurationException, match="revision"):
        predict(build(), tmp_path / "set")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_converts_the_weights_is_refused(tmp_path: Path, precision: Any) -> None:
    for task in (make(), TextToImageTask(DiffusersGenerator("emoji"))):
        with pytest.raises(MisconfigurationException, match=f"precision='{precision}' converts the generator"):
            fit(task, tmp_path, 1, precision=precision)


def test_the_digest_of_weights_sees_every_bit_and_no_order() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0, dtype=torch.bfloat16)}
    digest = weights_digest(weights.items())
    assert len(digest) == 12
    assert weights_digest(reversed(weights.items())) == digest
    assert weights_digest({**weights, "a": torch.tensor([1.0, 2.0]).t().contiguous()}.items()) == digest
    changed = [
        {**weights, "a": torch.tensor([1.0, 2.0 + 3e-7])},
        {**weights, "a": torch.tensor([[1.0, 2.0]])},
        {**weights, "b": torch.tensor(3.0)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
    ]
    assert len({digest, *(weights_digest(other.items()) for other in changed)}) == 1 + len(changed)
