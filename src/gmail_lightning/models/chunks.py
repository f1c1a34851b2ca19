"""A batch in chunks, with the exact gradients of one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(encode: Callable[..., Tensor], *rows: Tensor, chunk_size: int | None, recompute: bool = True) -> Tensor:
    """Encodes a batch in chunks whose activations are recomputed in the backward, with the exact gradients of one pass.

    Args:
        encode: Maps tensors of n rows to features (n, D).
        rows: Tensors with B rows each.
        chunk_size: Rows per chunk; None encodes in one piece and keeps the activations.
        recompute: False where no gradient reaches the tower: each chunk then runs once.

    Returns:
        Features of shape (B, D).
    """
    if chunk_size is None or len(rows[0]) <= chunk_size:
        return encode(*rows)
    pieces = zip(*(r.split(chunk_size) for r in rows), strict=True)
    if not recompute:
        return torch.cat([encode(*piece) for piece in pieces])
    return torch.cat([checkpoint(encode, *piece, use_reentrant=False) for piece in pieces])
