"""Image-text recall by counting ranks: exact, in tiles, one matrix product for both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.metrics.retrieval_duplicates import deduplicated_ranks
from gmail_lightning.metrics.states import gather_state, joined

#: Images and texts of a tile of scores. A CPU tile stays in the cache; a GPU needs large ones to keep its launches few.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)

TIE = 1e-6  # cosines closer than this are equal: fp32 rounds one and the same cosine differently in different kernels


def image_text_recall(
    image_features: Tensor,
    text_features: Tensor,
    text_image_index: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    text_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Recall at k and median rank of image-to-text and text-to-image retrieval by cosine similarity.

    An image counts as found if any of its texts is among the k best. A candidate that ties with the positive counts
    half a rank, so that equal features for everything find nothing among more than 2k candidates. Features of any
    precision are read block by block, so they may be memory-mapped; above the inputs stay one tile and a few numbers
    per image.

    Args:
        image_features: Shape (I, D), normalised inside.
        text_features: Shape (T, D), normalised inside.
        text_image_index: Shape (T,), the row of the image that each text belongs to. Every image needs a text.
        ks: The values of k.
        text_ids: Shape (T,), int64, equal for texts that read the same: adds ``deduplicated_recall``.

    Returns:
        ``i2t_R@k`` and ``t2i_R@k`` for every k, scalars in [0, 1]; ``i2t_median_rank`` and ``t2i_median_rank``, 1 is
        best.

    Raises:
        ValueError: If shapes disagree, an index is out of range, an image has no text, or a feature is not finite.

    Example:
        >>> import torch
        >>> image_text_recall(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), ks=(1,))["i2t_R@1"]
        tensor(1.)
    """
    owner = _checked_owner(image_features, text_features, text_image_index)
    with full_precision(image_features.device):
        image_rank, text_ranks = _ranks(image_features, text_features, owner)
    ranks, images = image_rank.unique(return_counts=True)
    halves = torch.arange(len(text_ranks), device=ranks.device) / 2
    values = {**_summary("i2t", ranks, images, ks), **_summary("t2i", halves, text_ranks, ks)}
    if text_ids is not None:
        values.update(deduplicated_recall(image_features, text_features, owner, text_ids, ks))
    return values


def deduplicated_recall(
    image_features: Tensor,
    text_features: Tensor,
    text_image_index: Tensor,
    text_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Tensor]:
    """Recall at k where texts of one id are one and the same text.

    A text finds any image that has a text of its id; an image finds any text whose id one of its own has. Positives
    never stand in one another's way, and ties count half a rank: where all ids differ it is ``image_text_recall``.

    Args:
        image_features: Shape (I, D), normalised inside.
        text_features: Shape (T, D), normalised inside.
        text_image_index: Shape (T,), the row of the image that each text belongs to. Every image needs a text.
        text_ids: Shape (T,), int64.
        ks: The values of k.

    Returns:
        ``i2t_dedup_R@k`` and ``t2i_dedup_R@k`` for every k, scalars in [0, 1].

    Raises:
        ValueError: As ``image_text_recall``, or if ``text_ids`` are not whole numbers, one per text.

    Example:
        >>> features, index = torch.eye(2), torch.tensor([0, 1])
        >>> deduplicated_recall(features, features.flip(0), index, torch.tensor([5, 5]), ks=(1,))["t2i_dedup_R@1"]
        tensor(1.)
    """
    owner = _checked_owner(image_features, text_features, text_image_index)
    if text_ids.shape != owner.shape or text_ids.is_floating_point():
        raise ValueError(
            f"text_ids: expected int64 of shape {tuple(owner.shape)}, one per text, got {text_ids.dtype} of shape "
            f"{tuple(text_ids.shape)}."
        )
    with full_precision(image_features.device):
        ranks = deduplicated_ranks(image_features, text_features, owner, text_ids.to(owner.device))
    named = zip(("i2t", "t2i"), ranks, strict=True)
    return {f"{name}_dedup_R@{k}": (rank < k).float().mean() for name, rank in named for k in ks}


def _checked_owner(image_features: Tensor, text_features: Tensor, text_image_index: Tensor) -> Tensor:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        _check_features(features, name)
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"Images and texts need features of one width, got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}."
        )
    owner = text_image_index.to(image_features.device, torch.int64)
    _check_owner(owner, len(image_features), len(text_features))
    return owner


def _check_features(features: Tensor, name: str) -> None:
    """Refuses NaN and infinity, because they compare as a perfect score."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: expected shape (N, D) with N > 0, got {tuple(features.shape)}.")
    # NaN and infinity times 0 is NaN; isfinite of every entry takes ten times as long
    bad = sum(int((features[rows] * 0).sum(dim=1).isnan().sum()) for rows in _blocks(features, 1))
    if bad:
        raise ValueError(f"{name}: {bad} rows are not finite.")


def _check_owner(owner: Tensor, images: int, texts: int) -> None:
    if owner.shape != (texts,):
        raise ValueError(f"text_image_index: expected shape ({texts},), one per text, got {tuple(owner.shape)}.")
    if owner.min() < 0 or owner.max() >= images:
        raise ValueError(f"text_image_index: values in [{owner.min()}, {owner.max()}], but there are {images} images.")
    without = int((owner.bincount(minlength=images) == 0).sum())
    if without:
        raise ValueError(f"text_image_index: {without} of {images} images have no text.")


def _blocks(features: Tensor, side: int) -> Iterator[slice]:
    """Rows of each block of images (side 0) or texts (side 1)."""
    step = (CPU_TILE if features.device.type == "cpu" else GPU_TILE)[side]
    return (slice(start, min(start + step, len(features))) for start in range(0, len(features), step))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in fp32, where those of training may run in TF32 or bf16: their scores would tie or reorder."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1)


def _ranks(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the best positive, 0 is best: of every image, shape (I,), and how many texts have rank h/2, (2I + 1,).

    The rank is the number of candidates that score above the positive, so nothing is sorted. There are at least as many
    texts as images, so the texts are walked once per pass, and only a histogram of their ranks is kept.
    """
    best = torch.full((len(image),), -torch.inf, device=image.device)
    for j in _blocks(text, 1):
        best.scatter_reduce_(0, owner[j], _positive(_unit(text[j]), image[owner[j]]), "amax")
    image_rank = torch.zeros(len(image), dtype=torch.float64, device=image.device)
    text_ranks = torch.zeros(2 * len(image) + 1, dtype=torch.int64, device=image.device)
    tile = CPU_TILE if image.device.type == "cpu" else GPU_TILE
    buffer = best.new_empty(2, min(tile[0], len(image)) * min(tile[1], len(text)))
    for j in _blocks(text, 1):
        unit = _unit(text[j])
        positive = _positive(unit, image[owner[j]])
        rank = torch.zeros_like(positive)
        for i in _blocks(image, 0):
            shape = i.stop - i.start, len(unit)
            scores, spare = (flat[: shape[0] * shape[1]].view(shape) for flat in buffer)
            torch.mm(_unit(image[i]), unit.T, out=scores)
            _mask_own(scores, owner[j] - i.start)
            image_rank[i] += _above(scores, best[i, None], 1, spare)
            rank += _above(scores, positive[None], 0, spare)
        text_ranks += (2 * rank).long().bincount(minlength=len(text_ranks))
    return image_rank, text_ranks


def _positive(text: Tensor, image: Tensor) -> Tensor:
    """Scores of texts, unit rows (B, D), with their own images (B, D)."""
    return _unit(image).mul_(text).sum(dim=1)


def _mask_own(scores: Tensor, row: Tensor) -> None:
    """A positive never stands above itself or its siblings: entry (row[c], c) of a tile, where it lies in the tile."""
    column = torch.arange(len(row), device=row.device)
    inside = (row >= 0) & (row < len(scores))
    row = row.clamp(0, len(scores) - 1)
    scores[row, column] = scores[row, column].masked_fill(inside, -torch.inf)


def _above(scores: Tensor, positive: Tensor, dim: int, spare: Tensor) -> Tensor:
    """Number of scores above the positive, ties counting half; ``spare`` is overwritten."""
    sign = torch.ops.aten.hardshrink.out(torch.sub(scores, positive, out=spare), TIE, out=spare).sign_()
    above: Tensor = (sign.sum(dim=dim) + scores.shape[dim]) / 2
    return above


def _summary(name: str, ranks: Tensor, counts: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Recall and median rank, of ranks in ascending order and the number of queries that have each."""
    seen = counts.cumsum(0)
    total = seen[-1]
    middle = torch.stack([(total - 1) // 2, total // 2])  # of an even number the mean of two
    median = ranks[torch.searchsorted(seen, middle, right=True)].mean().float() + 1
    recall = {f"{name}_R@{k}": counts[ranks < k].sum() / total for k in ks}
    return {**recall, f"{name}_median_rank": median}


class ImageTextRecall(Metric):
    """``image_text_recall`` over batches and ranks; ids, not positions, say which texts belong to which image.

    Where updates give ``text_ids``, also ``deduplicated_recall``.

    Args:
        ks: The values of k.
        prefix: Put before the name of every value.
    """

    full_state_update = False
    image_features: list[Tensor]
    image_id: list[Tensor]
    text_features: list[Tensor]
    text_image_id: list[Tensor]
    text_ids: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 5, 10), prefix: str = "") -> None:
        super().__init__(dist_sync_fn=gather_state)
        self.ks, self.prefix = tuple(ks), prefix
        for name in ("image_features", "image_id", "text_features", "text_image_id", "text_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_features: Tensor,
        image_id: Tensor,
        text_features: Tensor,
        text_image_id: Tensor,
        text_ids: Tensor | None = None,
    ) -> None:
        """Adds images (I, D) with ids (I,) and texts (T, D) with the ids of their images (T,); I or T may be 0.

        ``text_ids`` (T,) int64 are equal for texts that read the same; give them in every update or in none.
        """
        for name, features, ids in (("image", image_features, image_id), ("text", text_features, text_image_id)):
            if features.ndim != 2 or ids.shape != features.shape[:1]:
                raise ValueError(
                    f"{name}: expected features (N, D) and ids (N,), got {tuple(features.shape)} and "
                    f"{tuple(ids.shape)}."
                )
        if text_ids is not None and text_ids.shape != text_image_id.shape:
            raise ValueError(
                f"text_ids: expected {tuple(text_image_id.shape)}, one per text, got {tuple(text_ids.shape)}."
            )
        self.image_features.append(image_features.detach().float())
        self.image_id.append(image_id)
        self.text_features.append(text_features.detach().float())
        self.text_image_id.append(text_image_id)
        if text_ids is not None:
            self.text_ids.append(text_ids)

    def compute(self) -> dict[str, Tensor]:
        """See ``image_text_recall``; also ``num_images`` and ``num_texts``. Nothing where no row came at all.

        Raises:
            ValueError: If an id came twice, an image has no text, a text has no image, or a feature is not finite.
        """
        images, texts = joined(self.image_id), joined(self.text_image_id)
        if len(images) == len(texts) == 0:
            return {}
        if len(images) == 0 or len(texts) == 0:
            raise ValueError(f"An evaluation needs images and texts, got {len(images)} images and {len(texts)} texts.")
        ids, order = images.long().sort()
        if (ids[1:] == ids[:-1]).any():
            raise ValueError(f"image_id {int(ids[1:][ids[1:] == ids[:-1]][0])} came more than once in one evaluation.")
        texts = texts.long()
        index = torch.searchsorted(ids, texts).clamp(max=len(ids) - 1)
        if (ids[index] != texts).any():
            raise ValueError(f"A text belongs to image_id {int(texts[ids[index] != texts][0])}, which never came.")
        image_features, text_features = joined(self.image_features), joined(self.text_features)
        same = joined(self.text_ids)
        values = image_text_recall(
            image_features, text_features, order[index], self.ks, text_ids=same if len(same) else None
        )
        values["num_images"] = torch.tensor(float(len(images)), device=images.device)
        values["num_texts"] = torch.tensor(float(len(texts)), device=images.device)
        return {self.prefix + name: value for name, value in values.items()}
