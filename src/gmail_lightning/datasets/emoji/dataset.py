"""The data set that ships with the package: the same concepts, drawn by several hands."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from gmail_lightning.datasets.base import ImageTextDataset, ModalityName, constant_modality, decode_image
from gmail_lightning.transforms.image_hash import perceptual_hash

HANDS = ("noto", "fluent_flat", "fluent", "twemoji", "emojione", "generated")
CONCEPT_SETS = ("paired", "novel")

# {two} and {three} stand for up to that many keywords, joined as a list in words.
TEMPLATES = {
    "en": (
        "{label}",
        "a drawing of {label}",
        "{label}, a picture about {two}",
        "{group}: {label} with {three}",
        "a picture about {three} from {subgroup}",
    ),
    "de": (
        "{label}",
        "eine Zeichnung: {label}",
        "{label}, ein Bild über {two}",
        "{group}: {label} mit {three}",
        "ein Bild über {three} aus {subgroup}",
    ),
}
#: Of the grammar, those that name no more than a class.
CLASS_TEMPLATES = {"en": ("{}", "a drawing of {}"), "de": ("{}", "eine Zeichnung: {}")}
AND = {"en": " and ", "de": " und "}


@cache
def _read(name: str) -> dict[str, list[Any]]:
    """Reads one file of the pack into columns; several data sets of a process share it."""
    with resources.files("gmail_lightning.datasets.emoji").joinpath(f"{name}.parquet").open("rb") as file:
        columns: dict[str, list[Any]] = pq.read_table(file).to_pydict()
    return columns


@cache
def _pixels(hand: str, row: int) -> Tensor:
    """Decodes one drawing of a hand; all of a hand are 20 MB, so each is decoded once per process."""
    return decode_image(_read(hand)["image"][row])


@cache
def _hashes(hand: str) -> np.ndarray:
    """Perceptual hashes of all drawings of a hand, once per process."""
    return np.array([perceptual_hash(_pixels(hand, row)) for row in range(len(_read(hand)["image"]))])


def _in_words(words: list[str], conjunction: str) -> str:
    return conjunction.join(part for part in (", ".join(words[:-1]), words[-1]) if part)


class EmojiDataset(ImageTextDataset):
    """1594 concepts (64 px drawings, not photographs), each drawn once by a hand; ``emojione`` draws 1054 of them.

    ``generated`` are images of 32 px that a diffusion model made of the English captions; it was trained on the other
    hands and never saw Noto. Each has the caption that it was made of, and several show one concept.

    Noto stands for real images, every other hand for a generator. Rows of one concept by several hands are pairs:
    ``pair_id`` and ``image_id`` are the number of the concept. Concepts that are near copies of one another form one
    family; families are divided by a stable hash into ``paired`` (75 %) and ``novel``, which no aligner should see.
    Labels and keywords come from Unicode CLDR, and so do the classes. Licences: ``NOTICE.md`` beside the files.

    Args:
        hand: ``noto``, ``fluent_flat``, ``fluent``, ``twemoji``, ``emojione`` or ``generated``.
        concept_set: ``paired``, ``novel``, or None for all concepts.
        locale: Language of the captions, ``en`` or ``de``.
        modality: Overrides the modality of the hand.
        classes: What ``label`` numbers, alike for every hand: the 9 groups or the 95 subgroups of Unicode, or the
            concepts of ``concept_set``, named by their labels.

    Raises:
        ValueError: If a name is unknown; lists the known ones.
    """

    def __init__(
        self,
        hand: str = "noto",
        concept_set: Literal["paired", "novel"] | None = None,
        locale: str = "en",
        modality: ModalityName | None = None,
        classes: Literal["group", "subgroup", "concept"] = "group",
    ) -> None:
        for argument, value, known in (
            ("hand", hand, HANDS),
            ("concept_set", concept_set, (*CONCEPT_SETS, None)),
            ("locale", locale, tuple(TEMPLATES)),
            ("classes", classes, ("group", "subgroup", "concept")),
        ):
            if value not in known:
                raise ValueError(f"Unknown {argument} {value!r} of EmojiDataset. Known: {', '.join(map(str, known))}.")
        if hand == "generated" and locale != "en":
            raise ValueError(f"The generated images were made of English captions: locale={locale!r} has none.")
        self.hand, self.concept_set, self.locale = hand, concept_set, locale
        concepts = _read("concepts")
        number = {concept: i for i, concept in enumerate(concepts["concept"])}
        drawn = [number[concept] for concept in _read(hand)["concept"]]
        rows = [row for row, i in enumerate(drawn) if concept_set in (None, concepts["concept_set"][i])]
        self._rows = rows  # of the file of the hand
        self.image_id = np.array([drawn[row] for row in rows], dtype=np.int64)
        self.pair_id = self.image_id
        self.modality = constant_modality(modality or ("real" if hand == "noto" else "generated"), len(rows))
        self._source = "real" if self.modality[0] == 0 else hand
        self.templates = list(CLASS_TEMPLATES[locale])
        if classes == "concept":
            members = [i for i, name in enumerate(concepts["concept_set"]) if concept_set in (None, name)]
            self.class_names = [concepts[f"label_{locale}"][i] for i in members]
            self.label = np.searchsorted(members, self.image_id)
        else:
            numbers = concepts["group" if classes == "group" else "subgroup_en"]  # the same in every language
            names = dict(sorted(zip(numbers, concepts[f"{classes}_{locale}"], strict=True)))
            self.class_names = list(names.values())
            self.label = np.searchsorted(list(names), np.array(numbers)[self.image_id])

    @property
    def grammar(self) -> str:
        """The templates of the captions, one a line."""
        return "\n".join(TEMPLATES[self.locale])

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return _pixels(self.hand, self._rows[index]).clone()

    def captions(self, index: int) -> list[str]:
        """Returns one caption per template, in the order of the grammar: the first is the label."""
        if self.hand == "generated":
            return [_read(self.hand)["caption"][self._rows[index]]]
        concepts, concept = _read("concepts"), int(self.image_id[index])
        label, group, subgroup = (concepts[f"{c}_{self.locale}"][concept] for c in ("label", "group", "subgroup"))
        tags = [tag for tag in concepts[f"tags_{self.locale}"][concept] if tag.lower() != label.lower()] or [subgroup]
        two, three = _in_words(tags[:2], AND[self.locale]), _in_words(tags[:3], AND[self.locale])
        return [
            template.format(label=label, group=group, subgroup=subgroup, two=two, three=three)
            for template in TEMPLATES[self.locale]
        ]

    def sample_key(self, index: int) -> str:  # noqa: D102
        if self.hand == "generated":
            return f"generated/{_read(self.hand)['key'][self._rows[index]]}"
        return f"{self.hand}/{_read('concepts')['concept'][int(self.image_id[index])]}"

    def source(self, index: int) -> str:  # noqa: D102
        return self._source

    def perceptual_hashes(self) -> np.ndarray:  # noqa: D102
        hashes: np.ndarray = _hashes(self.hand)[self._rows]
        return hashes

    def columns(self, index: int) -> dict[str, str]:
        """Returns ``concept``, its code points, and ``concept_set``."""
        concepts, concept = _read("concepts"), int(self.image_id[index])
        return {name: concepts[name][concept] for name in ("concept", "concept_set")}
