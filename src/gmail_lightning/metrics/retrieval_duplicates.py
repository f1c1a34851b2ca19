"""Recall that counts what reads the same as found: captions of a narrow domain often recur word by word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-6  # as in ``image_text_recall``
ROWS = 1024  # of a tile


def deduplicated_recall(
    image_features: Tensor,
    text_features: Tensor,
    text_image_index: Tensor,
    text_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Tensor]:
    """Recall at k where texts of one id are one and the same text.

    A text finds any image that has a text of its id; an image finds any text whose id one of its own has. Positives
    never stand in one another's way, and a candidate that ties with the best of them counts half a rank, as in
    ``image_text_recall``, which it equals where all ids differ.

    Args:
        image_features: Shape (I, D), normalised inside.
        text_features: Shape (T, D), normalised inside.
        text_image_index: Shape (T,), the row of the image that each text belongs to.
        text_ids: Shape (T,), int64.
        ks: The values of k.

    Returns:
        ``i2t_dedup_R@k`` and ``t2i_dedup_R@k`` for every k, scalars in [0, 1].

    Raises:
        ValueError: If ``text_ids`` has another shape than ``text_image_index``.

    Example:
        >>> features, index = torch.eye(2), torch.tensor([0, 1])
        >>> deduplicated_recall(features, features.flip(0), index, torch.tensor([5, 5]), ks=(1,))["t2i_dedup_R@1"]
        tensor(1.)
    """
    if text_ids.shape != text_image_index.shape:
        raise ValueError(f"text_ids: expected shape {tuple(text_image_index.shape)}, got {tuple(text_ids.shape)}.")
    images = len(image_features)
    _, number = text_ids.unique(return_inverse=True)
    owned = (number * images + text_image_index).unique()  # ascending: which image has which text

    def is_hit(image: Tensor, text: Tensor) -> Tensor:
        wanted = number[text] * images + image
        at = torch.searchsorted(owned, wanted).clamp(max=len(owned) - 1)
        hit: Tensor = owned[at] == wanted
        return hit

    rows = torch.arange(len(text_features), device=text_ids.device)
    of_images = torch.arange(images, device=text_ids.device)
    image_rank = _ranks(image_features, text_features, lambda i: is_hit(of_images[i, None], rows[None]))
    text_rank = _ranks(text_features, image_features, lambda t: is_hit(of_images[None], rows[t, None]))
    return {
        **{f"i2t_dedup_R@{k}": (image_rank < k).float().mean() for k in ks},
        **{f"t2i_dedup_R@{k}": (text_rank < k).float().mean() for k in ks},
    }


def _ranks(queries: Tensor, candidates: Tensor, hits: Callable[[slice], Tensor]) -> Tensor:
    """Rank of the best hit of each query, 0 is best."""
    columns = F.normalize(candidates.float(), dim=1).T
    found = []
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(start + ROWS, len(queries)))
        scores, hit = F.normalize(queries[rows].float(), dim=1) @ columns, hits(rows)
        best = scores.masked_fill(~hit, -torch.inf).amax(dim=1, keepdim=True)
        above = (scores - best).masked_fill(hit, -torch.inf)
        found.append((above > TIE).sum(dim=1) + (above.abs() <= TIE).sum(dim=1) / 2)
    return torch.cat(found)
