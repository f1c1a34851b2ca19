"""What routes the rows of a batch."""

import random

import pytest
import torch

from gmail_lightning.types import Modality, modality_rows


@pytest.mark.parametrize("seed", range(20))
def test_modality_rows_are_those_of_a_loop(seed: int) -> None:
    draw = random.Random(seed)
    modality = [draw.randint(0, 1) for _ in range(draw.randint(0, 9))]
    shown = [row for row in range(len(modality)) if draw.random() < 0.6]
    draw.shuffle(shown)
    rows = modality_rows(
        {"modality": torch.tensor(modality, dtype=torch.long), "image_row": torch.tensor(shown).long()}
    )
    for name, which in (("real", Modality.REAL), ("generated", Modality.GENERATED)):
        assert rows[f"{name}_row"].tolist() == [i for i, one in enumerate(modality) if one == which]
        assert rows[f"image_{name}_row"].tolist() == [i for i, row in enumerate(shown) if modality[row] == which]
    assert {value.dtype for value in rows.values() if isinstance(value, torch.Tensor)} == {torch.int64}
    assert rows["paired"] is False  # no pair_id


@pytest.mark.parametrize(
    ("modality", "pair_id", "paired"),
    [
        ([1, 0, 1, 0], [5, 5, 9, 9], True),
        ([1, 1, 0, 0], [5, 9, 5, 9], True),  # in halves
        ([1, 1, 0, 0], [5, 9, 9, 5], False),  # in another order
        ([1, 0, 1, 0], [5, 5, -1, -1], False),
        ([1, 0, 1], [5, 5, 9], False),
        ([0, 0], [5, 9], False),
    ],
)
def test_paired(modality: list[int], pair_id: list[int], paired: bool) -> None:
    assert modality_rows({"modality": torch.tensor(modality), "pair_id": torch.tensor(pair_id)})["paired"] is paired


def test_without_image_row_every_row_has_pixels() -> None:
    rows = modality_rows({"modality": torch.tensor([1, 0, 1]), "image": torch.zeros(3, 3, 2, 2)})
    assert (rows["image_real_row"].tolist(), rows["image_generated_row"].tolist()) == ([1], [0, 2])
    assert "image_real_row" not in modality_rows({"modality": torch.tensor([1, 0, 1])})


def test_an_unknown_modality_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0 \(real\) or 1 \(generated\), got \[0, 2\]"):
        modality_rows({"modality": torch.tensor([0, 2])})
