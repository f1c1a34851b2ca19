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
    return SCALE * _cosine(image_features, text_features, "image_features", "text_features").clamp(min=0)


def ref_clip_score(
    image_features: Tensor, text_features: Tensor, reference_features: Tensor, reference_row: Tensor
) -> Tensor:
    """RefCLIPScore: harmonic mean of CLIPScore and the cosine of the caption with its nearest reference.

    Hessel et al., EMNLP 2021, arXiv 2104.08718, section 3. The cosine is cut at 0 as in the paper (the authors' code
    leaves it as it is), and the mean of two zeros is 0.

    Args:
        image_features: Shape (N, D), normalised inside.
        text_features: Shape (N, D); row i is the caption of image i.
        reference_features: Shape (R, D), of all references of all images.
        reference_row: The image of each reference, shape (R,); images may have different numbers of them.

    Returns:
        Shape (N,), from 0 to 10 / 7; float32, or float64 for such features.

    Raises:
        ValueError: If the shapes differ, a feature is not finite, or an image has no reference.

    Example:
        >>> import torch
        >>> image, caption = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> ref_clip_score(image, caption, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0]))
        tensor([1.0435])
    """
    image_text = clip_score(image_features, text_features)
    if reference_features.shape != (*reference_row.shape, text_features.shape[1]) or reference_row.ndim != 1:
        raise ValueError(
            f"Expected references (R, {text_features.shape[1]}) and the image of each (R,), got "
            f"{tuple(reference_features.shape)} and {tuple(reference_row.shape)}."
        )
    named = reference_row.unique().tolist()
    if named != list(range(len(image_text))):
        raise ValueError(
            f"Every one of the {len(image_text)} images needs a reference: reference_row must hold 0 to "
            f"{len(image_text) - 1}, and holds {named[:8]}{' ...' if len(named) > 8 else ''}."
        )
    cosine = _cosine(text_features[reference_row], reference_features, "text_features", "reference_features")
    # From 0: the largest, cut at 0.
    text_text = cosine.new_zeros(len(image_text)).scatter_reduce(0, reference_row, cosine, "amax")
    both = image_text + text_text
    return (2 * image_text * text_text / both).where(both > 0, 0)


def _cosine(first: Tensor, second: Tensor, first_name: str, second_name: str) -> Tensor:
    for name, features in ((first_name, first), (second_name, second)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    kind = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    return F.cosine_similarity(first.to(kind), second.to(kind))


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


class RefCLIPScore(Metric):
    """Means of ``ref_clip_score`` and ``clip_score`` over images, their captions and their references.

    Take another CLIP than the one that is trained on the images. To compare with the numbers of Hessel et al., put
    ``A photo depicts `` before every caption and every reference, as they do. See ``CLIPScore`` for captions that are
    longer than the context.

    Args:
        encode_image: Maps pixels (B, 3, H, W) to features (B, D).
        encode_text: Maps token ids (T, L) to features (T, D).
    """

    full_state_update = False
    higher_is_better = True
    ref_total: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, encode_image: Callable[[Tensor], Tensor], encode_text: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode_image, self.encode_text = encode_image, encode_text
        for name in ("ref_total", "total"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, image: Tensor, text: Tensor, references: Tensor, reference_row: Tensor) -> None:
        """Adds images (B, 3, H, W), the token ids of their captions (B, L), and their references.

        Args:
            image: Pixels.
            text: Token ids; row i is the caption of image i.
            references: Token ids (R, L) of all references.
            reference_row: The image of each, shape (R,).
        """
        image_features, text_features = self.encode_image(image), self.encode_text(text)
        scores = ref_clip_score(image_features, text_features, self.encode_text(references), reference_row)
        self.ref_total += scores.sum(dtype=torch.float64)
        self.total += clip_score(image_features, text_features).sum(dtype=torch.float64)
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``ref_clip_score`` and ``clip_score``, the means; without images both are NaN."""
        count = self.count.double()
        return {"ref_clip_score": (self.ref_total / count).float(), "clip_score": (self.total / count).float()}
