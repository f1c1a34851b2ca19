"""Re-pairing of a written store."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tar_fixtures import picture, store_row, write_store
from torch import Tensor, nn

from gmail_lightning.command.main import main
from gmail_lightning.datasets import DataError, TarShards
from gmail_lightning.generation.images.repair import repair_store
from gmail_lightning.models import DualEncoder
from gmail_lightning.types import ImageSpec, TextSpec


def number(texts: list[str]) -> Tensor:
    """The last word of each text."""
    return torch.tensor([[int(text.split()[-1])] for text in texts])


class Knowing(DualEncoder):
    """Knows ``picture(n)`` by heart and calls it n; a caption "... m" names the picture ``wanted[m]``."""

    def __init__(self, wanted: list[int]) -> None:
        super().__init__()
        self.pictures = torch.stack([torch.from_numpy(picture(n)) for n in range(len(wanted))]).flatten(1)
        self.wanted, self.unused = torch.tensor(wanted), nn.Parameter(torch.zeros(()))

    image_spec, text_spec, embed_dim = ImageSpec((6, 6)), TextSpec(number, 1), 16
    logit_scale = torch.ones(())

    def encode_image(self, image: Tensor) -> Tensor:
        pixels = (image * 255).round().byte().permute(0, 2, 3, 1).flatten(1)
        known = (pixels[:, None] == self.pictures).all(dim=2).int().argmax(dim=1)
        return nn.functional.one_hot(known, 16).float()

    def encode_text(self, text: Tensor) -> Tensor:
        return nn.functional.one_hot(self.wanted[text[:, 0]], 16).float()

    def lora_targets(self, roles, tower="image"):
        return []


def test_every_caption_gets_the_image_that_it_names(tmp_path: Path) -> None:
    wanted = [0, 2, 1, 3, 7, 5, 6, 4]
    rows = [store_row(n) for n in range(8)]
    rows[5] |= {"status": "rejected", "reason": "duplicate"}
    folder = write_store(tmp_path / "store", rows)
    before = pq.read_table(folder / "manifest.parquet")
    assert repair_store(folder, Knowing(wanted), num_captions=1, batch_size=3) == (7, 4)
    table = pq.read_table(folder / "manifest.parquet")
    assert table.select(before.column_names).equals(before)
    expected = [f"k{n:03d}" for n in wanted]
    expected[5] = None  # type: ignore[call-overload]
    assert table["repaired_key"].to_pylist() == expected
    assert table["repair_score"].to_pylist() == pytest.approx([1.0] * 5 + [None] + [1.0] * 2)
    assert str(table.schema.field("repair_score").type) == "double"
    assert not list(folder.glob("*.tmp-*"))
    data = TarShards(folder, repaired=True)  # what it is for
    assert torch.equal(data.image(1), torch.from_numpy(picture(2)).permute(2, 0, 1))
    assert repair_store(folder, Knowing(list(range(8))), num_captions=1) == (7, 0)  # again, over the columns
    assert pq.read_schema(folder / "manifest.parquet").names == table.column_names


def test_rows_of_one_caption_get_different_images_and_splits_stay_apart(tmp_path: Path) -> None:
    rows = [store_row(n, caption=f"caption {n // 2}") for n in range(4)]
    rows += [store_row(n, split="val", shard="val-000000", caption="caption 0") for n in (4, 5)]
    folder = write_store(tmp_path / "store", rows)
    repair_store(folder, Knowing([0] * 6))
    keys = pq.read_table(folder / "manifest.parquet")["repaired_key"].to_pylist()
    assert keys[0] == "k000"  # the image that its caption names
    assert keys[1] != keys[0]
    assert set(keys[4:]) == {"k004", "k005"}


def test_a_row_keeps_its_own_image_where_it_ties(tmp_path: Path) -> None:
    rows = [store_row(n, caption="caption 0") for n in range(4)] + [store_row(4, caption="caption 4")]
    folder = write_store(tmp_path / "store", rows)
    assert repair_store(folder, Knowing([0] * 5)) == (5, 0)


def test_sentences_of_another_encoder_decide(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", [store_row(n) for n in range(3)])
    calls: list[list[str]] = []

    def sentences(texts: list[str]) -> Tensor:
        calls.append(texts)
        return torch.eye(3)[: len(texts)]

    repair_store(folder, Knowing([0, 1, 2]), sentences, num_captions=1)
    assert calls == [["caption 0", "caption 1", "caption 2"]]


def test_the_verb_writes_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_store(tmp_path / "store", [store_row(n) for n in range(6)])
    assert main(["repair", str(folder), "--encoder", "emoji"]) == 0
    assert "6 rows" in capsys.readouterr().out
    table = pq.read_table(folder / "manifest.parquet")
    assert set(table["repaired_key"].to_pylist()) <= set(table["key"].to_pylist())
    assert main(["repair", str(tmp_path), "--encoder", "emoji"]) == 3
    assert "manifest.parquet: no such file" in capsys.readouterr().err
    assert main(["repair", str(folder), "--encoder", "nonsense"]) == 2


def test_a_store_without_good_rows_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", [store_row(0, status="rejected", reason="black")])
    with pytest.raises(DataError, match="no row is ok"):
        repair_store(folder, Knowing([0]))
