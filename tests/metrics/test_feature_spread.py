"""Spread and drift of features, against singular values and loops in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.metrics import FeatureSpread, feature_spread


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + 0.4


def written_out(features: Tensor) -> tuple[float, float]:
    unit = F.normalize(features.double(), dim=1)
    singular = [value for value in torch.linalg.svdvals(unit).tolist() if value > 1e-12]
    share = [value / sum(singular) for value in singular]
    rank = math.exp(-sum(p * math.log(p) for p in share))
    pairs = [float(a @ b) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    return rank, sum(pairs) / len(pairs)


@pytest.mark.parametrize(("rows", "width"), [(40, 7), (12, 12), (9, 300), (2, 64)])  # more rows than width, and fewer
def test_spread_is_that_of_singular_values_and_pairs(rows: int, width: int) -> None:
    features = drawn(rows, width)
    metric = FeatureSpread(width, prefix="text_")
    for part in features.split([1, 0, rows - 1]):
        metric.update(part)
    values = metric.compute()
    assert set(values) == {"text_effective_rank", "text_mean_cosine"}
    rank, cosine = written_out(features)
    for found in (feature_spread(features), {name.removeprefix("text_"): value for name, value in values.items()}):
        assert found["effective_rank"].item() == pytest.approx(rank, rel=1e-9)
        assert found["mean_cosine"].item() == pytest.approx(cosine, rel=1e-9)


def test_lengths_do_not_count() -> None:
    features = drawn(11, 5)
    scaled = features * torch.arange(1.0, 12.0)[:, None]
    for name, value in feature_spread(features).items():
        assert feature_spread(scaled)[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_a_collapse_has_rank_and_cosine_one() -> None:
    found = feature_spread(drawn(1, 768).expand(500, 768))
    assert found["effective_rank"].item() == pytest.approx(1, abs=1e-9)
    assert found["mean_cosine"].item() == pytest.approx(1, abs=1e-9)


def test_orthonormal_rows_have_their_number_as_rank_and_cosine_zero() -> None:
    basis = torch.linalg.qr(drawn(64, 64).double()).Q[:10]
    found = feature_spread(basis)
    assert found["effective_rank"].item() == pytest.approx(10, rel=1e-9)
    assert found["mean_cosine"].item() == pytest.approx(0, abs=1e-9)


def test_opposite_rows_by_hand() -> None:
    # Singular values sqrt(2) and 1: shares 0.5858 and 0.4142. Cosines of the three pairs: -1, 0, 0.
    found = feature_spread(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]))
    p = math.sqrt(2) / (math.sqrt(2) + 1)
    assert found["effective_rank"].item() == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))
    assert found["mean_cosine"].item() == pytest.approx(-1 / 3)


def test_drift_is_the_mean_over_rows_and_needs_earlier_features() -> None:
    metric = FeatureSpread(2)
    metric.update(torch.eye(2))
    assert "drift" not in metric.compute()
    # Cosines with the earlier rows 1, 0 and -1: drifts 0, 1 and 2; the rows above have none.
    metric.update(torch.eye(2), torch.tensor([[5.0, 0.0], [1.0, 0.0]]))
    metric.update(torch.eye(2)[:1], -torch.eye(2)[:1])
    assert metric.compute()["drift"].item() == pytest.approx(1)


def test_fewer_than_two_rows_have_no_spread() -> None:
    metric = FeatureSpread(3)
    metric.update(torch.empty(0, 3))
    metric.update(torch.ones(1, 3))
    assert metric.compute() == {}
    with pytest.raises(ValueError, match="at least 2 rows"):
        feature_spread(torch.ones(1, 3))


def test_what_cannot_be_measured_is_refused() -> None:
    good, bad = drawn(4, 3), drawn(4, 3).index_fill(0, torch.tensor([1, 2]), torch.nan)
    with pytest.raises(ValueError, match="features: 2 rows are not finite"):
        feature_spread(bad)
    metric = FeatureSpread(3)
    with pytest.raises(ValueError, match="features: 2 rows are not finite"):
        metric.update(bad)
    with pytest.raises(ValueError, match="earlier_features: 2 rows are not finite"):
        metric.update(good, bad)
    with pytest.raises(ValueError, match="earlier_features: expected shape"):
        metric.update(good, good[:1])
    with pytest.raises(ValueError, match="features: expected shape"):
        metric.update(good[:, :2])
    assert metric.count == 0  # a refused batch leaves nothing behind
