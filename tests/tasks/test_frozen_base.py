"""A checkpoint leans on the frozen encoder: every tensor of it counts, and looking takes once per run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.tasks import AlignmentTask, RetrievalTask, encoder_task


def replaced_tower(key: str) -> OpenCLIPEncoder:
    encoder = tiny_encoder()
    tensor = encoder.model.state_dict()[key]
    with torch.no_grad():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.1 + tensor.mean())
    return encoder


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("visual.conv1.weight", "image.conv1"),
        ("visual.class_embedding", "image.class_embedding"),
        ("visual.positional_embedding", "image.positional_embedding"),
        ("visual.ln_pre.weight", "image.ln_pre"),
        ("visual.transformer.resblocks.0.ln_1.bias", "image.0.ln_1.bias"),
        ("visual.ln_post.bias", "image.ln_post.bias"),
        ("visual.proj", "image.proj"),
        ("token_embedding.weight", "text.token_embedding"),
        ("text_projection", "text.text_projection"),
    ],
)
def test_a_checkpoint_is_refused_wherever_the_base_differs(tmp_path: Path, key: str, name: str) -> None:
    """By the task, by a task that follows, and by whoever takes the encoder away."""
    task = AlignmentTask(ModalityEncoder(tiny_encoder(), branch=LoRA(rank=2)))
    task.trainer = quiet_trainer(tmp_path)
    content: dict[str, Any] = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(content)
    torch.save(content, tmp_path / "a.ckpt")
    for build, error in (
        (
            lambda: AlignmentTask(ModalityEncoder(replaced_tower(key), branch=LoRA(rank=2))).on_load_checkpoint(
                content
            ),
            MisconfigurationException,
        ),
        (
            lambda: RetrievalTask(
                ModalityEncoder(replaced_tower(key), aligned=str(tmp_path / "a.ckpt"), text_side="lora")
            ),
            ValueError,
        ),
        (lambda: ModalityEncoder.from_checkpoint(tmp_path / "a.ckpt", replaced_tower(key)), ValueError),
    ):
        with pytest.raises(error, match=rf"(?s)another.*differ in 1 of \d+ tensors, most in {name}: "):
            build()
    AlignmentTask(ModalityEncoder(tiny_encoder(), branch=LoRA(rank=2))).on_load_checkpoint(content)


def test_the_fingerprint_is_computed_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], encoder_task.fingerprint

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(encoder_task, "fingerprint", counted)
    task = AlignmentTask(ModalityEncoder(tiny_encoder(), branch=LoRA(rank=2)))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    settings = {"enable_checkpointing": True, "callbacks": [saves], "limit_val_batches": 0}
    quiet_trainer(tmp_path, max_steps=3, **settings).fit(task, emoji_data(mode="paired"))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert (len(files), len(calls)) == (3, 1)
    held = [torch.load(path, weights_only=True)["base_fingerprint"] for path in files]
    assert held[0] == held[1] == held[2] == original(tiny_encoder(), ("image", "text"))
    quiet_trainer(tmp_path, max_steps=4, **settings).fit(task, emoji_data(mode="paired"))  # another run begins anew
    assert len(calls) == 2
