"""A LLaVA behind an alignment: the branches that its patch tokens go through, its two stages, what checkpoints keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.models import Captioner, ClipCap, Llava, ModalityEncoder
from gmail_lightning.models.restoring import restoring
from gmail_lightning.tasks import CaptioningTask

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model as a directory, with the emoji tokenizer."""
    from gmail_lightning.models.captioners.language_model import build_language_model

    torch.manual_seed(0)
    model, tokenizer, _ = build_language_model(LLAMA, "emoji")
    folder = tmp_path_factory.mktemp("language")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task(language: Path, aligned: Any = None, **settings: Any) -> CaptioningTask:
    torch.manual_seed(1)
    captioner = Llava(language_model=str(language), image_dim=32, **settings)
    encoder = tiny_encoder() if aligned is None else ModalityEncoder(tiny_encoder(), aligned=aligned)
    return CaptioningTask(encoder, captioner, num_beams=1, max_new_tokens=4, min_unique_captions=0.0)


def test_patch_tokens_take_the_branch_of_their_modality(language: Path, aligned: Any) -> None:
    made = task(language, str(aligned.path)).eval()
    for parameter in made.captioner.parameters():  # far from the start, where the image hardly matters
        torch.nn.init.normal_(parameter, std=0.3)
    image, modality = torch.rand(4, 3, 32, 32), torch.tensor([1, 0, 0, 1])
    batch = {"image": image, "modality": modality, "caption": ["a", "red", "cat", "tea"]}
    plain = tiny_encoder().image_tokens(image, layer=-2)
    other = aligned.task.encoder.encoder.image_tokens(image, layer=-2)
    tokens = torch.where(modality[:, None, None].bool(), other, plain)
    assert not torch.allclose(plain, other)
    expected = made.captioner.loss(tokens, made.captioner.encode(batch["caption"]))
    assert made.compute_losses(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    real_only = made.captioner.loss(plain, made.captioner.encode(batch["caption"]))
    assert abs(expected.item() - real_only.item()) > 1e-4


def test_the_second_stage_goes_on_from_the_first(language: Path, aligned: Any, tmp_path: Path) -> None:
    first = task(language, str(aligned.path))
    before = first.captioner.projector.linear_1.weight.detach().clone()
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(first, emoji_data())
    path = tmp_path / "stage1" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert {key.split(".")[1] for key in kept if key.startswith("captioner.")} == {"projector"}
    assert not torch.equal(first.captioner.projector.linear_1.weight, before)

    second = task(language, str(aligned.path), projector=str(tmp_path / "stage1"), tune="lora", lora_rank=2)
    torch.testing.assert_close(second.captioner.projector.linear_1.weight, first.captioner.projector.linear_1.weight)
    assert second.captioner.pretrained  # a language model with weights, and a projector that was trained
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=1)
    trainer.fit(second, emoji_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_B" in key for key in kept)
    assert not any("base_layer" in key or "embed_tokens" in key for key in kept)

    again = task(language, str(aligned.path), tune="lora", lora_rank=2)
    trainer = quiet_trainer(tmp_path, limit_test_batches=1)
    trainer.test(again, emoji_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert again.results["novel"].captions
    for name, value in second.captioner.state_dict().items():
        assert torch.equal(value, again.captioner.state_dict()[name]), name


def test_a_checkpoint_of_the_second_stage_needs_no_file_of_the_first(language: Path, tmp_path: Path) -> None:
    weights = {f"mm_projector.{i}.{name}": torch.ones(16, *shape) for i, width in ((0, 32), (2, 16))
               for name, shape in (("weight", (width,)), ("bias", ()))}  # fmt: skip
    torch.save(weights, tmp_path / "mm_projector.bin")
    given = {"language_model": str(language), "image_dim": 32, "projector": str(tmp_path / "mm_projector.bin")}
    first = CaptioningTask(tiny_encoder(), Llava(**given))
    assert torch.equal(first.captioner.projector.linear_1.weight, weights["mm_projector.0.weight"])
    checkpoint = {"state_dict": first.state_dict(), "hyper_parameters": {}}
    first.on_save_checkpoint(checkpoint)
    (tmp_path / "mm_projector.bin").unlink()
    with restoring(checkpoint):  # as ``load_from_checkpoint`` and the command line do
        again = CaptioningTask(tiny_encoder(), Llava(**given))
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    for name, value in first.captioner.state_dict().items():
        assert torch.equal(value, again.captioner.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipcap", "lora", "full"])
def test_a_step_in_mixed_precision(language: Path, tmp_path: Path, kind: str) -> None:
    def build() -> CaptioningTask:
        torch.manual_seed(1)
        made: Captioner
        if kind == "clipcap":
            made = ClipCap(16, GPT2, "emoji", prefix_length=3)
        elif kind == "lora":
            made = Llava(
                None, str(language), image_dim=32, tune="lora", lora_rank=2, lora_dropout=0.0, dtype="bfloat16"
            )
        else:
            made = Llava(None, str(language), image_dim=32, tune="full")
        return CaptioningTask(tiny_encoder(), made, num_beams=2, max_new_tokens=4, min_unique_captions=0.0)

    results = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(2)
        made = build()
        before = {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
        assert {p.dtype for p in before.values()} == {torch.float32}
        trainer = quiet_trainer(
            tmp_path, precision=precision, max_steps=2, log_every_n_steps=1, val_check_interval=2, limit_val_batches=1
        )
        trainer.fit(made, emoji_data())
        after = dict(made.named_parameters())
        assert all(after[n].isfinite().all() and not torch.equal(after[n], value) for n, value in before.items())
        assert made.results["novel"].captions
        results.append(trainer.callback_metrics["train/loss"].item())
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert results[0] != results[1]  # the second did run in another precision
