"""The gap against plain loops and scikit-learn."""

import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from gmail_lightning.metrics import ModalityGap, linear_probe_accuracy, modality_gap


def test_equals_plain_loops() -> None:
    torch.manual_seed(0)
    real = torch.randn(12, 6)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 3])  # two real images have two generated partners
    real[10], real[11] = real[9], real[3]
    generated = real + torch.randn(12, 6)
    got = modality_gap(generated, real, ids=ids, ks=(1, 3))
    g, r = generated.double(), real.double()
    g, r = g / g.norm(dim=1, keepdim=True), r / r.norm(dim=1, keepdim=True)
    cosine = [[float(a @ b) for b in r] for a in g]
    paired = sum(cosine[i][i] for i in range(12)) / 12
    others = [cosine[i][j] for i in range(12) for j in range(12) if ids[i] != ids[j]]
    shuffled = sum(others) / len(others)
    gallery = {int(i): n for n, i in enumerate(ids)}
    for k in (1, 3):
        hits = [sum(cosine[q][n] > cosine[q][q] + 1e-9 for n in gallery.values()) < k for q in range(12)]
        assert got[f"g2r_R@{k}"].item() == pytest.approx(sum(hits) / 12)
    assert got["paired_cosine"].item() == pytest.approx(paired, abs=1e-6)
    assert got["shuffled_cosine"].item() == pytest.approx(shuffled, abs=1e-6)
    assert got["margin"].item() == pytest.approx(paired - shuffled, abs=1e-6)
    assert got["centroid_distance"].item() == pytest.approx(float((g.mean(0) - r.mean(0)).norm()), abs=1e-6)


def test_linear_probe_equals_ridge_classifier() -> None:
    torch.manual_seed(0)
    generated, real = torch.randn(60, 8) + 0.6, torch.randn(60, 8)
    correct = 0
    for test in (0, 1):
        train, held = torch.arange(60) % 2 != test, torch.arange(60) % 2 == test
        x, y = torch.cat([generated[train], real[train]]), torch.tensor([1] * 30 + [0] * 30)
        centred = (x - x.mean(0)).double()
        penalty = 1e-2 * float((centred**2).sum(0).mean())
        model = RidgeClassifier(alpha=penalty).fit(x.double(), y)
        correct += (model.predict(generated[held].double()) == 1).sum() + (
            model.predict(real[held].double()) == 0
        ).sum()
    accuracy = linear_probe_accuracy(generated, real).item()
    assert accuracy == pytest.approx(correct / 120)
    assert 0.6 < accuracy < 1


def test_probe_is_at_chance_for_one_distribution_and_sure_for_two() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 4)
    assert abs(linear_probe_accuracy(x, torch.randn(400, 4)).item() - 0.5) < 0.08
    assert linear_probe_accuracy(x + 10, x).item() == 1.0


def test_the_probe_keeps_copies_of_an_image_on_one_side() -> None:
    torch.manual_seed(0)
    real = torch.randn(60, 40).repeat_interleave(5, dim=0)
    generated = torch.randn(60, 40).repeat_interleave(5, dim=0) + 0.01 * torch.randn(300, 40)
    ids = torch.arange(60).repeat_interleave(5)
    assert linear_probe_accuracy(generated, real).item() > 0.7  # what it would say of one and the same distribution
    assert abs(linear_probe_accuracy(generated, real, ids=ids).item() - 0.5) < 0.1


def test_metric_joins_pairs_over_batches_and_names_what_is_alone() -> None:
    torch.manual_seed(0)
    generated, real = torch.randn(9, 4), torch.randn(9, 4)
    metric = ModalityGap()
    rows = [(generated[i], 1, i) for i in range(9)] + [(real[i], 0, i) for i in range(9)]
    for part in torch.randperm(18).split(5):
        features = torch.stack([rows[i][0] for i in part])
        modality, ids = torch.tensor([rows[i][1] for i in part]), torch.tensor([rows[i][2] for i in part])
        metric.update(features, modality, ids)
    expected = modality_gap(generated, real)
    assert {k: v.item() for k, v in metric.compute().items()} == {
        k: pytest.approx(v.item()) for k, v in expected.items()
    }
    metric.update(generated[:1], torch.tensor([1]), torch.tensor([77]))
    with pytest.raises(ValueError, match=r"1 generated rows have no real row of their image_id .* 77"):
        metric.compute()


def test_metric_takes_several_generated_rows_of_one_image() -> None:
    torch.manual_seed(0)
    real, generated = torch.randn(5, 4), torch.randn(10, 4)
    metric, ids = ModalityGap(), torch.arange(5).repeat(2)
    metric.update(torch.cat([generated, real]), torch.tensor([1] * 10 + [0] * 5), torch.cat([ids, torch.arange(5)]))
    expected = modality_gap(generated, real[ids], ids=ids)
    for name, value in metric.compute().items():
        if name != "probe_accuracy":  # its folds depend on the order of the rows
            assert value.item() == pytest.approx(expected[name].item(), abs=1e-6)
    metric.update(real[:1], torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(ValueError, match="image_id 3 has more than one real row"):
        metric.compute()
