"""The embedded data set."""

from __future__ import annotations

import io
from importlib import resources

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.datasets.emoji import HANDS

PACK = resources.files("gmail_lightning.datasets.emoji")


def read(name: str) -> list[dict[str, object]]:
    with PACK.joinpath(f"{name}.parquet").open("rb") as file:
        return pq.read_table(file).to_pylist()


@pytest.mark.parametrize("hand", HANDS[:-1])
def test_rows_are_the_drawings_of_the_pack(hand: str) -> None:
    concepts, drawings = read("concepts"), read(hand)
    data = EmojiDataset(hand)
    assert len(data) == len(drawings) == (1054 if hand == "emojione" else 1594)
    assert data.modality.tolist() == [int(hand != "noto")] * len(data)
    assert np.array_equal(data.pair_id, data.image_id)
    for i in (0, 77, len(data) - 1):
        row, concept = data[i], concepts[int(data.image_id[i])]
        assert row["sample_key"] == f"{hand}/{drawings[i]['concept']}" == f"{hand}/{concept['concept']}"
        assert row["source"] == ("real" if hand == "noto" else hand)
        assert data.class_names is not None
        assert data.class_names[row["label"]] == concept["group_en"]
        drawn = Image.open(io.BytesIO(drawings[i]["image"])).convert("RGBA")  # type: ignore[arg-type]
        on_white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
        expected = torch.from_numpy(np.array(on_white)).permute(2, 0, 1)
        assert (row["image"].int() - expected.int()).abs().max() <= 1


def test_generated_rows_are_the_images_of_their_captions() -> None:
    images, concepts = read("generated"), read("concepts")
    data = EmojiDataset("generated")
    assert len(data) == len(images)
    assert (PACK / "generated.parquet").stat().st_size <= 6e6
    noto = EmojiDataset("noto")
    for i in (0, 1000, len(data) - 1):
        row, image = data[i], images[i]
        concept = int(data.image_id[i])
        assert concepts[concept]["concept"] == image["concept"]
        assert row["captions"] == [image["caption"]]
        assert image["caption"] in noto.captions(concept)
        assert (row["modality"], row["source"], row["pair_id"]) == (1, "generated", concept)
        assert row["sample_key"] == f"generated/{image['key']}"
        stored = np.array(Image.open(io.BytesIO(image["image"])).convert("RGB"))  # type: ignore[arg-type]
        assert np.array_equal(row["image"].permute(1, 2, 0).numpy(), stored)
    assert len({data.sample_key(i) for i in range(len(data))}) == len(data)
    novel, paired = EmojiDataset("generated", "novel"), EmojiDataset("generated", "paired")
    assert len(novel) + len(paired) == len(data)
    assert set(novel.image_id) == set(EmojiDataset("noto", "novel").image_id)
    with pytest.raises(ValueError, match="made of English captions"):
        EmojiDataset("generated", locale="de")


@pytest.mark.parametrize("locale", ["en", "de"])
def test_classes_are_numbered_alike_for_every_hand(locale: str) -> None:
    concepts = read("concepts")
    for classes, count in (("group", 9), ("subgroup", 95), ("concept", 373)):
        names = set()
        for hand in ("noto", "twemoji", "emojione"):
            data = EmojiDataset(hand, "novel", locale, classes=classes)
            column = f"{'label' if classes == 'concept' else classes}_{locale}"
            for i in range(0, len(data), 7):
                assert data.class_names[data.label[i]] == concepts[int(data.image_id[i])][column]
            names.add(tuple(data.class_names))
        assert len(names) == 1
        assert len(set(data.class_names)) == len(data.class_names) == count
    assert np.array_equal(EmojiDataset("noto", "novel", locale, classes="concept").label, np.arange(373))
    english = EmojiDataset("noto", classes="subgroup").label
    assert np.array_equal(EmojiDataset("noto", locale=locale, classes="subgroup").label, english)
    data = EmojiDataset("noto", locale=locale)
    assert data.templates is not None
    label = data.captions(5)[0]
    assert [template.replace("{}", label) for template in data.templates] == data.captions(5)[:2]
    with pytest.raises(ValueError, match="Unknown classes 'groups'"):
        EmojiDataset(classes="groups")  # type: ignore[arg-type]


def test_concept_sets_divide_families() -> None:
    family = {i: row["family"] for i, row in enumerate(read("concepts"))}
    paired, novel = EmojiDataset("noto", "paired"), EmojiDataset("noto", "novel")
    assert len(paired) + len(novel) == 1594
    assert not {family[i] for i in paired.image_id} & {family[i] for i in novel.image_id}
    assert set(EmojiDataset("fluent", "novel").pair_id) == set(novel.pair_id)
    assert set(EmojiDataset("emojione", "novel").pair_id) < set(novel.pair_id)


def test_captions_follow_the_grammar() -> None:
    data = EmojiDataset("noto")
    assert data.captions(0) == [
        "grinning face",
        "a drawing of grinning face",
        "grinning face, a picture about cheerful and cheery",
        "smileys & emotion: grinning face with cheerful, cheery and face",
        "a picture about cheerful, cheery and face from smiling",
    ]
    assert len(data.grammar.splitlines()) == 5
    peanuts = [row["label_en"] for row in read("concepts")].index("peanuts")
    assert EmojiDataset("twemoji", locale="de").captions(peanuts) == [
        "Erdnuss",
        "eine Zeichnung: Erdnuss",
        "Erdnuss, ein Bild über essen",  # the keyword erdnuss is the label
        "Essen & Trinken: Erdnuss mit essen",
        "ein Bild über essen aus Gemüse",
    ]


@pytest.mark.parametrize("locale", ["en", "de"])
def test_every_image_has_five_different_references(locale: str) -> None:
    data = EmojiDataset("noto", locale=locale)
    for i in range(len(data)):
        captions = data.captions(i)
        assert len(set(captions)) == 5
        assert all(caption == " ".join(caption.split()) and "{" not in caption for caption in captions)


def test_another_modality() -> None:
    data = EmojiDataset("noto", modality="generated")
    assert (data.modality[0], data.source(0)) == (1, "noto")
    data = EmojiDataset("twemoji", modality="real")
    assert (data.modality[0], data.source(0)) == (0, "real")


def test_a_row_is_a_copy() -> None:
    data = EmojiDataset("noto")
    data[5]["image"].zero_()
    assert data[5]["image"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hand": "Noto"}, "Unknown hand 'Noto' .* Known: noto, fluent_flat, fluent, twemoji, emojione, generated"),
        ({"concept_set": "train"}, "Unknown concept_set 'train' .* Known: paired, novel, None"),
        ({"locale": "fr"}, "Unknown locale 'fr' .* Known: en, de"),
        ({"modality": "fake"}, "Unknown modality 'fake'"),
    ],
)
def test_unknown_names_are_answered_with_the_known(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmojiDataset(**arguments)  # type: ignore[arg-type]


def test_the_notice_names_every_author() -> None:
    notice = PACK.joinpath("NOTICE.md").read_text(encoding="utf-8")
    for name in (
        *[f"{hand}.parquet" for hand in HANDS],
        "Google Inc",
        "Twitter, Inc",
        "Microsoft Corporation",
        "EmojiOne",
    ):
        assert name in notice
    assert "CC-BY 4.0" in notice
    assert "Unicode, Inc." in notice
