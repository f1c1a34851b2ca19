"""Distances between sets of images, the spread of features and recall of recurring captions, against loops."""

import pytest
import torch
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
