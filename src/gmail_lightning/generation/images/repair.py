"""Re-pairs the captions and images of a store that image generation wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.shards import MANIFEST
from gmail_lightning.datasets.tars.dataset import TarShards
from gmail_lightning.generation.images.store import ROW_GROUP
from gmail_lightning.generation.whole_files import write_table
from gmail_lightning.metrics.repair import TIE, rank_images
from gmail_lightning.models.base import DualEncoder
from gmail_lightning.transforms.image import resize


def repair_store(
    folder: str | Path,
    encoder: DualEncoder,
    encode_sentences: Callable[[list[str]], Tensor] | None = None,
    *,
    num_candidates: int = 15,
    num_captions: int = 2,
    batch_size: int = 64,
    chunk_size: int = 1024,
) -> tuple[int, int]:
    """Writes into a store's manifest which image each caption is better shown with (SynC, arXiv 2507.18616).

    Two columns are written: ``repaired_key``, the key of the image that the caption of a row is given, and
    ``repair_score``; null where a row is not ``ok``. ``TarShards(repaired=True)`` reads them. Images are chosen within
    their split. Where several rows have one caption, they share its best images, and a row keeps its own if that
    is among them. No image is
    changed, and none is generated again.

    Args:
        folder: The store.
        encoder: Says how near images and captions are; another than the one that is to be trained.
        encode_sentences: Maps n captions to features (n, E); by default the text tower of ``encoder``.
        num_candidates: Images looked at for each caption.
        num_captions: Captions that each candidate recalls.
        batch_size: Images or captions encoded at once.
        chunk_size: Rows scored at once.

    Returns:
        Number of captions with an image, and of those whose image is now that of another row.

    Raises:
        DataError: If the folder is not a finished store, or has no row that is ok.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the folder of a finished generation stage.")
    table = pq.read_table(path, partitioning=None)
    ok = table.filter(pc.equal(table["status"], "ok"))
    if not len(ok):
        raise DataError(f"{path}: no row is ok, so there is nothing to pair.")
    key, score = np.full(len(table), None, dtype=object), np.full(len(table), np.nan)
    for split in pc.unique(ok["split"]).to_pylist():
        data = TarShards(folder, split=split)
        keys = [data.sample_key(row) for row in range(len(data))]
        chosen, scores = _choose(
            data, encoder, encode_sentences, batch_size, (num_candidates, num_captions, chunk_size)
        )
        rows = pc.index_in(pa.array(keys, table["key"].type), value_set=table["key"].combine_chunks()).to_numpy()
        key[rows] = [keys[image] for image in chosen.tolist()]
        score[rows] = scores.numpy()
    columns = {"repaired_key": pa.array(key, pa.string()), "repair_score": pa.array(score, mask=np.isnan(score))}
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    write_table(table, path, ROW_GROUP)
    changed: int = pc.sum(pc.not_equal(table["repaired_key"], table["key"])).as_py()
    return len(ok), changed


def _choose(
    data: TarShards,
    encoder: DualEncoder,
    encode_sentences: Callable[[list[str]], Tensor] | None,
    batch_size: int,
    numbers: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Returns for each row of ``data`` the row whose image its caption is given, and the score."""
    captions = [data.captions(row)[0] for row in range(len(data))]
    distinct = list(dict.fromkeys(captions))  # an image recalls captions, not the rows that repeat one
    images = _encode_images(data, encoder, batch_size)
    texts = _in_batches(distinct, batch_size, lambda part: _encode_texts(encoder, part))
    sentences = None if encode_sentences is None else _in_batches(distinct, batch_size, encode_sentences)
    ranked = rank_images(images, texts, sentences, *numbers)
    rows_of: dict[str, list[int]] = {caption: [] for caption in distinct}
    for row, caption in enumerate(captions):
        rows_of[caption].append(row)
    chosen, scores = torch.empty(len(captions), dtype=torch.int64), torch.empty(len(captions))
    for number, caption in enumerate(distinct):
        candidates = list(zip(ranked.image_index[number].tolist(), ranked.score[number].tolist(), strict=True))
        for row, (image, score) in _deal(rows_of[caption], candidates):
            chosen[row], scores[row] = image, score
    return chosen, scores


def _deal(rows: list[int], candidates: list[tuple[int, float]]) -> list[tuple[int, tuple[int, float]]]:
    """Gives each row of one caption one of its best images; a row whose own image is among the best keeps it.

    Args:
        rows: The rows of the caption.
        candidates: Images and scores, the best first; an image has the number of the row that it was made for.
    """
    mine = set(rows)
    best = sorted(candidates, key=lambda pair: (-round(pair[1] / TIE), pair[0] not in mine))[: len(rows)]
    kept = {image: (image, score) for image, score in best if image in mine}
    others = [pair for pair in best if pair[0] not in mine] or best
    left = [row for row in rows if row not in kept]
    return [*kept.items(), *((row, others[min(i, len(others) - 1)]) for i, row in enumerate(left))]


@torch.no_grad()
def _encode_images(data: TarShards, encoder: DualEncoder, batch_size: int) -> Tensor:
    device = encoder.get_buffer("pixel_mean").device
    features = []
    for start in range(0, len(data), batch_size):
        rows = range(start, min(start + batch_size, len(data)))
        pixels = torch.stack([resize(data.image(row), encoder.image_spec) for row in rows])
        features.append(encoder.encode_image(pixels.to(device)).float().cpu())
    return torch.cat(features)


@torch.no_grad()
def _encode_texts(encoder: DualEncoder, captions: list[str]) -> Tensor:
    device = encoder.get_buffer("pixel_mean").device
    return encoder.encode_text(encoder.text_spec.encode(captions).to(device))


def _in_batches(captions: list[str], batch_size: int, encode: Callable[[list[str]], Tensor]) -> Tensor:
    parts = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
    return torch.cat([encode(part).detach().float().cpu() for part in parts])
