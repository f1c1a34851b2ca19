"""What every task promises: metrics per set, small checkpoints that fit, refusals."""

import re
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.chunks import in_chunks
from gmail_lightning.tasks import AlignmentTask, RetrievalTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}


def tiny(seed: int = 0, **kwargs) -> OpenCLIPEncoder:
    torch.manual_seed(seed)
    return OpenCLIPEncoder(config=TINY, merges="emoji", **kwargs)


def pairs(**kwargs) -> MixedModalityDataModule:
    sets = {name: [EmojiDataset(hand, name) for hand in ("noto", "fluent_flat")] for name in ("novel", "paired")}
    alike = {"novel": AllowedOverlap(["caption", "pixels"], "families share words, and some drawings are alike")}
    return MixedModalityDataModule(
        train=sets["paired"], val={"novel": sets["novel"]}, batch_size=16, allow_overlap=alike, **kwargs
    )


def trainer(tmp_path: Path, **kwargs) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "max_steps": 3, "max_epochs": -1, "default_root_dir": tmp_path, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "limit_val_batches": 0, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **kwargs})


def test_chunks_give_the_gradients_of_one_pass() -> None:
    torch.manual_seed(0)
    layer, x, y = (
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(),
        torch.randn(7, 3).double(),
        torch.rand(7, 1),
    )

    def gradients(chunk_size: int | None) -> list[Tensor]:
        layer.zero_grad()
        features = in_chunks(lambda a, b: layer(a) * b, x, y, chunk_size=chunk_size)
        torch.logsumexp(features @ features.T, dim=1).sum().backward()  # rows of different chunks meet in the loss
        return [p.grad.clone() for p in layer.parameters()]

    for one, chunked in zip(gradients(None), gradients(3), strict=True):
        torch.testing.assert_close(one, chunked, rtol=1e-12, atol=1e-12)


def test_contrastive_chunks_of_a_task_equal_the_whole_batch() -> None:
    data = pairs(input_spec=AlignmentTask(tiny()).input_spec)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    gradients = []
    for chunk_size in (None, 5):
        task = AlignmentTask(
            ModalityEncoder(tiny(), branch=LoRA(targets=("q", "v", "fc1"))), contrastive_chunk_size=chunk_size
        )
        torch.manual_seed(1)
        for p in task.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.05)
        task.compute_losses(batch)["loss"].backward()
        gradients.append([p.grad for p in task.parameters() if p.requires_grad])
    assert any(g.abs().max() > 1e-4 for g in gradients[0])
    for one, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(one, chunked, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_checkpoint_holds_trainables_and_the_base_only(tmp_path: Path) -> None:
    task = AlignmentTask(ModalityEncoder(tiny(), branch=LoRA(rank=2)))
    run = trainer(tmp_path)
    run.fit(task, pairs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert len(held["state_dict"]) == len(trained) == 2 * 2 * 2  # A and B of q and v of two blocks
    assert all(".lora." in key for key in held["state_dict"])
    assert "encoder" not in held["hyper_parameters"]
    assert held["branches"]["branch"]["init_args"]["rank"] == 2

    again = AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=tiny())
    image, modality = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    assert torch.equal(again.encoder.encode_image(image, modality), task.encoder.encode_image(image, modality))

    with pytest.raises(MisconfigurationException, match="another frozen encoder") as caught:
        AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=tiny(seed=1))
    assert len(set(re.findall(r"\b[0-9a-f]{12}\b", str(caught.value)))) == 2
    encoder = ModalityEncoder(tiny(), branch=LoRA(rank=2, targets=("q",)))
    with pytest.raises(MisconfigurationException, match="unknown"):
        AlignmentTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=encoder)


def test_accumulation_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="contrastive_chunk_size"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(AlignmentTask(tiny()), pairs())
    trainer(tmp_path, accumulate_grad_batches=2).fit(AlignmentTask(tiny(), allow_small_negatives=True), pairs())


def test_accumulation_by_a_callback_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=4"):
        trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 5: 4})]).fit(AlignmentTask(tiny()), pairs())


@pytest.mark.slow
def test_running_statistics_of_a_trained_tower_survive_a_checkpoint(tmp_path: Path) -> None:
    config = {**TINY, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}
    torch.manual_seed(0)
    task = RetrievalTask(OpenCLIPEncoder(config=config, merges="emoji"))
    run = trainer(tmp_path)
    run.fit(task, pairs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = RetrievalTask.load_from_checkpoint(
        tmp_path / "a.ckpt", encoder=OpenCLIPEncoder(config=config, merges="emoji")
    ).eval()
    image = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encoder.encode_image(image), task.eval().encoder.encode_image(image))


@pytest.mark.slow
def test_a_partly_frozen_encoder_leans_on_its_frozen_tower_alone(tmp_path: Path) -> None:
    task = RetrievalTask(tiny())
    for name, p in task.encoder.plain.model.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    run = trainer(tmp_path)
    run.fit(task, pairs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert held["base_fingerprint"]["towers"] == ["text"]

    def frozen(seed: int) -> OpenCLIPEncoder:
        encoder = tiny(seed)
        for name, p in encoder.model.named_parameters():
            p.requires_grad_(name.startswith("visual."))
        return encoder

    RetrievalTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=frozen(0))
    with pytest.raises(MisconfigurationException, match="another frozen encoder"):
        RetrievalTask.load_from_checkpoint(tmp_path / "a.ckpt", encoder=frozen(1))


def test_half_precision_weights_are_refused_with_lora(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer(tmp_path, precision="bf16-true").fit(AlignmentTask(tiny()), pairs())


class Unreached(AlignmentTask):
    def __init__(self) -> None:
        super().__init__(tiny())
        self.forgotten = nn.Parameter(torch.zeros(3))


def test_a_tensor_that_no_loss_reaches_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 trainable tensors got no gradient: forgotten"):
        trainer(tmp_path).fit(Unreached(), pairs())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    task = AlignmentTask(tiny())
    task.compute_losses = lambda batch: {"loss": torch.tensor(torch.nan, requires_grad=True)}
    with pytest.raises(RuntimeError, match="not finite at step 0: loss=nan"):
        trainer(tmp_path, log_every_n_steps=1).fit(task, pairs())


@pytest.mark.slow
def test_evaluation_is_logged_per_set_and_counts_every_image_once(tmp_path: Path) -> None:
    task = AlignmentTask(tiny())
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(task, pairs(eval_batch_size=100), verbose=False)
    assert set(task.results) == {"novel"}
    logged = {k: float(v) for k, v in run.logged_metrics.items()}
    assert logged == {f"val/novel/{k}": pytest.approx(v) for k, v in task.results["novel"].values.items()}

    # The same numbers from scratch: features of every image by hand, brute force over pairs.
    flat, noto = EmojiDataset("fluent_flat", "novel"), EmojiDataset("noto", "novel")
    encoder = task.encoder.eval()

    def features(dataset: EmojiDataset) -> Tensor:
        images = torch.stack([dataset[i]["image"] for i in range(len(dataset))]).float() / 255
        images = nn.functional.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            return nn.functional.normalize(encoder.encoder.encode_image(images), dim=1).double()

    g, r = features(flat), features(noto)
    assert flat.pair_id.tolist() == noto.pair_id.tolist()
    assert task.results["novel"].values["paired_cosine"] == pytest.approx(float((g * r).sum(1).mean()), abs=5e-3)


class Colour(StrEnum):
    RED = "red"


class Mine(RetrievalTask):
    """Arguments of every kind beside those of its base."""

    def __init__(self, encoder, head=None, data=None, rate=1.0, where=None, colour=None, weights=None, fn=None, odd=()):
        super().__init__(encoder)
        self.head = head or nn.Linear(2, 2).requires_grad_(False)


class Saving(RetrievalTask):
    """Saves its arguments itself, as Lightning's examples do, and hands others on."""

    def __init__(self, head, rate=1.0, data=None, where=None, colour=None, weights=None, fn=None, odd=(), **others):
        super().__init__(**others)
        self.head = head
        self.save_hyperparameters()


class Data(MixedModalityDataModule):
    def __init__(self, train, augmentation=None, note=None):
        super().__init__(train, batch_size=16, augmentation=augmentation)
        self.save_hyperparameters()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Mine, Saving])
def test_no_live_argument_lands_in_a_checkpoint(tmp_path: Path, kind: type[Mine]) -> None:
    head = nn.Linear(2, 2).requires_grad_(False)
    datasets = [EmojiDataset(hand, "paired") for hand in ("noto", "fluent_flat")]
    plain = {"rate": np.float64(0.5), "where": Path("a/b"), "colour": Colour.RED, "weights": torch.ones(2)}
    live = {"data": datasets, "fn": lambda x: x, "odd": [1, (head, 2)]}
    task = kind(encoder=tiny(), head=head, **plain, **live)
    assert not {"head", "encoder", *live} & set(task.hparams)
    run = trainer(tmp_path)
    run.fit(task, Data(datasets, augmentation=nn.Identity(), note=np.int64(3)))
    task.hparams["later"] = head  # whoever writes into them
    run.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    settings = held["hyper_parameters"]
    assert {"rate": 0.5, "where": "a/b", "colour": "red"}.items() <= settings.items()
    assert torch.equal(settings["weights"], torch.ones(2))
    assert not {"head", "encoder", "later", *live} & set(settings)
    assert held["datamodule_hyper_parameters"] == {"note": 3}
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt", encoder=tiny(), head=head)
    assert again.head is head
    trainer(tmp_path, max_steps=4).fit(task, Data(datasets), ckpt_path=tmp_path / "a.ckpt")


def test_a_task_without_an_encoder_refuses_cached_features() -> None:
    """What ``BaseTask.on_fit_start`` looks at, in a task whose own ``on_fit_start`` comes first."""
    from gmail_lightning.tasks import TextToImageTask

    class Stored:
        feature_stores: ClassVar = [{"path": "features/coco"}]

    task = TextToImageTask.__new__(TextToImageTask)
    nn.Module.__init__(task)
    task.ema, task._trainer = None, SimpleNamespace(datamodule=Stored())
    task._fabric = None
    with pytest.raises(MisconfigurationException, match=r"TextToImageTask reads pixels.*features/coco"):
        task.on_fit_start()
