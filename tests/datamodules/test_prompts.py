"""From captions to prompts: names, seeds, order, batches."""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datasets import CocoCaptions, DataError, EmojiDataset
from gmail_lightning.generation.images.prompt_table import PromptTable
from gmail_lightning.leakage import overlap
from gmail_lightning.leakage.check import AllowedOverlap
from gmail_lightning.transforms.image_hash import perceptual_hash

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from generation_ranks import Captions

RECIPE = "0123abcd"


def name_of(image_id: int, caption: str, image_index: int) -> str:
    """As the design says it."""
    digest = hashlib.blake2b(f"{image_id} {' '.join(caption.split())}".encode(), digest_size=8).hexdigest()
    return f"{digest}-{image_index:03d}-{RECIPE}"


def test_every_caption_becomes_its_images() -> None:
    rows = Captions([["one", "two\n lines"], ["three"], ["four", "five", "six"]], first_id=7)
    table = PromptTable([rows], images_per_caption=2, template="a drawing of {caption}, {caption}")
    texts = [(7, "one"), (7, "two lines"), (8, "three"), (9, "four"), (9, "five"), (9, "six")]
    expected = [name_of(image_id, text, k) for image_id, text in texts for k in range(2)]
    assert table.keys(RECIPE).to_pylist() == expected
    assert [table.key(i, RECIPE) for i in range(len(table))] == expected
    batch = table.batch("train-000000", np.array([2, 3, 11]), RECIPE)
    assert batch["shard"] == "train-000000"
    assert batch["row"] == [2, 3, 11]
    assert batch["caption"] == ["two lines", "two lines", "six"]
    assert batch["prompt"] == [f"a drawing of {caption}, {caption}" for caption in batch["caption"]]
    digests = [hashlib.blake2b(expected[i].encode(), digest_size=8).digest() for i in (2, 3, 11)]
    assert batch["seed"] == [int.from_bytes(digest, "big") >> 1 for digest in digests]
    assert table.columns(11) == {
        "prompt_id": expected[11][:16], "image_index": 1, "image_id": 9, "pair_id": 10, "concept_set": "novel",
    }  # fmt: skip


def test_rows_that_say_the_same_of_the_same_image_are_one_prompt() -> None:
    first, again = Captions(["one", "two"], first_id=1), Captions(["one ", "one"], first_id=1)
    table = PromptTable([first, again])
    assert table.keys(RECIPE).to_pylist() == [name_of(1, "one", 0), name_of(2, "two", 0), name_of(2, "one", 0)]
    assert table.repeated == 1


@pytest.mark.parametrize("count", [1, 2, None])
def test_the_first_captions_of_each_row(count: int | None) -> None:
    rows = EmojiDataset("noto", "novel")
    table = PromptTable([rows], captions_per_row=count)
    expected = [caption for i in range(len(rows)) for caption in rows.captions(i)[:count]]
    assert [table.caption(i) for i in range(len(table))] == expected
    assert table.columns(0)["concept_set"] == "novel"


def test_no_batch_holds_two_shards() -> None:
    data = PromptDataModule(Captions([str(i) for i in range(20)]), evaluation={}, batch_size=3)
    data.setup("predict")
    with pytest.raises(MisconfigurationException, match="DatasetWriter"):
        data.predict_dataloader()
    data.schedule(lambda: (RECIPE, [("a", np.arange(0, 8)), ("c", np.array([19, 10, 11, 12]))]))
    batches = list(data.predict_dataloader())
    assert [(b["shard"], b["row"]) for b in batches] == [
        ("a", [0, 1, 2]), ("a", [3, 4, 5]), ("a", [6, 7]), ("c", [19, 10, 11]), ("c", [12]),
    ]  # fmt: skip
    assert [b["caption"] for b in batches] == [[str(i) for i in b["row"]] for b in batches]


@pytest.mark.slow
def test_keys_of_a_million_prompts_are_arrays() -> None:
    numbers = np.arange(1_000_000, dtype=np.uint64) * np.uint64(2**44 + 1)
    from gmail_lightning.generation.images.image_names import image_keys

    keys = image_keys(numbers, 2, RECIPE)
    assert len(keys) == 2_000_000
    assert keys.nbytes < 2_000_000 * 40
    for i in (0, 1, 777_777, 1_999_999):
        assert keys[i].as_py() == f"{int(numbers[i // 2]):016x}-{i % 2:03d}-{RECIPE}"


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"images_per_caption": 0}, "images_per_caption=0"),
        ({"images_per_caption": 1001}, "at most 1000"),
        ({"captions_per_row": 0}, "captions_per_row=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"prompt_template": "a photo"}, "has no {caption}"),
        ({"split": "../train"}, "part of file names"),
        ({"allow_overlap": {"val": AllowedOverlap(["caption"], "why")}}, "allow_overlap names val"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(answer)):
        PromptDataModule(Captions(["one"]), **{"evaluation": {}, **wrong})


def test_captions_that_cannot_be_used_are_named() -> None:
    with pytest.raises(DataError, match=r"row 2 .*caption 2 is blank"):
        PromptDataModule(Captions([["one"], ["two", "  "]]), evaluation={}).setup("predict")
    with pytest.raises(DataError, match="Nothing to generate"):
        PromptDataModule([], evaluation={}).setup("predict")

    class Clashing(Captions):
        def columns(self, index):
            return {"status": "fine"}

    with pytest.raises(DataError, match="columns of its own named status"):
        PromptDataModule(Clashing(["one"]), evaluation={}).setup("predict")
    with pytest.raises(MisconfigurationException, match="not fit"):
        PromptDataModule(Captions(["one"]), evaluation={}).setup("fit")


class Pictures(Captions):
    """Evaluation rows whose hashes are not known; two rows show each picture."""

    def read_image(self, index):
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index // 2)).mul(255).to(torch.uint8)

    def picture(self):
        return np.arange(len(self)) // 2


class Lost(Captions):
    """Their files are missing."""

    def read_image(self, index):
        raise FileNotFoundError(2, "no such file", "gone.png")


def test_evaluation_pictures_are_decoded_and_what_cannot_be_compared_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, lost = Pictures(["a", "b", "c", "d"], 900), Lost(["e"], 950)
    data = PromptDataModule(Captions(["one"]), evaluation={"val": [pictures, lost]})
    with pytest.warns(UserWarning, match="val: generated images were not compared with 1 pictures of Lost .*gone.png"):
        hashes, notes = data.evaluation_hashes()
    assert list(hashes) == ["val"]
    assert hashes["val"][0] == ["row-0", "row-2"]
    assert hashes["val"][1].tolist() == [perceptual_hash(pictures.image(row)) for row in (0, 2)]
    assert notes[1:] == ["val: generated images were compared with its 2 images (near_evaluation)"]
    monkeypatch.setattr(overlap, "MAX_DECODED", 1)
    with pytest.warns(UserWarning, match="2 pictures of Pictures .*too many"):
        assert data.evaluation_hashes()[0] == {}


def test_captions_of_another_split_are_refused(tmp_path: Path) -> None:
    image = {"filename": "1.png", "cocoid": 1, "split": "test", "sentences": [{"raw": "a fox", "sentid": 1}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [image]}))
    captions = CocoCaptions(tmp_path / "dataset.json", tmp_path, split="test")
    with pytest.raises(DataError, match="is of the split 'test'"):
        PromptDataModule(captions, evaluation={}).setup("predict")
    PromptDataModule(captions, split="test").setup("predict")
