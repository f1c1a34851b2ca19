"""The gallery against what the data hold: each image with its own references and caption, the same at every step."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from echo_task import EchoTask
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.callbacks import CaptionGallery
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.tasks import RetrievalTask
from gmail_lightning.types import Modality

HANDS = ("noto", "fluent_flat")


class Page(HTMLParser):
    """Reads a gallery: of each card its image, and the texts by the tag that holds them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cards: list[dict[str, Any]] = []
        self.tag, self.sources, self.title = "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "article":
            self.cards.append(
                {"kind": values["class"], "image": None, "li": [], "b": "", "small": "", "em": "", "p": ""}
            )
        if tag == "img":
            assert values["src"].startswith("data:image/png;base64,")
            data = base64.b64decode(values["src"].partition(",")[2])
            self.cards[-1]["image"] = np.asarray(Image.open(io.BytesIO(data)))

    def handle_data(self, data: str) -> None:
        if self.tag == "title":
            self.title += data
        if self.cards and self.tag == "li":
            self.cards[-1]["li"].append(data)
        elif self.cards and self.tag in ("b", "small", "em", "p"):
            self.cards[-1][self.tag] += data

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""


def by_key(data: MixedModalityDataModule) -> dict[str, dict[str, Any]]:
    """Pixels, references and ids of the one evaluation set, straight from its loader."""
    (loader,) = data.val_dataloader()
    found = {}
    for batch in loader:
        for row, key in enumerate(batch["sample_key"]):
            found[key] = {
                "pixels": (batch["image"][row] * 255).round().byte().permute(1, 2, 0).numpy(),
                "references": batch["references"][row],
                "modality": Modality(int(batch["modality"][row])).name.lower(),
                "image_id": int(batch["image_id"][row]),
            }
    return found


def validate(folder: Path, task: EchoTask, gallery: CaptionGallery, **settings: Any) -> Page:
    data = emoji_data(**settings)
    quiet_trainer(folder, callbacks=[gallery]).validate(task, data, verbose=False)
    return Page(folder / "captions" / "novel-validate.html")


@pytest.mark.slow
def test_every_image_is_shown_with_its_own_texts_at_every_validation(tmp_path: Path) -> None:
    data, gallery = emoji_data(), CaptionGallery(num_images=7)
    trainer = quiet_trainer(tmp_path, callbacks=[gallery], max_steps=4, val_check_interval=2, num_sanity_val_steps=-1)
    trainer.fit(EchoTask(), data)
    files = sorted((tmp_path / "captions").iterdir())
    assert [file.name for file in files] == [f"novel-step-00000{step}.html" for step in (0, 2, 4)]
    rows, pages = by_key(data), [Page(file) for file in files]
    for step, page in zip((0, 2, 4), pages, strict=True):
        assert page.title == f"novel, step {step}"
        assert len(page.cards) == 7
        assert all(source.startswith("data:") for source in page.sources)  # opens without a network
        for card, first in zip(page.cards, pages[0].cards, strict=True):
            modality, _, key = card["small"].partition(": ")
            assert card["small"] == first["small"]
            assert card["b"] == f"{key} at {step}"
            assert card["li"] == rows[key]["references"]
            assert modality == card["kind"] == rows[key]["modality"]
            np.testing.assert_array_equal(card["image"], rows[key]["pixels"])


@pytest.mark.slow
def test_the_choice_spreads_over_the_set_and_keeps_pairs_together(tmp_path: Path) -> None:
    first = validate(tmp_path / "1", EchoTask(), CaptionGallery(num_images=16), eval_batch_size=128)
    again = validate(tmp_path / "2", EchoTask(), CaptionGallery(num_images=16), eval_batch_size=7)
    keys = [card["small"].partition(": ")[2] for card in first.cards]
    assert keys == [card["small"].partition(": ")[2] for card in again.cards]
    rows = by_key(emoji_data(input_spec=EchoTask.input_spec))
    ids = sorted(row["image_id"] for row in rows.values())
    shown = [rows[key]["image_id"] for key in keys]
    assert shown[::2] == shown[1::2]  # the two drawings of eight concepts, beside one another
    assert len(set(shown)) == 8
    quarters = np.searchsorted(ids, shown) * 4 // len(ids)
    assert set(quarters.tolist()) == {0, 1, 2, 3}


def test_large_images_are_made_small(tmp_path: Path) -> None:
    page = validate(tmp_path, EchoTask(), CaptionGallery(num_images=3, size=10))
    rows = by_key(emoji_data(input_spec=EchoTask.input_spec))
    for card in page.cards:
        pixels = Image.fromarray(rows[card["small"].partition(": ")[2]]["pixels"])
        expected = np.asarray(pixels.resize((10, 10), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(card["image"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('</b><script>alert("x")</script> & co', '</b><script>alert("x")</script> & co'),
        ("两只狗 🐶 {braces}", "两只狗 🐶 {braces}"),
        ("half a surrogate \ud83d", "half a surrogate �"),  # a character that no file can hold
    ],
)
def test_hard_captions_are_shown_as_they_are(text: str, shown: str, tmp_path: Path) -> None:
    page = validate(tmp_path, EchoTask(lambda key, step: text), CaptionGallery(num_images=2))
    assert [card["b"] for card in page.cards] == [shown] * 2
    assert page.cards[0]["li"]


def test_an_empty_caption_is_no_blank(tmp_path: Path) -> None:
    page = validate(tmp_path, EchoTask(lambda key, step: " \n"), CaptionGallery(num_images=2))
    assert [(card["b"], card["em"]) for card in page.cards] == [("", "nothing was written")] * 2


@pytest.mark.slow
def test_tensorboard_has_the_images_once_and_the_texts_at_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gallery, task = CaptionGallery(num_images=9, size=24), EchoTask(lambda key, step: f"a|b\n<i>\ud83d {step}")
    settings = {"max_steps": 2, "val_check_interval": 1, "num_sanity_val_steps": 0}
    data = emoji_data()
    trainer = quiet_trainer(tmp_path, callbacks=[gallery], **settings)
    trainer.loggers = [TensorBoardLogger(tmp_path, name="", version="")]
    trainer.fit(task, data)
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("captions/novel")
    drawn = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert drawn.shape == (2 * 26 + 2, 8 * 26 + 2, 3)  # eight in a row, two pixels between them
    texts = events.Tensors("captions/novel/text_summary")
    assert [text.step for text in texts] == [1, 2]
    lines = texts[1].tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + 9
    cards = Page(tmp_path / "captions" / "novel-step-000002.html").cards
    rows = by_key(data)
    for number, (line, card) in enumerate(zip(lines[2:], cards, strict=True)):
        assert line.startswith(f"| {number + 1} | {card['kind']} | a&#124;b &lt;i&gt;&#55357; 2 | ")
        assert line.count("|") == 5
        top, left = 2 + 26 * (number // 8), 2 + 26 * (number % 8)
        pixels = rows[card["small"].partition(": ")[2]]["pixels"]
        np.testing.assert_array_equal(drawn[top : top + 24, left : left + 24], pixels)


def test_names_questions_and_features_in_place_of_pixels(tmp_path: Path) -> None:
    gallery, task = CaptionGallery(num_images=3), EchoTask()
    trainer = quiet_trainer(tmp_path, callbacks=[gallery])
    batch: dict[str, Any] = {
        "image": torch.full((1, 3, 4, 4), 0.5), "image_row": torch.tensor([2]),
        "image_features": torch.zeros(2, 5), "feature_row": torch.tensor([0, 1]),
        "modality": torch.tensor([0, 1, 0]), "image_id": torch.tensor([5, 6, 7]), "row_id": torch.tensor([0, 1, 2]),
        "sample_key": ["a", "b", "c"], "references": [["x"], [], ["z"]], "question": ["what?", "", "<why>"],
        "eval_set": "science/qa 1.0",
    }  # fmt: skip
    task.result_of("science/qa 1.0").captions = ["1", "2", "3"]
    gallery.setup(trainer, task, "test")
    trainer.state.fn = TrainerFn.TESTING
    gallery.on_test_start(trainer, task)
    gallery.on_test_batch_end(trainer, task, None, batch, 0)
    gallery.on_test_end(trainer, task)
    page = Page(tmp_path / "captions" / "science_qa_1.0-test.html")
    assert page.title == "science/qa 1.0, test of the model as it is"
    assert [card["p"] for card in page.cards] == ["what?", "", "<why>"]
    assert [card["b"] for card in page.cards] == ["1", "2", "3"]
    assert [card["image"] is None for card in page.cards] == [True, True, False]
    assert (page.cards[2]["image"] == 128).all()
    assert [card["li"] for card in page.cards] == [["x"], [], ["z"]]


@pytest.mark.slow
def test_a_test_has_pages_of_its_own_and_a_trial_none(tmp_path: Path) -> None:
    sets = {hand: [EmojiDataset(hand, "novel")] for hand in HANDS}
    data = MixedModalityDataModule(test=sets, eval_batch_size=100)
    for trial in (True, False):
        trainer = quiet_trainer(tmp_path, callbacks=[CaptionGallery(num_images=2)], fast_dev_run=trial)
        trainer.test(EchoTask(), data, verbose=False)
        assert (tmp_path / "captions").exists() != trial
    assert {file.name for file in (tmp_path / "captions").iterdir()} == {f"{hand}-test.html" for hand in HANDS}
    settings = {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    quiet_trainer(tmp_path / "fit", callbacks=[CaptionGallery()], **settings).fit(EchoTask(), emoji_data())
    assert [file.name for file in (tmp_path / "fit" / "captions").iterdir()] == ["novel-step-000001.html"]


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images=0 and size=160 must be at least 1"):
        CaptionGallery(num_images=0)
    other = RetrievalTask(tiny_encoder())
    with pytest.raises(MisconfigurationException, match="RetrievalTask has no captions of the last evaluation batch"):
        quiet_trainer(tmp_path, callbacks=[CaptionGallery()]).validate(other, emoji_data(), verbose=False)

    class Short(EchoTask):
        def written(self, batch: Any) -> list[str]:
            return super().written(batch)[1:]

    with pytest.raises(RuntimeError, match="127 captions of a batch of 128 rows"):
        quiet_trainer(tmp_path, callbacks=[CaptionGallery()]).validate(Short(), emoji_data(), verbose=False)
