"""Ranks that count what reads the same as found: captions of a narrow domain often recur word by word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-6  # as in ``image_text_recall``
TILE = 2**23  # scores of a tile: 32 MB, and twice that for the numbers of its pairs


def deduplicated_ranks(image: Tensor, text: Tensor, owner: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the best hit of every image (I,) and every text (T,), 0 is best; see ``deduplicated_recall``."""
    _, number = text_ids.unique(return_inverse=True)
    owned = (number * len(image) + owner).unique()  # ascending: which image has which text

    def is_hit(images: Tensor, texts: Tensor) -> Tensor:
        wanted = number[texts] * len(image) + images
        at = torch.searchsorted(owned, wanted).clamp(max=len(owned) - 1)
        hit: Tensor = owned[at] == wanted
        return hit

    images, texts = torch.arange(len(image), device=owner.device), torch.arange(len(text), device=owner.device)
    image_rank = _ranks(image, text, lambda rows: is_hit(images[rows, None], texts[None]))
    return image_rank, _ranks(text, image, lambda rows: is_hit(images[None], texts[rows, None]))


def _ranks(queries: Tensor, candidates: Tensor, hits: Callable[[slice], Tensor]) -> Tensor:
    columns = F.normalize(candidates.float(), dim=1).T
    step = max(1, TILE // len(candidates))
    found = []
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores, hit = F.normalize(queries[rows].float(), dim=1) @ columns, hits(rows)
        best = scores.masked_fill(~hit, -torch.inf).amax(dim=1, keepdim=True)
        above = (scores - best).masked_fill(hit, -torch.inf)
        found.append((above > TIE).sum(dim=1) + (above.abs() <= TIE).sum(dim=1) / 2)
    return torch.cat(found)
