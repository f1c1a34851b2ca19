"""The alignment task: its terms against formulas in float64, its paths, its refusals."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_encoders import routed
from torch import Tensor
from torch.nn.functional import normalize

from gmail_lightning.models import ImageEncoder, OpenCLIPEncoder
from gmail_lightning.tasks import AlignmentTask
from gmail_lightning.types import ImageSpec, ImageTextBatch

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}


ROUTING = ("rank", "alpha", "targets", "real_path")


def task(**kwargs) -> AlignmentTask:
    torch.manual_seed(0)
    routing = {name: kwargs.pop(name) for name in (*ROUTING, "projection") if name in kwargs}
    made = AlignmentTask(routed(OpenCLIPEncoder(config=TINY, merges="emoji"), **routing), **kwargs)
    for name, p in made.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.1)  # away from the start, where both branches agree
    return made


@pytest.fixture
def batch() -> ImageTextBatch:
    """Four pairs, rows of a pair side by side; the first and the last pair show the same real image."""
    torch.manual_seed(1)
    ids = torch.tensor([5, 6, 7, 5]).repeat_interleave(2)
    text = torch.zeros(8, 16, dtype=torch.long)
    text[:, 0], text[:, 1], text[:, 2] = 6346, torch.arange(8) // 2 + 300, 6347
    return {
        "image": torch.rand(8, 3, 32, 32), "text": text, "modality": torch.tensor([1, 0] * 4), "image_id": ids,
        "pair_id": torch.arange(4).repeat_interleave(2),
    }  # fmt: skip


def features(made: AlignmentTask, batch: ImageTextBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features in float64 of generated rows, real rows and the texts."""
    with torch.no_grad():
        image = made.encoder.encode_image(batch["image"], batch["modality"])
        text = made.encoder.encode_text(batch["text"][::2])
    return tuple(normalize(x.double(), dim=1) for x in (image[0::2], image[1::2], text))


def info_nce(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One direction; candidates that show the anchor's own image under another row are left out."""
    losses = []
    ids = [5, 6, 7, 5]
    for i in range(4):
        kept = [j for j in range(4) if j == i or ids[j] != ids[i]]
        logits = torch.stack([scale * a[i] @ b[j] for j in kept])
        losses.append(logits.logsumexp(0) - scale * a[i] @ b[i])
    return torch.stack(losses).mean()


def test_every_term_and_the_weighted_total(batch: ImageTextBatch) -> None:
    made = task(temperature=0.1, alignment_weight=2.0, cosine_weight=0.5, generated_text_weight=0.25)
    generated, real, text = features(made, batch)
    scale = float(made.encoder.logit_scale)
    expected = {
        "alignment": info_nce(generated, real, 10.0),
        "cosine": 1 - (generated * real).sum(1).mean(),
        "generated_text": (info_nce(generated, text, scale) + info_nce(text, generated, scale)) / 2,
    }
    got = made.compute_losses(batch)
    assert set(got) == {"loss", *expected}
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), abs=1e-5), name
    total = 2 * expected["alignment"] + 0.5 * expected["cosine"] + 0.25 * expected["generated_text"]
    assert got["loss"].item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_patch_terms_and_their_gradients(batch: ImageTextBatch, chunk: int | None) -> None:
    """Of tokens averaged over the image, at the last block but one of two: the second block's adapters stay out."""
    made = task(temperature=0.1, patch_weight=2.0, patch_cosine_weight=0.5, contrastive_chunk_size=chunk)
    with torch.no_grad():
        tokens = made.encoder.image_tokens(batch["image"], batch["modality"], layer=-2)
        assert torch.equal(tokens[1::2], made.encoder.image_tokens(batch["image"][1::2], layer=0))
    generated, real = (normalize(x.double().mean(dim=1), dim=1) for x in (tokens[0::2], tokens[1::2]))
    expected = {"patch": info_nce(generated, real, 10.0), "patch_cosine": 1 - (generated * real).sum(1).mean()}
    got = made.compute_losses(batch)
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), abs=1e-5), name
    total = got["alignment"] + 2 * expected["patch"] + 0.5 * expected["patch_cosine"]
    assert got["loss"].item() == pytest.approx(total.item(), abs=1e-5)

    alone = task(alignment_weight=0.0, temperature=0.1, patch_weight=2.0, contrastive_chunk_size=chunk)
    losses = alone.compute_losses(batch)
    assert set(losses) == {"loss", "patch"}
    losses["loss"].backward()
    alone.on_after_backward()  # names trainable tensors without gradient
    adapters = dict(alone.encoder.image_adapters())
    assert {name.split(".")[3] for name, p in adapters.items() if p.requires_grad} == {"0"}
    assert {name.split(".")[3] for name in adapters} == {"0", "1"}
    name = "encoder.lora.image.0.v.B"
    with torch.no_grad():  # a central difference in one entry
        values = []
        for step in (1e-2, -2e-2):
            adapters[name][0, 0] += step
            values.append(alone.compute_losses(batch)["loss"].item())
    assert adapters[name].grad[0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05, abs=1e-4)


def test_patch_terms_refuse_cached_features(batch: ImageTextBatch) -> None:
    cached = {**batch, "image_features": torch.zeros(4, 16), "feature_row": torch.arange(1, 8, 2)}
    cached.update(image=batch["image"][::2], image_row=torch.arange(0, 8, 2))
    with pytest.raises(ValueError, match="need the pixels of every row"):
        task(patch_weight=1.0).compute_losses(cached)


def test_symmetric_and_sigmoid_forms(batch: ImageTextBatch) -> None:
    made = task(temperature=0.1, symmetric=True)
    generated, real, _ = features(made, batch)
    both = (info_nce(generated, real, 10.0) + info_nce(real, generated, 10.0)) / 2
    assert made.compute_losses(batch)["loss"].item() == pytest.approx(both.item(), abs=1e-5)

    made = task(temperature=0.1, loss="sigmoid", learnable_temperature=True)
    generated, real, _ = features(made, batch)
    ids, total = [5, 6, 7, 5], 0.0
    for i in range(4):
        for j in range(4):
            if i == j or ids[i] != ids[j]:
                sign = 1.0 if i == j else -1.0
                total -= torch.nn.functional.logsigmoid(sign * (10.0 * generated[i] @ real[j] - 10.0)).item()
    loss = made.compute_losses(batch)["loss"]
    assert loss.item() == pytest.approx(total / 4, abs=1e-4)
    loss.backward()
    assert made.log_temperature.grad.abs() > 0
    assert made.bias.grad.abs() > 0


@pytest.mark.parametrize("real_path", ["frozen", "projected", "adapted"])
def test_every_trainable_tensor_gets_a_gradient(batch: ImageTextBatch, real_path: str) -> None:
    made = task(real_path=real_path, projection=True, targets=("q", "k", "v", "out", "fc1", "fc2"))
    made.compute_losses(batch)["loss"].backward()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    sides = {name.split(".")[1] for name in trained if "projection" in name}
    assert sides == {"generated_projection"} | ({"real_projection"} if real_path != "frozen" else set())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_frozen_path_is_the_plain_encoder_while_the_task_trains(
    batch: ImageTextBatch, precision: torch.dtype
) -> None:
    made = task(targets=("q", "k", "v", "out", "fc1", "fc2"))
    torch.manual_seed(0)
    plain = OpenCLIPEncoder(config=TINY, merges="emoji").eval().requires_grad_(False)
    real = batch["modality"] == 0
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    for mode in (True, False):
        made.train(mode)
        for _ in range(25):
            optimizer.zero_grad()
            made.compute_losses(batch)["loss"].backward()
            optimizer.step()
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            got = made.encoder.encode_image(batch["image"], batch["modality"])
            assert torch.equal(got[real], plain.encode_image(batch["image"][real]))
            assert not torch.allclose(got[~real], plain.encode_image(batch["image"][~real]), atol=1e-2)


class ImagesOnly(ImageEncoder):
    pretrained = True

    def __init__(self) -> None:
        super().__init__()
        self.tower = OpenCLIPEncoder(config=TINY, merges="emoji")

    image_spec = ImageSpec((32, 32))
    embed_dim = 16

    def encode_image(self, image: Tensor) -> Tensor:
        return self.tower.encode_image(image)

    def lora_targets(self, roles, tower="image"):
        return self.tower.lora_targets(roles, tower)


def test_an_encoder_without_text_aligns_and_asks_for_no_text(batch: ImageTextBatch) -> None:
    made = AlignmentTask(ImagesOnly())
    assert made.input_spec.texts == {}
    assert set(made.build_metrics("eval")) == {"gap"}
    made.compute_losses({k: v for k, v in batch.items() if k != "text"})["loss"].backward()
    with pytest.raises(ValueError, match="ImagesOnly has no text tower"):
        AlignmentTask(ImagesOnly(), generated_text_weight=1.0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"alignment_weight": 0.0}, "must be above 0"),
        (
            {"alignment_weight": 0.0, "real_text_weight": 1.0, "real_path": "projected"},
            "patch_cosine must be above 0",
        ),
        ({"cosine_weight": -1.0}, "No weight may be negative"),
        ({"real_text_weight": 1.0}, "frozen real path cannot train"),
        ({"alignment_weight": 0.0, "patch_weight": 1.0, "projection": True}, "no term on these has a weight"),
        ({"patch_weight": 1.0, "patch_layer": 2}, "patch_layer=2: this tower has 2 blocks"),
        ({"alignment_weight": 0.0, "patch_cosine_weight": 1.0, "patch_layer": -3}, "patch_layer=-3: this tower has 2"),
        ({"temperature": 0.0}, "must be positive"),
        ({"symmetric": True, "loss": "sigmoid"}, "symmetric as it is"),
        ({"targets": ("q", "query")}, "query"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        task(**wrong)


def test_a_batch_that_is_not_made_of_pairs_is_refused(batch: ImageTextBatch) -> None:
    shifted = {**batch, "pair_id": batch["pair_id"].flip(0)[[1, 2, 3, 4, 5, 6, 7, 0]]}
    unpaired = {**batch, "pair_id": torch.full((8,), -1)}  # a mixture of sets that know no pairs
    for wrong in (shifted, unpaired):
        with pytest.raises(MisconfigurationException, match="mode='paired'"):
            task().compute_losses(wrong)
