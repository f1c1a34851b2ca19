"""Reciprocal consistency against sums written out in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.losses import gradient_cosines, prediction_contrast_loss, reciprocal_consistency_loss


def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    u, v, s = (torch.randn(5, 7, generator=draws, dtype=torch.float64).requires_grad_() for _ in range(3))
    return u, v, s, torch.rand(5, generator=draws, dtype=torch.float64)


def softmax_rows(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).softmax(dim=1)


@pytest.mark.parametrize("stop", ["targets", "clip", "diffusion", "none"])
def test_two_way_divergence_is_the_sum_written_out(stop: str) -> None:
    u, v, s, w = features()
    loss = reciprocal_consistency_loss(u, v, s, logit_scale=3.0, weight=w, stop_gradient=stop)  # type: ignore[arg-type]
    p, q = softmax_rows(v, s, 3.0), softmax_rows(u, s, 3.0)
    both = (p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)
    assert loss.item() == pytest.approx((both * w).mean().item() / 2, abs=1e-12)
    reached = [g is not None for g in torch.autograd.grad(loss, [u, v, s], allow_unused=True)]
    assert reached == {"clip": [True, False, False], "diffusion": [False, True, True]}.get(stop, [True] * 3)


def test_targets_get_no_gradient() -> None:
    u, v, s, _ = features()
    (found,) = torch.autograd.grad(reciprocal_consistency_loss(u, v, s, logit_scale=3.0), [u])
    p, q = softmax_rows(v, s, 3.0).detach(), softmax_rows(u, s, 3.0)
    (expected,) = torch.autograd.grad((p * (p / q).log()).sum(1).mean() / 2, [u])
    torch.testing.assert_close(found, expected)


def test_info_nce_and_cosine_are_the_sums_written_out() -> None:
    u, v, _, w = features()
    ids = torch.tensor([1, 2, 1, 3, 4])
    loss = reciprocal_consistency_loss(u, v, distance="infonce", logit_scale=3.0, weight=w, ids=ids)
    cosine = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or ids[j] != ids[i]]
        for row in (cosine[i], cosine[:, i]):
            total += w[i] * ((3 * row[others]).exp().sum().log() - 3 * row[i]) / 2 / 5
    torch.testing.assert_close(loss, total)
    direct = reciprocal_consistency_loss(u, v, distance="cosine", weight=w)
    torch.testing.assert_close(direct, (w * (1 - cosine.diagonal())).mean())


def test_equal_sides_are_at_zero() -> None:
    u, _, s, _ = features()
    assert abs(reciprocal_consistency_loss(u, u, s).item()) < 1e-12
    assert abs(reciprocal_consistency_loss(u, u, distance="cosine").item()) < 1e-12


def test_prediction_contrast_is_the_sum_written_out() -> None:
    draws = torch.Generator().manual_seed(0)
    anchor, positive, negative = (
        torch.randn(3, *shape, 2, 2, generator=draws, dtype=torch.float64) for shape in ((), (2,), (2,))
    )
    differs = torch.tensor([[True, True], [True, False], [True, True]])
    loss = prediction_contrast_loss(anchor, positive, negative, temperature=0.5, is_negative=differs)
    total = 0.0
    for i in range(3):
        likeness = [F.cosine_similarity(anchor[i].flatten(), x.flatten(), dim=0) / 0.5 for x in positive[i]]
        unlike = [
            F.cosine_similarity(anchor[i].flatten(), x.flatten(), dim=0) / 0.5
            for x, is_one in zip(negative[i], differs[i], strict=True)
            if is_one
        ]
        log_sum = torch.stack(likeness + unlike).exp().sum().log()
        total += sum(log_sum - one for one in likeness) / 2 / 3
    torch.testing.assert_close(loss, torch.as_tensor(total))


def test_what_cannot_be_compared_is_refused() -> None:
    u, v, s, _ = features()
    with pytest.raises(ValueError, match="there is one"):
        reciprocal_consistency_loss(u[:1], v[:1], s[:1])
    with pytest.raises(ValueError, match="text_features must have shape"):
        reciprocal_consistency_loss(u, v)
    with pytest.raises(ValueError, match="distance='l2'"):
        reciprocal_consistency_loss(u, v, distance="l2")  # type: ignore[arg-type]


def test_cosines_of_gradients_are_those_by_hand() -> None:
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    found = gradient_cosines({"a": (x**2).sum() + y.sum(), "b": x[0] - x[1], "c": y.square().sum()}, [x, y])
    assert found["a_b"].item() == pytest.approx((2 - 4) / (20**0.5 * 2**0.5))
    assert found["a_c"].item() == pytest.approx(1.0)
    assert found.keys() == {"a_b", "a_c"}
