"""Distances between sets of images, the spread of features and recall of recurring captions, against loops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.kid import poly_mmd

from gmail_lightning.metrics import (
    FeatureSpread,
    GenerationScore,
    cmmd,
    deduplicated_recall,
    feature_spread,
    image_text_recall,
    kernel_distance,
)
from gmail_lightning.metrics import generation as module

DRAWS = torch.Generator().manual_seed(0)
ONE, OTHER = torch.randn(9, 6, generator=DRAWS), torch.randn(7, 6, generator=DRAWS) + 0.3


def test_kernel_distance_is_that_of_torchmetrics_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = poly_mmd(ONE[:7].double(), OTHER.double())  # the peer takes sets of one size
    torch.testing.assert_close(kernel_distance(ONE[:7], OTHER), expected)
    whole = kernel_distance(ONE, OTHER), cmmd(ONE, OTHER)
    monkeypatch.setattr(module, "ROWS", 2)
    torch.testing.assert_close((kernel_distance(ONE, OTHER), cmmd(ONE, OTHER)), whole)


def test_cmmd_is_the_sum_written_out() -> None:
    x, y = F.normalize(ONE.double(), dim=1), F.normalize(OTHER.double(), dim=1)
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b).square() / 200).mean()  # noqa: E731
    torch.testing.assert_close(cmmd(ONE, OTHER), 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def test_distances_worked_out_by_hand() -> None:
    # Rows (1, 0), (0, 1) against twice (2, 1): pairs (0/2 + 1)^3 = 1, (5/2 + 1)^3 = 42.875, across 2^3 = 8 and 1.5^3.
    x, y = torch.eye(2), torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    assert kernel_distance(x, y).item() == pytest.approx(1 + 42.875 - (8 + 1.5**3))
    # Opposite unit rows are at squared distance 4: within 1 and 1, across exp(-4 / 200).
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert cmmd(x, -x).item() == pytest.approx(1000 * 2 * (1 - math.exp(-0.02)))


def test_the_kernels_are_the_loops_over_pairs() -> None:
    x, y = ONE.double(), OTHER.double()
    poly = lambda a, b: (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 6 + 1) ** 3  # noqa: E731
    within = [sum(poly(a, b) for a in s for b in s if a is not b) for s in (list(x), list(y))]
    across = sum(poly(a, b) for a in x for b in y)
    expected = within[0] / 72 + within[1] / 42 - 2 * across / 63
    assert kernel_distance(ONE, OTHER).item() == pytest.approx(expected, rel=1e-12)


def test_equal_sets_are_at_zero_and_below() -> None:
    assert cmmd(ONE, ONE.flip(0)).item() == pytest.approx(0, abs=1e-10)
    gram = (ONE.double() @ ONE.double().T / 6 + 1) ** 3  # the unbiased estimate misses the diagonals, hence below 0
    expected = 2 * ((gram.sum() - gram.trace()) / 72 - gram.mean())
    assert kernel_distance(ONE, ONE).item() == pytest.approx(expected.item())
    assert expected < 0


@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
def test_distances_refuse_what_they_cannot_measure(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    bad = ONE.clone()
    bad[4, 2] = torch.inf
    for pair, words in (
        ((ONE[:1], OTHER), "at least 2 rows"),
        ((ONE, OTHER[:1]), "at least 2 rows"),
        ((ONE, OTHER[:, :5]), "at least 2 rows"),
        ((bad, OTHER), "generated: 1 rows are not finite"),
        ((OTHER, bad), "real: 1 rows are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            distance(*pair)


def test_score_leaves_out_what_it_has_no_rows_for() -> None:
    score = GenerationScore()
    score.update(ONE, OTHER)  # no texts, and sides of different sizes
    assert set(score.compute()) == {"kid", "cmmd", "num_images"}
    score.update(ONE[:2], OTHER[:2], ONE[:2])
    with pytest.raises(ValueError, match="2 texts, 11 images"):
        score.compute()
    single = GenerationScore()
    single.update(ONE[:1], OTHER, 2 * ONE[:1])
    values = single.compute()
    assert set(values) == {"clip_score", "num_images"}
    assert values["clip_score"].item() == pytest.approx(2.5)
    assert values["num_images"] == 1
    empty = GenerationScore()
    empty.update(ONE[:0], OTHER[:0], ONE[:0])
    assert empty.compute() == {}


def test_scores_in_batches_are_those_of_all() -> None:
    score = GenerationScore(prefix="x_")
    for rows in (slice(0, 4), slice(4, 4), slice(4, 7)):
        score.update(ONE[rows], OTHER[rows], OTHER[rows])
    values = score.compute()
    torch.testing.assert_close(values["x_kid"], kernel_distance(ONE[:7], OTHER))
    assert values["x_num_images"] == 7
    expected = 2.5 * F.cosine_similarity(ONE[:7], OTHER).clamp(min=0).mean()
    torch.testing.assert_close(values["x_clip_score"], expected)
    assert GenerationScore().compute() == {}


def test_spread_is_that_of_the_singular_values() -> None:
    singular = torch.linalg.svdvals(F.normalize(ONE.double(), dim=1))
    share = singular / singular.sum()
    cosine = F.normalize(ONE.double(), dim=1) @ F.normalize(ONE.double(), dim=1).T
    metric = FeatureSpread(6)
    metric.update(ONE[:5], OTHER[:5])
    metric.update(ONE[5:], ONE[5:])
    values = metric.compute()
    for found in (values, feature_spread(ONE)):
        assert found["effective_rank"].item() == pytest.approx((-(share * share.log()).sum()).exp().item())
        assert found["mean_cosine"].item() == pytest.approx((cosine.sum() - 9).item() / 72)
    drift = (1 - F.cosine_similarity(ONE[:5].double(), OTHER[:5].double())).sum() / 9
    assert values["drift"].item() == pytest.approx(drift.item())
    collapsed = feature_spread(torch.ones(4, 3))
    assert collapsed["effective_rank"].item() == pytest.approx(1, abs=1e-5)
    assert collapsed["mean_cosine"].item() == pytest.approx(1)


def test_captions_that_read_the_same_are_hits() -> None:
    draws = torch.Generator().manual_seed(1)
    images, texts = torch.randn(6, 4, generator=draws), torch.randn(13, 4, generator=draws)
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5])
    ids = torch.tensor([7, 1, 7, 2, 3, 9, 9, 4, 5, 7, 6, 6, 8])
    scores = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    has = torch.stack([torch.isin(ids, ids[owner == i]) for i in range(6)])  # image i has a text that reads so
    wanted = {
        "i2t": [(scores[i] > scores[i][has[i]].max()).sum() for i in range(6)],
        "t2i": [(scores[:, t] > scores[:, t][has[:, t]].max()).sum() for t in range(13)],
    }
    found = deduplicated_recall(images, texts, owner, ids, ks=(1, 2, 3))
    for way, ranks in wanted.items():
        for k in (1, 2, 3):
            assert found[f"{way}_dedup_R@{k}"].item() == pytest.approx((torch.stack(ranks) < k).float().mean().item())
    strict = image_text_recall(images, texts, owner, ks=(1, 2))
    apart = deduplicated_recall(images, texts, owner, torch.arange(13), ks=(1, 2))
    assert all(strict[name.replace("_dedup", "")] == value for name, value in apart.items())
