"""Recall against a plain loop over sorted candidates."""

import pytest
import torch
from torch import Tensor

from gmail_lightning.metrics import ImageTextRecall, image_text_recall, retrieval


def brute_force(image: Tensor, text: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """Rank of the best positive by a loop in float64; siblings do not count, ties count half."""
    image = image.double() / image.double().norm(dim=1, keepdim=True)
    text = text.double() / text.double().norm(dim=1, keepdim=True)
    scores = (image @ text.T).tolist()
    i2t = []
    for i, row in enumerate(scores):
        best = max(s for s, o in zip(row, owner.tolist(), strict=True) if o == i)
        others = [s for s, o in zip(row, owner.tolist(), strict=True) if o != i]
        i2t.append(sum(s > best for s in others) + 0.5 * sum(s == best for s in others) < k)
    t2i = []
    for t, o in enumerate(owner.tolist()):
        column = [row[t] for row in scores]
        others = column[:o] + column[o + 1 :]
        t2i.append(sum(s > column[o] for s in others) + 0.5 * sum(s == column[o] for s in others) < k)
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_a_plain_loop_also_on_negative_scores(chunk: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    torch.manual_seed(0)
    image, owner = torch.randn(19, 5), torch.cat([torch.arange(19), torch.randint(19, (24,))])
    owner = owner[torch.randperm(len(owner))]
    text = 0.8 * image[owner] + torch.randn(len(owner), 5) - 0.5
    got = image_text_recall(image, text, owner, ks=(k,))
    i2t, t2i = brute_force(image, text, owner, k)
    assert got[f"i2t_R@{k}"].item() == pytest.approx(i2t)
    assert got[f"t2i_R@{k}"].item() == pytest.approx(t2i)
    assert 0 < t2i < 1


def test_a_tie_counts_half_a_rank() -> None:
    # Exact in floating point: axis-aligned unit vectors. Texts 0 and 1 coincide, so each image ties once: rank 0.5.
    image = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    text, owner = image.clone(), torch.arange(3)
    got = image_text_recall(image, text, owner, ks=(1,))
    i2t, t2i = brute_force(image, text, owner, 1)
    assert (got["i2t_R@1"].item(), got["t2i_R@1"].item()) == (i2t, t2i) == (1.0, 1.0)


def test_constant_features_do_not_score() -> None:
    got = image_text_recall(torch.ones(100, 4), torch.ones(100, 4), torch.arange(100), ks=(1, 10))
    assert all(value == 0 for value in got.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, t, o: (i, t, o.clamp(max=1)), "1 of 3 images have no text"),
        (lambda i, t, o: (i, t, o + 1), r"values in \[1, 3\]"),
        (lambda i, t, o: (i.index_fill(0, torch.tensor([1]), torch.nan), t, o), "1 rows are not finite"),
        (lambda i, t, o: (i, t, o[:2]), "one per text"),
        (lambda i, t, o: (i[:0], t, o), "N > 0"),
    ],
)
def test_bad_input_is_named(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        image_text_recall(*change(torch.eye(3), torch.eye(3), torch.arange(3)))


def test_metric_joins_by_id_in_any_order() -> None:
    torch.manual_seed(0)
    image, text, owner = torch.randn(10, 4), torch.randn(30, 4), torch.arange(10).repeat(3)
    metric, order = ImageTextRecall(prefix="real_"), torch.randperm(10)
    for rows in order.split(4):
        mine = torch.isin(owner, rows)
        metric.update(image[rows], 100 + rows, text[mine], 100 + owner[mine])
    expected = image_text_recall(image, text, owner)
    assert {f"real_{k}": v for k, v in expected.items()} == metric.compute()
    metric.update(image[:1], torch.tensor([100]), text[:1], torch.tensor([100]))
    with pytest.raises(ValueError, match="100 came more than once"):
        metric.compute()


@pytest.mark.parametrize("width", [16, 512, 768])
def test_a_collapsed_encoder_does_not_score(width: int) -> None:
    """Equal features give cosines that two kernels round differently: still ties."""
    for seed in range(5):
        torch.manual_seed(seed)
        features = torch.randn(1, width).repeat(50, 1)
        got = image_text_recall(features, features.clone(), torch.arange(50), ks=(1, 10))
        assert all(value == 0 for value in got.values())
