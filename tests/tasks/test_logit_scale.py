"""The cap of CLIP's logit scale and of a learned temperature: gradients at it, steps beyond it and back."""

import math

import pytest
import torch
from tiny_tasks import TINY, emoji_data, tiny_encoder
from torch.nn.functional import normalize

from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.base import DualEncoder
from gmail_lightning.tasks import AlignmentTask, LongRetrievalTask, RetrievalTask, ZeroShotClassificationTask
from gmail_lightning.types import ImageSpec, TextSpec


def siglip(scale: float) -> OpenCLIPEncoder:
    torch.manual_seed(0)
    encoder = OpenCLIPEncoder(config={**TINY, "init_logit_bias": -5.0}, merges="emoji")
    encoder.model.logit_scale.data.fill_(math.log(scale))
    return encoder


def batch(task: RetrievalTask) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = task.encoder.text_spec.encode(["a cat", "a red dog", "the hand", "two trees"])
    row = torch.arange(4)
    return {
        "image": torch.rand(4, 3, 32, 32, generator=generator), "text": text, "long_text": text, "short_text": text,
        "modality": torch.ones(4, dtype=torch.long), "image_id": row, "pair_id": row, "label": row,
    }  # fmt: skip


def reference(task: RetrievalTask, rows: dict[str, torch.Tensor], log_scale: float) -> tuple[float, float]:
    """CLIP's loss in float64 and its derivative by the log of the scale."""
    with torch.no_grad():
        image = normalize(task.encoder.encode_image(rows["image"]).double(), dim=1)
        text = normalize(task.encoder.encode_text(rows["text"]).double(), dim=1)
    parameter = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
    logits = parameter.exp() * image @ text.T
    loss = sum((x.logsumexp(1) - x.diagonal()).mean() for x in (logits, logits.T)) / 2
    loss.backward()
    return loss.item(), parameter.grad.item()


@pytest.mark.parametrize("cap", [100.0, 50.0, 7.3])
def test_the_gradient_at_the_cap_is_that_of_the_loss(cap: float) -> None:
    task = RetrievalTask(tiny_encoder(), max_logit_scale=cap)
    parameter = task.encoder.plain.model.logit_scale
    parameter.data.fill_(math.log(cap))  # in fp32, whose exp may lie above
    loss = task.compute_losses(batch(task))["loss"]
    loss.backward()
    value, gradient = reference(task, batch(task), math.log(cap))
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert abs(gradient) > 1e-3
    assert parameter.grad.item() == pytest.approx(gradient, rel=1e-4)


def tasks() -> dict[str, torch.nn.Module]:
    return {
        "retrieval": RetrievalTask(tiny_encoder()),
        "text side": RetrievalTask(ModalityEncoder(tiny_encoder(), text_side="full")),
        "classes": ZeroShotClassificationTask(ModalityEncoder(tiny_encoder(), text_side="full")),
        "a lower cap": RetrievalTask(ModalityEncoder(tiny_encoder(), text_side="full"), max_logit_scale=20.0),
        "temperature": AlignmentTask(tiny_encoder(), temperature=0.02, learnable_temperature=True),
        "SigLIP": RetrievalTask(siglip(117.0)),
        "SigLIP's classes": ZeroShotClassificationTask(ModalityEncoder(siglip(117.0), text_side="full")),
        "SigLIP's temperature": AlignmentTask(
            tiny_encoder(), temperature=1 / 117, loss="sigmoid", learnable_temperature=True
        ),
    }


HIGHEST = {"a lower cap": 20.0, "SigLIP": None, "SigLIP's classes": None, "SigLIP's temperature": None}


def scale_of(task: torch.nn.Module) -> tuple[torch.nn.Parameter, float]:
    """The parameter, and the sign by which it makes the scale."""
    if isinstance(task, AlignmentTask):
        return task.log_temperature, -1.0
    return task.encoder.log_scale, 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tasks()])
def test_a_step_beyond_ends_at_the_cap_and_one_down_leaves_it(name: str, fitted) -> None:
    task, highest = tasks()[name], HIGHEST.get(name, 100.0)
    parameter, sign = scale_of(task)

    def step(parameters, by: float) -> torch.optim.Optimizer:
        class Push(torch.optim.SGD):
            def step(self, closure=None):
                loss = closure()
                assert abs(parameter.grad) > 0
                with torch.no_grad():
                    parameter.add_(sign * by)
                return loss

        return Push(parameters, lr=0.0)

    mode = "paired" if isinstance(task, AlignmentTask) else "mixture"
    settings = {"accumulate_grad_batches": 2} if isinstance(task, ZeroShotClassificationTask) else {}
    before = sign * parameter.item()
    task.optimizer = lambda parameters: step(parameters, 3.0)
    fitted(task, emoji_data(mode=mode), steps=1, **settings)
    limit = math.inf if highest is None else math.log(highest)
    assert sign * parameter.item() == pytest.approx(min(before + 3.0, limit), abs=1e-5)
    task.optimizer = lambda parameters: step(parameters, -0.25)
    before = sign * parameter.item()
    fitted(task, emoji_data(mode=mode), steps=1, **settings)  # asserts a gradient at the cap, too
    assert sign * parameter.item() == pytest.approx(before - 0.25, abs=1e-5)


def test_the_scale_of_siglip_is_not_cut() -> None:
    task = RetrievalTask(siglip(117.0))
    rows = batch(task)
    with torch.no_grad():
        image = normalize(task.encoder.encode_image(rows["image"]).double(), dim=1)
        text = normalize(task.encoder.encode_text(rows["text"]).double(), dim=1)
        loss = task.compute_losses(rows)["loss"]
    sign = 2 * torch.eye(4, dtype=torch.float64) - 1
    logits = task.encoder.plain.model.logit_scale.double().exp() * image @ text.T - 5.0
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(sign * logits).sum().item() / 4, rel=1e-5)
    assert task.scale.item() == pytest.approx(117.0, rel=1e-6)


class Own(DualEncoder):
    """A scale of its own name, under no wrapped model."""

    image_spec, text_spec, embed_dim = ImageSpec((4, 4)), TextSpec(lambda texts: torch.zeros(len(texts), 2), 2), 3

    def __init__(self, log_scale: float) -> None:
        super().__init__()
        self.other, self.tau = (torch.nn.Parameter(torch.tensor(x)) for x in (0.3, log_scale))

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.tau.exp()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(2, 3))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return text.new_ones(len(text), 3)

    def lora_targets(self, roles, tower="image"):
        return []


def test_the_parameter_of_an_encoder_of_ones_own_is_found_by_its_value() -> None:
    encoder = Own(6.0)
    assert encoder.log_scale is encoder.tau
    RetrievalTask(encoder).after_step()
    assert encoder.tau.item() == pytest.approx(math.log(100))
    frozen = Own(6.0).requires_grad_(False)
    task = RetrievalTask(frozen)
    task.after_step()
    assert (frozen.tau.item(), task.scale.item()) == (6.0, 100.0)  # another's weights stay, the loss takes the cap


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RetrievalTask(tiny_encoder(), max_logit_scale=0.0), "max_logit_scale=0.0 must be positive"),
        (lambda: LongRetrievalTask(tiny_encoder(), max_logit_scale=-1.0), "must be positive"),
        (lambda: RetrievalTask(siglip(20.0), max_logit_scale=50.0), "has no cap"),
        (lambda: ZeroShotClassificationTask(siglip(20.0), max_logit_scale=50.0), "has no cap"),
        (lambda: AlignmentTask(tiny_encoder(), temperature=0.005, learnable_temperature=True), "0.01 or above"),
        (lambda: AlignmentTask(tiny_encoder(), temperature=float("nan")), "must be positive"),
    ],
)
def test_a_cap_or_temperature_that_would_not_be_held_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_low_temperature_is_the_one_that_was_written() -> None:
    task = AlignmentTask(tiny_encoder(), temperature=0.005)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 16, generator=generator)
    logits = normalize(first.double(), dim=1) @ normalize(second.double(), dim=1).T / 0.005
    expected = (logits.logsumexp(1) - logits.diagonal()).mean()
    assert task._alignment(first, second, torch.arange(6)).item() == pytest.approx(expected.item(), rel=1e-5)
