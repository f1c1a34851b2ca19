"""Products that decide are taken in fp32, whatever autocast does to the towers."""

from collections.abc import Callable

import pytest
import torch
from tiny_tasks import tiny_encoder
from torch.nn.functional import cross_entropy, normalize

from gmail_lightning.metrics import image_text_recall, modality_gap
from gmail_lightning.metrics.repair import rank_images
from gmail_lightning.models import ModalityEncoder
from gmail_lightning.tasks import LinearProbeTask, ZeroShotClassificationTask

CLASSES = 400


def near(rows: int, spread: float = 1e-3, seed: int = 0) -> torch.Tensor:
    """Features whose cosines differ by less than bf16 tells apart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.ones(16) + spread * torch.randn(rows, 16, generator=generator)


def batch() -> dict[str, object]:
    label = torch.arange(32)
    image = near(32, 0.05, seed=1)
    return {
        "image_features": image, "feature_row": label, "modality": torch.zeros(32, dtype=torch.long), "label": label,
        "eval_set": "pets",
    }  # fmt: skip


def zero_shot() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    task = ZeroShotClassificationTask(ModalityEncoder(tiny_encoder(), text_side="lora"))
    task._weights["pets"] = normalize(near(CLASSES), dim=1)
    expected = normalize(batch()["image_features"].double(), dim=1) @ task._weights["pets"].double().T
    return lambda: task.scores(batch()), expected


def probe() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    task = LinearProbeTask(tiny_encoder())
    task.head = torch.nn.Linear(16, CLASSES)
    task.head.weight.data, task.head.bias.data = near(CLASSES), torch.linspace(0, 1e-3, CLASSES)
    features = normalize(batch()["image_features"].double(), dim=1) * 4
    return lambda: task.logits(batch()), features @ task.head.weight.double().T + task.head.bias.double()


def repair() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    image, text = near(60, seed=2), near(50, seed=3)
    first, second = normalize(image.double(), dim=1), normalize(text.double(), dim=1)
    recalled = (first @ second.T).argmax(1)
    nearest = (second @ first.T).topk(3).indices
    best = torch.stack([second[recalled[nearest[:, k]]].mul(second).sum(1) for k in range(3)], 1)
    return lambda: rank_images(image, text, num_candidates=3, num_captions=1).score, best.sort(1, descending=True)[0]


@pytest.mark.parametrize("build", [zero_shot, probe, repair])
@torch.no_grad()
def test_scores_are_in_fp32(build) -> None:
    score, expected = build()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=2e-6)
    if build is not repair:
        assert torch.equal(scores.argmax(1), expected.argmax(1))


@torch.no_grad()
def test_metrics_do_not_depend_on_autocast() -> None:
    image, text = near(40, 0.03, seed=4), near(40, 0.03, seed=4) + near(40, 0.01, seed=5)
    plain = image_text_recall(image, text, torch.arange(40)), modality_gap(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image_text_recall(image, text, torch.arange(40)), modality_gap(image, text)) == plain
    assert plain[0]["t2i_R@1"] > 0


def test_the_losses_of_classes_are_those_of_fp32() -> None:
    task, rows = LinearProbeTask(tiny_encoder()), batch()
    task.head = torch.nn.Linear(16, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        found = task.compute_losses(rows)
    found["loss"].backward()
    gradient = task.head.weight.grad.clone()
    features = normalize(rows["image_features"].double(), dim=1) * 4
    head = task.head.double()
    head.zero_grad()
    loss = cross_entropy(head(features), rows["label"])
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), head.weight.grad, rtol=1e-4, atol=1e-7)
