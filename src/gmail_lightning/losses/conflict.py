"""How far the terms of a loss pull the same weights into different directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F


def gradient_cosines(terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Cosine between the gradients of every two terms, on the parameters that both reach; below 0 they conflict.

    Args:
        terms: Scalars by name, of one graph, which is kept.
        parameters: What requires a gradient.

    Returns:
        Scalars by ``<first>_<second>``; without the pairs that reach nothing in common.
    """
    gradients = {
        name: torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True)
        for name, term in terms.items()
        if term.requires_grad
    }
    found = {}
    for (one, first), (other, second) in combinations(gradients.items(), 2):
        pairs = zip(first, second, strict=True)
        both = [(a.flatten(), b.flatten()) for a, b in pairs if a is not None and b is not None]
        if both:
            left, right = (torch.cat([pair[side] for pair in both]).float() for side in (0, 1))
            found[f"{one}_{other}"] = F.cosine_similarity(left, right, dim=0)
    return found
