"""Re-pairing against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gmail_lightning.metrics import repair_pairs
from gmail_lightning.metrics.repair import rank_images


def unit(x: torch.Tensor) -> np.ndarray:
    array = x.double().numpy()
    return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True))


def reference(
    images: np.ndarray, texts: np.ndarray, sentences: np.ndarray, num_candidates: int, num_captions: int
) -> list[list[tuple[float, int]]]:
    """For each caption its candidates with their scores, the best first."""
    ranked = []
    for text, sentence in zip(texts, sentences, strict=True):
        candidates = sorted(range(len(images)), key=lambda i: -float(images[i] @ text))[:num_candidates]
        scored = []
        for place, image in enumerate(candidates):
            recalled = sorted(range(len(texts)), key=lambda t: -float(texts[t] @ images[image]))[:num_captions]
            score = max(float(sentences[t] @ sentence) for t in recalled)
            scored.append((-round(score, 6), place, score, image))
        ranked.append([(score, image) for _, _, score, image in sorted(scored)])
    return ranked


@pytest.mark.parametrize("own_sentences", [True, False])
@pytest.mark.parametrize(("num_candidates", "num_captions", "chunk_size"), [(15, 2, 7), (4, 3, 1000), (1, 1, 16)])
def test_pairs_equal_plain_loops(own_sentences: bool, num_candidates: int, num_captions: int, chunk_size: int) -> None:
    torch.manual_seed(num_candidates)
    centres = torch.randn(6, 12)
    images = centres[torch.randint(0, 6, (30,))] + 0.8 * torch.randn(30, 12)
    texts = centres[torch.randint(0, 6, (40,))] + 0.8 * torch.randn(40, 12)
    sentences = torch.randn(40, 5) if own_sentences else None
    expected = reference(
        unit(images), unit(texts), unit(texts if sentences is None else sentences), num_candidates, num_captions
    )
    arguments = {"num_candidates": num_candidates, "num_captions": num_captions, "chunk_size": chunk_size}
    index, score = repair_pairs(images, texts, sentences, **arguments)
    assert index.tolist() == [row[0][1] for row in expected]
    assert score.tolist() == pytest.approx([row[0][0] for row in expected], abs=1e-5)
    ranked = rank_images(images, texts, sentences, **arguments)
    assert ranked.image_index.tolist() == [[image for _, image in row] for row in expected]
    if num_candidates > 1:  # the nearest image is not always the best
        nearest = (torch.from_numpy(unit(texts) @ unit(images).T)).argmax(dim=1)
        assert (index != nearest).any()


def test_exchanged_images_are_put_right_and_a_tie_goes_to_the_nearer() -> None:
    texts = torch.eye(5)
    exchanged = torch.tensor([1, 0, 2, 4, 3])
    index, score = repair_pairs(texts[exchanged] * 7, texts)
    assert index.tolist() == exchanged.tolist()  # its own inverse
    assert score.tolist() == pytest.approx([1.0] * 5)
    near, nearer = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.95, 0.4]])  # both recall both captions
    assert repair_pairs(torch.cat([near, nearer]), torch.eye(2), num_candidates=9).image_index.tolist() == [1, 0]


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 4\) and \(2, 4\)"):
        repair_pairs(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="num_captions=0"):
        repair_pairs(torch.ones(2, 3), torch.ones(2, 3), num_captions=0)
    with pytest.raises(ValueError, match="image_features: 1 rows are not finite"):
        repair_pairs(torch.tensor([[torch.inf, 1.0]]), torch.ones(1, 2))
