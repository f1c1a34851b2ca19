"""Feature stores: whose features a row gets, and what is refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tar_fixtures import write_tar

from gmail_lightning.datamodules.collate import RowTable
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets import (
    ClassificationDataset,
    CocoCaptions,
    DataError,
    EmojiDataset,
    FeatureStore,
    Flickr30k,
    ImageTextDataset,
    ManifestDataset,
    ShareGPT4V,
    TarShards,
)
from gmail_lightning.datasets.store_files import FEATURES
from gmail_lightning.generation.array_store import ArrayStore
from gmail_lightning.generation.rows import store_columns
from gmail_lightning.types import ImageSpec, InputSpec

SPEC = InputSpec(image=ImageSpec((32, 32)))


def write_store(folder: Path, dataset, width: int = 3, **record) -> np.ndarray:
    """Features of every picture of a data set: random, and so all different."""
    rows = EvaluationRows(RowTable([dataset]), SPEC)
    columns = store_columns([(dataset, int(row)) for row in rows.first])
    values = np.random.default_rng(0).normal(size=(len(columns), width)).astype(np.float16)
    store = ArrayStore(folder, FEATURES, columns, {"branches": {}, **record})
    store.begin()
    for half in np.array_split(np.random.default_rng(1).permutation(len(columns)), min(len(columns), 2)):
        store.parts.add(half, {"features": values[half]})
        store.parts.flush()
    store.finish()
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


@pytest.mark.slow
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


def test_every_attribute_of_a_data_set_is_the_stores_too(tmp_path: Path) -> None:
    """Of all that the base declares, so that a new one is not forgotten."""
    emoji = EmojiDataset("fluent", "novel")
    write_store(tmp_path / "store", emoji)
    names = set(ImageTextDataset.__annotations__) - {"feature_store", "summary"}  # its own
    for name in names - {"modality", "image_id", "pair_id"}:
        setattr(emoji, name, f"the {name}")
    store = FeatureStore(tmp_path / "store", emoji)
    assert len(names) >= 13
    for name in names:
        assert getattr(store, name) is getattr(emoji, name), name


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
    if not (image := root / "caltech101/101_ObjectCategories/dog/9.jpg").is_file():
        image.touch()
    return ClassificationDataset("caltech101", root, "all", modality, class_names=["dog"], subset=True)


@pytest.mark.parametrize("build", [_coco, _flickr30k, _sharegpt4v, _caltech101])
def test_images_under_the_same_names_in_another_folder_are_others(tmp_path: Path, build) -> None:
    for number, name in enumerate(("first", "other")):
        image = build(tmp_path, tmp_path / name, "generated").image_file(0)
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(image, number)
    first, other = (build(tmp_path, tmp_path / name, "generated") for name in ("first", "other"))
    assert first.sample_key(0) == other.sample_key(0)
    values = write_store(tmp_path / "store", first)
    again = FeatureStore(tmp_path / "store", build(tmp_path, tmp_path / "other" / ".." / "first", "generated"))
    assert np.array_equal(again.feature(0).numpy(), values[0])
    with pytest.raises(DataError, match="has no features of 1 of 1 images"):
        FeatureStore(tmp_path / "store", other)
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = FeatureStore(tmp_path / "store", build(tmp_path, tmp_path / "moved", "generated"))
    assert np.array_equal(moved.feature(0).numpy(), values[0])


def draw(path: Path, grey: int) -> None:
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(path)


def files(folder: Path, order: list[int]) -> ImageTextDataset:
    lines = [json.dumps({"image": f"{n}.png", "caption": f"caption {n}"}) for n in order]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return ManifestDataset(folder / "rows.jsonl", modality="real")


def content(folder: Path, order: list[int]) -> ImageTextDataset:
    images = [(folder / f"{n}.png").read_bytes() for n in order]
    pq.write_table(pa.table({"image": images, "caption": [f"caption {n}" for n in order]}), folder / "rows.parquet")
    return ManifestDataset(folder / "rows.parquet", modality="real")


def coco_rows(folder: Path, order: list[int]) -> ImageTextDataset:
    images = [{"id": n, "file_name": f"{n}.png"} for n in order]
    captions = [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in order]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return CocoCaptions(folder / "coco.json", folder)


def tars(folder: Path, order: list[int]) -> ImageTextDataset:
    (folder / "tars").mkdir(exist_ok=True)
    path = folder / "tars" / "0.tar"
    if not path.is_file():
        write_tar(path, [(f"k{n}.{suffix}", data) for n in range(5) for suffix, data in parts(folder, n)])
    return TarShards(folder / "tars", modality="real")


def parts(folder: Path, number: int) -> list[tuple[str, bytes]]:
    return [("png", (folder / f"{number}.png").read_bytes()), ("txt", f"caption {number}".encode())]


@pytest.mark.parametrize("build", [files, content, coco_rows, tars])
def test_rows_in_another_order_and_folder_keep_their_features(tmp_path: Path, build) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(5):
        draw(folder / f"{n}.png", 10 * n)
    values = write_store(tmp_path / "store", build(folder, list(range(5))))
    for order in ([4, 2, 0, 3, 1], [3, 1], [1, 0, 2, 4, 3]):
        data = FeatureStore(tmp_path / "store", build(folder, order))
        numbers = [int(data.captions(row)[0].split()[1]) for row in range(len(data))]
        assert build is tars or numbers == order
        assert all(np.array_equal(data.feature(row).numpy(), values[n]) for row, n in enumerate(numbers))
        folder = folder.rename(tmp_path / f"moved{len(order)}{order[0]}")


@pytest.mark.parametrize("build", [files, content, coco_rows, tars])
@pytest.mark.parametrize("changed", [0, 3])
def test_images_edited_in_place_are_noticed(tmp_path: Path, build, changed: int) -> None:
    for n in range(5):
        draw(tmp_path / f"{n}.png", 10 * n)
    write_store(tmp_path / "store", build(tmp_path, list(range(5))))
    FeatureStore(tmp_path / "store", build(tmp_path, list(range(5))))
    draw(tmp_path / f"{changed}.png", 255)
    os.utime(tmp_path / f"{changed}.png", ns=(2 * 10**18, 2 * 10**18))
    (tmp_path / "tars" / "0.tar").unlink(missing_ok=True)
    told = "has no features of 1 of 5 images" if build is content else "was changed after its features were written"
    with pytest.raises(DataError, match=told):  # bytes have no name of their own
        FeatureStore(tmp_path / "store", build(tmp_path, list(range(5))))


def test_a_store_of_an_earlier_release_is_refused(tmp_path: Path) -> None:
    emoji = EmojiDataset("noto", "novel")
    write_store(tmp_path / "store", emoji)
    rows = pq.read_table(tmp_path / "store" / "rows.parquet").drop_columns(["file_id", "size", "changed"])
    pq.write_table(rows, tmp_path / "store" / "rows.parquet")
    with pytest.raises(DataError, match=r"of an earlier release.* Write the store again"):
        FeatureStore(tmp_path / "store", emoji)


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
