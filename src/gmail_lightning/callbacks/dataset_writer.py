"""Generated images become a data set: shards that survive a kill, an audit, a manifest and a card."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gmail_lightning.callbacks.resumption import begin, stop_if_told
from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datasets.shards import CARD, MANIFEST
from gmail_lightning.generation.images.assignment import Mode, begin_images, how_made, missing_shards, owned_shards
from gmail_lightning.generation.images.audit import NEAR_DISTANCE
from gmail_lightning.generation.images.image_names import recipe_id
from gmail_lightning.generation.images.publication import publish
from gmail_lightning.generation.images.shard_writer import BackgroundWriter, ImageFormat
from gmail_lightning.generation.images.store import ShardStore
from gmail_lightning.tasks.image_generation import MakesImages, ScoredImages
from gmail_lightning.types import PromptBatch

DRY_RUN_PROMPTS = 8
FAILED = ("not_finite", "undecodable")
REQUIRED = ("generator", "revision", "scheduler", "steps", "guidance", "size")
WAIT = 2.0  # seconds between two looks at what the other devices have done


class DatasetWriter(Callback):
    """Writes the images that a task makes of prompts, shard by shard, so that a killed run loses minutes.

    The plan says which image belongs to which shard; it depends on the prompts alone. A shard is the unit of work: it
    is there whole, or it is made again whole. Run the same command again, on any number of devices, nodes or
    independent processes (``worker``), and it makes what is missing: worker w of n makes the shards whose number is w
    modulo n. They share nothing but the folder. Who finds all shards complete audits the rows against one another, and
    writes ``manifest.parquet`` and the card ``README.md``.

    Rows that failed stay as they are: the same seed would fail again. Encoding and auditing run in threads beside the
    generator; predictions are not kept in memory.

    Args:
        out: The folder; all nodes must see it.
        mode: ``incremental`` makes what is missing for the recipe that the folder was made by, and refuses another
            recipe, way of storing or scorer; prompts that are not planned yet get shards of their own. ``overwrite``
            first removes what this stage wrote there. ``extend`` adds the images of another recipe.
        shard_size: Images of a shard.
        size: Size to store, see ``ImageFormat``: pixels of the shorter side, or height and width; None keeps the
            generator's. Images stored at the size of training are read several times faster.
        image_format: ``jpg`` decodes twice as fast as ``webp``, which takes half the space; ``png`` keeps every pixel.
        quality: Of webp and jpg.
        max_distance: Differing bits of the perceptual hashes of near duplicates, 0 to 4; None keeps near duplicates.
        worker: ``i/n`` makes one of n shares, i from 0.
        dry_run: Makes the images of the first 8 prompts only, in the folder ``<out>-dry-run``, anew each time.
        licences: For the card, by what they are of, such as ``generator`` or ``captions``.
        num_threads: Threads that encode and audit.
        seconds: Least time between two lines of progress.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        out: str,
        mode: Mode = "incremental",
        shard_size: int = 512,
        size: int | tuple[int, int] | None = None,
        image_format: Literal["webp", "png", "jpg"] = "jpg",
        quality: int = 95,
        max_distance: int | None = NEAR_DISTANCE,
        worker: str = "0/1",
        dry_run: bool = False,
        licences: dict[str, str] | None = None,
        num_threads: int = 2,
        seconds: float = 20.0,
    ) -> None:
        share = re.fullmatch(r"(\d+)/(\d+)", worker)
        if share is None or int(share[1]) >= int(share[2]):
            raise ValueError(f"worker={worker!r}: give i/n with i from 0 to n - 1, such as 0/4.")
        if mode not in ("incremental", "overwrite", "extend"):
            raise ValueError(f"Unknown mode {mode!r}: use incremental, overwrite or extend.")
        for name, value in (("shard_size", shard_size), ("num_threads", num_threads)):
            if value < 1:
                raise ValueError(f"{name}={value}: give a positive number.")
        if max_distance is not None and not 0 <= max_distance <= 4:
            raise ValueError(f"max_distance={max_distance}: give 0 to 4, or None.")
        self.mode: Mode = "overwrite" if dry_run else mode
        self.worker, self.num_workers = (0, 1) if dry_run else (int(share[1]), int(share[2]))
        if mode == "overwrite" and self.num_workers > 1:
            raise ValueError(
                f"mode='overwrite' with worker={worker!r}: a worker that starts later would remove what another has "
                "made. Begin with one worker, and add others with mode='incremental'."
            )
        self.store = ShardStore(Path(f"{out}-dry-run" if dry_run else out))
        self.image_format = ImageFormat(size, image_format, quality)
        self.shard_size, self.max_distance, self.dry_run = shard_size, max_distance, dry_run
        self.licences, self.num_threads, self.seconds = licences or {}, num_threads, seconds
        #: Rows of the manifest, or of this process where others are not done, that have no image.
        self.failed = 0
        self._recipe: dict[str, Any] = {}
        self._recipe_id = ""
        self._own: list[str] = []  # shards of all processes of this launch
        self._writer: BackgroundWriter | None = None
        self._total = 0
        self._start = self._last = 0.0

    # Before the first image

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the data module ask what this process makes, once the weights are those of the checkpoint.

        That raises MisconfigurationException if the folder was made by another recipe, or holds something else, and
        DataError if it holds another split.

        Raises:
            MisconfigurationException: If the task makes no images, or the data are no prompts.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, MakesImages) and isinstance(data, PromptDataModule)):
            raise MisconfigurationException(
                "DatasetWriter writes what ImageGenerationTask, TextToImageTask or UniDiffTask makes of "
                f"PromptDataModule, with predict; here are {type(pl_module).__name__} and {type(data).__name__}."
            )
        cast(Any, trainer).predict_loop.return_predictions = False  # they would be kept until the end
        data.schedule(partial(self._schedule, trainer, pl_module, data))

    def _schedule(
        self, trainer: Trainer, task: MakesImages, data: PromptDataModule
    ) -> tuple[str, list[tuple[str, np.ndarray]]]:
        """Id of the recipe, and the images of each shard that this process makes."""
        self._recipe = self._describe(task, data)
        self._recipe_id = recipe_id(self._recipe)
        keys = data.table.keys(self._recipe_id)
        if self.dry_run:
            keys = keys.slice(0, DRY_RUN_PROMPTS * data.images_per_caption)
        storage = {f"stored_{name}": value for name, value in asdict(self.image_format).items()}
        storage["shard_size"] = self.shard_size
        made = how_made(self._recipe, storage, task.describe_scorer())
        begin(partial(begin_images, self.store, self.mode, made, data.split, keys), trainer)
        plan = self.store.read_plan()
        world, owners = trainer.world_size, self.num_workers * trainer.world_size
        shares = [owned_shards(len(plan.shards), self.worker * world + rank, owners) for rank in range(world)]
        self._own = [plan.shards[number] for share in shares for number in share]
        missing = missing_shards(self.store, plan, shares[trainer.global_rank], keys)
        self._total = sum(len(rows) for _, rows in missing)
        rank_zero_info(
            f"{self.store.folder}: {len(plan)} images in {len(plan.shards)} shards, recipe {self._recipe_id}; to make: "
            f"{self._total} images in {len(missing)} shards"
            + (f" on the first of {world} devices." if world > 1 else ".")
        )
        sizes = {name: len(rows) for name, rows in missing}
        self._writer = BackgroundWriter(self.store.folder, sizes, self.image_format, self.num_threads)
        self._start = self._last = time.monotonic()
        return self._recipe_id, missing

    def _describe(self, task: MakesImages, data: PromptDataModule) -> dict[str, Any]:
        described = task.describe_generator()
        missing = [name for name in REQUIRED if name not in described]
        if missing:
            raise MisconfigurationException(
                f"{type(task.generator).__name__}.describe() lacks {', '.join(missing)}: the manifest has them."
            )
        return {**described, "prompt_template": data.prompt_template}

    # The images

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hands a batch to the threads; waits only where they are two batches behind."""
        scored, prompts = cast(ScoredImages, outputs), cast(PromptBatch, batch)
        rows = self._rows(cast(PromptDataModule, trainer.datamodule), prompts, scored)  # type: ignore[attr-defined]
        assert self._writer is not None
        self._writer.put(prompts["shard"], rows, scored.images.image, list(scored.images.flagged))
        now = time.monotonic()
        if now - self._last >= self.seconds and trainer.is_global_zero:
            self._last = now
            self._tell(trainer, self.progress(now - self._start))
        stop_if_told(trainer)

    def _rows(self, data: PromptDataModule, batch: PromptBatch, scored: ScoredImages) -> list[dict[str, Any]]:
        """What the manifest says of a batch, besides the audit."""
        recipe = self._recipe
        constant = {name: recipe[name] for name in ("generator", "revision", "scheduler", "steps", "guidance")}
        constant |= {"shard": batch["shard"], "split": data.split, "modality": "generated"}
        known = data.table.manifest_rows(batch, self._recipe_id)
        return [
            {
                "key": row["key"],  # first, in the .json members too
                **constant,
                **row,
                "truncated": bool(scored.truncated[i]),
                "clip_score": scored.clip_score[i],
                "clip_score_reason": scored.clip_score_reason[i],
            }
            for i, row in enumerate(known)
        ]

    def _tell(self, trainer: Trainer, line: str) -> None:
        bar = trainer.progress_bar_callback
        if bar is not None and trainer.is_global_zero:
            bar.print(line)

    def progress(self, seconds: float) -> str:
        """One line: images of this process, speed, time that is left, and what was not ok by its reason."""
        assert self._writer is not None
        counts = dict(self._writer.counts)
        done = sum(counts.values())
        rate = done / max(seconds, 1e-9)
        line = f"images {done}/{self._total}  {rate:.1f} images/s"
        if 0 < done < self._total:
            line += f"  {timedelta(seconds=round((self._total - done) / rate))} left"
        return "  ".join([line, *(f"{reason} {n}" for reason, n in sorted(counts.items()) if reason != "ok")])

    # After the last

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets the threads finish what they have, and removes the shard that is not whole."""
        if self._writer is not None:
            self._writer.stop()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the threads; the first rank then writes manifest and card, if no shard is missing anywhere."""
        assert self._writer is not None
        self._writer.finish()
        self._tell(trainer, self.progress(time.monotonic() - self._start))
        self.failed = sum(self._writer.counts[reason] for reason in FAILED)
        if not trainer.is_global_zero:
            return
        limit = trainer.limit_predict_batches  # 1.0 is all of them, 1 is one; fast_dev_run sets a number
        if isinstance(limit, float) and limit == 1.0:
            self._wait()
        plan = self.store.read_plan()
        missing = [s for s, there in zip(plan.shards, self.store.complete(plan.shards), strict=True) if not there]
        if missing:
            rank_zero_info(
                f"{self.store.folder}: {len(missing)} of {len(plan.shards)} shards are missing, such as {missing[0]}. "
                "Who completes the last of them writes the manifest. If no other worker is running, run the same "
                "command again, without --worker, in mode incremental (or extend)."
            )
            return
        self._merge(cast(PromptDataModule, trainer.datamodule), plan.shards)  # type: ignore[attr-defined]

    def _wait(self) -> None:
        """Waits until the other devices of this launch are done, too."""
        if not all(self.store.complete(self._own)):
            rank_zero_info("Waiting for the other devices.")
        while not all(self.store.complete(self._own)):  # no collective: the others may need hours
            time.sleep(WAIT)

    def _merge(self, data: PromptDataModule, shards: list[str]) -> None:
        evaluation, leakage = data.evaluation_hashes()
        pair_ids = data.table.keys(self._recipe_id), np.repeat(data.table.pair_id, data.table.images_per_caption)
        published = publish(
            self.store,
            shards,
            evaluation,
            pair_ids,
            max_distance=self.max_distance,
            leakage=[*data.leakage, *leakage],
            licences=self.licences,
        )
        if published.renumbered:
            rank_zero_warn(
                f"{published.renumbered} images take another pair_id than when they were made: that of the captions "
                "now."
            )
        counts = published.counts
        self.failed = counts.get("failed", 0)
        found = ", ".join(f"{counts[name]} {name}" for name in ("ok", "rejected", "failed") if name in counts)
        rank_zero_info(f"{self.store.folder / MANIFEST}: {found}. Card: {self.store.folder / CARD}")
        if self.dry_run:
            rank_zero_info(f"Dry run: look at the images in {self.store.folder}; without --dry_run all are made.")
