"""Features reduced to the principal components of their batch: the coarse side of Long-CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from gmail_lightning.distributed import all_reduce, require_equal_rows, world_size


def principal_components(features: Tensor, num_components: int = 32) -> Tensor:
    """Projects features onto the plane of the largest principal components of the batch (Long-CLIP, arXiv 2403.15378).

    The batch is the joined one of all ranks, so that the result does not depend on the number of devices. The plane,
    that is mean and directions, takes no gradient: that of the directions is not defined where eigenvalues meet, and
    that of the mean, a 1/N part, would need a collective in the backward. The rows move within the plane.

    Args:
        features: Shape (n, D); Long-CLIP gives rows of norm 1.
        num_components: Dimensions of the plane; from the rank of the centred batch on, nothing changes.

    Returns:
        Shape (n, D), not of norm 1; in the precision of ``features``, single at least.

    Raises:
        ValueError: If there is no component or no row, or the ranks hold different numbers of rows.

    Example:
        >>> import torch
        >>> principal_components(torch.tensor([[2.0, 1.0], [-2.0, 1.0], [0.0, 4.0], [0.0, -2.0]]), 1).round() + 0.0
        tensor([[ 0.,  1.],
                [ 0.,  1.],
                [ 0.,  4.],
                [ 0., -2.]])
    """
    if num_components < 1 or features.ndim != 2 or len(features) == 0:
        raise ValueError(
            f"Expected features (n, D) and at least one component, got {tuple(features.shape)} and {num_components}."
        )
    require_equal_rows(features)
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if num_components >= features.shape[1]:
            return features
        rows = features.detach().double()
        count = len(rows) * world_size()
        mean = all_reduce(rows.sum(0), "sum") / count
        centred = rows - mean
        covariance = all_reduce(centred.T @ centred, "sum")
        directions: Tensor = torch.linalg.eigh(covariance).eigenvectors  # (D, D), in ascending order
        plane = directions[:, -num_components:].to(features.dtype)
        mean = mean.to(features.dtype)
        return (features - mean) @ plane @ plane.T + mean
