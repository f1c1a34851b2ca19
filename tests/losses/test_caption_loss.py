import pytest
import torch

from gmail_lightning.losses import caption_loss
from gmail_lightning.losses.captioning import refuse_masked


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 7, requires_grad=True)
    labels = torch.randint(7, (3, 5))
    labels[0, 3:] = -100
    labels[2, :4] = -100
    return logits, labels, torch.tensor([0.5, 2.0, 3.0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_a_sum_token_by_token_in_float64(weighted: bool, smoothing: float) -> None:
    logits, labels, weight = problem()
    given = caption_loss(logits, labels, weight=weight if weighted else None, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(given, logits)

    exact = logits.detach().double().requires_grad_()
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for row in range(3):
        for position in range(5):
            if labels[row, position] >= 0:
                log_p = exact[row, position] - exact[row, position].exp().sum().log()
                target = torch.full((7,), smoothing / 7, dtype=torch.float64)
                target[labels[row, position]] += 1 - smoothing
                w = float(weight[row]) if weighted else 1.0
                total, mass = total - w * (target * log_p).sum(), mass + w
    expected = total / mass
    torch.testing.assert_close(given.double(), expected, atol=1e-6, rtol=1e-6)
    (reference,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), reference, atol=1e-7, rtol=1e-5)


def test_a_row_of_weight_zero_is_as_if_it_were_not_there() -> None:
    logits, labels, _ = problem()
    without = caption_loss(logits[:2], labels[:2])
    torch.testing.assert_close(caption_loss(logits, labels, weight=torch.tensor([1.0, 1.0, 0.0])), without)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, labels, weight = problem()
    with pytest.raises(ValueError, match=r"\(3, 5, 7\), labels \(3, 4\)"):
        caption_loss(logits, labels[:, 1:])
    with pytest.raises(ValueError, match=r"weight \(2,\)"):
        caption_loss(logits, labels, weight=weight[:2])


def test_a_row_without_a_label_is_refused_by_its_text() -> None:
    labels = torch.tensor([[1, -100], [-100, -100]])
    with pytest.raises(ValueError, match=r"1 of 2 rows have no token to learn.*'a dog'"):
        refuse_masked(labels, ["a cat", "a dog"])
    refuse_masked(labels[:1], ["a cat"])
