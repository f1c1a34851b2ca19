"""Gradients over micro-batches of unequal numbers of tokens, as one batch with all of them would give."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class TokenMean:
    """Makes accumulated gradients those of the mean over all tokens of an optimisation step.

    Lightning sums the gradients of K micro-batches and divides by K, and each loss is a mean over its own tokens. So
    each is weighed by its tokens relative to those of the first, and once all are known the sum is divided by them.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._total: Tensor | None = None

    def weigh(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """The loss to go backward.

        Args:
            loss: A mean over the tokens of a micro-batch, scalar.
            tokens: Their number, or sum of weights, a mean over ranks, scalar; see ``losses.counted_tokens``.
        """
        first = tokens if self._first is None else torch.where(self._first > 0, self._first, tokens)
        self._first, self._total = first, tokens if self._total is None else self._total + tokens
        return loss * (tokens / first.clamp(min=torch.finfo(first.dtype).tiny))

    def divide(self, parameters: Iterable[Tensor], accumulate: int) -> None:
        """Brings the accumulated gradients to the mean over all tokens, and begins anew; nothing where none came.

        Args:
            parameters: With the gradients.
            accumulate: K, by which Lightning has divided, also where an epoch ends with fewer micro-batches.
        """
        if self._first is None or self._total is None:
            return
        factor = accumulate * self._first / self._total.clamp(min=torch.finfo(self._total.dtype).tiny)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._first = self._total = None
