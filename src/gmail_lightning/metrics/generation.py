"""How near generated images are to real ones, as two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.metrics.clip_score import clip_score
from gmail_lightning.metrics.states import gather_state, joined

ROWS = 1024  # of a tile of the kernels
SIGMA, SCALE = 10.0, 1000.0  # of CMMD


def kernel_distance(generated: Tensor, real: Tensor) -> Tensor:
    """Kernel distance (KID; Binkowski et al., arXiv 1801.01401, section 4): squared MMD, kernel ``(x.y / D + 1)^3``.

    Unbiased, over all rows and not over random subsets, so it is the same at every call; it may be a little below 0.

    Args:
        generated: Features, shape (N, D). KID is on those of Inception; on others it is another figure.
        real: Shape (M, D).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: If a side has fewer than two rows, widths differ, or a feature is not finite.

    Example:
        >>> kernel_distance(torch.eye(2), torch.eye(2) + 1)
        tensor(16.6250, dtype=torch.float64)
    """
    x, y = _checked(generated, real)
    width = x.shape[1]

    def mean(first: Tensor, second: Tensor, same: bool) -> Tensor:
        total = torch.stack([((tile @ second.T / width + 1) ** 3).sum() for tile in first.split(ROWS)]).sum()
        if not same:
            return total / (len(first) * len(second))
        diagonal = ((first.square().sum(dim=1) / width + 1) ** 3).sum()
        return (total - diagonal) / (len(first) * (len(first) - 1))

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def cmmd(generated: Tensor, real: Tensor) -> Tensor:
    """CMMD (Jayasumana et al., arXiv 2401.09603): 1000 times the squared MMD of unit rows, Gaussian kernel, sigma 10.

    With the diagonals, as the authors' code has it: two equal sets are at 0.

    Args:
        generated: Features, shape (N, D), normalised inside. The paper's are of CLIP ViT-L/14 at 336 pixels.
        real: Shape (M, D).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: As ``kernel_distance``.

    Example:
        >>> cmmd(torch.eye(2), torch.eye(2))
        tensor(0., dtype=torch.float64)
    """
    x, y = (F.normalize(side, dim=1) for side in _checked(generated, real))

    def mean(first: Tensor, second: Tensor) -> Tensor:
        # |a - b|^2 = 2 - 2 a.b
        tiles = [torch.exp((tile @ second.T - 1) / SIGMA**2).sum() for tile in first.split(ROWS)]
        return torch.stack(tiles).sum() / (len(first) * len(second))

    return SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _checked(generated: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    sides = generated, real
    if any(side.ndim != 2 or len(side) < 2 or side.shape[1:] != real.shape[1:] for side in sides):
        raise ValueError(
            f"Expected features (N, D) and (M, D) of at least 2 rows each, got {tuple(generated.shape)} and "
            f"{tuple(real.shape)}."
        )
    for name, features in (("generated", generated), ("real", real)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    return generated.double(), real.double()


class GenerationScore(Metric):
    """``kernel_distance``, ``cmmd`` and the mean ``clip_score`` over batches and ranks, with the number of images.

    Args:
        prefix: Of the names ``kid``, ``cmmd``, ``clip_score`` and ``num_images``: say there whose features they are.
    """

    full_state_update = False
    generated: list[Tensor]
    real: list[Tensor]
    scores: list[Tensor]

    def __init__(self, prefix: str = "") -> None:
        super().__init__(dist_sync_fn=gather_state)
        self.prefix = prefix
        for name in ("generated", "real", "scores"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, generated_features: Tensor, real_features: Tensor, text_features: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            generated_features: Of generated images, shape (N, D); N may be 0.
            real_features: Of real ones, shape (M, D); M may be 0.
            text_features: Of the captions that the generated ones were made for, shape (N, D).

        Raises:
            ValueError: As ``clip_score``.
        """
        self.generated.append(generated_features.detach())
        self.real.append(real_features.detach())
        if text_features is not None:
            self.scores.append(clip_score(generated_features.detach(), text_features.detach()))

    def compute(self) -> dict[str, Tensor]:
        """What there are rows for: ``kid`` and ``cmmd`` need two of each kind. Nothing where no row came at all.

        Raises:
            ValueError: As ``kernel_distance``, or if only some updates gave texts.
        """
        generated, real, scores = map(joined, (self.generated, self.real, self.scores))
        if len(generated) == len(real) == 0:
            return {}
        values = {"num_images": torch.tensor(float(len(generated)), device=generated.device)}
        if min(len(generated), len(real)) >= 2:
            values.update(kid=kernel_distance(generated, real), cmmd=cmmd(generated, real))
        if len(scores):
            if len(scores) != len(generated):
                raise ValueError(f"{len(scores)} texts, {len(generated)} images: give them in every update or in none.")
            values["clip_score"] = scores.double().mean().float()
        return {f"{self.prefix}{name}": value for name, value in values.items()}
