"""The loss of captioners: what a language model is asked to write after the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.distributed import all_reduce, world_size

IGNORED = -100  # a label that is not written: padding, prompts, image tokens


def caption_loss(
    logits: Tensor, labels: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the labels, a mean over the tokens of all ranks.

    A token counts as much as the weight of its row, so a mean over ranks of the gradients is that of one process with
    all rows. With label smoothing e the target of a token is 1 - e, and e spread evenly over the vocabulary.

    Args:
        logits: Shape (B, L, V); position j predicts label j, nothing is shifted here.
        labels: Token ids, shape (B, L), and -100 where nothing is to be predicted.
        weight: Of each row, not negative, shape (B,); None weighs all alike.
        label_smoothing: From 0 to 1.

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
    counted = (labels != IGNORED).float() * (1.0 if weight is None else weight.float()[:, None])
    total = all_reduce(counted.sum().detach(), "sum") / world_size()
    return (token_loss * counted).sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


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
