"""The audit of generated images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from gmail_lightning.datasets import DataError, EmojiDataset
from gmail_lightning.generation.images.audit import audit_image, audit_rows
from gmail_lightning.transforms.image_hash import exact_hash, perceptual_hash

Row = dict[str, object]


def filled(*color: int, size: int = 16) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, size, size).clone()


def test_scores_are_those_of_the_pixels() -> None:
    image = EmojiDataset("noto").image(5)
    row = audit_image(image, flagged=False)
    pixels = image.numpy() / 255
    assert row["pixel_mean"] == pytest.approx(pixels.mean(), abs=1e-12)
    assert row["pixel_std"] == pytest.approx(pixels.std(), abs=1e-12)
    assert (row["status"], row["reason"]) == ("ok", None)
    assert (row["exact_hash"], row["perceptual_hash"]) == (exact_hash(image), perceptual_hash(image))


def test_each_fault_has_its_reason_and_the_first_is_kept() -> None:
    dark, speck, noisy = filled(0, 0, 0), filled(0, 0, 0), filled(250, 3, 120)
    dark[:, 0, :4] = 4  # a little noise is black still
    speck[:, :4, :4] = 255  # a light in the night is not
    noisy[1, ::2] += 1  # half a level of deviation
    drawing = EmojiDataset("noto").image(0)
    cases = [
        (dark, False, "black"),
        (dark, True, "safety"),  # Stable Diffusion's checker paints what it flags black
        (speck, False, None),
        (filled(255, 255, 255), False, "constant"),
        (filled(255, 0, 0), False, "constant"),  # one colour, though its values deviate over the channels
        (noisy, False, "constant"),
        (drawing, True, "safety"),
        (drawing, False, None),
    ]
    for image, flagged, reason in cases:
        row = audit_image(image, flagged)
        assert (row["status"], row["reason"]) == ("ok" if reason is None else "rejected", reason)


def table(rows: list[Row]) -> pa.Table:
    schema = {"key": pa.string(), "status": pa.string(), "reason": pa.string(), "exact_hash": pa.string()}
    schema |= {"perceptual_hash": pa.int64(), "duplicate_of": pa.string()}
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in schema.items()})


def random_rows(count: int) -> list[Row]:
    """Rows of few pixels and near hashes, some rejected or failed before."""
    rng = np.random.default_rng(4)
    centres = rng.integers(-(2**63), 2**63 - 1, 8).tolist()
    rows: list[Row] = []
    for number in range(count):
        pixels = int(rng.integers(0, count))
        bits = np.random.default_rng(pixels)  # equal pixels, equal hash
        value = centres[bits.integers(0, 8)]
        for bit in bits.integers(0, 63, bits.integers(0, 5)).tolist():
            value ^= 1 << bit
        status = ("ok", "ok", "ok", "ok", "ok", "rejected", "failed")[int(rng.integers(0, 7))]
        row: Row = {"key": f"k{number}", "status": status, "exact_hash": f"p{pixels}", "perceptual_hash": value}
        if status == "failed":
            row |= {"exact_hash": None, "perceptual_hash": None, "reason": "not_finite"}
        elif status == "rejected":
            row["reason"] = "safety"
        rows.append(row)
    return rows


def reference_audit(
    rows: list[Row], evaluation: dict[str, tuple[list[str], list[int]]], max_distance: int | None, evaluation_bits: int
) -> list[tuple[object, object, object]]:
    """The definition, row by row against every row before."""

    def bits(one: Row, other: int) -> int:
        return bin((int(one["perceptual_hash"]) ^ other) & (2**64 - 1)).count("1")  # type: ignore[call-overload]

    rows = [dict(row) for row in rows]
    for check in ("duplicate", "near_duplicate", "near_evaluation"):
        stay: list[Row] = []
        for row in rows:
            if row["status"] != "ok":
                continue
            twin = None
            if check == "duplicate":
                twin = next((other["key"] for other in stay if other["exact_hash"] == row["exact_hash"]), None)
            elif check == "near_duplicate" and max_distance is not None:
                near = [(bits(row, int(o["perceptual_hash"])), i) for i, o in enumerate(stay)]  # type: ignore[call-overload]
                near = [pair for pair in near if pair[0] <= max_distance]
                twin = stay[min(near)[1]]["key"] if near else None
            elif check == "near_evaluation":
                for name, (keys, hashes) in evaluation.items():
                    near = [(bits(row, other), i) for i, other in enumerate(hashes)]
                    near = [pair for pair in near if pair[0] <= evaluation_bits]
                    twin = twin or (f"{name}/{keys[min(near)[1]]}" if near else None)
            if twin is None:
                stay.append(row)
            else:
                row |= {"status": "rejected", "reason": check, "duplicate_of": twin}
    return [(row["status"], row.get("reason"), row.get("duplicate_of")) for row in rows]


@pytest.mark.parametrize("max_distance", [None, 0, 1, 3])
def test_the_whole_set_is_audited_as_defined(max_distance: int | None) -> None:
    rows = random_rows(200)
    chosen = [int(row["perceptual_hash"]) ^ 1 for row in rows if row["perceptual_hash"] is not None]  # type: ignore[call-overload]
    evaluation = {"test": (["a", "b", "c"], chosen[20:23]), "val": (["d", "e"], chosen[60:62])}
    arrays = {name: (keys, np.array(hashes)) for name, (keys, hashes) in evaluation.items()}
    audited = audit_rows(table(rows), arrays, max_distance, evaluation_distance=1)
    result = list(zip(*(audited[name].to_pylist() for name in ("status", "reason", "duplicate_of")), strict=True))
    assert result == reference_audit(rows, evaluation, max_distance, 1)
    reasons = {reason for _, reason, _ in result}
    assert {"duplicate", "near_evaluation", "safety", "not_finite"} <= reasons
    assert ("near_duplicate" in reasons) == (max_distance is not None)
    assert audit_rows(audited, arrays, max_distance, evaluation_distance=1).equals(audited)  # nothing left to do


def test_a_chain_of_near_pictures_keeps_every_second_link() -> None:
    """Greedy: 0 - 3 bits - 1 - 3 bits - 2: the middle one goes, the last is far from the first and stays."""
    rows: list[Row] = [
        {"key": str(i), "status": "ok", "exact_hash": str(i), "perceptual_hash": h} for i, h in enumerate((0, 7, 63))
    ]
    assert audit_rows(table(rows), max_distance=3)["status"].to_pylist() == ["ok", "rejected", "ok"]
    assert audit_rows(table(rows), max_distance=2)["status"].to_pylist() == ["ok"] * 3


def test_columns_are_added_where_missing_and_the_others_stay() -> None:
    plain = table(random_rows(30)).drop_columns(["duplicate_of"]).append_column("seed", pa.array(range(30)))
    audited = audit_rows(plain)
    assert audited.column_names == [*plain.column_names, "duplicate_of"]
    assert audited["seed"].equals(plain["seed"])
    empty = audit_rows(table([]))
    assert len(empty) == 0
    with pytest.raises(DataError, match="no column exact_hash"):
        audit_rows(plain.drop_columns(["exact_hash"]))
    with pytest.raises(DataError, match="'val': 1 keys for 2 hashes"):
        audit_rows(plain, {"val": (["a"], np.array([1, 2]))})
