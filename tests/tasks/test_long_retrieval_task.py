"""Long-CLIP's two terms against its description in float64, and evaluation that counts what is cut."""

import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.encoders.long_text import stretch_context
from gmail_lightning.tasks import LongRetrievalTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}
CAPTIONS = ["a red fox", "a cat. it sleeps by the river", "a dog. it runs. far", "U.S. flag", "two birds", "a fox. a"]


def task(**kwargs) -> LongRetrievalTask:
    torch.manual_seed(0)
    encoder = OpenCLIPEncoder(config=TINY, merges="emoji")
    side = kwargs.pop("text_side", None)
    return LongRetrievalTask(encoder if side is None else ModalityEncoder(encoder, text_side=side), **kwargs)


def batch(made: LongRetrievalTask) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "image": torch.rand(6, 3, 32, 32),
        "modality": torch.tensor([1, 0] * 3),
        "image_id": torch.tensor([4, 5, 6, 7, 8, 5]),
        **{name: spec.encode(CAPTIONS) for name, spec in made.input_spec.texts.items()},
    }


def smoothed(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Cross-entropy both ways with labels smoothed by 0.1, over the candidates that are kept."""
    total = 0.0
    for table, rows in ((logits, kept), (logits.T, kept.T)):
        for i, row in enumerate(table):
            target = torch.tensor([int(rows[i, :i].sum())])
            total += F.cross_entropy(row[rows[i]][None], target, label_smoothing=0.1) / (2 * len(table))
    return total


@pytest.mark.parametrize("components", [2, 32])
def test_both_terms_are_those_of_long_clip(components: int) -> None:
    made = task(num_components=components, short_weight=0.5)
    rows = batch(made)
    tokenizer = made.encoder.text_spec.encode
    first = ["a red fox", "a cat", "a dog", "U.S", "two birds", "a fox"]
    assert torch.equal(rows["short_text"], tokenizer(first))
    assert torch.equal(rows["long_text"], tokenizer(CAPTIONS))
    with torch.no_grad():
        image, long, short = (
            F.normalize(x.double(), dim=1)
            for x in (
                made.encoder.encode_image(rows["image"]),
                made.encoder.encode_text(tokenizer(CAPTIONS)),
                made.encoder.encode_text(tokenizer(first)),
            )
        )
    kept = (rows["image_id"][:, None] != rows["image_id"]) | torch.eye(6, dtype=torch.bool)
    mean = image.mean(dim=0)
    u, s, v = torch.linalg.svd(image - mean, full_matrices=False)
    coarse = u[:, :components] * s[:components] @ v[:components] + mean
    scale = made.encoder.logit_scale.item()
    expected = [smoothed(scale * image @ long.T, kept), smoothed(scale * coarse @ short.T, kept)]
    got = made.compute_losses(rows)
    assert [got["long"].item(), got["short"].item()] == pytest.approx([x.item() for x in expected], abs=1e-5)
    assert got["loss"].item() == pytest.approx((expected[0] + 0.5 * expected[1]).item(), abs=1e-5)
    if components == 2:  # the coarse images are not normalised again
        assert abs(got["short"].item() - smoothed(scale * F.normalize(coarse, dim=1) @ short.T, kept).item()) > 1e-4


def test_chunks_give_the_gradients_of_one_pass_and_both_towers_train() -> None:
    gradients = []
    for chunk in (None, 2):
        made = task(num_components=3, contrastive_chunk_size=chunk)
        made.compute_losses(batch(made))["loss"].backward()
        gradients.append({name: p.grad for name, p in made.named_parameters()})
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-6)
    made = task(short_weight=0.0)
    assert set(made.compute_losses(batch(made))) == {"loss", "long", "logit_scale"}


def test_only_the_text_side_trains_on_a_stretched_tower() -> None:
    torch.manual_seed(0)
    encoder = OpenCLIPEncoder(config=TINY, merges="emoji")
    stretch_context(encoder, 40, keep=8)
    made = LongRetrievalTask(ModalityEncoder(encoder, text_side="full"), num_components=3)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert any("positional_embedding" in name for name in trained)
    assert not any("visual" in name for name in trained)
    rows = batch(made)
    assert rows["long_text"].shape == rows["short_text"].shape == (6, 40)
    before = encoder.model.positional_embedding.detach().clone()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1, weight_decay=1.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(made.compute_losses(rows)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert torch.equal(encoder.model.positional_embedding[:8], before[:8])
    assert not torch.equal(encoder.model.positional_embedding[8:], before[8:])


def test_evaluation_counts_the_captions_that_are_cut() -> None:
    made = task()
    assert pickle.loads(pickle.dumps(made.input_spec.texts["short_text"].encode))(["a. b"]).shape == (1, 16)
    references = [["a fox", "a fox by the river " * 9], ["a cat"], ["a dog. " * 30, "x", "a dog " * 7]]
    texts = [text for captions in references for text in captions]
    rows = {
        "image": torch.rand(3, 3, 32, 32),
        "modality": torch.tensor([0, 1, 0]),
        "row_id": torch.arange(3),
        "references": references,
        "long_text": made.input_spec.texts["long_text"].encode(texts),
        "long_text_row": torch.tensor([0, 0, 1, 2, 2, 2]),
    }
    for own, other in (("", "generated_"), ("generated_", "")):
        metrics = made.build_metrics("val")
        with torch.no_grad():
            made.update_metrics(metrics, rows)
        values = {name: float(value) for metric in metrics.values() for name, value in metric.compute().items()}
        assert (values[own + "num_images"], values[own + "num_texts"]) == (2, 5)
        assert (values[other + "num_images"], values[other + "num_texts"]) == (1, 1)
        assert values[own + "num_truncated"] == 2  # "a dog " * 7 fits to the token
        assert values[own + "truncated"] == pytest.approx(2 / 5)
        assert values[other + "num_truncated"] == values[other + "truncated"] == 0
        rows["modality"] = 1 - rows["modality"]


def test_it_runs_on_the_batches_of_the_data_module(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = EmojiDataset("twemoji", "paired"), EmojiDataset("noto", "novel")
    alike = {"novel": AllowedOverlap(["caption", "pixels"], "families share words, and some drawings are alike")}
    data = MixedModalityDataModule(
        [train], {"novel": [val]}, batch_size=8, mode="mixture", generated_fraction=1.0, allow_overlap=alike
    )
    made, seen = task(text_side="full", num_components=3), []
    update = made.update_metrics
    monkeypatch.setattr(made, "update_metrics", lambda m, batch: seen.extend(batch["references"]) or update(m, batch))
    trainer = Trainer(
        max_steps=1, limit_val_batches=2, default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    words = made.encoder.encoder.model.token_embedding.weight
    before = words.detach().clone()
    trainer.fit(made, data)
    assert not torch.equal(words, before)
    seen.clear()
    trainer.validate(made, data, verbose=False)
    values, captions = made.results["novel"].values, [caption for captions in seen for caption in captions]
    tokenizer = made.encoder.text_spec.encode
    cut = sum(len(tokenizer.encode(caption)) + 2 > 16 for caption in captions)
    assert (values["num_images"], values["num_texts"], values["num_truncated"]) == (16, len(captions), cut)
    assert 0 < cut < len(captions)
    assert values["truncated"] == pytest.approx(cut / len(captions))


def test_a_checkpoint_brings_settings_and_the_stretched_tower_back(tmp_path) -> None:
    def stretched() -> OpenCLIPEncoder:
        torch.manual_seed(0)
        encoder = OpenCLIPEncoder(config=TINY, merges="emoji")
        stretch_context(encoder, 40, keep=8)
        return encoder

    settings = {"short_weight": 0.25, "num_components": 7, "label_smoothing": 0.2}
    made = LongRetrievalTask(ModalityEncoder(stretched(), text_side="full"), **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(made)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = LongRetrievalTask.load_from_checkpoint(tmp_path / "last.ckpt", encoder=stretched())
    assert {name: getattr(again, name) for name in settings} == settings
    assert torch.equal(
        again.encoder.encoder.model.positional_embedding, made.encoder.encoder.model.positional_embedding
    )
    rows = batch(made)
    assert again.compute_losses(rows)["loss"].item() == pytest.approx(made.compute_losses(rows)["loss"].item())
    before = (
        LongRetrievalTask(ModalityEncoder(stretched(), text_side="full"), **settings)
        .compute_losses(rows)["loss"]
        .item()
    )
    assert abs(before - made.compute_losses(rows)["loss"].item()) > 1e-3


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="logit bias"):
        LongRetrievalTask(OpenCLIPEncoder(config={**TINY, "init_logit_bias": -5.0}, merges="emoji"))
    for setting in ({"short_weight": -1.0}, {"num_components": 0}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            task(**setting)
