"""No training step waits for its device: nothing in it reads a value of a tensor, or needs one to know a shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_syncs import CountSyncs, HostSyncs
from tiny_encoders import routed
from tiny_pipelines import build
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.models import (
    ClipCap,
    DiffusersGenerator,
    FullCopy,
    Llava,
    ModalityEncoder,
    OpenCLIPEncoder,
    ReciprocalConsistency,
)
from gmail_lightning.tasks import (
    AlignmentTask,
    BaseTask,
    CaptioningTask,
    LinearProbeTask,
    LongRetrievalTask,
    RetrievalTask,
    TextToImageTask,
    UniDiffTask,
    ZeroShotClassificationTask,
)

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip


def siglip() -> OpenCLIPEncoder:
    torch.manual_seed(0)
    config = {**tiny_encoder().model_config, "init_logit_bias": -10}
    return OpenCLIPEncoder(config=config, merges="emoji")


def clipcap() -> ClipCap:
    return ClipCap(image_dim=16, language_model=GPT2, tokenizer="emoji", prefix_length=2)


def llava() -> Llava:
    return Llava(language_model=LLAMA, tokenizer="emoji", image_dim=32, tune="full")


PAIRED: dict[str, Callable[[], BaseTask]] = {
    "align": lambda: AlignmentTask(tiny_encoder(), cosine_weight=1.0, generated_text_weight=0.5),
    "align, projected": lambda: AlignmentTask(routed(tiny_encoder(), real_path="projected"), real_text_weight=0.5),
    "align, in chunks": lambda: AlignmentTask(tiny_encoder(), contrastive_chunk_size=3, symmetric=True),
    "align, patches": lambda: AlignmentTask(tiny_encoder(), patch_weight=1.0, patch_cosine_weight=1.0),
    "align, learned": lambda: AlignmentTask(tiny_encoder(), loss="sigmoid", learnable_temperature=True),
    "align, full copy": lambda: AlignmentTask(ModalityEncoder(tiny_encoder(), branch=FullCopy())),
    "pre-train": lambda: RetrievalTask(tiny_encoder(), image_weight=1.0, contrastive_chunk_size=4),
}
MIXED: dict[str, Callable[[], BaseTask]] = {
    "retrieval": lambda: RetrievalTask(routed(tiny_encoder(), text_side="full")),
    "retrieval, SigLIP": lambda: RetrievalTask(routed(siglip(), text_side="lora")),
    "long retrieval": lambda: LongRetrievalTask(routed(tiny_encoder(), text_side="full"), num_components=3),
    "zero-shot": lambda: ZeroShotClassificationTask(routed(tiny_encoder(), text_side="lora"), chunk_size=4),
    "probe": lambda: LinearProbeTask(routed(tiny_encoder(), train_adapters=False)),
    "ClipCap": lambda: CaptioningTask(routed(tiny_encoder()), clipcap()),
    "CapDec": lambda: CaptioningTask(tiny_encoder(), clipcap(), text_noise=0.016),
    "LLaVA": lambda: CaptioningTask(routed(tiny_encoder()), llava()),
}
CASES = [
    pytest.param(name, mode, share, id=name, marks=[] if name in ("align", "retrieval") else pytest.mark.slow)
    for cases, mode, share in ((PAIRED, "paired", {}), (MIXED, "mixture", {"generated_fraction": 0.5}))
    for name in cases
]


@pytest.mark.parametrize(("name", "mode", "share"), CASES)
def test_a_training_step_reads_nothing(
    name: str, mode: str, share: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = CountSyncs()
    for module in ("alignment", "info_nce", "tiled"):
        monkeypatch.setattr(f"gmail_lightning.losses.{module}.reads_are_free", counted.is_on_host)
    task = {**PAIRED, **MIXED}[name]()
    settings: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "log_every_n_steps": 50}
    quiet_trainer(tmp_path, callbacks=[counted], gradient_clip_val=1.0, **settings).fit(
        task, emoji_data(mode=mode, **share) if share else emoji_data(mode=mode, generated_fraction=None)
    )
    assert counted.found == []


@pytest.mark.slow
def test_a_training_step_of_a_generator_reads_nothing(tmp_path: Path) -> None:
    """Of Stable Diffusion; transformers itself looks at the mask of the T5 that pixel-space pipelines have."""
    generator = DiffusersGenerator(str(build("sd", tmp_path / "sd")), num_inference_steps=2)
    counted = CountSyncs()
    quiet_trainer(tmp_path, callbacks=[counted], max_steps=2, limit_val_batches=0, log_every_n_steps=50).fit(
        TextToImageTask(generator, train_text_encoder=True), emoji_data(batch_size=4)
    )
    assert counted.found == []


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["none", "feature", "reciprocal_kl", "image", "prediction_contrast"])
def test_a_joint_training_step_reads_nothing(reading: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountSyncs()
    for module in ("info_nce", "tiled"):
        monkeypatch.setattr(f"gmail_lightning.losses.{module}.reads_are_free", counted.is_on_host)
    generator = DiffusersGenerator("emoji", num_inference_steps=2)
    task = UniDiffTask(
        OpenCLIPEncoder(pretrained="emoji"),
        generator,
        ReciprocalConsistency(reading, timesteps=(0, 900)),
        generated_rows=["synthesis"],
    )
    settings: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "log_every_n_steps": 50}
    quiet_trainer(tmp_path, callbacks=[counted], gradient_clip_val=1.0, **settings).fit(
        task, emoji_data(mode="mixture", generated_fraction=0.5)
    )
    assert counted.found == []


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: (2 * x).sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(), lambda x: torch.equal(x, x), lambda x: float(x[0]), lambda x: x.cpu(),
        lambda x: x.to("cpu"), lambda x: x.masked_select(x > 0),
        lambda x: x.masked_scatter(x > 0, x), lambda x: x.unique(), lambda x: x.clone().numpy(),
    ],
)  # fmt: skip
def test_what_waits_is_found(waits: Callable[[torch.Tensor], Any]) -> None:
    tensor = torch.ones(4)
    with HostSyncs([tensor]) as mode:
        waits(tensor)
    assert len(mode.found) == 1
    with HostSyncs([]) as mode:
        waits(tensor)  # of the host
    assert mode.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "mode", "share"), CASES)
def test_a_training_step_on_a_gpu_never_waits(name: str, mode: str, share: dict[str, float], tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Strict(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx else "default")  # the first one compiles kernels

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    task = {**PAIRED, **MIXED}[name]()
    data = emoji_data(mode=mode, **share) if share else emoji_data(mode=mode, generated_fraction=None)
    pl.Trainer(
        accelerator="gpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=3,
        limit_val_batches=0, log_every_n_steps=50, default_root_dir=tmp_path, callbacks=[Strict()],
    ).fit(task, data)  # fmt: skip
