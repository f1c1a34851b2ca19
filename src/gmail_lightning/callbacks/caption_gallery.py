"""Images, references and what the captioner wrote, as a page one can open and send."""

from __future__ import annotations

import base64
import html
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import encode_png
from torchvision.utils import make_grid

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.tasks import BaseTask
from gmail_lightning.types import ImageTextBatch, Modality

GOLDEN = 0x9E3779B97F4A7C15  # 2 ** 64 / golden ratio: multiples of it, modulo 2 ** 64, spread evenly
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1em; }}
article {{ display: flex; gap: 1em; border: 1px solid #ccc; border-radius: 6px; padding: .8em; }}
img, .none {{ width: {width}px; height: {width}px; object-fit: contain; flex: none; background: #eee; }}
.generated {{ border-color: #e67e22; }} small {{ color: #666; overflow-wrap: anywhere; }}
ul {{ margin: .3em 0; padding-left: 1.2em; color: #666; }} p {{ margin: .2em 0; }} em {{ color: #b00; }}
</style></head><body><h1>{title}</h1><p>{summary}</p><main>
{cards}
</main></body></html>
"""


class GalleryRow(NamedTuple):
    """One image of the gallery; rows are chosen by their first two fields."""

    order: int
    row_id: int
    image: Tensor | None  # (3, h, w) uint8; None where the batch had features in place of pixels
    caption: str
    references: list[str]
    question: str
    modality: Modality
    sample_key: str


class CaptionGallery(Callback):
    """Shows some images with their references and the caption that was written, after every evaluation of a set.

    Writes ``captions/<set>-step-<n>.html`` into the run folder (``captions/<set>-test.html`` where only tested), one
    file with all it needs, and the same to TensorBoard. The images are a fixed choice that spreads over the set, the
    same every time for an equal number of devices: those of the first device, which alone writes.

    Args:
        num_images: Images of each evaluation set.
        size: Longer side of the thumbnails in pixels.

    Raises:
        ValueError: If there is nothing to show.
    """

    def __init__(self, num_images: int = 16, size: int = 160) -> None:
        if num_images < 1 or size < 1:
            raise ValueError(f"num_images={num_images} and size={size} must be at least 1.")
        self.num_images, self.size = num_images, size
        self._rows: dict[str, list[GalleryRow]] = {}
        self._folder = Path()
        self._images_logged: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a task without captions, and asks for the run folder, which is a collective, on every rank.

        Raises:
            MisconfigurationException: If the task writes none.
        """
        if not (isinstance(pl_module, BaseTask) and pl_module.writes_captions):
            raise MisconfigurationException(
                f"CaptionGallery shows what CaptioningTask writes; {type(pl_module).__name__} has no captions of the "
                "last evaluation batch."
            )
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "captions"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the images of the last evaluation."""
        self._rows = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As ``on_validation_start``."""
        self._rows = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps those rows of the batch that are to be shown."""
        if trainer.is_global_zero and not _is_trial(trainer):
            self._keep(batch, cast(BaseTask, pl_module).result_of(batch.get("eval_set", "eval")).captions)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As ``on_validation_batch_end``."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a page for every set."""
        if not _is_trial(trainer):
            on_first_rank(partial(self._write_all, trainer), trainer)
        self._rows = {}

    def _write_all(self, trainer: Trainer) -> None:
        for name, rows in self._rows.items():
            self._write(trainer, name, rows)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As ``on_validation_end``."""
        self.on_validation_end(trainer, pl_module)

    def _keep(self, batch: ImageTextBatch, captions: list[str]) -> None:
        if len(captions) != len(batch["modality"]):
            raise RuntimeError(f"{len(captions)} captions of a batch of {len(batch['modality'])} rows.")
        kept = self._rows.setdefault(batch.get("eval_set", "eval"), [])
        # By image, so that a generated image is shown with its real one.
        orders = [image_id * GOLDEN % 2**64 for image_id in batch["image_id"].tolist()]
        questions = batch.get("question", [""] * len(captions))
        for row, place in enumerate(zip(orders, batch["row_id"].tolist(), strict=True)):
            if len(kept) == self.num_images and place >= kept[-1][:2]:
                continue
            one = GalleryRow(
                *place,
                image=_thumbnail(batch, row, self.size),
                caption=captions[row],
                references=batch["references"][row],
                question=questions[row],
                modality=Modality(int(batch["modality"][row])),
                sample_key=batch["sample_key"][row],
            )
            del kept[self.num_images - 1 :]
            kept.append(one)
            kept.sort(key=lambda other: other[:2])

    def _write(self, trainer: Trainer, name: str, rows: list[GalleryRow]) -> None:
        rows = sorted(rows, key=lambda row: row.row_id)
        verb = cast(TrainerFn, trainer.state.fn)
        of_fit = verb == TrainerFn.FITTING
        when = (
            f"step {trainer.global_step}" if of_fit else f"{verb.value} of {trainer.ckpt_path or 'the model as it is'}"
        )
        suffix = f"step-{trainer.global_step:06d}" if of_fit else verb.value
        self._folder.mkdir(parents=True, exist_ok=True)
        file_name = re.sub(r"[^\w.-]", "_", name)
        path = self._folder / f"{file_name}-{suffix}.html"
        path.write_text(gallery_page(f"{name}, {when}", rows, self.size), "utf-8")
        rank_zero_info(f"Captions: {path}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tag, writer = f"captions/{name}" if of_fit else f"captions/{name} ({verb.value})", logger.experiment
                writer.add_text(tag, _markdown(rows), trainer.global_step)
                if tag not in self._images_logged:  # they do not change
                    writer.add_image(tag, _grid(rows, self.size), trainer.global_step)
                    self._images_logged.add(tag)


def _is_trial(trainer: Trainer) -> bool:
    """Whether a few batches are run to see that they do; the whole validation before training is none."""
    running = cast(Any, trainer)
    return bool(running.fast_dev_run) or (trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"))


def _thumbnail(batch: ImageTextBatch, row: int, size: int) -> Tensor | None:
    """Pixels of a row, uint8 of shape (3, h, w), no side longer than ``size``; None where it has none."""
    found = (batch["image_row"] == row).nonzero().flatten().tolist() if "image" in batch else []
    if not found:
        return None
    image = batch["image"][found[0]].detach().float()[None]
    scale = size / max(image.shape[2:])
    if scale < 1:
        shape = [max(1, round(side * scale)) for side in image.shape[2:]]
        image = F.interpolate(image, shape, mode="bilinear", antialias=True)
    return (image[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def gallery_page(title: str, rows: list[GalleryRow], size: int) -> str:
    """The page as HTML, with the images inside.

    Args:
        title: Of the page.
        rows: What is shown, in this order.
        size: Side of the square that an image is shown in.
    """
    different = len({row.caption for row in rows})
    summary = f"{len(rows)} images, {different} different captions. Bold: what was written; below it the references."
    return PAGE.format(title=_escape(title), summary=summary, width=size, cards="\n".join(map(_card, rows)))


def _escape(text: str) -> str:
    """Text for HTML; a lone surrogate, which no file can hold, must not end a run."""
    return html.escape(text).encode("utf-8", "xmlcharrefreplace").decode()


def _card(row: GalleryRow) -> str:
    picture = '<div class="none"></div>'
    if row.image is not None:
        png = base64.b64encode(encode_png(row.image).numpy().tobytes()).decode()
        picture = f'<img alt="" src="data:image/png;base64,{png}">'
    modality = row.modality.name.lower()
    question = f"<p>{_escape(row.question)}</p>" if row.question else ""
    caption = f"<b>{_escape(row.caption)}</b>" if row.caption.strip() else "<em>nothing was written</em>"
    references = "".join(f"<li>{_escape(text)}</li>" for text in row.references)
    return (
        f'<article class="{modality}">{picture}<div>{question}<p>{caption}</p><ul>{references}</ul>'
        f"<small>{modality}: {_escape(row.sample_key)}</small></div></article>"
    )


def _markdown(rows: list[GalleryRow]) -> str:
    """The texts as a table for TensorBoard, numbered as the images of ``_grid``, row by row."""

    def cell(*texts: str) -> str:
        return "<br>".join(_escape(" ".join(text.split())).replace("|", "&#124;") for text in texts)

    lines = [
        f"| {number} | {row.modality.name.lower()} | {cell(*filter(None, [row.question]), row.caption)} "
        f"| {cell(*row.references)} |"
        for number, row in enumerate(rows, 1)
    ]
    return "\n".join(["| image | modality | written | references |", "| --- | --- | --- | --- |", *lines])


def _grid(rows: list[GalleryRow], size: int, columns: int = 8) -> Tensor:
    """The images beside each other, uint8 of shape (3, H, W), grey where there is none."""
    tiles = torch.full((len(rows), 3, size, size), 238, dtype=torch.uint8)
    for tile, row in zip(tiles, rows, strict=True):
        if row.image is not None:
            tile[:, : row.image.shape[1], : row.image.shape[2]] = row.image
    return cast(Tensor, make_grid(tiles, nrow=columns, pad_value=255))
