"""``check_dataset``: our readers pass it, and it names the fault that was put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tar_fixtures import sample, write_tar

from gmail_lightning.datasets import (
    CocoCaptions,
    EmojiDataset,
    ImageFolder,
    ImageTextDataset,
    ManifestDataset,
    TarShards,
)
from gmail_lightning.testing import check_dataset


def coco(root: Path) -> CocoCaptions:
    content = {
        "images": [{"id": i, "file_name": f"a/{i}.png"} for i in range(3)],
        "annotations": [{"id": 2 * i + j, "image_id": i, "caption": f"a {i}  {j}"} for i in range(3) for j in range(2)],
    }
    (root / "captions.json").write_text(json.dumps(content))
    return CocoCaptions(root / "captions.json", root)


def manifest(root: Path) -> ManifestDataset:
    rows = [{"image": f"a/{i}.png", "captions": [f"one  {i}", "two"], "weight": 0.5, "label": i} for i in range(3)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ManifestDataset(root / "rows.jsonl", modality="generated")


def shards(root: Path) -> TarShards:
    return TarShards(
        write_tar(root / "0.tar", [m for i in range(3) for m in sample(str(i), i, f"a {i}")]), modality="real"
    )


READERS = {
    "emoji": lambda root: EmojiDataset("noto", "novel", classes="group"),
    "coco": coco, "manifest": manifest, "folder": ImageFolder, "shards": shards,
}  # fmt: skip


@pytest.mark.parametrize("name", list(READERS))
def test_our_data_sets(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 6), (40 * i, 9, 9)).save(tmp_path / "a" / f"{i}.png")
    check_dataset(READERS[name](tmp_path))


class Own(ImageTextDataset):
    """Two rows, without a fault."""

    def __init__(self) -> None:
        self.modality, self.image_id, self.pair_id = np.zeros(2, np.int64), np.arange(2), np.arange(2)

    def read_image(self, index: int) -> torch.Tensor:
        return torch.full((3, 4, 5), index, dtype=torch.uint8)

    def captions(self, index: int) -> list[str]:
        return [f"caption {index}"]

    def sample_key(self, index: int) -> str:
        return str(index)


def test_an_own_data_set_passes() -> None:
    check_dataset(Own())


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"image_id": np.arange(2.0)}, "image_id is float64"),
        ({"pair_id": np.arange(3)}, r"pair_id is int64 of shape \(3,\)"),
        ({"modality": np.array([0, 2])}, "other values than 0"),
        ({"image_id": np.array([-1, 0])}, "image_id is negative"),
        ({"label": np.array([0, 5]), "class_names": ["a", "b"]}, "label goes up to 5, and there are 2"),
        ({"sample_key": lambda index: "same"}, "two rows one name"),
        ({"read_image": lambda index: torch.rand(3, 4, 5)}, "image is torch.float32"),
        (
            {"read_image": lambda index: torch.randint(255, (3, 4, 5), dtype=torch.uint8)},
            "differs when it is read again",
        ),
        ({"captions": lambda index: []}, "at least one text"),
        ({"captions": lambda index: [" "]}, "a caption is empty"),
        ({"caption_blocks": lambda: iter([])}, "caption_blocks and captions differ"),
        ({"handle": open}, None),
        ({"handle": (i for i in ())}, "pickling, as for a worker process that is spawned, raises TypeError"),
    ],
)
def test_faults_of_a_data_set(attributes: dict[str, Any], told: str | None) -> None:
    data = Own()
    vars(data).update(attributes)
    if told is None:
        check_dataset(data)
    else:
        with pytest.raises(AssertionError, match=told):
            check_dataset(data)


def test_what_a_check_runs_into_is_the_last_fault() -> None:
    data = Own()
    data.image_id = np.arange(2.0)
    vars(data)["read_image"] = lambda index: 1 / 0
    with pytest.raises(AssertionError, match=r"(?s)image_id is float64.*the check ends here, for ZeroDivisionError"):
        check_dataset(data)
    del data.image_id
    with pytest.raises(AssertionError, match=r"AttributeError is raised: .*image_id.* Mend this first"):
        check_dataset(data)


def test_another_class_is_told() -> None:
    with pytest.raises(AssertionError, match="list is no ImageTextDataset: make it a subclass"):
        check_dataset([1])  # type: ignore[arg-type]


def test_no_rows() -> None:
    data = Own()
    data.modality = data.modality[:0]
    with pytest.raises(AssertionError, match="it has no rows"):
        check_dataset(data)
