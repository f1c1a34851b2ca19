"""The denoising loss of diffusion models."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

PredictionType = Literal["epsilon", "v_prediction"]


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Weight of each timestep: ``min(SNR, gamma)`` in terms of the clean image (Hang et al., arXiv 2303.09556, eq. 5).

    Args:
        snr: Signal-to-noise ratio, ``alpha_bar / (1 - alpha_bar)``, shape (B,); above 0 where noise is predicted.
        gamma: Cap; 5 in the paper.
        prediction_type: What the network predicts: divided by SNR for the noise, by SNR + 1 for the velocity.

    Returns:
        Shape (B,).
    """
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per row, weighted.

    Args:
        prediction: Output of the denoiser, shape (B, C, H, W).
        target: Noise, or velocity (Salimans and Ho, arXiv 2202.00512), of the same shape.
        weight: Factor of each row, shape (B,); None weighs all alike.

    Returns:
        Scalar, in fp32.
    """
    loss = denoising_errors(prediction, target)
    return loss.mean() if weight is None else (loss * weight).mean()


def denoising_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, shape (B,), in fp32; arguments as ``denoising_loss``."""
    return functional.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
