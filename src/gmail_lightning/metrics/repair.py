"""Re-pairing of captions and generated images (SynC)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.metrics.retrieval import full_precision

TIE = 1e-6  # similarities closer than this are equal


class Repair(NamedTuple):
    """The image that each of T captions is given."""

    image_index: Tensor  # (T,) int64
    score: Tensor  # (T,) float32, similarity of the caption to the nearest of those that the image recalls


def rank_images(
    image_features: Tensor,
    text_features: Tensor,
    sentence_features: Tensor | None = None,
    num_candidates: int = 15,
    num_captions: int = 2,
    chunk_size: int = 1024,
) -> Repair:
    """The candidates of every caption, the best first: ``repair_pairs`` with all of its images.

    Returns:
        Image indices and scores of shape (T, K), K the smaller of ``num_candidates`` and N.

    Raises:
        ValueError: If shapes disagree, a number is not positive, or a feature is not finite.
    """
    images, texts = _unit(image_features, "image_features"), _unit(text_features, "text_features")
    sentences = texts if sentence_features is None else _unit(sentence_features, "sentence_features")
    if images.shape[1] != texts.shape[1] or len(sentences) != len(texts):
        raise ValueError(
            f"Expected images (N, D), texts (T, D) and sentences (T, E), got {tuple(images.shape)}, "
            f"{tuple(texts.shape)} and {tuple(sentences.shape)}."
        )
    if min(num_candidates, num_captions, chunk_size) < 1:
        raise ValueError(f"{num_candidates=}, {num_captions=} and {chunk_size=} must be positive.")
    num_candidates, num_captions = min(num_candidates, len(images)), min(num_captions, len(texts))
    with full_precision(images.device):
        return _rank(images, texts, sentences, num_candidates, num_captions, chunk_size)


def _rank(
    images: Tensor, texts: Tensor, sentences: Tensor, num_candidates: int, num_captions: int, chunk_size: int
) -> Repair:
    """``rank_images`` of unit rows."""
    recalled = torch.cat([(part @ texts.T).topk(num_captions).indices for part in images.split(chunk_size)])  # (N, C)
    index, score = [], []
    for part, own in zip(texts.split(chunk_size), sentences.split(chunk_size), strict=True):
        candidates = (part @ images.T).topk(num_candidates).indices  # (t, K), the nearest image first
        similarity = torch.stack(  # (t, K, C), one candidate at a time: the gathered sentences are what takes memory
            [torch.einsum("tce,te->tc", sentences[recalled[candidates[:, k]]], own) for k in range(num_candidates)], 1
        )
        best = similarity.amax(dim=2)  # (t, K)
        order = (best / TIE).round().argsort(dim=1, descending=True, stable=True)  # ties: the nearer image
        index.append(candidates.gather(1, order))
        score.append(best.gather(1, order))
    return Repair(torch.cat(index), torch.cat(score))


def repair_pairs(
    image_features: Tensor,
    text_features: Tensor,
    sentence_features: Tensor | None = None,
    num_candidates: int = 15,
    num_captions: int = 2,
    chunk_size: int = 1024,
) -> Repair:
    """Gives each caption the generated image that recalls it best: SynC, arXiv 2507.18616.

    For each caption, the nearest images by cosine are candidates. Each candidate recalls its nearest captions, and its
    score is the highest similarity of one of these sentences to the caption. The best candidate is kept; of equal ones
    the nearer image. SynC then trains on the best 90 % by score (``Filter.top_share``).

    Args:
        image_features: Shape (N, D), normalised inside.
        text_features: Shape (T, D) in the same space.
        sentence_features: Shape (T, E), captions in the space of a sentence encoder (SynC: Sentence-BERT); by default
            the text features.
        num_candidates: K of SynC, images looked at for each caption.
        num_captions: Captions that each candidate recalls.
        chunk_size: Rows scored at once; memory is ``chunk_size`` times N or T.

    Returns:
        Image and score of each caption, (T,).

    Raises:
        ValueError: If shapes disagree, a number is not positive, or a feature is not finite.
    """
    ranked = rank_images(image_features, text_features, sentence_features, num_candidates, num_captions, chunk_size)
    return Repair(ranked.image_index[:, 0], ranked.score[:, 0])


def _unit(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: expected shape (N, D) with N > 0, got {tuple(features.shape)}.")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    return F.normalize(features.float(), dim=-1)
