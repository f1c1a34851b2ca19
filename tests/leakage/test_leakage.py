"""What training shares with the evaluation sets, against plain sets and loops."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import DataError, EmojiDataset, ImageFolder, ImageTextDataset, ManifestDataset, base
from gmail_lightning.leakage import overlap
from gmail_lightning.leakage.check import KINDS, check_leakage
from gmail_lightning.transforms.image_hash import perceptual_hash
from gmail_lightning.types import InputSpec


class Rows(ImageTextDataset):
    """Captions, ids and, where they are given, hashes; row n shows ``picture(seed + n)``."""

    def __init__(self, captions: list[list[str]], ids: list[int], seed: int = 0, knows_hashes: bool = False) -> None:
        self._captions, self.seed, self.knows_hashes = captions, seed, knows_hashes
        self.modality, self.pair_id = np.zeros(len(ids), dtype=int), np.arange(len(ids))
        self.image_id = np.array(ids)
        self.decoded = 0

    def read_image(self, index: int) -> torch.Tensor:
        self.decoded += 1
        return picture(self.seed + index)

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def sample_key(self, index: int) -> str:
        return f"r{index}"

    def perceptual_hashes(self) -> np.ndarray | None:
        return (
            np.array([perceptual_hash(picture(self.seed + i)) for i in range(len(self))]) if self.knows_hashes else None
        )


def picture(number: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(number)) * 255
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0].to(torch.uint8)


ALL = {kind: AllowedOverlap([*KINDS], "to count") for kind in ("val", "test")}


def counts(train: list[Any], evaluation: dict[str, list[Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    found = check_leakage(train, evaluation, {name: ALL["val"] for name in evaluation})
    return {(o.eval_set, o.kind): (o.shared, o.total) for o in found}


def plain(caption: str) -> str:
    return " ".join("".join(" " if c in string.punctuation else c for c in caption.lower()).split())


def test_captions_are_counted_as_plain_sets_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CAPTION_BLOCK", 7)
    rng = np.random.default_rng(0)
    words = ["a", "Red", "fox", "dog,", "runs!", "sits."]

    def rows(count: int, first: int) -> Rows:
        texts = [[" ".join(rng.choice(words, 3)) + " " * i for i in range(1 + row % 3)] for row in range(count)]
        return Rows(texts, list(range(first, first + count)))

    train, evaluation = [rows(40, 0), rows(23, 100)], {"val": [rows(20, 200)], "test": [rows(5, 300), rows(9, 400)]}
    known = {plain(c) for data in train for row in data._captions for c in row}
    found = counts(train, evaluation)
    for name, datasets in evaluation.items():
        own = {plain(c) for data in datasets for row in data._captions for c in row}
        assert found[name, "caption"] == (len(own & known), len(own))
        assert 0 < len(own & known) < len(own)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A man riding a wave.", "a  man riding\ta wave", True),
        ("Fox & dog", "fox, dog!", True),
        ("ＦＯＸ", "fox", True),  # full-width letters  # noqa: RUF001
        ("cafe\u0301", "CAF\u00c9", True),
        ("one fox", "one foxes", False),
        ("😀", "😃", False),  # nothing but signs: these are the caption
        ("किताब", "काताब", False),  # a vowel sign is no punctuation
    ],
)
def test_what_counts_as_one_caption(one: str, other: str, same: bool) -> None:
    found = counts([Rows([[one]], [1])], {"val": [Rows([[other]], [2])]})
    assert found["val", "caption"] == (int(same), 1)


def test_a_planted_caption_stops_with_both_rows_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,caption,image_id\na.png,a cat,1\nb.png,A Dog!,2\nc.png,a hen,3\n")
    (tmp_path / "val.csv").write_text("image,caption,image_id\nd.png,a cow,4\ne.png,a dog,5\n")
    train, val = (ManifestDataset(tmp_path / f"{name}.csv", modality="real") for name in ("train", "val"))
    with pytest.raises(DataError) as fault:
        check_leakage([train], {"val": [val]})
    message = str(fault.value)
    for part in ("val: 1 of 2 captions", "'a dog'", "val.csv row 2 (key", "train.csv row 2 (key", "kinds: [caption]"):
        assert part in message
    assert "image ids" not in message
    with pytest.raises(DataError, match="1 of 2 captions"):  # what is allowed of another kind does not help
        check_leakage([train], {"val": [val]}, {"val": AllowedOverlap(["pixels"], "other")})
    found = check_leakage([train], {"val": [val]}, {"val": AllowedOverlap(["caption"], "on purpose")}, ("caption",))
    assert [str(o) for o in found] == ["val: 1 of 2 captions are in training (allowed: on purpose)"]


def test_image_ids_are_counted_and_named() -> None:
    train = [Rows([["a"]] * 3, [7, 8, 8]), Rows([["b"]] * 2, [-1, 5])]
    evaluation = {"val": [Rows([["c"]] * 5, [5, 8, 8, 9, -1])], "test": [Rows([["d"]], [1])]}
    found = counts(train, evaluation)
    assert found["val", "image_id"] == (2, 3)  # 5 and 8 of 5, 8 and 9; -1 is none
    assert found["test", "image_id"] == (0, 1)
    with pytest.raises(DataError, match=r"2 of 3 image ids .* image_id 8 in Rows row 2 \(key 'r1'\) and in Rows row 2"):
        check_leakage(train, evaluation, kinds=["image_id"])


def test_names_below_different_folders_are_different_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(picture(len(split)).permute(1, 2, 0).numpy()).save(tmp_path / split / "cat" / "1.png")
        (tmp_path / split / "list.csv").write_text(f"image,caption\ncat/1.png,a cat of {split}\n")
    for make in (ImageFolder, lambda root: ManifestDataset(root / "list.csv", modality="real")):
        train, val = make(tmp_path / "train"), make(tmp_path / "val")
        assert train.image_id.tolist() != val.image_id.tolist()
        assert counts([train], {"val": [val]})["val", "image_id"] == (0, 1)
        assert counts([train], {"val": [train]})["val", "image_id"] == (1, 1)
    (tmp_path / "again.csv").write_text("image,caption\ncat/1.png,the same file\n")
    again = ManifestDataset(tmp_path / "again.csv", tmp_path / "train", modality="generated")
    first = ManifestDataset(tmp_path / "train" / "list.csv", modality="real")
    assert counts([again], {"val": [first]})["val", "image_id"] == (1, 1)


def test_names_of_classes_are_no_captions(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(picture(len(split)).permute(1, 2, 0).numpy()).save(tmp_path / split / "cat" / "1.png")
    train, val = ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "val")
    captions = Rows([["A photo of a cat."], ["a hen"]], [1, 2])
    (one,) = check_leakage([train], {"val": [val]}, kinds=["caption"])
    assert (one.shared, one.total, one.unchecked) == (0, 0, "1 rows of ImageFolder (they name classes)")
    with pytest.raises(DataError, match="1 of 2 captions"):  # captions beside them are compared as ever
        check_leakage([train], {"val": [val, captions]}, kinds=["caption"])


def test_pixels_are_compared_where_hashes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "HASH_BLOCK", 3)
    train = [Rows([["a"]] * 8, list(range(8)), seed=0, knows_hashes=True), Rows([["b"]] * 4, [50, 51, 52, 53], seed=90)]
    val = Rows([["c"]] * 6, list(range(100, 106)), seed=5)  # its first three are training pictures
    for knows in (False, True):
        val.knows_hashes = knows
        (one,) = check_leakage(train, {"val": [val]}, {"val": ALL["val"]}, ["pixels"])
        assert (one.shared, one.total) == (3, 6)
        assert one.unchecked == "4 training rows of Rows (no stored hashes)"
        assert "Rows row 1 (key 'r0') and Rows row 6 (key 'r5')" in one.example
    assert val.decoded == 6  # once each, and only while the hashes were not known
    monkeypatch.setattr(overlap, "MAX_DECODED", 5)
    val.knows_hashes = False
    (one,) = check_leakage(train, {"val": [val]}, {}, ["pixels"])
    assert (one.shared, one.total) == (0, 0)
    assert "6 pictures of Rows (no stored hashes, too many)" in str(one)
    (one,) = check_leakage(train[1:], {"val": [val]}, {}, ["pixels"])  # no training hashes: nothing is decoded
    assert "not checked: 4 training rows" in str(one)
    assert val.decoded == 6


def test_hashes_of_the_emoji_are_those_of_their_pixels() -> None:
    data = EmojiDataset("noto", "novel")
    hashes = data.perceptual_hashes()
    assert [int(hashes[i]) for i in (0, 5, -1)] == [perceptual_hash(data.image(i)) for i in (0, 5, len(data) - 1)]


def test_another_split_is_no_training_data() -> None:
    data = Rows([["a"]], [1])
    data.split = "val"
    with pytest.raises(DataError, match="Rows is of the split 'val', but stands in the training stream"):
        check_leakage([data], {})
    data.split = "train"
    assert check_leakage([data], {}) == []


@pytest.mark.parametrize(
    ("kinds", "reason", "message"),
    [
        (["captions"], "x", r"kinds is \['captions'\]. Known: caption"),
        ([], "x", "kinds is"),
        (["pixels"], " ", "blank"),
    ],
)
def test_a_declaration_needs_known_kinds_and_a_reason(kinds: list[Any], reason: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllowedOverlap(kinds, reason)


def test_a_declaration_names_a_set_that_is_there() -> None:
    with pytest.raises(ValueError, match="allow_overlap names vall, but the evaluation sets are val"):
        MixedModalityDataModule(val={"val": [Rows([["a"]], [1])]}, allow_overlap={"vall": ALL["val"]})


class Nothing(LightningModule):
    input_spec = InputSpec()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_fit_prints_and_logs_the_counts_and_looks_at_test_sets_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    train = Rows([["a fox"], ["a hen"]], [1, 2], knows_hashes=True)
    test = Rows([["A hen."], ["a cow"]], [3, 4], seed=50, knows_hashes=True)
    settings: dict[str, Any] = {"batch_size": 2, "mode": "mixture", "generated_fraction": 0.0, "test": {"test": [test]}}
    logger = CSVLogger(tmp_path)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=logger, default_root_dir=tmp_path, **quiet)
    with pytest.raises(DataError, match="test: 1 of 2 captions are in training"):
        trainer.fit(Nothing(), MixedModalityDataModule([train], **settings))
    allowed = {"test": AllowedOverlap(["caption"], "hens are hens")}
    with caplog.at_level("INFO"):
        trainer.fit(Nothing(), MixedModalityDataModule([train], allow_overlap=allowed, **settings))
    lines = [record.message for record in caplog.records if record.message.startswith("Leakage: ")]
    assert lines == [
        "Leakage: test: 1 of 2 captions are in training (allowed: hens are hens).",
        "Leakage: test: 0 of 2 image ids are in training.",
        "Leakage: test: 0 of 2 pictures are in training.",
    ]
    logger.finalize("done")
    content = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "data/leakage/test/caption" in content
    assert "1.0" in content
