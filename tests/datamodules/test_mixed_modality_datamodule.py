"""The data module under a real Trainer: resume, replacement, grouping, errors, and the command line."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datamodules.rows import TrainRows
from gmail_lightning.datasets import DataError, EmojiDataset, ImageDecodeError, ImageTextDataset
from gmail_lightning.datasets.base import decode_image
from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec, InputSpec, TextSpec


def encode(texts: list[str]) -> Tensor:
    """The first eight code points."""
    return torch.tensor([[ord(c) for c in text[:8].ljust(8)] for text in texts])


SPEC = InputSpec(ImageSpec((8, 8)), {"text": TextSpec(encode, 8)})
NO_PIXELS = InputSpec(None, {"text": TextSpec(encode, 8)})


class Pictures(ImageTextDataset):
    """Random pictures with two captions each; rows in ``broken`` do not decode."""

    def __init__(self, modality: int, pair_id: list[int], name: str, broken: frozenset[int] = frozenset()) -> None:
        self.modality = np.full(len(pair_id), modality)
        self.image_id = np.array(pair_id) + 1000 * modality
        self.pair_id = np.array(pair_id)
        self.name, self.broken = name, broken

    def read_image(self, index: int) -> Tensor:
        if index in self.broken:
            return decode_image(b"nonsense")
        pixels = np.random.default_rng([int(self.modality[index]), index]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return decode_image(buffer.getvalue())

    def captions(self, index: int) -> list[str]:
        return [f"{self.pair_id[index]} {letter}" for letter in "ab"]

    def sample_key(self, index: int) -> str:
        return f"{self.name}/{index}"


def pairs(
    n: int = 22,
    broken_real: frozenset[int] = frozenset(),
    broken_generated: frozenset[int] = frozenset(),
    first: int = 100,
) -> list[ImageTextDataset]:
    ids = list(range(first, first + n))
    return [
        Pictures(0, ids, "real", broken_real),
        Pictures(1, ids[::-1], "one", broken_generated),
        Pictures(1, ids, "two", broken_generated),
    ]


class Recorder(LightningModule):
    """Trains one number, and records what it is given."""

    def __init__(self, input_spec: InputSpec = SPEC) -> None:
        super().__init__()
        self.input_spec = input_spec
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[dict[str, Any]] = []
        self.evaluated: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(copy.deepcopy(batch))
        return self.weight.sum() * batch["modality"].float().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append(copy.deepcopy(batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, ModelCheckpoint) for callback in arguments.get("callbacks", [])):
        quiet["enable_checkpointing"] = False
    return Trainer(**{"default_root_dir": folder, **quiet, **arguments})


def datamodule(train: list[ImageTextDataset] | None = None, **arguments: Any) -> MixedModalityDataModule:
    defaults: dict[str, Any] = {
        "batch_size": 8,
        "augmentation": v2.ColorJitter(brightness=0.5),
        "generated_augmentation": [v2.RandomHorizontalFlip(), v2.ColorJitter(contrast=0.5)],
        "val": {"held out": pairs(6, first=10)},
    }
    return MixedModalityDataModule(pairs() if train is None else train, **{**defaults, **arguments})


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Key by key, pixel by pixel."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


# 22 pairs, batches of 4: 5 batches an epoch. Checkpoints after 2 batches of an epoch, at its end, and beyond it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stop", "workers"),
    [("paired", 2, 0), ("paired", 5, 0), ("paired", 5, 1), ("paired", 7, 0), ("paired", 7, 1), ("mixture", 7, 0)],
)
def test_ten_steps_equal_some_steps_a_resume_and_the_rest(tmp_path: Path, mode: str, stop: int, workers: int) -> None:
    # 22 generated rows and batches of 4: 5 batches an epoch there, too
    train = pairs() if mode == "paired" else pairs()[:2]
    straight = Recorder()
    trainer(tmp_path, max_steps=10).fit(straight, datamodule(train, mode=mode))
    assert len(straight.seen) == 10

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1)
    first = Recorder()
    trainer(tmp_path, max_steps=stop, callbacks=[saver]).fit(first, datamodule(train, mode=mode, num_workers=workers))
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["MixedModalityDataModule"]
    assert {"epoch": (stop - 1) // 5, "step": (stop - 1) % 5 + 1}.items() <= state.items()

    second = Recorder()
    trainer(tmp_path, max_steps=10).fit(second, datamodule(train, mode=mode, num_workers=workers), ckpt_path=path)
    assert_same(first.seen + second.seen, straight.seen)
    assert not torch.equal(straight.seen[0]["image"], straight.seen[5]["image"])


class CountsSteps(Recorder):
    """Asks for the number of steps while it configures optimizers, before Lightning knows where a resumed run is."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [3, 4])
def test_resume_under_limit_train_batches(tmp_path: Path, stop: int, workers: int) -> None:
    arguments: dict[str, Any] = {"max_steps": 8, "limit_train_batches": 3}
    straight, first, second = Recorder(), Recorder(), CountsSteps()
    trainer(tmp_path, **arguments).fit(straight, datamodule())
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1)
    trainer(tmp_path, **{**arguments, "max_steps": stop}, callbacks=[saver]).fit(first, datamodule())
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer(tmp_path, **arguments).fit(second, datamodule(num_workers=workers), ckpt_path=path)
    assert_same(first.seen + second.seen, straight.seen)


def test_resume_from_an_end_of_epoch_checkpoint_and_validation_in_between(tmp_path: Path) -> None:
    straight, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3, val_check_interval=2).fit(straight, datamodule())
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    trainer(tmp_path, max_epochs=2, val_check_interval=2, callbacks=[saver]).fit(first, datamodule())
    path = tmp_path / "saved" / "epoch=0.ckpt"
    trainer(tmp_path, max_epochs=3, val_check_interval=2).fit(second, datamodule(), ckpt_path=path)
    assert_same(first.seen[:5] + second.seen, straight.seen)
    # at the end of an epoch another batch size may come in
    other = Recorder()
    trainer(tmp_path, max_epochs=3).fit(other, datamodule(batch_size=4), ckpt_path=path)
    assert len(other.seen) == 2 * 11


def test_resume_in_mid_epoch_with_another_global_batch_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    trainer(tmp_path, max_steps=2, callbacks=[saver]).fit(Recorder(), datamodule())
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    with pytest.raises(
        MisconfigurationException, match="batch 2 of epoch 0, with 8 rows in a global batch; now they are 4"
    ):
        trainer(tmp_path, max_steps=4).fit(Recorder(), datamodule(batch_size=4), ckpt_path=path)


def test_state_of_one_rank_serves_two(tmp_path: Path) -> None:
    """Two ranks of half the batch size go on where one rank stopped; the ranks are simulated."""
    straight = Recorder()
    trainer(tmp_path, max_steps=5).fit(straight, datamodule())
    expected = sorted(key for batch in straight.seen[2:] for key in batch["sample_key"])
    keys: list[str] = []
    for rank in range(2):
        module = datamodule(batch_size=4, input_spec=SPEC)
        module.replicas = lambda rank=rank: (2, rank)  # type: ignore[method-assign]
        module.setup("fit")
        module.load_state_dict({"epoch": 0, "step": 2, "global_batch_size": 8, "replaced": 0})
        batches = list(module.train_dataloader())
        assert len(batches) == 3
        keys += [key for batch in batches for key in batch["sample_key"]]
    assert sorted(keys) == expected


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    module, first, second = datamodule(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=3).fit(first, module)
    trainer(tmp_path, max_steps=3).fit(second, module)
    assert_same(first.seen, second.seen)
    assert module.state_dict()["step"] == 3


def test_pixels_are_those_of_an_independent_computation() -> None:
    by_key = {data.sample_key(i): (data, i) for data in pairs() for i in range(len(data))}
    captions = set()
    for batch in training_loader():
        for row, key in enumerate(batch["sample_key"]):
            data, index = by_key[key]
            assert torch.equal(batch["image"][row], data[index]["image"] / 255)
            assert batch["caption"][row] in data.captions(index)
            assert batch["modality"][row] == data.modality[index]
            assert batch["pair_id"][row] == data.pair_id[index]
            captions.add(batch["caption"][row][-1])
        assert [text[-1] for text in batch["caption"][::2]] == [text[-1] for text in batch["caption"][1::2]]
        assert torch.equal(batch["text"], encode(batch["caption"]))
        assert torch.equal(batch["image_id"][::2], batch["image_id"][1::2])  # that of the real row
        assert batch["text_row"].tolist() == batch["image_row"].tolist() == list(range(8))
        assert batch["generated_row"].tolist() == batch["image_generated_row"].tolist() == [0, 2, 4, 6]
        assert batch["real_row"].tolist() == batch["image_real_row"].tolist() == [1, 3, 5, 7]
        assert batch["paired"] is True
    assert captions == {"a", "b"}  # each caption is drawn at times


class Noise(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.rand_like(image)


def training_loader(**arguments: Any) -> Any:
    module = datamodule(**{"input_spec": SPEC, "augmentation": None, "generated_augmentation": None, **arguments})
    module.setup("fit")
    return module.train_dataloader()


def test_augmentation_depends_on_epoch_and_position_alone() -> None:
    loader = training_loader(augmentation=Noise())
    items = list(loader.sampler)[:8]
    before = torch.get_rng_state()
    batch = loader.dataset.__getitems__(items)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loader.dataset.__getitems__(items[2:4])["image"], batch["image"][2:4])
    assert torch.equal(batch["image"][::2], batch["image"][1::2])  # the rows of a pair share the draw
    assert len(batch["image"].flatten(1).unique(dim=0)) == 4
    later = loader.dataset.__getitems__([(row, epoch + 1, position) for row, epoch, position in items])
    assert len(torch.cat([batch["image"], later["image"]]).flatten(1).unique(dim=0)) == 8
    other = training_loader(augmentation=Noise(), seed=1).dataset.__getitems__(items)
    assert len(torch.cat([batch["image"], other["image"]]).flatten(1).unique(dim=0)) == 8
    mixture = training_loader(augmentation=Noise(), mode="mixture")
    assert len(next(iter(mixture))["image"].flatten(1).unique(dim=0)) == 8  # no pairs: each row its own


def test_generated_augmentation_leaves_real_rows_alone() -> None:
    plain, changed = (next(iter(training_loader(generated_augmentation=one))) for one in (None, Noise()))
    assert torch.equal(plain["image"][1::2], changed["image"][1::2])
    assert not (plain["image"][::2] == changed["image"][::2]).flatten(1).all(1).any()
    with pytest.raises(ValueError, match=r"CenterCrop turns an image of shape \(3, 8, 8\) into \(3, 4, 4\)"):
        next(iter(training_loader(augmentation=v2.CenterCrop(4))))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["paired", "mixture"])
def test_broken_images_are_replaced_and_counted(tmp_path: Path, mode: str, workers: int) -> None:
    broken = frozenset({3, 4})
    clean, task = Recorder(), Recorder()
    arguments: dict[str, Any] = {"mode": mode, "num_workers": workers, "max_replaced_fraction": 0.5}
    trainer(tmp_path, max_epochs=2).fit(clean, datamodule(**{**arguments, "num_workers": 0}))
    module = datamodule(pairs(broken_real=broken), **arguments)
    with pytest.warns(UserWarning, match=r"had to be replaced, the last since: Pictures row \d \(key 'real/\d'\)"):
        trainer(tmp_path, max_epochs=2).fit(task, module)
    replaced = {0: 0, 1: 0}
    for number, (before, batch) in enumerate(zip(clean.seen, task.seen, strict=True)):
        is_broken = torch.tensor([key in ("real/3", "real/4") for key in before["sample_key"]])
        expected = is_broken.view(-1, 2).any(1).repeat_interleave(2) if mode == "paired" else is_broken
        assert torch.equal(batch["replaced"], expected)
        assert not {"real/3", "real/4"} & set(batch["sample_key"])
        kept = ~expected
        assert torch.equal(batch["image"][kept], before["image"][kept])
        assert torch.equal(batch["modality"], before["modality"])
        assert len(batch["replaced_reason"]) == is_broken.sum()
        if mode == "paired":
            assert torch.equal(batch["pair_id"][::2], batch["pair_id"][1::2])
        for row in expected.nonzero().flatten().tolist():
            name, index = batch["sample_key"][row].split("/")[0], int(batch["sample_key"][row].split("/")[1])
            data = {d.name: d for d in pairs()}[name]
            assert batch["pair_id"][row] == data.pair_id[index]
            assert batch["caption"][row] in data.captions(index)
        replaced[number * 2 // len(task.seen)] += int(is_broken.sum())  # images that do not decode, not their partners
    assert sum(replaced.values()) > 0
    assert module.state_dict()["replaced"] == replaced[1]
    again = Recorder()
    trainer(tmp_path, max_epochs=2).fit(again, datamodule(pairs(broken_real=broken), **{**arguments, "num_workers": 0}))
    assert_same(task.seen, again.seen)


def test_too_many_broken_images_stop_the_training(tmp_path: Path) -> None:
    # one broken image among 22 pairs: 1 of the 40 of an epoch is 2.5 %
    module = datamodule(pairs(broken_real=frozenset({3})), max_replaced_fraction=0.02)
    with pytest.raises(
        DataError, match=r"1 of 40 training images .*key 'real/3'.*does not decode.*max_replaced_fraction=0.02"
    ):
        trainer(tmp_path, max_epochs=3).fit(Recorder(), module)
    everything = frozenset(range(22))
    module = datamodule(pairs(broken_generated=everything), max_replaced_fraction=1.0)
    with pytest.raises(DataError, match=r"key '(one|two)/\d+'\) does not decode, nor do 8 rows drawn in its place"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), module)
    with pytest.raises(ImageDecodeError, match=r"Pictures row 3 \(key 'real/2'\)"):  # nothing stands in where it counts
        trainer(tmp_path).validate(Recorder(), datamodule(val={"a": [Pictures(0, [1, 2, 3], "real", frozenset({2}))]}))


class TwoCaptions(Pictures):
    """One caption a row, the two rows of a picture far apart."""

    def __init__(self, modality: int, pair_id: list[int], name: str) -> None:
        super().__init__(modality, pair_id, name)
        self.image_id = self.picture() + 50

    def picture(self) -> np.ndarray:
        return np.arange(len(self)) % 5

    def captions(self, index: int) -> list[str]:
        return [f"caption {index}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_each_picture_once_with_all_captions(tmp_path: Path, workers: int) -> None:
    sets = {"x": [TwoCaptions(0, list(range(10)), "r"), Pictures(1, [7, 8], "g")], "y": [Pictures(0, [1], "s")]}
    module = datamodule(val=sets, eval_batch_size=3, num_workers=workers)
    assert module.eval_sets == {"val": ["x", "y"], "test": ["x", "y"]}
    task = Recorder()
    trainer(tmp_path).validate(task, module, verbose=False)
    assert [batch["eval_set"] for batch in task.evaluated] == ["x", "x", "x", "y"]
    keys = [key for batch in task.evaluated for key in batch["sample_key"]]
    # Rows 7 and 8 are second captions of pictures 2 and 3: their generated images go by these pictures' id.
    assert keys == ["r/0", "r/1", "r/2", "g/0", "r/3", "g/1", "r/4", "s/0"]
    ids = [i for batch in task.evaluated[:3] for i in batch["image_id"].tolist()]
    assert ids == [50, 51, 52, 52, 53, 53, 54]
    references = dict(zip(keys, (c for batch in task.evaluated for c in batch["references"]), strict=True))
    assert all(references[f"r/{i}"] == [f"caption {i}", f"caption {i + 5}"] for i in range(5))
    assert [references[key] for key in ("g/0", "g/1", "s/0")] == [["7 a", "7 b"], ["8 a", "8 b"], ["1 a", "1 b"]]
    assert [row for batch in task.evaluated[:3] for row in batch["row_id"].tolist()] == list(range(7))
    for batch in task.evaluated:
        flat = [(row, text) for row, captions in enumerate(batch["references"]) for text in captions]
        assert batch["text_row"].tolist() == [row for row, _ in flat]
        assert torch.equal(batch["text"], encode([text for _, text in flat]))
        assert batch["caption"] == [captions[0] for captions in batch["references"]]
    assert torch.equal(task.evaluated[0]["image"][1], TwoCaptions(0, list(range(10)), "r")[1]["image"] / 255)


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_ranks_share_the_pictures_without_repetition(world: int) -> None:
    keys: list[str] = []
    for rank in range(world):
        module = datamodule(input_spec=SPEC, test={"a": pairs(5)}, predict=pairs(4))
        module.replicas = lambda rank=rank: (world, rank)  # type: ignore[method-assign]
        module.setup("test")
        (loader,) = module.test_dataloader()
        keys += [key for batch in loader for key in batch["sample_key"]]
        keys += ["predict " + key for batch in module.predict_dataloader() for key in batch["sample_key"]]
    expected = [data.sample_key(i) for data in pairs(5) for i in range(5)]
    expected += ["predict " + data.sample_key(i) for data in pairs(4) for i in range(4)]
    assert sorted(keys) == sorted(expected)


def test_test_and_predict_under_a_trainer(tmp_path: Path) -> None:
    task = Recorder(NO_PIXELS)
    module = datamodule(test={"z": pairs(3)}, predict=pairs(4)[0])
    assert module.eval_sets == {"val": ["held out"], "test": ["z"]}
    trainer(tmp_path).test(task, module, verbose=False)
    assert {batch["eval_set"] for batch in task.evaluated} == {"z"}
    task.evaluated.clear()
    trainer(tmp_path).predict(task, module)
    assert [key for batch in task.evaluated for key in batch["sample_key"]] == [f"real/{i}" for i in range(4)]
    assert not {"image", "image_row", "eval_set"} & task.evaluated[0].keys()  # no pixels were asked for
    assert list(datamodule().evaluation["test"]) == ["held out"]


def test_only_tensors_at_the_top_move() -> None:
    batch = {"a": torch.zeros(2), "b": ["x"], "c": [torch.zeros(1)]}
    moved = datamodule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["a"].device.type == "meta"
    assert moved["b"] is batch["b"]
    assert moved["c"] is batch["c"]


def test_labels_are_there_where_one_data_set_has_them() -> None:
    emoji = EmojiDataset("noto", "novel")
    module = datamodule(val={"a": [emoji, *pairs(2)]}, input_spec=NO_PIXELS, eval_batch_size=1000)
    (batch,) = module.val_dataloader()[0]
    assert emoji.label is not None
    labels = dict(zip(batch["sample_key"], batch["label"].tolist(), strict=True))
    expected = {emoji.sample_key(i): int(emoji.label[i]) for i in range(len(emoji))}
    assert labels == {**expected, **{data.sample_key(i): -1 for data in pairs(2) for i in range(2)}}
    assert batch["source"][0] == "real"


def test_the_composition_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_steps=7).fit(Recorder(), datamodule())
    lines = [record.message for record in caplog.records if record.message.startswith("Batch:")]
    assert lines == [
        "Batch: 8 rows per device x 1 = 8; each device sees 4 generated and 4 real rows (paired); 5 batches per epoch."
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fit", "error", "message"),
    [
        ({"train": []}, {}, DataError, "No training data"),
        ({"max_replaced_fraction": 2.0}, {}, ValueError, "max_replaced_fraction is 2.0"),
        ({}, {"overfit_batches": 2}, MisconfigurationException, "overfit_batches .*limit_train_batches"),
        ({"train": pairs()[1:]}, {}, DataError, r"Pictures row \d+ \(key 'one/\d+'\) .* no real row of its pair_id 1"),
        ({"train": [*pairs(), Pictures(0, [104], "again")]}, {}, DataError, "104 .* 'real/4'.*and .* 'again/0'"),
        ({"train": [Pictures(0, [], "none")]}, {}, DataError, "No rows in Pictures"),
        ({"generated_fraction": 1.5, "mode": "mixture"}, {}, MisconfigurationException, "generated_fraction is 1.5"),
        ({"batch_size": 64}, {}, DataError, "22 pairs, fewer than the 32"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, arguments: dict[str, Any], fit: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, max_steps=1, **fit).fit(Recorder(), datamodule(**arguments))


def test_context_length_and_missing_spec(tmp_path: Path) -> None:
    wrong = InputSpec(None, {"long_text": TextSpec(encode, 77)})
    with pytest.raises(ValueError, match=r"texts\['long_text'\]: encode returned shape \(8, 8\) .* is 77"):
        trainer(tmp_path, max_steps=1).fit(Recorder(wrong), datamodule(val={}))
    with pytest.raises(ValueError, match="input_spec=InputSpec"):
        datamodule().setup("fit")


def test_real_rows_without_partner_are_counted(tmp_path: Path) -> None:
    lonely = [*pairs(), Pictures(0, [900, 901, -1], "lonely")]
    with pytest.warns(UserWarning, match="3 real training rows have no generated row"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), datamodule(lonely))


def test_sizes_and_names_of_texts_follow_the_spec() -> None:
    spec = InputSpec(ImageSpec((4, 6), "squash"), {"long_text": TextSpec(encode, 8), "short_text": TextSpec(encode, 8)})
    loader = training_loader(input_spec=spec)
    assert isinstance(loader.dataset, TrainRows)
    batch = next(iter(loader))
    assert torch.equal(batch["long_text"], batch["short_text"])
    assert batch["short_text_row"].tolist() == list(range(8))
    name, index = batch["sample_key"][1].split("/")
    data = {d.name: d for d in pairs()}[name]  # type: ignore[attr-defined]
    assert torch.equal(batch["image"][1], resize(data[int(index)]["image"], spec.image))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_line_builds_it_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("""
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data:
  class_path: MixedModalityDataModule
  init_args:
    batch_size: 32
    train:
      - {class_path: EmojiDataset, init_args: {hand: noto, concept_set: paired}}
      - {class_path: EmojiDataset, init_args: {hand: fluent_flat, concept_set: paired, locale: de}}
    val:
      novel: [{class_path: EmojiDataset, init_args: {hand: noto, concept_set: novel}}]
    allow_overlap:
      novel: {kinds: [caption, pixels], reason: "families share words, and some drawings are alike"}
    predict: {class_path: EmojiDataset}
    augmentation: {class_path: torchvision.transforms.v2.ColorJitter, init_args: {brightness: 0.2}}
    generated_augmentation:
      class_path: torchvision.transforms.v2.Compose
      init_args:
        transforms:
          - {class_path: torchvision.transforms.v2.RandomCrop, init_args: {size: [32, 32], padding: 2}}
          - {class_path: torchvision.transforms.v2.ColorJitter, init_args: {brightness: 0.2}}
""")
    cli = LightningCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        save_config_callback=None, args=["--config", str(config), "--data.init_args.num_workers=0"],
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    )  # fmt: skip
    module = cli.datamodule
    assert isinstance(module, MixedModalityDataModule)
    assert module.allow_overlap["novel"].kinds == ["caption", "pixels"]
    module.input_spec = InputSpec(ImageSpec((32, 32)), {"text": TextSpec(encode, 8)})
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (32, 3, 32, 32)
    assert set(batch["source"]) == {"real", "fluent_flat"}
    assert len(module.datasets["predict"][0]) == 1594
    assert [type(one).__name__ for one in module.generated_augmentation.transforms] == ["RandomCrop", "ColorJitter"]


class StopAfter(Callback):
    """Ends a run from outside in the middle of an epoch, as a cluster does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt


def test_prefetched_batches_do_not_count(tmp_path: Path) -> None:
    module = datamodule(num_workers=1)
    with pytest.raises(SystemExit):
        trainer(tmp_path, max_steps=9, callbacks=[StopAfter()]).fit(Recorder(), module)
    assert module.state_dict()["step"] == 3
