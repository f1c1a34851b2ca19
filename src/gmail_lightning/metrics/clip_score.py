"""CLIPScore: how well an image fits its caption, in the eyes of a CLIP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

SCALE = 2.5  # w of Hessel et al. 2021


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """CLIPScore without references, 2.5 * max(cos, 0): Hessel et al., EMNLP 2021, arXiv 2104.08718, equation 1.

    Args:
        image_features: Shape (N, D), normalised inside.
        text_features: Shape (N, D); row i is the caption of image i.

    Returns:
        Shape (N,), from 0 to 2.5; float32, or float64 for such features.

    Raises:
        ValueError: If the shapes differ, or a feature is not finite.

    Example:
        >>> import torch
        >>> clip_score(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-1.0, 0.0]]))
        tensor([1.5000, 0.0000])
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            "Expected features (N, D) of as many images as captions, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}."
        )
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    kind = torch.float64 if torch.float64 in (image_features.dtype, text_features.dtype) else torch.float32
    return SCALE * F.cosine_similarity(image_features.to(kind), text_features.to(kind)).clamp(min=0)


def fills_context(encode: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
    """Says of each text whether a word more would change nothing, because no position is left; shape (N,) bool.

    Such a text is cut, or fits to the token.

    Args:
        encode: Maps n strings to token ids (n, L), as ``TextSpec.encode`` does.
        texts: N strings.
    """
    if not texts:
        return torch.zeros(0, dtype=torch.bool)
    return (encode(texts) == encode([f"{text} a" for text in texts])).all(dim=1)


class CLIPScore(Metric):
    """Mean of ``clip_score`` over images and their captions, and the share of captions that were cut.

    Take another CLIP than the one that is trained on the images. The token ids must keep the end token of a caption
    that is cut, as every ``TextSpec`` of this library does: CLIP reads the caption off there, and sliced ids lose a
    third of the score (Lightning-AI/torchmetrics#2883).

    Args:
        encode_image: Maps pixels (B, 3, H, W) to features (B, D).
        encode_text: Maps token ids (B, L) to features (B, D).
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    cut: Tensor
    count: Tensor

    def __init__(self, encode_image: Callable[[Tensor], Tensor], encode_text: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode_image, self.encode_text = encode_image, encode_text
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cut", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, image: Tensor, text: Tensor, truncated: Tensor | None = None) -> None:
        """Adds images (B, 3, H, W), the token ids of their captions (B, L), and which of these were cut (B,)."""
        scores = clip_score(self.encode_image(image), self.encode_text(text))
        self.total += scores.sum(dtype=torch.float64)
        self.count += len(scores)
        if truncated is not None:
            self.cut += truncated.sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns ``clip_score``, the mean, and ``truncated``, a share; without images both are NaN."""
        count = self.count.double()
        return {"clip_score": (self.total / count).float(), "truncated": (self.cut / count).float()}
