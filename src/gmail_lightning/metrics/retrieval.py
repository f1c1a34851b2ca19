"""Image-text recall by counting ranks: exact, chunked, one matrix product for both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

CHUNK = 512  # image rows scored at once; the score block is the only memory that grows with the texts
TIE = 1e-6  # cosines closer than this are equal: fp32 rounds one and the same cosine differently in different kernels


def _check(features: Tensor, name: str) -> Tensor:
    """Unit-norm float32 rows; NaN and infinity are an error, because they compare as a perfect score."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: expected shape (N, D) with N > 0, got {tuple(features.shape)}.")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    return F.normalize(features.float(), dim=-1)


def _ranks(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the best positive of every image (I,) and of every text (T,), 0 is best, a tie counts half."""
    positive = (text * image[owner]).sum(dim=1)  # (T,)
    best = torch.full((len(image),), -torch.inf, device=image.device).scatter_reduce(0, owner, positive, "amax")
    image_rank, text_rank = positive.new_empty(len(image)), positive.new_zeros(len(text))
    own_texts = torch.argsort(owner, stable=True)  # the texts of a block of images lie next to one another
    first = torch.searchsorted(owner[own_texts].contiguous(), torch.arange(len(image) + 1, device=image.device))
    for start in range(0, len(image), CHUNK):
        stop = min(start + CHUNK, len(image))
        scores = image[start:stop] @ text.T  # (C, T)
        own = own_texts[first[start] : first[stop]]
        scores[owner[own] - start, own] = -torch.inf  # a positive never stands above itself or its siblings
        image_rank[start:stop] = _above(scores, best[start:stop, None], dim=1)
        text_rank += _above(scores, positive[None], dim=0)
    return image_rank, text_rank


def _above(scores: Tensor, positive: Tensor, dim: int) -> Tensor:
    """Number of scores above the positive, ties counting half."""
    return 0.5 * ((scores > positive + TIE).sum(dim=dim) + (scores >= positive - TIE).sum(dim=dim))


def image_text_recall(
    image_features: Tensor, text_features: Tensor, text_image_index: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Tensor]:
    """Recall at k of image-to-text and text-to-image retrieval by cosine similarity.

    An image counts as found if any of its texts is among the k best. A candidate that ties with the positive counts
    half a rank, so that equal features for everything score at chance and not 1.

    Args:
        image_features: Shape (I, D), normalised inside.
        text_features: Shape (T, D), normalised inside.
        text_image_index: Shape (T,), the row of the image that each text belongs to. Every image needs a text.
        ks: The values of k.

    Returns:
        ``i2t_R@k`` and ``t2i_R@k`` for every k, scalars in [0, 1].

    Raises:
        ValueError: If shapes disagree, an index is out of range, an image has no text, or a feature is not finite.

    Example:
        >>> import torch
        >>> image_text_recall(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), ks=(1,))
        {'i2t_R@1': tensor(1.), 't2i_R@1': tensor(1.)}
    """
    image, text = _check(image_features, "image_features"), _check(text_features, "text_features")
    owner = text_image_index.to(image.device, torch.int64)
    if owner.shape != (len(text),):
        raise ValueError(f"text_image_index: expected shape ({len(text)},), one per text, got {tuple(owner.shape)}.")
    if owner.min() < 0 or owner.max() >= len(image):
        raise ValueError(
            f"text_image_index: values in [{owner.min()}, {owner.max()}], but there are {len(image)} images."
        )
    without = len(image) - len(owner.unique())
    if without:
        raise ValueError(f"text_image_index: {without} of {len(image)} images have no text.")
    i2t, t2i = _ranks(image, text, owner)
    return {f"{name}_R@{k}": (rank < k).float().mean() for name, rank in (("i2t", i2t), ("t2i", t2i)) for k in ks}


class ImageTextRecall(Metric):
    """``image_text_recall`` over batches and ranks; ids, not positions, say which texts belong to which image."""

    full_state_update = False
    image_features: list[Tensor]
    image_id: list[Tensor]
    text_features: list[Tensor]
    text_image_id: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), prefix: str = "") -> None:
        super().__init__()
        self.ks, self.prefix = tuple(ks), prefix
        for name in ("image_features", "image_id", "text_features", "text_image_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_features: Tensor, image_id: Tensor, text_features: Tensor, text_image_id: Tensor) -> None:
        """Adds images (I, D) with ids (I,) and texts (T, D) with the ids of their images (T,)."""
        self.image_features.append(image_features.detach().float())
        self.image_id.append(image_id)
        self.text_features.append(text_features.detach().float())
        self.text_image_id.append(text_image_id)

    def compute(self) -> dict[str, Tensor]:
        """See ``image_text_recall``; an id that came twice, or a text without its image, is an error."""
        ids, order = dim_zero_cat(self.image_id).sort()
        if (ids[1:] == ids[:-1]).any():
            raise ValueError(f"image_id {int(ids[1:][ids[1:] == ids[:-1]][0])} came more than once in one evaluation.")
        text_ids = dim_zero_cat(self.text_image_id)
        index = torch.searchsorted(ids, text_ids).clamp(max=len(ids) - 1)
        if (ids[index] != text_ids).any():
            raise ValueError(
                f"A text belongs to image_id {int(text_ids[ids[index] != text_ids][0])}, which never came."
            )
        features = dim_zero_cat(self.image_features)[order]
        recall = image_text_recall(features, dim_zero_cat(self.text_features), index, self.ks)
        return {self.prefix + name: value for name, value in recall.items()}
