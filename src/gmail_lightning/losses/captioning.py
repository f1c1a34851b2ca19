"""The loss of captioners: what a language model is asked to write after the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.distributed import all_reduce, world_size

IGNORED = -100  # a label that is not written: padding, prompts, image tokens


def counted_tokens(labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """What `caption_loss` divides by: the tokens to be predicted, each by the weight of its row, a mean over ranks.

    Args:
        labels: As `caption_loss`.
        weight: As `caption_loss`.

    Returns:
        A scalar, in fp32.
    """
    return all_reduce(_counted(labels, weight).sum().detach(), "sum") / world_size()


def _counted(labels: Tensor, weight: Tensor | None) -> Tensor:
    return (labels != IGNORED).float() * (1.0 if weight is None else weight.float()[:, None])


def caption_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    tokens: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the labels, a mean over the tokens of all ranks.

    A token counts as much as the weight of its row, so a mean over ranks of the gradients is that of one process with
    all rows. Over accumulated micro-batches of unequal length it is not by itself: weigh each by `counted_tokens`, as
    ``CaptioningTask`` does (``tasks.accumulation``). With label smoothing e the target of a token is 1 - e, and e is
    spread evenly over the vocabulary.

    Args:
        logits: Shape (B, L, V); position j predicts label j, nothing is shifted here.
        labels: Token ids, shape (B, L), and -100 where nothing is to be predicted.
        weight: Of each row, not negative, shape (B,); None weighs all alike.
        label_smoothing: From 0 to 1.
        tokens: ``counted_tokens(labels, weight)``, where they are counted already.

    Returns:
        A scalar, in fp32.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.shape[:2] != labels.shape or (weight is not None and weight.shape != labels.shape[:1]):
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and weight "
            f"{None if weight is None else tuple(weight.shape)} do not fit: (B, L, V), (B, L) and (B,)."
        )
    token_loss = F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view_as(labels)
    total = counted_tokens(labels, weight) if tokens is None else tokens
    return (token_loss * _counted(labels, weight)).sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


def refuse_masked(labels: Tensor, texts: list[str]) -> None:
    """Refuses rows without a token to learn from, which would train silently with a loss of zero.

    Args:
        labels: Shape (B, L), on the CPU, where looking costs nothing.
        texts: What they were made of, length B.

    Raises:
        ValueError: Naming the first such text.
    """
    masked = (labels == IGNORED).all(dim=1)
    if masked.any():
        row = int(masked.nonzero()[0])
        raise ValueError(
            f"{int(masked.sum())} of {len(labels)} rows have no token to learn: every label is masked, as that of "
            f"{texts[row]!r}. The chat template does not fit the tokenizer, or the text was cut before its answer."
        )
