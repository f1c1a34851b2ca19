"""Feature stores: whose features a row gets, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from gmail_lightning.datamodules.collate import RowTable
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets import (
    ClassificationDataset,
    CocoCaptions,
    DataError,
    EmojiDataset,
    FeatureStore,
    Flickr30k,
    ImageFolder,
    ImageTextDataset,
    ShareGPT4V,
)
from gmail_lightning.datasets.feature_files import merge_parts, places, write_part
from gmail_lightning.types import ImageSpec, InputSpec

SPEC = InputSpec(image=ImageSpec((32, 32)))


def write_store(folder: Path, dataset, width: int = 3, **record) -> np.ndarray:
    """Features of every picture of a data set: random, and so all different."""
    rows = EvaluationRows(RowTable([dataset]), SPEC)
    keys = [dataset.sample_key(int(row)) for row in rows.first]
    columns = {"key": keys, "modality": dataset.modality[rows.first], "image_id": dataset.image_id[rows.first]}
    values = np.random.default_rng(0).normal(size=(len(keys), width)).astype(np.float16)
    (folder / "parts").mkdir(parents=True)
    for half in np.array_split(np.random.default_rng(1).permutation(len(keys)), min(len(keys), 2)):
        write_part(folder, half, values[half])
    recorded = {"count": len(keys), "places": places([dataset]), "branches": {}, **record}
    merge_parts(folder, pa.table(columns), recorded)
    return values


@pytest.fixture
def coco(tmp_path: Path) -> CocoCaptions:
    """Three images, five captions each, in an order that mixes them; no image file is there."""
    images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)]
    captions = [{"id": n, "image_id": 10 + n % 3, "caption": f"caption {n}"} for n in range(15)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return CocoCaptions(tmp_path / "captions.json", tmp_path)


def test_the_five_captions_of_a_picture_share_its_features(tmp_path: Path, coco: CocoCaptions) -> None:
    values = write_store(tmp_path / "store", coco)
    assert values.shape == (3, 3)
    store = FeatureStore(tmp_path / "store", coco)
    assert len(store) == len(coco) == 15
    for row in range(15):  # the pictures are numbered in the order of their first rows
        assert np.array_equal(store.feature(row).numpy(), values[row % 3])
        assert store.captions(row) == [f"caption {row}"]
    batch = EvaluationRows(RowTable([store]), SPEC, "test")[0]
    assert batch["references"] == [[f"caption {n}" for n in range(0, 15, 3)]]
    assert "image" not in batch
    assert np.array_equal(batch["image_features"].numpy(), values[:1])
    assert batch["feature_row"].tolist() == [0]


def test_a_part_of_the_rows_finds_its_features_by_any_row_of_the_picture(tmp_path: Path, coco: CocoCaptions) -> None:
    values = write_store(tmp_path / "store", coco)
    content = json.loads(coco.annotations.read_text())
    content["annotations"] = content["annotations"][12:] + content["annotations"][:5]  # other first captions
    coco.annotations.write_text(json.dumps(content))
    store = FeatureStore(tmp_path / "store", CocoCaptions(coco.annotations, tmp_path))
    assert store.pair_id.tolist() == [12, 13, 14, 0, 1, 2, 3, 4]
    for row, pair_id in enumerate(store.pair_id):
        assert np.array_equal(store.feature(row).numpy(), values[pair_id % 3])


def test_all_else_is_as_the_data_set_says(tmp_path: Path) -> None:
    emoji = EmojiDataset("fluent", "novel")
    write_store(tmp_path / "store", emoji)
    store = FeatureStore(tmp_path / "store", emoji)
    for name in ("modality", "image_id", "pair_id", "label"):
        assert np.array_equal(getattr(store, name), getattr(emoji, name))
    assert store.class_names == emoji.class_names
    assert np.array_equal(store.perceptual_hashes(), emoji.perceptual_hashes())
    for row in (0, 7):
        one, other = store[row], emoji[row]
        assert torch.equal(one.pop("image"), other.pop("image"))
        assert one == other
        assert store.columns(row) == emoji.columns(row)
    blocks = [next(d.caption_blocks()) for d in (store, emoji)]
    assert blocks[0][0].equals(blocks[1][0])
    assert "features in place of 373 images' pixels" in store.summary


def test_a_worker_gets_the_path_and_not_the_array(tmp_path: Path) -> None:
    emoji = EmojiDataset("noto", "novel")
    values = write_store(tmp_path / "store", emoji, width=4096)
    store = FeatureStore(tmp_path / "store", emoji)
    data = pickle.dumps(store)
    assert len(data) < values.nbytes / 10
    assert torch.equal(pickle.loads(data).feature(5), store.feature(5))


def test_missing_features_are_counted(tmp_path: Path) -> None:
    write_store(tmp_path / "store", EmojiDataset("noto", "novel"))
    with pytest.raises(DataError, match=r"no features of 1221 of 1594 images, such as EmojiDataset row .* holds 373"):
        FeatureStore(tmp_path / "store", EmojiDataset("noto"))
    with pytest.raises(DataError, match="no features of 373 of 373 images"):  # no hand lends features to another
        FeatureStore(tmp_path / "store", EmojiDataset("fluent", "novel"))


def test_equal_names_of_other_images_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", EmojiDataset("noto", "novel"))
    with pytest.raises(DataError, match=r"has modality 1, but in .* it is 0 .373 such rows.: .* other data"):
        FeatureStore(tmp_path / "store", EmojiDataset("noto", "novel", modality="generated"))

    for name in ("a", "b"):
        (tmp_path / name / "cat").mkdir(parents=True)
        for number in range(2):
            (tmp_path / name / "cat" / f"{number}.jpg").touch()
    write_store(tmp_path / "folder", ImageFolder(tmp_path / "a"))
    FeatureStore(tmp_path / "folder", ImageFolder(tmp_path / "a"))
    with pytest.raises(DataError, match=r"below another folder .* Write the store again"):
        FeatureStore(tmp_path / "folder", ImageFolder(tmp_path / "b"))


def _coco(folder: Path, root: Path, modality: str) -> ImageTextDataset:
    images = [{"id": 9, "file_name": "9.jpg"}]
    captions = [{"id": 1, "image_id": 9, "caption": "a dog"}]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return CocoCaptions(folder / "coco.json", root, modality)


def _flickr30k(folder: Path, root: Path, modality: str) -> ImageTextDataset:
    (folder / "results.token").write_text("9.jpg#0\ta dog\n")
    return Flickr30k(folder / "results.token", root, modality, "full", subset=True)


def _sharegpt4v(folder: Path, root: Path, modality: str) -> ImageTextDataset:
    entry = {"image": "sam/9.jpg", "conversations": [{"value": "?"}, {"value": "a dog"}]}
    (folder / "share.json").write_text(json.dumps([entry]))
    return ShareGPT4V(folder / "share.json", root, modality, subset=True)


def _caltech101(folder: Path, root: Path, modality: str) -> ImageTextDataset:
    (root / "caltech101/101_ObjectCategories/dog").mkdir(parents=True, exist_ok=True)
    (root / "caltech101/101_ObjectCategories/dog/9.jpg").touch()
    return ClassificationDataset("caltech101", root, "all", modality, class_names=["dog"], subset=True)


@pytest.mark.parametrize("build", [_coco, _flickr30k, _sharegpt4v, _caltech101])
def test_images_of_another_generator_under_the_same_names_are_refused(tmp_path: Path, build) -> None:
    first, other = (build(tmp_path, tmp_path / name, "generated") for name in ("first", "other"))
    assert [first.sample_key(0), first.image_id[0]] == [other.sample_key(0), other.image_id[0]]
    values = write_store(tmp_path / "store", first)
    again = FeatureStore(tmp_path / "store", build(tmp_path, tmp_path / "other" / ".." / "first", "generated"))
    assert np.array_equal(again.feature(0).numpy(), values[0])
    assert again.place == first.place
    with pytest.raises(DataError, match="below another folder"):
        FeatureStore(tmp_path / "store", other)
    write_store(tmp_path / "real", build(tmp_path, tmp_path / "first", "real"))  # published images, wherever they lie
    FeatureStore(tmp_path / "real", build(tmp_path, tmp_path / "other", "real"))


def test_unfinished_and_damaged_stores_are_refused(tmp_path: Path) -> None:
    emoji, folder = EmojiDataset("noto", "novel"), tmp_path / "store"
    with pytest.raises(DataError, match="no finished feature store"):
        FeatureStore(folder, emoji)
    write_store(folder, emoji)
    record = (folder / "store.json").rename(folder / "away")
    with pytest.raises(DataError, match=r"store.json is missing.*same command again"):
        FeatureStore(folder, emoji)
    record.rename(folder / "store.json")
    FeatureStore(folder, emoji)
    np.save(folder / "features.npy", np.zeros((372, 3), np.float16))
    with pytest.raises(DataError, match=r"373 keys and 372 features, but store.json says 373"):
        FeatureStore(folder, emoji)
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"features.npy.*Write the store again"):
        FeatureStore(folder, emoji)
