"""Every value and gradient against dense float64 formulas, whatever the tiles, masks, precision and layout."""

import math
from unittest import mock

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gmail_lightning.losses import clip_loss, info_nce, sigmoid_loss, tiled


def dense_logits(image, text, scale, ids):
    """float64 logits, and which of them are left out."""
    image, text = F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)
    ids = torch.arange(len(image)) if ids is None else ids
    masked = (ids[:, None] == ids[None, :]) & ~torch.eye(len(image), dtype=torch.bool)
    return scale * image @ text.T, masked


def dense_clip(image, text, scale, ids=None):
    logits, masked = dense_logits(image, text, scale, ids)
    logits = logits.masked_fill(masked, -torch.inf)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_smoothed(image, text, scale, ids=None, smoothing=0.1, normalize_images=True):
    """Torch's own smoothing, row by row over the candidates of each."""
    logits, masked = dense_logits(image, text, scale, ids)
    if not normalize_images:
        logits = logits * image.double().norm(dim=1, keepdim=True)
    total = 0
    for table, left_out in ((logits, masked), (logits.T, masked.T)):
        for i, (row, out) in enumerate(zip(table, left_out, strict=True)):
            target = int((~out[:i]).sum())  # place of the pair among its candidates
            total = total + F.cross_entropy(row[~out][None], torch.tensor([target]), label_smoothing=smoothing)
    return total / (2 * len(logits))


def dense_sigmoid(image, text, scale, bias, ids=None):
    logits, masked = dense_logits(image, text, scale, ids)
    sign = 2 * torch.eye(len(image), dtype=torch.float64) - 1
    return -F.logsigmoid(sign * (logits + bias)).masked_fill(masked, 0).sum() / len(image)


def features(rows, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    image, text = 3 * image + 1, text + 0.4 * image  # unnormalised, and pairs resemble one another a little
    return [x.to(dtype).requires_grad_() for x in (image, text)]


def gradients(loss, *inputs):
    """Loss and its gradients in float64, through a factor from above."""
    value = loss(*inputs)
    return [value.detach().double()] + [g.double() for g in torch.autograd.grad(2.5 * value, inputs)]


def assert_equal_gradients(actual, expected, tolerance):
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=tolerance, abs=tolerance)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.shape == e.shape
        assert (a - e).norm() <= tolerance * e.norm() + 1e-12


@pytest.fixture(params=[(512, 1024), (5, 7), (8, 3), (64, 1)], ids=str)
def tile(request, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", request.param)


@pytest.mark.parametrize("ids", [None, 40, 5, 1], ids=["distinct", "40 ids", "5 ids", "1 id"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 300.0])
def test_clip_loss_equals_the_dense_formula(tile, scale, ids):
    image, text = features(37)
    ids = ids and torch.randint(ids, (37,), generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(scale, requires_grad=True)
    actual = gradients(lambda i, t, s: clip_loss(i, t, s, ids=ids), image, text, scale)
    expected = gradients(lambda i, t, s: dense_clip(i, t, s, ids), image, text, scale)
    if ids is not None and len(ids.unique()) == 1:  # no negative is left
        assert max(x.abs().max().item() for x in actual) < 1e-5
    else:
        assert_equal_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("ids", [None, 40, 5], ids=["distinct", "40 ids", "5 ids"])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -20.0), (2.0, 1.0)])
def test_sigmoid_loss_equals_the_dense_formula(tile, scale, bias, ids):
    image, text = features(37)
    ids = ids and torch.randint(ids, (37,), generator=torch.Generator().manual_seed(1))
    scale, bias = torch.tensor(scale, requires_grad=True), torch.tensor(bias, requires_grad=True)
    actual = gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, ids=ids), image, text, scale, bias)
    expected = gradients(lambda i, t, s, b: dense_sigmoid(i, t, s, b, ids), image, text, scale, bias)
    assert_equal_gradients(actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [None, 40, 5], ids=["distinct", "40 ids", "5 ids"])
@pytest.mark.parametrize("normalize_images", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_equal_torch(tile, smoothing, normalize_images, ids):
    image, text = features(37)
    ids = ids and torch.randint(ids, (37,), generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(6.0, requires_grad=True)
    options = {"ids": ids, "normalize_images": normalize_images}
    actual = gradients(lambda i, t, s: clip_loss(i, t, s, label_smoothing=smoothing, **options), image, text, scale)
    expected = gradients(lambda i, t, s: dense_smoothed(i, t, s, smoothing=smoothing, **options), image, text, scale)
    assert_equal_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("frozen", ["image", "text"])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 50.0])
def test_images_of_any_norm_beside_a_frozen_side(frozen, norm):
    image, text = features(29, dtype=torch.float64)
    image = (norm / 4 * image).detach().requires_grad_()
    (image if frozen == "image" else text).requires_grad_(False)
    trained = text if frozen == "image" else image
    options = {"ids": torch.arange(29) // 2, "normalize_images": False}
    actual = gradients(lambda x: clip_loss(image, text, 8.0, label_smoothing=0.1, **options), trained)
    expected = gradients(lambda x: dense_smoothed(image, text, 8.0, **options), trained)
    assert_equal_gradients(actual, expected, 1e-9)


def test_smoothing_needs_no_matrix_and_keeps_half_precision_out():
    image, text = features(2048, dim=32, dtype=torch.bfloat16)
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(image, text, 20.0, ids=torch.arange(2048) // 2, label_smoothing=0.1, normalize_images=False)
        loss.backward()
    assert largest.elements == tiled.CPU_TILE[0] * tiled.CPU_TILE[1] < 2048 * 2048
    assert (loss.dtype, image.grad.dtype) == (torch.float32, torch.bfloat16)
    image, text = (x.detach().float() for x in (image, text))
    expected = clip_loss(image, text, 20.0, ids=torch.arange(2048) // 2, label_smoothing=0.1, normalize_images=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_float64_features_are_computed_in_float64(tile):
    image, text = features(23, dtype=torch.float64)
    scale = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    assert_equal_gradients(gradients(clip_loss, image, text, scale), gradients(dense_clip, image, text, scale), 1e-12)
    actual, expected = (gradients(loss, image, text, scale, bias) for loss in (sigmoid_loss, dense_sigmoid))
    assert_equal_gradients(actual, expected, 1e-12)


def test_three_pairs_by_hand():
    # cosines: rows e1, e2, e3 against e1, (e1 + e2) / sqrt 2, e3; the loss sees exp(2 cos)
    image = torch.eye(3)
    text = torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.1]])
    h, one = math.exp(2 / math.sqrt(2)), math.exp(2)
    image_to_text = math.log((one + h + 1) / one) + math.log((1 + h + 1) / h) + math.log((1 + 1 + one) / one)
    text_to_image = math.log((one + 1 + 1) / one) + math.log((h + h + 1) / h) + math.log((1 + 1 + one) / one)
    assert clip_loss(image, text, 2.0).item() == pytest.approx((image_to_text + text_to_image) / 6, rel=1e-6)
    # with the first two rows of one image: neither is the other's negative
    image_to_text = math.log((one + 1) / one) + math.log((h + 1) / h) + math.log((2 + one) / one)
    text_to_image = math.log((one + 1) / one) + math.log((h + 1) / h) + math.log((2 + one) / one)
    masked = clip_loss(image, text, 2.0, ids=torch.tensor([7, 7, 2]))
    assert masked.item() == pytest.approx((image_to_text + text_to_image) / 6, rel=1e-6)
    # sigmoid, bias -1: pairs have logits 1, sqrt 2 - 1, 1; of the 6 others one has sqrt 2 - 1 and five have -1
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = 2 * softplus(-1) + softplus(1 - math.sqrt(2)) + softplus(math.sqrt(2) - 1) + 5 * softplus(-1)
    assert sigmoid_loss(image, text, 2.0, -1.0).item() == pytest.approx(expected / 3, rel=1e-6)


def test_open_clip_gives_the_same():
    image, text = features(48)
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-8.0, requires_grad=True)

    def peer(loss):
        return lambda image, text, *rest: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), *rest)

    clip, sigmoid = peer(open_clip.loss.ClipLoss()), peer(open_clip.loss.SigLipLoss())
    assert_equal_gradients(gradients(clip_loss, image, text, scale), gradients(clip, image, text, scale), 1e-5)
    actual, expected = (gradients(loss, image, text, scale, bias) for loss in (sigmoid_loss, sigmoid))
    assert_equal_gradients(actual, expected, 1e-5)


# in fp32 only 1e-4, since cosines near 1 and -1 leave little of the gradients
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("side", ["image", "text"])
def test_logits_far_below_the_largest_take_the_safe_path(tile, side, dtype, tolerance):
    image, text = features(40, dtype=dtype)
    with torch.no_grad():
        image += 5
        text += 5
        (image if side == "image" else text)[1] *= -1  # points away from the whole other side
    logits, _ = dense_logits(image, text, 100.0, None)
    assert logits.max() - logits.amax(1 if side == "image" else 0)[1] > 60
    scale = torch.tensor(100.0, dtype=dtype, requires_grad=True)
    with mock.patch.object(info_nce, "_log_sums", wraps=info_nce._log_sums) as safe:
        actual = gradients(clip_loss, image, text, scale)
    assert safe.called
    assert_equal_gradients(actual, gradients(dense_clip, image, text, scale), tolerance)
    ids = torch.arange(40) // 3
    actual = gradients(lambda i, t, s: clip_loss(i, t, s, ids=ids), image, text, scale)
    assert_equal_gradients(actual, gradients(lambda i, t, s: dense_clip(i, t, s, ids), image, text, scale), tolerance)


class Largest(TorchDispatchMode):
    """Counts the products that run, and the elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


@pytest.mark.parametrize("frozen", ["image", "text"])
@pytest.mark.parametrize("loss", [clip_loss, lambda *args: sigmoid_loss(*args, -5.0)], ids=["clip", "sigmoid"])
def test_a_frozen_side_has_no_gradient_and_costs_no_product(monkeypatch, loss, frozen):
    monkeypatch.setattr(tiled, "CPU_TILE", (64, 64))
    sides = dict(zip(("image", "text"), features(37), strict=True))
    scale = torch.tensor(12.0, requires_grad=True)
    with Largest() as both:
        expected = torch.autograd.grad(loss(*sides.values(), scale), [*sides.values(), scale])
    sides[frozen].requires_grad_(False)
    with Largest() as one:
        loss(*sides.values(), scale).backward()
    assert (both.products, one.products) == (4, 3)
    assert sides[frozen].grad is None
    trained = 1 - list(sides).index(frozen)
    torch.testing.assert_close(list(sides.values())[trained].grad, expected[trained])
    torch.testing.assert_close(scale.grad, expected[2])


def test_only_the_scale_is_trained():
    image, text = (x.detach() for x in features(20))
    scale, bias = torch.tensor(12.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    actual = gradients(lambda s: clip_loss(image, text, s), scale)
    assert_equal_gradients(actual, gradients(lambda s: dense_clip(image, text, s), scale), 1e-5)
    actual = gradients(lambda s, b: sigmoid_loss(image, text, s, b), scale, bias)
    expected = gradients(lambda s, b: dense_sigmoid(image, text, s, b), scale, bias)
    assert_equal_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("loss", [clip_loss, lambda *args: sigmoid_loss(*args, -5.0)], ids=["clip", "sigmoid"])
def test_memory_is_linear_in_the_rows(loss):
    rows = 2048
    image, text = features(rows, dim=32)
    with Largest() as largest:
        loss(image, text, torch.tensor(20.0, requires_grad=True)).backward()
    assert largest.elements == tiled.CPU_TILE[0] * tiled.CPU_TILE[1] < rows * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_single_precision(dtype):
    image, text = features(37, dtype=dtype)
    scale = torch.tensor(14.0, requires_grad=True)
    loss = clip_loss(image, text, scale)
    loss.backward()
    expected = gradients(dense_clip, image, text, scale)
    assert (loss.dtype, image.grad.dtype, text.grad.dtype) == (torch.float32, dtype, dtype)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert scale.grad.item() == pytest.approx(expected[3].item() / 2.5, rel=1e-5)
    dense = [x.detach().double().requires_grad_() for x in (image, text)]
    for side, grad in zip((image, text), torch.autograd.grad(dense_clip(*dense, 14.0), dense), strict=True):
        torch.testing.assert_close(side.grad, grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_changes_nothing():
    image, text = features(37)
    scale, bias = torch.tensor(30.0, requires_grad=True), torch.tensor(-8.0, requires_grad=True)
    for loss, inputs in ((clip_loss, (image, text, scale)), (sigmoid_loss, (image, text, scale, bias))):
        expected = gradients(loss, *inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = gradients(loss, *inputs)  # the backward too
        assert all(torch.equal(a, e) for a, e in zip(inside, expected, strict=True))


def test_layout_and_aliases():
    image, text = features(37)
    wide = torch.randn(16, 74, generator=torch.Generator().manual_seed(2), requires_grad=True)
    actual = gradients(lambda x: clip_loss(x.T[::2], text, 9.0), wide)
    assert_equal_gradients(actual, gradients(lambda x: dense_clip(x.T[::2], text, 9.0), wide), 1e-5)
    actual = gradients(lambda x: clip_loss(x, x, 9.0), image)
    assert_equal_gradients(actual, gradients(lambda x: dense_clip(x, x, 9.0), image), 1e-5)
    column = torch.tensor([9.0], requires_grad=True)  # open_clip has scales of shape (1,) too
    assert torch.autograd.grad(clip_loss(image, text, column), column)[0].shape == (1,)


def test_a_single_pair_has_no_negatives():
    image, text = features(1)
    actual = gradients(clip_loss, image, text, torch.tensor(14.0, requires_grad=True))
    assert max(x.abs().max().item() for x in actual) < 1e-5
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    actual, expected = (gradients(loss, image, text, scale, bias) for loss in (sigmoid_loss, dense_sigmoid))
    assert_equal_gradients(actual, expected, 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features_show_in_the_loss(tile, bad):
    image, text = features(37)
    with torch.no_grad():
        text[36, 3] = bad
    assert clip_loss(image, text, 100.0).isnan()
    assert clip_loss(text, image, 10.0).isnan()
    assert sigmoid_loss(image, text, 10.0, -10.0).isnan()


def test_faulty_input_is_refused_by_name():
    image = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"image_features and row i of text_features .* got \(4, 3\) and \(5, 3\)"):
        clip_loss(image, torch.ones(5, 3), 1.0)
    with pytest.raises(ValueError, match=r"text_features must have shape \(N, D\), got \(4,\)"):
        sigmoid_loss(image, torch.ones(4), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"ids must have shape \(4,\).*got \(3,\)"):
        clip_loss(image, image, 1.0, ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"label_smoothing=1 must be in \[0, 1\)"):
        clip_loss(image, image, 1.0, label_smoothing=1)
    with pytest.raises(ValueError, match="have no rows"):
        clip_loss(torch.ones(0, 3), torch.ones(0, 3), 1.0)


def test_second_derivatives_are_refused():
    image, text = features(5)
    factor = torch.tensor(3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(factor * clip_loss(image, text, 2.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
