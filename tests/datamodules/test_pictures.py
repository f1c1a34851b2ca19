"""Views of one picture under one draw; pixels, cached features and token ids side by side."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import horizontal_flip

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datamodules.collate import RowTable
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets import DataError, ImageTextDataset
from gmail_lightning.datasets.base import decode_image
from gmail_lightning.datasets.pictures import look_at
from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec, InputSpec, TextSpec

SMALL, LARGE = ImageSpec((6, 6)), ImageSpec((9, 12), "squash", "bilinear")
VIEWS = {"image": SMALL, "large": LARGE}


class Rows(ImageTextDataset):
    """Random pictures of 20 x 14 pixels; ``kinds`` says what a row has: pixels, features, ids or a broken image."""

    def __init__(self, modality: int, kinds: list[str], first: int = 0, width: int = 5) -> None:
        self.modality = np.full(len(kinds), modality)
        self.pair_id = self.image_id = np.arange(len(kinds)) + first
        self.kinds, self.width = kinds, width

    def read_image(self, index: int) -> Tensor:
        if self.kinds[index] == "broken":
            return decode_image(b"nonsense")
        assert self.kinds[index] == "pixels", "decoded without need"
        draw = torch.Generator().manual_seed(1000 * int(self.modality[index]) + index)
        return torch.randint(0, 256, (3, 14, 20), generator=draw, dtype=torch.uint8)

    def feature(self, index: int) -> Tensor | None:
        return torch.full((self.width,), float(index)) if self.kinds[index] == "features" else None

    def token_ids(self, index: int) -> Tensor | None:
        return torch.arange(self.width) + 10 * index if self.kinds[index] == "ids" else None

    def captions(self, index: int) -> list[str]:
        return [f"caption {index}"]

    def sample_key(self, index: int) -> str:
        return f"{self.modality[index]}/{index}"


def pairs(real: list[str] | None = None) -> list[ImageTextDataset]:
    return [Rows(0, real or ["pixels"] * 12), Rows(1, ["pixels"] * 12)]


def loader(train: list[ImageTextDataset], **arguments: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 8, "input_spec": InputSpec(images=VIEWS), "seed": 3, **arguments}
    module = MixedModalityDataModule(train, **settings)
    module.setup("fit")
    return module.train_dataloader()


class Flip(nn.Module):
    """Flips for every other draw, and counts its draws."""

    def __init__(self) -> None:
        super().__init__()
        self.flipped: list[bool] = []

    def forward(self, image: Tensor) -> Tensor:
        self.flipped.append(bool(torch.rand(()) < 0.5))
        return horizontal_flip(image) if self.flipped[-1] else image


def test_two_views_are_two_sizes_of_the_same_augmented_picture() -> None:
    """A flip commutes with nothing here but itself: the views are resized from the flipped bytes."""
    flip, train = Flip(), pairs()
    by_key = {data.sample_key(row): (data, row) for data in train for row in range(len(data))}
    seen = 0
    for batch in loader(train, augmentation=flip):
        assert batch["image"].shape == (8, 3, 6, 6)
        assert batch["large"].shape == (8, 3, 9, 12)
        assert batch["image_row"].tolist() == list(range(8))
        assert len(flip.flipped) == 8  # one draw for a picture, not one for a view
        assert flip.flipped[::2] == flip.flipped[1::2]  # nor one for each of a pair
        for row, key in enumerate(batch["sample_key"]):
            data, index = by_key[key]
            picture = horizontal_flip(data.image(index)) if flip.flipped[row] else data.image(index)
            assert torch.equal(batch["image"][row], resize(picture, SMALL))
            assert torch.equal(batch["large"][row], resize(picture, LARGE))
        seen += sum(flip.flipped)
        flip.flipped.clear()
    assert 0 < seen < 24


def test_views_of_an_augmentation_in_floats_are_rounded_to_bytes_once() -> None:
    picture = torch.randint(0, 256, (3, 14, 20), dtype=torch.uint8)
    jitter = v2.ColorJitter(brightness=0.5)
    torch.manual_seed(5)
    views = look_at(picture, VIEWS, [jitter])
    torch.manual_seed(5)
    bytes_ = (jitter(picture.float() / 255) * 255).round().to(torch.uint8)
    assert torch.equal(views["image"], resize(bytes_, SMALL))
    assert torch.equal(views["large"], resize(bytes_, LARGE))
    torch.manual_seed(5)
    assert torch.equal(look_at(picture, {"image": SMALL}, [jitter])["image"], jitter_after(picture, jitter))


def jitter_after(picture: Tensor, jitter: nn.Module) -> Tensor:
    torch.manual_seed(5)
    changed: Tensor = jitter(resize(picture, SMALL))
    return changed


def test_one_view_by_any_name_is_what_the_short_form_gives() -> None:
    arguments: dict[str, Any] = {"augmentation": v2.ColorJitter(brightness=0.5)}
    short = next(iter(loader(pairs(), input_spec=InputSpec(SMALL), **arguments)))
    named = next(iter(loader(pairs(), input_spec=InputSpec(images={"view": SMALL}), **arguments)))
    assert torch.equal(short["image"], named["view"])
    assert torch.equal(short["image_row"], named["image_row"])
    assert torch.equal(short["image_generated_row"], named["image_generated_row"])
    assert "image" not in named


def test_views_of_replaced_rows_stay_together() -> None:
    train = pairs(["pixels", "broken", "broken", *["pixels"] * 9])
    by_key = {data.sample_key(row): (data, row) for data in train for row in range(len(data))}
    replaced = 0
    for batch in loader(train):
        for row, key in enumerate(batch["sample_key"]):
            data, index = by_key[key]
            assert torch.equal(batch["image"][row], resize(data.image(index), SMALL))
            assert torch.equal(batch["large"][row], resize(data.image(index), LARGE))
        assert batch["paired"] is True
        replaced += int(batch["replaced"].sum())
    assert replaced == 4  # 12 pairs in 3 batches of 4: both broken images, and their partners


def test_evaluation_has_every_view() -> None:
    batch = EvaluationRows(RowTable(pairs()), InputSpec(images=VIEWS), "x").__getitems__([0, 1, 2])
    assert (batch["image"].shape, batch["large"].shape) == ((3, 3, 6, 6), (3, 3, 9, 12))  # type: ignore[typeddict-item]
    assert batch["image_row"].tolist() == [0, 1, 2]


def test_the_forms_of_an_input_spec() -> None:
    text = {"text": TextSpec(len, 8)}  # type: ignore[arg-type]
    assert (
        InputSpec(SMALL, text) == InputSpec(image=SMALL, texts=text) == InputSpec(images={"image": SMALL}, texts=text)
    )
    assert InputSpec(SMALL) != InputSpec(LARGE)
    assert InputSpec(SMALL).image is SMALL
    assert (InputSpec().images, InputSpec().texts, InputSpec().image) == ({}, {}, None)
    assert InputSpec(images={"other": SMALL}).image is None
    assert replace(InputSpec(SMALL), texts=text) == InputSpec(SMALL, text)
    assert pickle.loads(pickle.dumps(InputSpec(images=VIEWS))) == InputSpec(images=VIEWS)
    with pytest.raises(ValueError, match="give one of them"):
        InputSpec(LARGE, images=VIEWS)
    with pytest.raises(ValueError, match=r"^text: one key of the batch cannot hold an image and a text"):
        InputSpec(texts=text, images={"text": SMALL})


KINDS = ["pixels", "features", "ids", "ids", "pixels", "features", "ids"]


def test_rows_of_three_kinds_stand_side_by_side() -> None:
    data = Rows(0, KINDS)
    rows = EvaluationRows(RowTable([data]), InputSpec(SMALL), "x")
    order = [6, 0, 5, 3, 1]  # ids, pixels, features, ids, features
    batch = rows.__getitems__(order)
    assert (batch["image_row"].tolist(), batch["feature_row"].tolist()) == ([1], [2, 4])
    assert batch["token_row"].tolist() == [0, 3]
    assert torch.equal(batch["image"][0], resize(data.image(0), SMALL))
    assert batch["image_features"].tolist() == [[5.0] * 5, [1.0] * 5]
    assert batch["image_token_ids"].tolist() == [[60, 61, 62, 63, 64], [30, 31, 32, 33, 34]]
    assert batch["image_token_ids"].dtype == torch.int64
    only = rows.__getitems__([2, 3])
    assert {"image", "image_row", "image_features", "feature_row"}.isdisjoint(only)
    without = EvaluationRows(RowTable([data]), InputSpec(), "x").__getitems__(order)
    assert {"image_row", "feature_row", "token_row"}.isdisjoint(without)  # nothing was asked for, nothing is read


def test_training_pairs_ids_with_pixels_and_counts_images_apart() -> None:
    real = ["ids", "pixels"] * 6
    batch = next(iter(loader(pairs(real), input_spec=InputSpec(SMALL))))
    kinds = [real[int(key.split("/")[1])] if key.startswith("0/") else "pixels" for key in batch["sample_key"]]
    assert batch["token_row"].tolist() == [row for row, kind in enumerate(kinds) if kind == "ids"]
    assert batch["image_row"].tolist() == [row for row, kind in enumerate(kinds) if kind == "pixels"]
    assert 0 < len(batch["token_row"]) < 4
    modality = batch["modality"][batch["image_row"]].tolist()
    assert batch["image_generated_row"].tolist() == [i for i, one in enumerate(modality) if one == 1]
    assert batch["image_real_row"].tolist() == [i for i, one in enumerate(modality) if one == 0]


def test_what_cannot_stand_in_one_batch_is_named() -> None:
    mixed = RowTable([Rows(0, ["ids"]), Rows(0, ["ids"], first=9, width=7)])
    why = r"image_token_ids of Rows row 1 .* shape \(5,\), that of Rows row 1 .* shape \(7,\): they cannot stand"
    with pytest.raises(DataError, match=why):
        EvaluationRows(mixed, InputSpec(SMALL), "x").__getitems__([0, 1])

    class Floats(Rows):
        def token_ids(self, index: int) -> Tensor:
            return torch.zeros(4)

    with pytest.raises(DataError, match=r"key '0/0'\): token_ids returned torch.float32 of shape \(4,\)"):
        EvaluationRows(RowTable([Floats(0, ["ids"])]), InputSpec(SMALL), "x").__getitems__([0])


def test_ids_of_a_store_cannot_be_augmented() -> None:
    real, generated = pairs(["ids"] * 12)
    real.token_store = {"path": "somewhere"}
    with pytest.raises(MisconfigurationException, match=r"augmentation cannot change the token ids of Rows row 1"):
        loader([real, generated], augmentation=Flip())
    assert len(next(iter(loader([real, generated])))["token_row"]) == 4


@pytest.mark.parametrize("given", ['{"image": {"size": [6, 6]}}', '{"images": {"image": {"size": [6, 6]}}}'])
def test_a_recipe_may_write_either_form(given: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--spec", type=InputSpec)
    assert parser.instantiate(parser.parse_args(["--spec", given])).spec == InputSpec(SMALL)
