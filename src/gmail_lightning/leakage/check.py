"""What training shares with the evaluation sets: captions, image ids, pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.leakage.overlap import PIXEL_DISTANCE, shared_captions, shared_image_ids, shared_pictures

Kind = Literal["caption", "image_id", "pixels"]
KINDS: tuple[Kind, ...] = ("caption", "image_id", "pixels")
COUNT = {"caption": shared_captions, "image_id": shared_image_ids, "pixels": shared_pictures}


@dataclass(frozen=True)
class AllowedOverlap:
    """What an evaluation set shares with training on purpose.

    Attributes:
        kinds: ``caption``, ``image_id``, ``pixels``.
        reason: Why that is right; it is printed with the counts.
    """

    kinds: list[Kind]
    reason: str

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"allow_overlap: kinds is {self.kinds}. Known: {', '.join(KINDS)}.")
        if not self.reason.strip():
            raise ValueError("allow_overlap: reason is blank. Say why the evaluation set may share this with training.")


@dataclass(frozen=True)
class Overlap:
    """What one evaluation set and training have in common, of one kind.

    Attributes:
        eval_set: Name of the evaluation set.
        kind: Of what is counted: distinct captions, image ids, or pictures of the evaluation set.
        shared: How many of them training has too.
        total: How many there are that were looked for.
        example: One of them, with the two rows; empty where nothing is shared.
        unchecked: What could not be looked at, and why; empty where nothing.
        reason: Why it is allowed; None where it is not.
    """

    eval_set: str
    kind: Kind
    shared: int
    total: int
    example: str = ""
    unchecked: str = ""
    reason: str | None = None

    def __str__(self) -> str:
        of = {"caption": "captions", "image_id": "image ids", "pixels": "pictures"}[self.kind]
        allowed = f" (allowed: {self.reason})" if self.shared and self.reason is not None else ""
        unchecked = f"; not checked: {self.unchecked}" if self.unchecked else ""
        return f"{self.eval_set}: {self.shared:,} of {self.total:,} {of} are in training{allowed}{unchecked}"


FIXES: dict[Kind, str] = {
    "caption": "Remove these rows from training, or exchange the split. Captions are compared in lower case, without "
    "punctuation; short ones of a data set may recur by chance.",
    "image_id": "Remove these rows from training, or exchange the split. One image_id means one real image in all data "
    "sets; if two collections merely number alike, give one of them a name, as its space.",
    "pixels": "Remove these rows from training, or exchange the split. The hashes of the pictures differ in at most "
    f"{PIXEL_DISTANCE} of 64 bits, as those of copies do, and of some drawings that are nearly alike.",
}


def check_leakage(
    train: Sequence[ImageTextDataset],
    evaluation: Mapping[str, Sequence[ImageTextDataset]],
    allow_overlap: Mapping[str, AllowedOverlap] | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> list[Overlap]:
    """Looks for what training has in common with each evaluation set.

    Captions are compared in lower case, in Unicode's compatibility form, and with anything but letters and digits taken
    as a space; evaluation sets whose captions are names of classes are left out. Image ids are compared
    whatever the modality: a generated image of an evaluation image is a leak, too. Pixels are
    compared by the perceptual hashes that the training sets know; an evaluation set that does not know its own is
    decoded, if it has no more than 10,000 pictures. What could not be compared is said in ``unchecked``.

    Args:
        train: Data sets to train on, or whose captions are to become training images.
        evaluation: Data sets of each evaluation set.
        allow_overlap: By name of an evaluation set, what it may share.
        kinds: What to compare.

    Returns:
        One overlap per evaluation set and kind, also where nothing is shared.

    Raises:
        DataError: If a set shares what it does not allow, all such sets and kinds at once, or if a training data set is
            of another split than ``train``.
        ValueError: If ``allow_overlap`` names a set that is not there.
    """
    allow_overlap = allow_overlap or {}
    refuse_unknown_sets(allow_overlap, evaluation)
    refuse_other_splits(train)
    found: list[Overlap] = []
    for kind in kinds:
        for name, shared in COUNT[kind](train, evaluation).items():
            allowed = allow_overlap.get(name)
            reason = allowed.reason if allowed is not None and kind in allowed.kinds else None
            found.append(Overlap(name, kind, *shared, reason))
    found.sort(key=lambda overlap: list(evaluation).index(overlap.eval_set))
    wrong = [overlap for overlap in found if overlap.shared and overlap.reason is None]
    if wrong:
        faults = "\n".join(f"- {overlap}. Example: {overlap.example}. {FIXES[overlap.kind]}" for overlap in wrong)
        declare = "; ".join(
            f"{name}: {{kinds: [{', '.join(o.kind for o in wrong if o.eval_set == name)}], reason: ...}}"
            for name in dict.fromkeys(overlap.eval_set for overlap in wrong)
        )
        raise DataError(
            f"Training shares data with the evaluation, so its figures would be too good:\n{faults}\n"
            f"What is shared on purpose is declared in the data module, and printed: allow_overlap: {declare}."
        )
    return found


def check_on_one_process(
    trainer: Trainer | None,
    train: Sequence[ImageTextDataset],
    evaluation: Mapping[str, Sequence[ImageTextDataset]],
    allow_overlap: Mapping[str, AllowedOverlap],
) -> None:
    """Calls ``check_leakage`` on the first process, stops all where it fails, prints the counts and logs them.

    They are logged as ``data/leakage/<set>/<kind>``. Without training data sets there is nothing to compare.
    """
    if not train:
        return
    check = partial(check_leakage, train, evaluation, allow_overlap)
    found = check() if trainer is None else on_first_rank(check, trainer)
    for overlap in found:
        rank_zero_info(f"Leakage: {overlap}.")
    if trainer is not None and found:
        counts = {f"data/leakage/{overlap.eval_set}/{overlap.kind}": float(overlap.shared) for overlap in found}
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=0)


def refuse_unknown_sets(allow_overlap: Mapping[str, AllowedOverlap], evaluation: Mapping[str, object]) -> None:
    """Raises a ValueError for names that are no evaluation set's."""
    unknown = [name for name in allow_overlap if name not in evaluation]
    if unknown:
        raise ValueError(
            f"allow_overlap names {', '.join(unknown)}, but the evaluation sets are {', '.join(evaluation) or 'none'}."
        )


def refuse_other_splits(train: Sequence[ImageTextDataset]) -> None:
    """Raises a DataError for data sets that say that they belong to another split."""
    for dataset in train:
        if dataset.split not in (None, "train"):
            raise DataError(
                f"{_name(dataset)} is of the split {dataset.split!r}, but stands in the training stream. Train on "
                "data of the split 'train', and give this one to val or test."
            )


def _name(dataset: ImageTextDataset) -> str:
    path = getattr(dataset, "path", None)
    return type(dataset).__name__ if path is None else f"{type(dataset).__name__} {path}"
