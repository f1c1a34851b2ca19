"""Reciprocal consistency between what a diffusion model and what a CLIP see in the same pictures (UniDiff)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.distributed import all_reduce, gather_rows, rank, world_size
from gmail_lightning.losses.tiled import check_pairs, unit_rows

Distance = Literal["reciprocal_kl", "infonce", "cosine"]
StopGradient = Literal["targets", "clip", "diffusion", "none"]


def reciprocal_consistency_loss(
    diffusion_features: Tensor,
    image_features: Tensor,
    text_features: Tensor | None = None,
    *,
    distance: Distance = "reciprocal_kl",
    logit_scale: float | Tensor = 1 / 0.07,
    weight: Tensor | None = None,
    stop_gradient: StopGradient = "targets",
    ids: Tensor | None = None,
) -> Tensor:
    """Reciprocal semantic consistency of UniDiff (arXiv 2306.00813), in three forms, over all ranks.

    The paper names the term; its equation is not public, so these are readings of it. ``reciprocal_kl``: both sides say
    how alike a picture is to every text of the batch, and each distribution is drawn to the other,
    ``(KL(p, q) + KL(q, p)) / 2``. ``infonce``: symmetric InfoNCE between the two sides. ``cosine``: 1 - cosine, which
    has no negatives. Under ``torch.distributed`` texts and pictures of all ranks are candidates, every rank gets the
    loss of the joined batch, and the gradients, averaged over ranks, are those of one process. At least in single
    precision, whatever autocast says.

    Args:
        diffusion_features: What the diffusion model sees, shape (N, D). Normalised inside.
        image_features: What CLIP sees of the same pictures, shape (N, D). Normalised inside.
        text_features: Of their captions, shape (N, D); ``reciprocal_kl`` alone needs them. Normalised inside.
        distance: As above.
        logit_scale: Factor of the cosine similarities, one over the temperature; ``cosine`` has none.
        weight: Of each row, shape (N,), such as ``alpha_bar`` of its timestep; None weighs all by 1.
        stop_gradient: What gets none: the ``targets``, the first argument of each KL (no effect on the other forms);
            the side of ``clip``, texts included; the side of ``diffusion``; or ``none``.
        ids: Integers, shape (N,). In ``infonce`` rows with the same id are not negatives of one another.

    Returns:
        Scalar.

    Raises:
        ValueError: If a name is unknown, shapes differ, texts are missing, ranks hold different numbers of rows, or a
            form that compares rows meets a single one, where it is zero whatever the features are.

    Example:
        >>> reciprocal_consistency_loss(torch.eye(2), torch.eye(2).flip(0), distance="cosine")
        tensor(1.)
    """
    if distance not in ("reciprocal_kl", "infonce", "cosine"):
        raise ValueError(f"distance={distance!r}: use 'reciprocal_kl', 'infonce' or 'cosine'.")
    if stop_gradient not in ("targets", "clip", "diffusion", "none"):
        raise ValueError(f"stop_gradient={stop_gradient!r}: use 'targets', 'clip', 'diffusion' or 'none'.")
    check_pairs(diffusion_features, image_features, ids, ("diffusion_features", "image_features"))
    if weight is not None and weight.shape != diffusion_features.shape[:1]:
        raise ValueError(f"weight must have shape ({len(diffusion_features)},), got {tuple(weight.shape)}.")
    if distance != "cosine" and len(diffusion_features) * world_size() == 1:
        raise ValueError(f"distance={distance!r} compares the rows of a batch, and there is one. Raise batch_size.")
    with torch.autocast(diffusion_features.device.type, enabled=False):
        u, v = unit_rows(diffusion_features), unit_rows(image_features)
        u = u.detach() if stop_gradient == "diffusion" else u
        v = v.detach() if stop_gradient == "clip" else v
        if distance == "cosine":
            return _mean(1 - (u * v).sum(dim=1), weight)
        if distance == "infonce":
            return _mean(_info_nce(u, v, logit_scale, ids), weight)
        if text_features is None or text_features.shape != image_features.shape:
            got = None if text_features is None else tuple(text_features.shape)
            raise ValueError(f"text_features must have shape {tuple(image_features.shape)}, got {got}.")
        s = unit_rows(text_features)
        s = _all_rows(s.detach() if stop_gradient == "clip" else s)
        p, q = ((logit_scale * side @ s.T).log_softmax(dim=1) for side in (v, u))
        if stop_gradient == "targets":
            return _mean((_divergence(p.detach(), q) + _divergence(q.detach(), p)) / 2, weight)
        return _mean((_divergence(p, q) + _divergence(q, p)) / 2, weight)


def prediction_contrast_loss(
    prediction: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.1,
    weight: Tensor | None = None,
    is_negative: Tensor | None = None,
) -> Tensor:
    """Contrast of what a diffusion model predicts of one noisy latent under its own condition and under others.

    After DCR (arXiv 2603.04803): the mean over the positives of ``-log(exp(pos / t) / sum)``, the sum over all
    positives and negatives of the row; drawn negatives stand for all others. Similarities are cosines of the flattened
    predictions. Rows of other ranks take no part.

    Args:
        prediction: Under the row's own condition, shape (N, ...).
        positives: What it should be like, shape (N, P, ...): the target, predictions under the condition's other views.
        negatives: Predictions under other conditions, shape (N, K, ...).
        temperature: Divides the cosines.
        weight: Of each row, shape (N,); None weighs all by 1.
        is_negative: False where a drawn condition is the row's own after all, shape (N, K); None: all are others.

    Returns:
        Scalar, the mean over the rows of all ranks.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> x = torch.eye(2)
        >>> prediction_contrast_loss(x, x[:, None], x.flip(0)[:, None], temperature=1.0)
        tensor(0.3133)
    """
    rows = prediction.shape[0]
    for name, others in (("positives", positives), ("negatives", negatives)):
        if others.shape[0] != rows or others.shape[2:] != prediction.shape[1:]:
            raise ValueError(
                f"{name} must have shape ({rows}, ..., {', '.join(map(str, prediction.shape[1:]))}), got "
                f"{tuple(others.shape)}."
            )
    with torch.autocast(prediction.device.type, enabled=False):
        anchor = unit_rows(prediction.flatten(1))
        found = [
            torch.einsum("nd,nkd->nk", anchor, F.normalize(others.flatten(2).to(anchor.dtype), dim=2)) / temperature
            for others in (positives, negatives)
        ]
        if is_negative is not None:
            found[1] = found[1].masked_fill(~is_negative, -torch.inf)
        log_sum = torch.cat(found, dim=1).logsumexp(dim=1, keepdim=True)
        return _mean((log_sum - found[0]).mean(dim=1), weight)


def _mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the rows of all ranks; the gradient is that of this rank's own mean, as data parallelism averages."""
    mean = (rows if weight is None else rows * weight).mean()
    if world_size() == 1:
        return mean
    joined = all_reduce(mean.detach().clone(), "sum") / world_size()
    return mean + (joined - mean).detach()


def _divergence(target: Tensor, other: Tensor) -> Tensor:
    """KL(target, other) of each row of two log-distributions, shape (N,)."""
    return F.kl_div(other, target, reduction="none", log_target=True).sum(dim=1)


def _info_nce(u: Tensor, v: Tensor, scale: float | Tensor, ids: Tensor | None) -> Tensor:
    """Symmetric InfoNCE of each row of this rank, the rows of all ranks as candidates, shape (N,)."""
    own = torch.arange(len(u), device=u.device) + rank() * len(u)
    logits = [scale * first @ _all_rows(second).T for first, second in ((u, v), (v, u))]
    if ids is not None:
        same = ids[:, None] == gather_rows(ids)
        same = same & (torch.arange(same.shape[1], device=u.device) != own[:, None])
        logits = [each.masked_fill(same, -torch.inf) for each in logits]
    first, second = (F.cross_entropy(each, own, reduction="none") for each in logits)
    return (first + second) / 2


def _all_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, with gradients."""
    gathered: Tensor = _Gather.apply(rows) if world_size() > 1 else rows
    return gathered


class _Gather(torch.autograd.Function):
    """Joins rows of all ranks; the backward adds up what every rank's loss asks of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = all_reduce(grad.contiguous().clone(), "sum")
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]
