"""Losses whose values the host may not look at, as on a device: the same numbers, whatever the range."""

import pytest
import torch
from torch.nn.functional import normalize

from gmail_lightning.losses import alignment_loss, clip_loss, sigmoid_loss


@pytest.fixture(autouse=True)
def no_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("alignment", "info_nce", "tiled"):
        monkeypatch.setattr(f"gmail_lightning.losses.{module}.reads_are_free", lambda tensor: False)


def dense_logits(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    logits = scale * normalize(a, dim=1) @ normalize(b, dim=1).T
    if ids is not None:
        logits = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(len(a), dtype=torch.bool), -torch.inf)
    return logits


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0, 2000.0])
@pytest.mark.parametrize("ids", [None, torch.arange(7), torch.tensor([5, -3, 5, 9, 9, 5, 0])])
@pytest.mark.parametrize("sign", [1.0, -1.0])  # pairs that agree, and pairs that are opposite: every power underflows
def test_clip_loss_equals_the_dense_one(scale: float, ids: torch.Tensor | None, sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 5, generator=generator).double().requires_grad_()
    common = torch.randn(1, 5, generator=generator).double()
    b = (sign * (a.detach() + 3 * common)).requires_grad_()
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    logits, target = dense_logits(a, b, s, ids), torch.arange(7)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    gradients = torch.autograd.grad(expected, (a, b, s))
    actual = clip_loss(a, b, s, ids=ids)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (a, b, s)), gradients)


def test_label_smoothing_counts_the_candidates_of_every_group() -> None:
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).double().unbind()
    ids = torch.tensor([4, 4, 1, 0, 0, 0])
    logits = dense_logits(a, b, torch.tensor(3.0), ids)
    rows = []
    for direction in (logits, logits.T):
        for i, row in enumerate(direction):
            log_p = row.log_softmax(0)[row.isfinite()]
            rows.append(-0.9 * row.log_softmax(0)[i] - 0.1 * log_p.mean())
    torch.testing.assert_close(clip_loss(a, b, 3.0, ids=ids, label_smoothing=0.1), torch.stack(rows).mean())


def test_sigmoid_and_alignment_loss() -> None:
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).double().unbind()
    ids = torch.tensor([4, 4, 1, 0, 0, 0])
    with pytest.MonkeyPatch.context() as patch:
        for module in ("alignment", "info_nce", "tiled"):
            patch.setattr(f"gmail_lightning.losses.{module}.reads_are_free", lambda tensor: True)
        looked = sigmoid_loss(a, b, 5.0, -2.0, ids=ids), alignment_loss(a, b, temperature=0.2, ids=ids)
    torch.testing.assert_close(
        (sigmoid_loss(a, b, 5.0, -2.0, ids=ids), alignment_loss(a, b, temperature=0.2, ids=ids)), looked
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_on_a_device_that_is_not_positive_gives_nan(temperature: float) -> None:
    assert alignment_loss(torch.eye(3), torch.eye(3), temperature=torch.tensor(temperature)).isnan()
