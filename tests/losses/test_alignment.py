"""Equation 1 of GMAIL against its dense float64 form."""

import math

import pytest
import torch
import torch.nn.functional as F

from gmail_lightning.losses import alignment_loss, clip_loss, tiled


def dense_alignment(generated, real, temperature, ids=None, symmetric=False):
    generated, real = F.normalize(generated.double(), dim=1), F.normalize(real.double(), dim=1)
    logits = generated @ real.T / temperature
    if ids is not None:
        logits = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(generated))
    loss = F.cross_entropy(logits, target)
    return (loss + F.cross_entropy(logits.T, target)) / 2 if symmetric else loss


@pytest.fixture
def pair():
    generated, real = torch.randn(2, 41, 24, generator=torch.Generator().manual_seed(0))
    return (0.3 * real + generated).requires_grad_(), real.requires_grad_()


@pytest.mark.parametrize("tile", [(512, 1024), (6, 11)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.005])
@pytest.mark.parametrize("groups", [None, 9])
def test_equals_equation_1(monkeypatch, pair, tile, symmetric, temperature, groups):
    monkeypatch.setattr(tiled, "CPU_TILE", tile)
    ids = groups and torch.arange(41) % groups
    inputs = (*pair, torch.tensor(temperature, requires_grad=True))
    actual = alignment_loss(*pair, temperature=inputs[2], ids=ids, symmetric=symmetric)
    expected = dense_alignment(*inputs, ids=ids, symmetric=symmetric)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for a, e in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_a_frozen_real_side_gives_the_same_gradient_to_the_generated(pair):
    generated, real = pair
    (expected,) = torch.autograd.grad(dense_alignment(generated, real, 0.07), generated)
    alignment_loss(generated, real.detach()).backward()
    assert real.grad is None
    assert (generated.grad - expected).norm() <= 1e-5 * expected.norm()


def test_only_the_real_side_trained(pair):
    generated, real = pair
    (expected,) = torch.autograd.grad(dense_alignment(generated, real, 0.07), real)
    (actual,) = torch.autograd.grad(alignment_loss(generated.detach(), real), real)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_logits_far_below_the_largest(pair):
    generated, real = pair
    with torch.no_grad():
        generated += 4
        real += 4
        generated[3] *= -1  # points away from every candidate
    expected = dense_alignment(generated, real, 0.01)
    actual = alignment_loss(generated, real, temperature=0.01)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, e in zip(torch.autograd.grad(actual, pair), torch.autograd.grad(expected, pair), strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_three_pairs_by_hand():
    # cosines of the first generated image: 1, 0, 0; of the second: 0.6, 0.8, 0; of the third: 0, 0, 1
    generated = torch.tensor([[2.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 3.0]])
    first = third = math.log((math.exp(2) + 2) / math.exp(2))
    second = math.log((math.exp(1.2) + math.exp(1.6) + 1) / math.exp(1.6))
    loss = alignment_loss(generated, torch.eye(3), temperature=0.5)
    assert loss.item() == pytest.approx((first + second + third) / 3, rel=1e-6)


def test_symmetric_is_clip_loss(pair):
    torch.testing.assert_close(alignment_loss(*pair, temperature=0.1, symmetric=True), clip_loss(*pair, 10.0))


@pytest.mark.parametrize("temperature", [0, -0.07, math.nan, torch.tensor(0.0)])
def test_temperature_must_be_positive(pair, temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        alignment_loss(*pair, temperature=temperature)


def test_faulty_shapes_are_refused_by_name(pair):
    with pytest.raises(ValueError, match=r"Row i of generated and row i of real .* got \(41, 24\) and \(40, 24\)"):
        alignment_loss(pair[0], pair[1][1:])
