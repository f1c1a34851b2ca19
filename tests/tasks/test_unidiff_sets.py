"""Which rows of a batch and which sets of an evaluation the terms and metrics of a joint fine-tuning see."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_unidiff import FAST, data, fit, make, rates, rows

from gmail_lightning.command.run_record import settings_of
from gmail_lightning.datamodules import ImageTextDataModule
from gmail_lightning.datasets import EmojiDataset, FashionMNIST
from gmail_lightning.models import DiffusersGenerator, OpenCLIPEncoder, ReciprocalConsistency
from gmail_lightning.models.averaging import EarlierWeights
from gmail_lightning.tasks import UniDiffTask
from gmail_lightning.types import modality_rows


def of_modality(task: UniDiffTask, modality: list[int]) -> dict[str, Any]:
    batch = rows(task, len(modality)) | {"modality": torch.tensor(modality)}
    return {**batch, **modality_rows(batch)}


@pytest.mark.parametrize(
    ("term", "modality", "count"),
    [("contrast", [0, 1, 1, 1], 1), ("synthesis", [1, 1, 1, 1], 0), ("consistency", [0, 1, 1, 1], 1)],
)
def test_a_term_without_rows_is_told(term: str, modality: list[int], count: int) -> None:
    others = [other for other in ("contrast", "synthesis", "consistency") if other != term]
    task = make(ReciprocalConsistency("feature"), generated_rows=others)
    with pytest.raises(
        MisconfigurationException, match=rf"term {term} has {count} rows? in the batch, without the gen"
    ):
        task.compute_losses(of_modality(task, modality))


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["none", "feature", "image"])
def test_rows_that_no_term_looks_at_do_not_go_through_the_unet(reading: Any) -> None:
    task = make(ReciprocalConsistency(reading), generated_rows=["contrast"], prompt_dropout=0.0)
    seen = []
    task.generator.part("unet").register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    batch = of_modality(task, [0, 1, 0, 1])
    task.draws = lambda: torch.Generator().manual_seed(1)  # type: ignore[method-assign]
    mixed = task.compute_losses(batch)
    assert set(seen) == {2}
    of_real = {key: value[[0, 2]] for key, value in batch.items() if torch.is_tensor(value) and len(value) == 4}
    of_real["text_row"] = torch.arange(2)
    real = task.compute_losses({**of_real, **modality_rows(of_real)})
    for term in ("synthesis", "consistency")[: 1 + (reading != "none")]:
        torch.testing.assert_close(mixed[term], real[term], atol=1e-5, rtol=1e-5)


def test_equal_captions_are_no_negatives() -> None:
    task = make(synthesis_weight=0.0)
    batch = rows(task, 4)
    batch["text"][1] = batch["text"][0]
    found = task.compute_losses(batch)["contrast"]
    images, texts = (torch.nn.functional.normalize(side, dim=1) for side in _features(task, batch))
    logits = task.scale * images @ texts.T
    logits[0, 1] = logits[1, 0] = -torch.inf
    labels = torch.arange(4)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(found, (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)


def _features(task: UniDiffTask, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return task.encode_images(batch), task.encoder.encode_text(batch["text"])


@pytest.mark.slow
def test_sets_that_only_name_classes_get_no_retrieval(tmp_path: Path, fashion: Path) -> None:
    task = rates()
    sets = {
        "classes": FashionMNIST(fashion, "test", classes=["bag", "coat"]),
        "captions": EmojiDataset("noto", "novel", classes="concept"),
    }
    trainer = pl.Trainer(default_root_dir=tmp_path, limit_val_batches=1, **FAST)
    texts: list[int] = []
    task.encoder.plain.model.transformer.register_forward_hook(lambda module, args, out: texts.append(len(args[0])))
    trainer.validate(task, ImageTextDataModule(val={"classes": sets["classes"]}, eval_batch_size=4), verbose=False)
    assert max(texts) <= 2 * 6  # the prompts of the classes, and of four pictures the first caption alone
    trainer.validate(task, ImageTextDataModule(val=sets, eval_batch_size=4), verbose=False)
    classes, captions = task.results["classes"].values, task.results["captions"].values
    assert {"accuracy", "interpolated_accuracy", "image_effective_rank", "text_drift"} <= classes.keys()
    assert not any("R@" in name or "denoising" in name for name in classes)
    assert {"i2t_R@1", "interpolated_i2t_R@1", "denoising_loss", "accuracy"} <= captions.keys()


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of each class in the idx files of the test split."""
    folder = tmp_path_factory.mktemp("fashion")
    pictures = torch.randint(0, 256, (20, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name, array in (("images-idx3", pictures), ("labels-idx1", torch.arange(20, dtype=torch.uint8) % 10)):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"t10k-{name}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.numpy().tobytes())
    return folder


@pytest.mark.slow
def test_synthesis_alone_beside_a_clip_that_stays(tmp_path: Path) -> None:
    task = make(contrast_weight=0.0, text_tower="separate")
    fit(task, tmp_path, 1, enable_checkpointing=False)
    pl.Trainer(default_root_dir=tmp_path, limit_val_batches=1, **FAST).validate(task, data(), verbose=False)
    values = task.results["novel"].values
    assert values["image_drift"] == values["text_drift"] == 0
    assert not any(name.startswith("interpolated") for name in values)


def test_earlier_weights_are_seen_under_autocast() -> None:
    layer = torch.nn.Linear(4, 4)
    x, before = torch.rand(2, 4), layer.weight.detach().clone()
    earlier = EarlierWeights([layer.weight])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.add_(1)
        layer(x)  # leaves a cast of the weight in the cache
        with earlier.swapped_in():
            expected = torch.nn.functional.linear(x, before.clone(), layer.bias)
            torch.testing.assert_close(layer(x), expected)


def test_each_reading_has_a_weight_of_its_own() -> None:
    for reading, weight in (("reciprocal_kl", 0.1), ("image", 1.0), ("none", 0.0)):
        assert ReciprocalConsistency(reading).weight == weight  # type: ignore[arg-type]
    assert ReciprocalConsistency("image", 0.3).weight == 0.3
    assert ReciprocalConsistency("image", 0.0).reading == "none"


def test_settings_that_a_reading_passes_over_are_refused() -> None:
    for settings, reading in (
        ({"condition": "prompt"}, "image"),
        ({"temperature": 0.1}, "image"),
        ({"negatives": 3}, "feature"),
        ({"distance": "cosine"}, "prediction_contrast"),
    ):
        with pytest.raises(ValueError, match=f"belongs to .*, not to reading='{reading}'"):
            ReciprocalConsistency(reading, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train: vision: True"):
        make(train={"vision": True})
    recomputing = OpenCLIPEncoder(pretrained="emoji", grad_checkpointing=True)
    with pytest.raises(ValueError, match="needs an encoder with grad_checkpointing: false"):
        UniDiffTask(recomputing, DiffusersGenerator("emoji"), ReciprocalConsistency("image", stop_gradient="clip"))


def test_what_only_evaluations_read_does_not_change_a_run() -> None:
    settings = [
        {"trainer": {}, "data": {}, "model": {"init_args": {"score": score, "contrast_weight": 1.0}}}
        for score in (None, {"num_images": 8})
    ]
    recorded = [settings_of(one, UniDiffTask.evaluation_only) for one in settings]
    assert recorded[0] == recorded[1]


@pytest.mark.slow
def test_a_term_that_reaches_nothing_is_in_no_conflict(tmp_path: Path) -> None:
    frozen: Any = {"vision": "full", "text": 2, "unet": "frozen"}
    task = make(ReciprocalConsistency(), text_tower="separate", train=frozen, conflict_every_n_steps=1)
    trainer = fit(task, tmp_path, 1, enable_checkpointing=False)
    found = {name for name in trainer.logged_metrics if "conflict" in name}
    assert found == {"train/conflict/contrast_consistency"}
    with pytest.raises(ValueError, match="nothing is left that trains"):
        make(text_tower="separate", train={"vision": "frozen", "text": "frozen", "unet": "frozen"})


def test_a_checkpoint_of_another_text_tower_or_reading_is_refused() -> None:
    task = make(ReciprocalConsistency("feature"), text_tower="separate")
    content: dict[str, Any] = {"state_dict": task.state_dict(), "hyper_parameters": {}}
    task.on_save_checkpoint(content)
    make(ReciprocalConsistency("feature"), text_tower="separate").on_load_checkpoint(content)
    with pytest.raises(MisconfigurationException, match="text_tower='separate', this task has 'shared'"):
        make(ReciprocalConsistency("feature")).on_load_checkpoint(content)
    with pytest.raises(MisconfigurationException, match=r"consistency\.reading='feature', this task has 'image'"):
        make(ReciprocalConsistency("image"), text_tower="separate").on_load_checkpoint(content)


def test_accumulation_is_of_no_harm_where_nothing_is_contrasted(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Raise batch_size, or set"):
        fit(make(), tmp_path, 1, accumulate_grad_batches=2)
    assert not make(contrast_weight=0.0).batch_contrastive


def test_random_weights_that_stay_are_refused() -> None:
    fresh = DiffusersGenerator("emoji", fresh=["unet"])
    with pytest.raises(ValueError, match="fresh: unet has random weights that would stay"):
        UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), fresh, train={"unet": 2})
    UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), DiffusersGenerator("emoji", fresh=["unet"]))
