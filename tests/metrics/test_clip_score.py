"""CLIPScore against loops in float64 and the reference formula of the peer library."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics
from packaging.version import Version
from torch import Tensor

from gmail_lightning.metrics import CLIPScore, RefCLIPScore, clip_score, ref_clip_score
from gmail_lightning.metrics.clip_score import fills_context


def reference(image: Tensor, text: Tensor) -> list[float]:
    scores = []
    for one, other in zip(image.double().tolist(), text.double().tolist(), strict=True):
        dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
        scores.append(2.5 * max(dot / math.hypot(*one) / math.hypot(*other), 0.0))
    return scores


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-6)])
def test_scores_equal_a_loop_in_float64(kind: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    image, text = torch.randn(40, 9).to(kind) * 3, torch.randn(40, 9).to(kind)
    scores = clip_score(image, text)
    assert scores.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert scores.tolist() == pytest.approx(reference(image, text), abs=tolerance)
    assert 0 < (scores == 0).sum() < 40  # some captions are worse than nothing


def test_metric_is_the_mean_over_batches_and_counts_what_was_cut() -> None:
    torch.manual_seed(0)
    weight, table = torch.randn(12, 5), torch.randn(20, 5)
    metric = CLIPScore(lambda image: image.flatten(1) @ weight, lambda ids: table[ids].sum(dim=1))
    images, texts = torch.rand(11, 3, 2, 2), torch.randint(0, 20, (11, 4))
    cut = torch.tensor([True, False, False, True] + [False] * 7)
    for part in torch.arange(11).split(4):
        metric.update(images[part], texts[part], cut[part])
    expected = reference(images.flatten(1) @ weight, table[texts].sum(dim=1))
    assert metric.compute()["clip_score"].item() == pytest.approx(sum(expected) / 11, abs=1e-6)
    assert metric.compute()["truncated"].item() == pytest.approx(2 / 11)
    metric.reset()
    metric.update(images[:2], texts[:2])
    assert metric.compute()["clip_score"].item() == pytest.approx(sum(expected[:2]) / 2, abs=1e-6)
    assert metric.compute()["truncated"] == 0


@pytest.mark.skipif(Version(torchmetrics.__version__) < Version("1.9"), reason="takes no model of one's own")
def test_scores_are_those_of_torchmetrics_but_for_its_scale() -> None:
    """torchmetrics gives 100 * cos, bounded below by 0 only as a mean; 2.5 * cos is the paper's."""
    from torchmetrics.functional.multimodal import clip_score as peer

    class Model(torch.nn.Module):
        """The little of a transformers CLIP that torchmetrics calls."""

        config = type("config", (), {"text_config": type("text", (), {"max_position_embeddings": 16})})

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1)[:, :6]

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids[:, :6].float()

    def process(text: list[str] | None = None, images: list[Tensor] | None = None, **_: object) -> dict[str, Tensor]:
        if images is not None:
            return {"pixel_values": torch.stack([image.float() for image in images])}
        ids = torch.tensor([[ord(letter) for letter in one[:6]] for one in text or []])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    images = torch.randint(0, 255, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    captions = ["a wolf howls", "second", "thirds", "fourth", "fifths!"]
    theirs = peer(list(images), captions, model_name_or_path=lambda: (Model(), process))
    ours = clip_score(images.flatten(1)[:, :6].float(), process(captions)["input_ids"].float())
    assert ours.mean().item() / 2.5 * 100 == pytest.approx(theirs.item(), rel=1e-5)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"as many images as captions, got \(2, 3\) and \(1, 3\)"):
        clip_score(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="text_features: 1 rows are not finite"):
        clip_score(torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [torch.nan, 0, 0]]))


def encode(texts: list[str]) -> Tensor:
    """One token per word, a start and an end, eight positions; the end is kept."""
    rows = [[1, *(2 + sum(map(ord, word)) for word in text.split()[:6]), 0] for text in texts]
    return torch.tensor([[*row, *[0] * (8 - len(row))] for row in rows])


def test_texts_that_fill_the_context_are_found() -> None:
    assert fills_context(encode, ["one two", "1 2 3 4 5", "1 2 3 4 5 6", "1 2 3 4 5 6 7 8"]).tolist() == [
        False, False, True, True,
    ]  # fmt: skip
    assert fills_context(encode, []).tolist() == []


def ref_reference(image: Tensor, text: Tensor, references: list[Tensor]) -> list[float]:
    """The authors' formula in float64 loops, the cosine with the nearest reference cut at 0 as in the paper."""
    scores = []
    for score, caption, group in zip(reference(image, text), text, references, strict=True):
        nearest = max(reference(caption.expand(len(group), -1), group)) / 2.5
        scores.append(0.0 if score + nearest == 0 else 2 * score * nearest / (score + nearest))
    return scores


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-6)])
def test_ref_clip_score_equals_a_loop_in_float64(kind: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    image, text = torch.randn(40, 5).to(kind) * 3, torch.randn(40, 5).to(kind)
    count = torch.randint(1, 5, (40,))
    row = torch.repeat_interleave(count)[torch.randperm(int(count.sum()))]  # in any order
    references = torch.randn(len(row), 5).to(kind) * 7
    scores = ref_clip_score(image, text, references, row)
    expected = ref_reference(image, text, [references[row == i] for i in range(40)])
    assert scores.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert scores.tolist() == pytest.approx(expected, abs=tolerance)
    assert 0 < sum(value == 0 for value in expected) < 40


def test_ref_clip_score_of_captions_that_share_nothing_is_0_and_not_nan() -> None:
    image, text = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[-1.0, 0], [-1, 0], [1, 0]])
    references = torch.tensor([[1.0, 0], [-1, 0], [-1, 0]])  # both cosines below 0; either alone
    assert ref_clip_score(image, text, references, torch.arange(3)).tolist() == [0, 0, 0]
    same = torch.tensor([[3.0, 4.0]])
    assert ref_clip_score(same, same, same, torch.tensor([0])).item() == pytest.approx(10 / 7)


def test_ref_clip_score_metric_is_the_mean_over_batches() -> None:
    torch.manual_seed(1)
    weight, table = torch.randn(12, 5), torch.randn(20, 5)
    metric = RefCLIPScore(lambda image: image.flatten(1) @ weight, lambda ids: table[ids].sum(dim=1))
    images, texts = torch.rand(11, 3, 2, 2), torch.randint(0, 20, (11, 4))
    references = [torch.randint(0, 20, (1 + i % 3, 4)) for i in range(11)]
    for part in torch.arange(11).split(4):
        row = torch.cat([torch.full((len(references[i]),), at) for at, i in enumerate(part.tolist())])
        metric.update(images[part], texts[part], torch.cat([references[i] for i in part.tolist()]), row)
    image, text = images.flatten(1) @ weight, table[texts].sum(dim=1)
    expected = ref_reference(image, text, [table[ids].sum(dim=1) for ids in references])
    assert metric.compute()["ref_clip_score"].item() == pytest.approx(sum(expected) / 11, abs=1e-6)
    assert metric.compute()["clip_score"].item() == pytest.approx(sum(reference(image, text)) / 11, abs=1e-6)
    metric.reset()
    metric.update(images[:1], texts[:1], references[0], torch.tensor([0]))
    assert metric.compute()["ref_clip_score"].item() == pytest.approx(expected[0], abs=1e-6)


def test_bad_references_are_refused() -> None:
    two = torch.eye(2)
    with pytest.raises(ValueError, match=r"2 images needs a reference: .* 0 to 1, and holds \[0\]"):
        ref_clip_score(two, two, two, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"holds \[-1, 1\]"):
        ref_clip_score(two, two, two, torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match=r"holds \[0, 1, 2\]"):
        ref_clip_score(two, two, torch.ones(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"references \(R, 2\) and the image of each \(R,\), got \(2, 2\) and \(3,\)"):
        ref_clip_score(two, two, two, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="reference_features: 1 rows are not finite"):
        ref_clip_score(two, two, torch.tensor([[1.0, torch.inf], [0, 1]]), torch.tensor([0, 1]))
