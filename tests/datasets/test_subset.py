"""A subset of a published data set: refused by its counts, unless it says that it is one, and then told as one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmail_lightning.datasets import (
    ClassificationDataset,
    CocoCaptions,
    DataError,
    Flickr30k,
    ImageTextDataset,
    ScienceQA,
    ShareGPT4V,
    Urban1k,
)

TURNS = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A cup."}]
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cup"}]}
SENTENCES = [{"raw": "a cup", "sentid": 1}]
PROBLEM = {"question": "What?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png"}


def karpathy(dataset: str, split: str = "test", **image: Any) -> dict[str, Any]:
    entry = {"imgid": 0, "filename": "a.jpg", "split": split, "sentences": SENTENCES, **image}
    return {"dataset": dataset, "images": [entry]}


FILES = {
    "captions_val2017.json": json.dumps(COCO),
    "dataset_coco.json": json.dumps(karpathy("coco", cocoid=1, filepath="val2014")),
    "dataset_flickr30k.json": json.dumps(karpathy("flickr30k")),
    "results_20130124.token": "a.jpg#0\ta cup\n",
    "share.json": json.dumps([{"id": "1", "image": "coco/train2017/1.jpg", "conversations": TURNS}]),
    "caption/1.txt": "a street",
    "image/1.jpg": "",
    "problems.json": json.dumps({"1": PROBLEM}),
    "pid_splits.json": json.dumps({"test": ["1"]}),
    "caltech101/101_ObjectCategories/accordion/1.jpg": "",
}
READERS: dict[str, Callable[..., ImageTextDataset]] = {
    "coco_5k": lambda root, **given: CocoCaptions(root / "captions_val2017.json", root, protocol="coco_5k", **given),
    "karpathy_test": lambda root, **given: CocoCaptions(
        root / "dataset_coco.json", root, protocol="karpathy_test", **given
    ),
    "flickr30k_1k": lambda root, **given: Flickr30k(root / "dataset_flickr30k.json", root, **given),
    "flickr30k_full": lambda root, **given: Flickr30k(root / "results_20130124.token", root, split="full", **given),
    "sharegpt4v_1k": lambda root, **given: ShareGPT4V(root / "share.json", root, **given),
    "urban1k": lambda root, **given: Urban1k(root, **given),
    "scienceqa": lambda root, **given: ScienceQA(root / "problems.json", root, **given),
    "caltech101": lambda root, **given: ClassificationDataset(
        "caltech101", root, "all", class_names=["accordion"], **given
    ),
}


@pytest.mark.parametrize("protocol", READERS)
def test_counts_are_checked_unless_it_says_subset(protocol: str, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"not the protocol {protocol}: 1 .* instead of .* or say subset=True"):
        READERS[protocol](tmp_path)
    data = READERS[protocol](tmp_path, subset=True)
    assert len(data) == 1
    assert data.summary is not None
    assert f"are published), not protocol {protocol}" in data.summary
    assert ": a subset (" in data.summary


def test_a_subset_is_of_something(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    with pytest.raises(ValueError, match="subset=True: of no protocol"):
        CocoCaptions(tmp_path / "captions.json", tmp_path, subset=True)


@pytest.mark.parametrize("protocol", ["flickr30k_full", "sharegpt4v_1k", "urban1k", "caltech101"])
def test_the_earlier_name_of_the_switch(protocol: str, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert READERS[protocol](tmp_path, check_counts=False).summary == READERS[protocol](tmp_path, subset=True).summary
