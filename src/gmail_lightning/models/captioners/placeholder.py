"""Where the image stands among words: one place in the worker, one per patch token on the device.

Every column is worked out by arithmetic on columns that the worker knew: nothing is looked for, so nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shown_column(image_column: Tensor, num_patches: int, length: int) -> Tensor:
    """Of every column of an expanded row the column, before it was expanded, that it shows.

    Args:
        image_column: Column of the placeholder, shape (B,).
        num_patches: Columns that the image takes once expanded, T.
        length: Columns of the expanded rows.

    Returns:
        Shape (B, length), int64.

    Example:
        >>> shown_column(torch.tensor([0, 2]), num_patches=3, length=6)
        tensor([[0, 0, 0, 1, 2, 3],
                [0, 1, 2, 2, 2, 3]])
    """
    column = torch.arange(length, device=image_column.device)
    passed = (column - image_column[:, None]).clamp(0, num_patches - 1)  # patches that stand to its left
    return column - passed


def expand(rows: Tensor, image_column: Tensor, num_patches: int) -> Tensor:
    """Repeats what stands at the placeholder once per patch token: (B, L) becomes (B, L + T - 1).

    Args:
        rows: Ids or labels, shape (B, L).
        image_column: Column of the placeholder, shape (B,).
        num_patches: Patch tokens per image, T.
    """
    return rows.gather(1, shown_column(image_column, num_patches, rows.shape[1] + num_patches - 1))


def put_image(words: Tensor, image_column: Tensor, tokens: Tensor) -> Tensor:
    """Puts patch tokens in the place of the words there; gradients reach both.

    Args:
        words: Embeddings of expanded rows, shape (B, L, W).
        image_column: Column of the first patch token, shape (B,).
        tokens: Patch tokens, shape (B, T, W), in the dtype of ``words``.
    """
    places = image_column[:, None] + torch.arange(tokens.shape[1], device=image_column.device)  # (B, T)
    return words.scatter(1, places[..., None].expand_as(tokens), tokens)
