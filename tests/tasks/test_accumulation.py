"""Captioners: gradients over micro-batches of unequal length are those of one batch with all rows."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny_tasks import quiet_trainer, tiny_encoder
from torch.utils.data import DataLoader

from gmail_lightning.models import ClipCap, Llava
from gmail_lightning.tasks import CaptioningTask

GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CAPTIONS = [
    "a cat", "a red dog on a green hill with two small trees behind it", "dog", "a man",
    "the hand of a person in a red bus", "cat", "a flag of a country with a white star in the middle", "a green tree",
]  # fmt: skip
WEIGHTS = [0.0, 0.0, 1.0, 0.5, 2.0, 0.25, 1.0, 3.0]  # those of the first micro-batch of two count nothing


class Heard(torch.optim.SGD):
    """Notes the gradients of every step, as they come to the optimizer."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.1)
        self.heard: list[list[torch.Tensor]] = []

    def step(self, closure=None):
        loss = closure()
        self.heard.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step()
        return loss


def batches(size: int, weighted: bool) -> list[dict[str, object]]:
    features = torch.randn(len(CAPTIONS), 16, generator=torch.Generator().manual_seed(0))
    found = []
    for start in range(0, len(CAPTIONS), size):
        rows = slice(start, start + size)
        batch = {
            "image_features": features[rows], "feature_row": torch.arange(len(features[rows])),
            "modality": torch.ones(len(features[rows]), dtype=torch.long), "caption": CAPTIONS[rows],
        }  # fmt: skip
        found.append({**batch, "weight": torch.tensor(WEIGHTS[rows])} if weighted else batch)
    return found


def gradients(folder, rows: list[dict[str, object]], steps: int = 1, **settings) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    captioner = ClipCap(16, language_model=GPT2, tokenizer="emoji", prefix_length=4)
    made: list[Heard] = []
    task = CaptioningTask(tiny_encoder(), captioner, optimizer=lambda p: made.append(Heard(p)) or made[0])
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=0, **settings)
    trainer.fit(task, DataLoader(rows, batch_size=None, shuffle=False))
    assert len(made[0].heard) == steps
    return made[0].heard


def check(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for first, second in zip(found, expected, strict=True):
        assert sum(float(g.norm()) for g in second) > 1e-2
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_are_one_batch(tmp_path, size: int, weighted: bool) -> None:
    expected = gradients(tmp_path, batches(8, weighted))
    check(gradients(tmp_path, batches(size, weighted), accumulate_grad_batches=-(-8 // size)), expected)


def test_the_gradient_is_clipped_after_it_is_normalised(tmp_path) -> None:
    expected = gradients(tmp_path, batches(8, False), gradient_clip_val=0.5)
    norm = torch.stack([g.norm() for g in expected[0]]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)  # clipped
    check(gradients(tmp_path, batches(2, False), accumulate_grad_batches=4, gradient_clip_val=0.5), expected)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path) -> None:
    """Three of three and one of one: Lightning divides both by three."""
    rows = batches(2, False)
    whole = batches(6, False)
    found = gradients(tmp_path, rows, 2, accumulate_grad_batches=3)
    check(found, gradients(tmp_path, whole, 2))


def test_a_schedule_of_accumulation(tmp_path) -> None:
    found = gradients(tmp_path, batches(2, False), 3, callbacks=[GradientAccumulationScheduler({0: 4, 1: 2})])
    both = batches(8, False) + batches(4, False)
    check(found, gradients(tmp_path, both, 3))


def test_one_batch_is_as_before(tmp_path) -> None:
    captioner = ClipCap(16, language_model=GPT2, tokenizer="emoji", prefix_length=4)
    task = CaptioningTask(tiny_encoder(), captioner)
    task.trainer = quiet_trainer(tmp_path)
    (batch,) = batches(8, True)
    assert torch.equal(task.training_step(batch, 0), task.compute_losses(batch)["loss"])


def test_a_captioner_that_does_not_say_its_tokens_is_refused(tmp_path) -> None:
    class Silent(ClipCap):
        def loss(self, *args, **kwargs):
            loss = super().loss(*args, **kwargs)
            self.tokens = None
            return loss

    torch.manual_seed(0)
    task = CaptioningTask(tiny_encoder(), Silent(16, language_model=GPT2, tokenizer="emoji", prefix_length=4))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=2 .* Silent.loss does not set"):
        trainer.fit(task, DataLoader(batches(2, False), batch_size=None))


def test_a_llava_counts_the_tokens_of_its_answers() -> None:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Llava(language_model={"model_type": "llama", **size}, tokenizer="emoji", image_dim=8, tune="full")
    texts, weight = ["a cat", "a red dog on a hill"], torch.tensor([2.0, 1.0])
    made.loss(torch.randn(2, 3, 8), made.encode(texts), weight=weight)
    answers = [len(answer) for _, answer in made.chat.tokens(["", ""], texts)]
    assert answers[1] > answers[0] > 1
    assert float(made.tokens) == 2 * answers[0] + answers[1]
