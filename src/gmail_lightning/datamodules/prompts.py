"""From captions to prompts: what the generation of images reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gmail_lightning.datamodules.base import as_list, tell
from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.generation.images.prompt_table import PromptBatches, PromptTable
from gmail_lightning.leakage.check import AllowedOverlap, Kind, check_leakage, refuse_unknown_sets
from gmail_lightning.leakage.overlap import picture_hashes

#: Gives the id of a recipe, and the name and the numbers in the table of the images of each shard.
Plan = Callable[[], tuple[str, list[tuple[str, np.ndarray]]]]


class PromptDataModule(LightningDataModule):
    """Feeds the generation of images with the captions of data sets.

    What is generated for training (``split="train"``) must not repeat what a model is tested with: captions and image
    ids are checked against the evaluation sets before the first image, and a repetition that is not allowed is an
    error, as are captions of another split. Pairs for evaluation are generated apart, under the name of their split,
    and no store holds two splits.

    An image is named by a hash of (image id, caption), its number and the recipe, and its seed is a hash of that name:
    neither the order of the captions nor their path, the batch size or the number of workers changes an image.

    Args:
        captions: Data sets whose captions are to become images.
        split: What the images are for: ``train``, ``val``, ``test`` or another name of letters, digits and ``_``.
        evaluation: Named data sets that images for training must not repeat. Needed for ``train``: ``{}`` says that
            there are none.
        allow_overlap: By name of an evaluation set, what it shares with training on purpose, and why.
        images_per_caption: Number of images of each caption, up to 1000.
        captions_per_row: Only so many captions of each row, the first; None takes all.
        prompt_template: What the generator reads; ``{caption}`` stands for the caption. Part of the recipe.
        batch_size: Images that a device makes together.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        captions: list[ImageTextDataset] | ImageTextDataset,
        split: str = "train",
        evaluation: dict[str, list[ImageTextDataset]] | None = None,
        allow_overlap: dict[str, AllowedOverlap] | None = None,
        images_per_caption: int = 1,
        captions_per_row: int | None = None,
        prompt_template: str = "{caption}",
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        for name, value in (
            ("images_per_caption", images_per_caption),
            ("captions_per_row", 1 if captions_per_row is None else captions_per_row),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: give a positive number.")
        if images_per_caption > 1000:
            raise ValueError(f"images_per_caption={images_per_caption}, but at most 1000 are numbered.")
        if "{caption}" not in prompt_template:
            raise ValueError(f"prompt_template={prompt_template!r} has no {{caption}} in it.")
        if not split.isidentifier():
            raise ValueError(f"split={split!r}: it becomes part of file names; use letters, digits and _.")
        refuse_unknown_sets(allow_overlap or {}, evaluation or {})
        self.captions = as_list(captions)
        self.split, self.evaluation, self.allow_overlap = split, evaluation, allow_overlap or {}
        self.images_per_caption, self.captions_per_row = images_per_caption, captions_per_row
        self.prompt_template, self.batch_size = prompt_template, batch_size
        #: What is shared with the evaluation sets, in words; for the card.
        self.leakage: list[str] = []
        self._table: PromptTable | None = None
        self._plan: Plan | None = None

    @property
    def table(self) -> PromptTable:
        """All images to make."""
        if self._table is None:
            raise ValueError("The data module was not set up: call setup('predict').")
        return self._table

    def setup(self, stage: str) -> None:
        """Checks the captions against the evaluation sets, then lists the prompts.

        Raises:
            DataError: If there is nothing to generate, the evaluation sets of a training split are not named, or one of
                them shares captions or images with it that it does not allow.
        """
        if stage != "predict":
            raise MisconfigurationException(f"PromptDataModule feeds predict, not {stage}.")
        if not any(map(len, self.captions)):
            raise DataError("Nothing to generate: give the data module data sets under captions.")
        tell(self.captions)
        self._check_leakage()
        self._table = PromptTable(self.captions, self.images_per_caption, self.captions_per_row, self.prompt_template)
        self._warn_of_shared_pairs(self._table)
        repeated = f", {self._table.repeated} repeated ones left out" if self._table.repeated else ""
        rank_zero_info(
            f"Split {self.split!r}: {len(self._table.prompt)} prompts{repeated}, {len(self._table)} images to make."
        )

    def _warn_of_shared_pairs(self, table: PromptTable) -> None:
        """Says so where several rows have one ``pair_id``: the alignment pairs generated rows with one real row."""
        owner, first = np.unique(np.stack([table.pair_id, table.dataset, table.row]), axis=1, return_index=True)
        owner, first = owner[:, owner[0] >= 0], first[owner[0] >= 0]
        again = np.flatnonzero(owner[0, 1:] == owner[0, :-1]) + 1
        if len(again):
            one, other = (table.describe(int(first[i])) for i in (again[0] - 1, again[0]))
            rank_zero_warn(
                f"pair_id {owner[0, again[0]]} stands in {one} and in {other} ({len(again)} such rows). To align on "
                "these images in mode 'paired', give each real row a pair_id of its own, now or later: it is not in "
                "an image's name."
            )

    def _check_leakage(self) -> None:
        if self.split != "train":
            return
        if self.evaluation is None:
            raise DataError(
                "Images for training are checked against the evaluation sets before the first is made: name these "
                "under evaluation ({} says that there are none). For evaluation pairs, give split another name."
            )
        kinds: list[Kind] = ["caption", "image_id"]
        check = partial(check_leakage, self.captions, self.evaluation, self.allow_overlap, kinds)
        found = check() if self.trainer is None else on_first_rank(check, self.trainer)
        self.leakage = [str(overlap) for overlap in found] or ["No evaluation sets were named."]
        for line in self.leakage:
            rank_zero_info(f"Leakage: {line}")

    def evaluation_hashes(self) -> tuple[dict[str, tuple[list[str], np.ndarray]], list[str]]:
        """Sample keys and perceptual hashes of the evaluation sets that images for training are compared with.

        Where a data set does not know its hashes, its pictures are decoded, if there are no more than 10,000.

        Returns:
            By name of the set; and lines on what was compared, and what was not, for which there is a warning, too.
        """
        hashes: dict[str, tuple[list[str], np.ndarray]] = {}
        notes = []
        for name, datasets in (self.evaluation or {}).items() if self.split == "train" else ():
            if name in self.allow_overlap and "pixels" in self.allow_overlap[name].kinds:
                notes.append(f"{name}: generated images may look like its images ({self.allow_overlap[name].reason})")
                continue
            keys, columns = list[str](), [np.empty(0, np.int64)]
            for dataset in datasets:
                rows, column, fault = picture_hashes(dataset)
                if column is None:
                    notes.append(f"{name}: generated images were not compared with {fault}")
                    rank_zero_warn(f"{notes[-1]}: those that are near one are not found.")
                    continue
                keys += [dataset.sample_key(row) for row in rows.tolist()]
                columns.append(column)
            if keys:
                hashes[name] = keys, np.concatenate(columns)
                notes.append(f"{name}: generated images were compared with its {len(keys)} images (near_evaluation)")
        return hashes, notes

    def schedule(self, plan: Plan) -> None:
        """Says who knows what this process makes: the writer, which knows what is there.

        Args:
            plan: Gives the id of the recipe, and the name and the numbers in the table of the images of each shard, in
                the order in which they are made. It is asked once a checkpoint is restored.
        """
        self._plan = plan

    def predict_dataloader(self) -> PromptBatches:
        """What the plan says. It has no length, so that a process with nothing to do comes to an end too.

        Raises:
            MisconfigurationException: If there is no writer.
        """
        if self._plan is None:
            raise MisconfigurationException(
                "PromptDataModule needs the callback DatasetWriter under trainer.callbacks: it says what is missing."
            )
        recipe, shards = self._plan()
        return PromptBatches(self.table, recipe, shards, self.batch_size)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Returns the batch: strings and numbers."""
        return batch
