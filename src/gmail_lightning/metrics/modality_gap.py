"""How far generated images lie from real ones in an embedding: cosines, retrieval, centroids, a linear probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gmail_lightning.metrics.retrieval import image_text_recall
from gmail_lightning.metrics.states import gather_state
from gmail_lightning.types import DataError


def linear_probe_accuracy(generated: Tensor, real: Tensor, *, ids: Tensor | None = None, ridge: float = 1e-2) -> Tensor:
    """Accuracy of a ridge classifier that tells generated from real rows, by two-fold cross-validation over images.

    Closed form and deterministic: every other image trains and the rest test, then the reverse; an image never stands
    on both sides. 0.5 is chance.

    Args:
        generated: Shape (N, D), N >= 4.
        real: Shape (N, D), row i paired with row i of ``generated``.
        ids: Shape (N,); rows with equal ids show one real image.
        ridge: Penalty, relative to the mean squared feature.

    Returns:
        Scalar in [0, 1].
    """
    if len(generated) < 4:
        return torch.tensor(torch.nan)
    x = torch.cat([generated, real]).double()
    y = torch.cat([torch.ones(len(generated)), -torch.ones(len(real))]).to(x)
    ids = torch.arange(len(generated), device=x.device) if ids is None else ids
    fold = ids.unique(return_inverse=True)[1].repeat(2) % 2
    correct = x.new_zeros(())
    for test in (0, 1):
        train_x, train_y = x[fold != test], y[fold != test]
        mean = train_x.mean(dim=0)
        centred = train_x - mean
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, centred.T @ train_y)
        score = (x[fold == test] - mean) @ weight
        correct += (score * y[fold == test] > 0).sum()
    return (correct / len(x)).float()


def modality_gap(
    generated: Tensor, real: Tensor, *, ids: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Tensor]:
    """Measures the gap between paired generated and real features.

    Look at the margin and the retrieval, never at the paired cosine alone: it rises when all features collapse.

    Args:
        generated: Shape (N, D), normalised inside.
        real: Shape (N, D); row i is the real image of row i of ``generated``.
        ids: Shape (N,); rows with equal ids show one real image, which stands in the gallery once.
        ks: The values of k of generated-to-real retrieval, whose gallery is the distinct real images.

    Returns:
        ``paired_cosine``, ``shuffled_cosine`` (mean over all pairs of different ids), ``margin`` (their difference),
        ``centroid_distance`` (Euclidean, of unit features), ``g2r_R@k``, ``probe_accuracy``.

    Raises:
        ValueError: If the shapes differ or a feature is not finite.
    """
    if generated.shape != real.shape:
        raise ValueError(
            f"Expected as many generated as real rows, got {tuple(generated.shape)} and {tuple(real.shape)}."
        )
    g, r = F.normalize(generated.float(), dim=-1), F.normalize(real.float(), dim=-1)
    ids = torch.arange(len(g), device=g.device) if ids is None else ids
    _, index = torch.unique(ids, return_inverse=True)
    num = int(index.max()) + 1
    first = torch.full((num,), len(g), device=g.device).scatter_reduce(
        0, index, torch.arange(len(g), device=g.device), "amin"
    )
    recall = image_text_recall(r[first], g, index, ks)

    paired = (g * r).sum(dim=1)
    summed = torch.zeros(2, num, g.shape[1], dtype=torch.float64, device=g.device)
    for side, rows in enumerate((g, r)):
        summed[side].index_add_(0, index, rows.double())
    count = torch.bincount(index, minlength=num).double()
    same = (summed[0] * summed[1]).sum()
    others = len(g) ** 2 - (count**2).sum()
    shuffled = ((summed[0].sum(dim=0) @ summed[1].sum(dim=0) - same) / others).float()
    return {
        "paired_cosine": paired.mean(),
        "shuffled_cosine": shuffled,
        "margin": paired.mean() - shuffled,
        "centroid_distance": (g.mean(dim=0) - r.mean(dim=0)).norm(),
        **{f"g2r_R@{k}": recall[f"t2i_R@{k}"] for k in ks},
        "probe_accuracy": linear_probe_accuracy(g, r, ids=ids),
    }


class ModalityGap(Metric):
    """``modality_gap`` over batches and ranks; rows come in any order and are joined by ``image_id``.

    Several generated rows may share one real image; the real image comes once.

    Args:
        ks: The values of k of generated-to-real retrieval.
        prefix: Put before the name of every value.
    """

    full_state_update = False
    features: list[Tensor]
    modality: list[Tensor]
    image_id: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), prefix: str = "") -> None:
        super().__init__(dist_sync_fn=gather_state)
        self.ks, self.prefix = tuple(ks), prefix
        for name in ("features", "modality", "image_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, modality: Tensor, image_id: Tensor) -> None:
        """Adds rows: features (B, D), modality and image_id (B,)."""
        self.features.append(features.detach().float())
        self.modality.append(modality)
        self.image_id.append(image_id)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Joined rows: generated (N, D), real (N, D), image_id (N,), in the order of ``image_id``.

        Raises:
            DataError: If a modality is missing, a generated row has no real image, or a real image came twice.
        """
        features, modality, image_id = (dim_zero_cat(x) for x in (self.features, self.modality, self.image_id))
        real, generated = (modality == 0).nonzero()[:, 0], (modality == 1).nonzero()[:, 0]
        if len(real) == 0 or len(generated) == 0:
            raise DataError(
                f"The gap needs both modalities, got {len(generated)} generated and {len(real)} real rows. Give the "
                "evaluation set real and generated data sets, and do not cut it short by limit_val_batches."
            )
        real = real[image_id[real].argsort(stable=True)]
        generated = generated[image_id[generated].argsort(stable=True)]
        keys = image_id[real].contiguous()
        if (keys[1:] == keys[:-1]).any():
            raise DataError(f"image_id {int(keys[1:][keys[1:] == keys[:-1]][0])} has more than one real row.")
        index = torch.searchsorted(keys, image_id[generated].contiguous()).clamp(max=len(keys) - 1)
        alone = keys[index] != image_id[generated]
        if alone.any():
            raise DataError(
                f"{int(alone.sum())} generated rows have no real row of their image_id in this evaluation, the first "
                f"is {int(image_id[generated][alone][0])}. Give the real and the generated rows of the evaluation set "
                "a pair_id in common, or an image_id."
            )
        return features[generated], features[real[index]], keys[index]

    def compute(self) -> dict[str, Tensor]:
        """See ``modality_gap``."""
        generated, real, ids = self.pairs()
        values = modality_gap(generated, real, ids=ids, ks=self.ks)
        return {self.prefix + name: value for name, value in values.items()}
