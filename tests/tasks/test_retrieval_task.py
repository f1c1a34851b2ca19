"""Pre-training losses against formulas in float64, and recall by hand."""

import pytest
import torch
from torch.nn.functional import normalize

from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.tasks import RetrievalTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    text = torch.zeros(6, 16, dtype=torch.long)
    text[:, 0], text[:, 1], text[:, 2] = 6346, torch.tensor([300, 301, 302, 303, 304, 305]), 6347
    ids = torch.arange(3).repeat_interleave(2)
    return {
        "image": torch.rand(6, 3, 32, 32),
        "text": text,
        "modality": torch.tensor([1, 0] * 3),
        "image_id": ids,
        "pair_id": ids,
    }


def info_nce(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    return sum((x.logsumexp(1) - x.diagonal()).mean() for x in (logits, logits.T)) / 2


@pytest.mark.parametrize("cap", [5.0, 100.0])
def test_text_and_image_terms(cap: float) -> None:
    torch.manual_seed(0)
    task, rows = (
        RetrievalTask(OpenCLIPEncoder(config=TINY, merges="emoji"), image_weight=0.5, max_logit_scale=cap),
        batch(),
    )
    with torch.no_grad():
        image = normalize(task.encoder.encode_image(rows["image"]).double(), dim=1)
        text = normalize(task.encoder.encode_text(rows["text"]).double(), dim=1)
    scale = min(cap, float(task.encoder.logit_scale))
    same = rows["image_id"][:, None] == rows["image_id"]
    text_loss = info_nce(scale * image @ text.T, same)
    image_loss = info_nce(scale * image[0::2] @ image[1::2].T, torch.eye(3, dtype=torch.bool))
    got = task.compute_losses(rows)
    assert got["text"].item() == pytest.approx(text_loss.item(), abs=1e-5)
    assert got["image"].item() == pytest.approx(image_loss.item(), abs=1e-5)
    assert got["loss"].item() == pytest.approx((text_loss + 0.5 * image_loss).item(), abs=1e-5)


def test_an_encoder_with_a_bias_takes_the_sigmoid_loss() -> None:
    torch.manual_seed(0)
    task, rows = RetrievalTask(OpenCLIPEncoder(config={**TINY, "init_logit_bias": -5.0}, merges="emoji")), batch()
    with torch.no_grad():
        image = normalize(task.encoder.encode_image(rows["image"]).double(), dim=1)
        text = normalize(task.encoder.encode_text(rows["text"]).double(), dim=1)
    logits = float(task.encoder.logit_scale) * image @ text.T - 5.0
    total = 0.0
    for i in range(6):
        for j in range(6):
            if i == j or rows["image_id"][i] != rows["image_id"][j]:
                total -= torch.nn.functional.logsigmoid((1 if i == j else -1) * logits[i, j]).item()
    assert task.compute_losses(rows)["loss"].item() == pytest.approx(total / 6, abs=1e-4)
