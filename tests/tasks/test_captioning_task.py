"""A captioner behind an alignment: what it learns from, what is scored, what a checkpoint keeps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_encoders import routed
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from torch.nn import functional as F

from gmail_lightning.callbacks import FeatureWriter
from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset, FeatureStore
from gmail_lightning.metrics.captioning.java_tools import JavaError
from gmail_lightning.models import ClipCap, ImageEncoder, Llava, ModalityEncoder, PatchTokens
from gmail_lightning.models.branches.fingerprint import frozen_weights, weights_difference
from gmail_lightning.tasks import CaptioningTask, EmbeddingTask, captioning
from gmail_lightning.tasks.encoder_task import reaching
from gmail_lightning.types import CaptionSpec, Modality

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


def captioner(seed: int = 0, **settings: Any) -> ClipCap:
    torch.manual_seed(seed)
    return ClipCap(**{"image_dim": 16, "language_model": GPT2, "tokenizer": "emoji", "prefix_length": 2, **settings})


def task(encoder: ImageEncoder | None = None, **settings: Any) -> CaptioningTask:
    usual = {"captioner": captioner(), "num_beams": 1, "max_new_tokens": 4, "min_unique_captions": 0.0}
    return CaptioningTask(encoder or tiny_encoder(), **{**usual, **settings})


def as_aligned(aligned: Any, **settings: Any) -> ModalityEncoder:
    return ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), **settings)


def evaluation_batch(data: MixedModalityDataModule, made: CaptioningTask, folder: Path) -> dict[str, Any]:
    """One batch of both hands, as the evaluation sees it."""
    trainer = quiet_trainer(folder, limit_val_batches=1)
    seen: list[dict[str, Any]] = []
    made.update_metrics = lambda metrics, batch: seen.append(batch)  # type: ignore[method-assign]
    trainer.validate(made, data, verbose=False)
    del made.update_metrics
    return seen[0]


@pytest.mark.slow
def test_loss_is_the_captioners_on_each_branch(aligned: Any, tmp_path: Path) -> None:
    made = task(as_aligned(aligned)).eval()
    batch = evaluation_batch(emoji_data(), made, tmp_path)
    generated = batch["modality"] == Modality.GENERATED
    assert 0 < generated.sum() < len(generated)
    plain = tiny_encoder().encode_image(batch["image"])
    other = aligned.task.encoder.encode_image(batch["image"], torch.ones(len(generated), dtype=torch.long))
    features = torch.where(generated[:, None], other, plain)
    ids = made.captioner.encode(batch["caption"])
    torch.testing.assert_close(
        made.compute_losses(batch)["loss"], made.captioner.loss(features, ids), rtol=1e-5, atol=1e-6
    )
    weight = torch.rand(len(generated))
    weighted = made.compute_losses({**batch, "weight": weight})["loss"]
    torch.testing.assert_close(weighted, made.captioner.loss(features, ids, weight=weight), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weighted, made.compute_losses(batch)["loss"], atol=1e-6)


@pytest.mark.slow
def test_text_noise_trains_on_texts_and_captions_images(tmp_path: Path) -> None:
    """Without noise the features are those of the texts; with it, their direction moves by the variance asked for."""
    made = task(text_noise=0.0).eval()
    batch = evaluation_batch(emoji_data(), made, tmp_path)
    first = torch.tensor([batch["text_row"].tolist().index(row) for row in range(len(batch["caption"]))])
    batch["text"] = batch["text"][first]  # one per row, as in training
    features = F.normalize(tiny_encoder().encode_text(batch["text"]), dim=-1)
    given: list[torch.Tensor] = []
    loss = made.captioner.loss
    made.captioner.loss = lambda x, *a, **k: (given.append(x), loss(x, *a, **k))[1]  # type: ignore[method-assign]
    made.compute_losses(batch)
    torch.testing.assert_close(given[0], features)
    made.text_noise = 0.01
    for seed in range(50):
        torch.manual_seed(seed)
        made.compute_losses(batch)
    noisy = torch.stack(given[1:])
    torch.testing.assert_close(noisy.norm(dim=-1), torch.ones(noisy.shape[:2]))
    torch.manual_seed(7)
    expected = F.normalize(features + 0.1 * torch.randn(50, *features.shape), dim=-1)
    assert (noisy * features).sum(-1).mean().item() == pytest.approx(
        (expected * features).sum(-1).mean().item(), abs=5e-3
    )

    images = F.normalize(tiny_encoder().encode_image(batch["image"]), dim=-1)
    del made.captioner.loss
    assert made.write(batch) == made.captioner.generate(images, num_beams=1, max_new_tokens=4)


def no_java(asked: list[str]) -> Any:
    def scores(hypotheses: list[str], references: list[list[str]], **_: Any) -> Any:
        asked.append(hypotheses[0])
        raise JavaError("no java here")

    return scores


@pytest.mark.slow
def test_scores_of_each_modality_and_what_needs_java_is_left_to_test(tmp_path: Path) -> None:
    made = task(metrics=("bleu", "rouge", "cider", "meteor"))
    data = emoji_data()
    trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=2, num_sanity_val_steps=0, limit_val_batches=2)
    trainer.fit(made, data)
    values = made.results["novel"].values
    assert {"CIDEr", "Bleu_4", "ROUGE_L", "unique_captions", "mean_length", "generated_CIDEr"} <= values.keys()
    assert "METEOR" not in values
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmail_lightning.metrics.captioning.coco_score.JAVA_METRICS", {"meteor": no_java(asked)})
        trainer.validate(made, data, verbose=False)
    values = made.results["novel"].values
    assert math.isnan(values["METEOR"])
    assert math.isnan(values["generated_METEOR"])
    assert math.isfinite(values["CIDEr"])
    assert (
        made.results["novel"].reasons["METEOR"] == made.results["novel"].reasons["generated_METEOR"] == "no java here"
    )
    assert len(asked) == 2  # one set, two modalities


@pytest.mark.slow
def test_fit_on_cached_features_equals_fit_on_pixels(aligned: Any, tmp_path: Path) -> None:
    """Features of the aligned branch, written once, in place of the pixels of every step: the same weights."""
    hands = [EmojiDataset(hand, "novel") for hand in ("fluent_flat", "noto")]
    writer = FeatureWriter(str(tmp_path / "store"), "float32")
    embedding = EmbeddingTask(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path)))
    quiet_trainer(tmp_path, callbacks=[writer]).predict(
        embedding, MixedModalityDataModule(predict=hands, batch_size=64)
    )
    alike = AllowedOverlap(["caption", "image_id", "pixels"], "the same drawings")
    weights = []
    for sets in (hands, [FeatureStore(str(tmp_path / "store"), dataset) for dataset in hands]):
        made = task(as_aligned(aligned))
        data = MixedModalityDataModule(
            sets, {"novel": sets}, mode="mixture", generated_fraction=0.5, batch_size=16, allow_overlap={"novel": alike}
        )
        torch.manual_seed(3)
        quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(made, data)
        weights.append(made.captioner.state_dict())
    assert not torch.equal(weights[0]["clip_project.model.0.weight"], captioner().clip_project.model[0].weight)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_checkpoint_keeps_captioner_and_adapters_and_writes_the_same(aligned: Any, tmp_path: Path) -> None:
    made, data = task(as_aligned(aligned)), emoji_data()
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(made, data)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    keys = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"].keys()
    assert any(".lora." in key for key in keys)
    assert all(key.startswith("captioner.") or "lora" in key or "projection" in key for key in keys)
    loaded = CaptioningTask.load_from_checkpoint(
        tmp_path / "c.ckpt", encoder=tiny_encoder(), captioner=captioner(seed=1), num_beams=1, max_new_tokens=4
    )
    batch = evaluation_batch(data, loaded, tmp_path)
    written = loaded.eval().write(batch)
    assert written == made.eval().write(batch)
    assert written != task().eval().write(batch)


def test_predictions_name_their_images(tmp_path: Path) -> None:
    made, data = task().eval(), MixedModalityDataModule(predict=[EmojiDataset("noto", "novel")], batch_size=64)
    batches = quiet_trainer(tmp_path, limit_predict_batches=2).predict(made, data)
    images = EmojiDataset("noto", "novel")
    assert torch.cat([b["image_id"] for b in batches]).tolist() == images.image_id[:128].tolist()
    assert [key for b in batches for key in b["sample_key"]][5] == images.sample_key(5)
    assert all(isinstance(caption, str) for b in batches for caption in b["caption"])


class Quiz(EmojiDataset):
    """Asks which letter is right; it is B of every concept with an even number, else A."""

    has_questions = True
    captions_are_classes = True

    def question(self, index: int) -> str:
        return f"Which one? {index}"

    def captions(self, index: int) -> list[str]:
        return ["The answer is B." if self.image_id[index] % 2 == 0 else "The answer is A."]


class Asked(CaptionSpec):
    """Ids of questions: their letters."""

    def encode(self, captions, questions):
        raise AssertionError("nothing is trained")

    def encode_questions(self, questions):
        letters = [[ord(letter) for letter in question.ljust(20)] for question in questions]
        return {"prompt_ids": torch.tensor(letters)}


class Answering(ClipCap):
    """Says always the same, and notes what it is asked."""

    caption_spec = Asked()

    def generate(self, image_features, prompts=None, **settings):
        self.asked.extend("".join(map(chr, ids)).strip() for ids in prompts["prompt_ids"].tolist())
        return ["B. a thing"] * len(image_features)


@pytest.mark.slow
def test_multiple_choice_questions_are_scored_by_their_letter(tmp_path: Path) -> None:
    answering = Answering(16, GPT2, "emoji", prefix_length=2)
    made, asked = task(captioner=answering), []
    answering.asked = asked
    sets = [Quiz("noto", "novel")]
    quiet_trainer(tmp_path).validate(made, MixedModalityDataModule(sets, {"quiz": sets}), verbose=False)
    even = (sets[0].image_id % 2 == 0).mean()
    assert made.results["quiz"].values["IMG-Accuracy"] == pytest.approx(even)
    assert 0.4 < even < 0.6
    assert (made.results["quiz"].values["questions"], made.results["quiz"].values["unparsable"]) == (len(sets[0]), 0)
    assert "generated_IMG-Accuracy" not in made.results["quiz"].values
    assert sorted(asked) == sorted(f"Which one? {i}" for i in range(len(sets[0])))


def test_questions_to_a_captioner_that_answers_none_are_refused(tmp_path: Path) -> None:
    sets = [Quiz("noto", "novel")]
    with pytest.raises(ValueError, match="ClipCap answers no questions, but the data ask some: use Llava"):
        quiet_trainer(tmp_path).validate(task(), MixedModalityDataModule(sets, {"quiz": sets}), verbose=False)


def test_a_collapse_is_told(tmp_path: Path) -> None:
    made = task(min_unique_captions=0.5)
    made.captioner.generate = lambda x, *a, **k: ["a thing"] * len(x)  # type: ignore[method-assign]
    with pytest.warns(
        UserWarning, match=r"novel: only 0\.\d% of the captions of real images differ.*2.0 words on average"
    ):
        quiet_trainer(tmp_path).validate(made, emoji_data(), verbose=False)
    assert made.results["novel"].values["mean_length"] == 2.0


def test_a_collapse_on_generated_images_is_told(tmp_path: Path) -> None:
    made = task(min_unique_captions=0.5)
    made.captioner.generate = lambda x, *a, **k: ["a thing"] * len(x)  # type: ignore[method-assign]
    sets = [EmojiDataset("fluent_flat", "novel")]
    with pytest.warns(UserWarning, match=r"captions of generated images differ"):
        quiet_trainer(tmp_path).validate(made, MixedModalityDataModule(sets, {"novel": sets}), verbose=False)


def test_java_alone_is_left_to_test(tmp_path: Path) -> None:
    made = task(metrics=["meteor"])
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=1, val_check_interval=1).fit(made, emoji_data())
    assert "unique_captions" in made.results["novel"].values
    assert not {"METEOR", "CIDEr"} & made.results["novel"].values.keys()
    assert made.results["novel"].tokenizer is None  # nothing was split


def test_adapters_that_the_captioner_does_not_read_stay_as_they_are(aligned: Any, tmp_path: Path) -> None:
    """Of two blocks, tokens of the first: the adapters of the second, and the projection, are frozen."""
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    reader = Llava(language_model={**llama, "num_attention_heads": 2}, tokenizer="emoji", image_dim=32, tune="full")
    made = task(as_aligned(aligned, train_adapters=True), captioner=reader)
    trained = {name for name, p in made.encoder.image_adapters() if p.requires_grad}
    assert trained
    assert all(name.startswith("encoder.lora.image.0.") for name in trained)
    before = {name: p.detach().clone() for name, p in made.encoder.image_adapters()}
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(made, emoji_data())
    changed = {name for name, p in made.encoder.image_adapters() if not torch.equal(p, before[name])}
    assert changed == trained


def test_real_and_generated_batches_train_the_adapters_alike(aligned: Any, tmp_path: Path) -> None:
    """A batch without generated rows gives the adapters no gradient, and is no error."""
    made = task(as_aligned(aligned, train_adapters=True))
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, emoji_data(generated_fraction=0.0))
    assert all(p.grad is not None for p in made.encoder.parameters() if p.requires_grad)


def saved_language_model(folder: Path, seed: int) -> str:
    model = captioner(seed)
    model.gpt.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_is_refused_by_another_captioner(tmp_path: Path) -> None:
    """By another frozen language model of the same shape, and by a setting that no tensor shows."""
    first, second = (saved_language_model(tmp_path / str(seed), seed) for seed in (0, 1))

    def made(path: str, **settings: Any) -> CaptioningTask:
        return task(captioner=captioner(language_model=path, tokenizer=None, tune_language_model=False, **settings))

    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(made(first), emoji_data())
    path = tmp_path / "c.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert not [key for key in content["state_dict"] if ".gpt." in key]

    made(first).on_load_checkpoint(content)
    with pytest.raises(MisconfigurationException, match=r"another frozen language model: \d+ of \d+ tensors"):
        made(second).on_load_checkpoint(content)
    with pytest.raises(MisconfigurationException, match="trained with normalize_prefix=False, and here it is True"):
        made(first, normalize_prefix=True).on_load_checkpoint(content)


def test_the_frozen_language_model_is_looked_at_once_per_run_and_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], captioning.frozen_weights
    monkeypatch.setattr(captioning, "frozen_weights", lambda module: calls.append(1) or original(module))
    path = saved_language_model(tmp_path / "lm", 0)
    made = task(captioner=captioner(language_model=path, tokenizer=None, tune_language_model=False))
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    quiet_trainer(tmp_path, max_steps=3, callbacks=[saves], **settings).fit(made, emoji_data())
    assert (len(list(tmp_path.glob("*.ckpt"))), len(calls)) == (3, 1)
    before = frozen_weights(made.captioner)
    name = next(name for name, p in made.captioner.named_parameters() if not p.requires_grad)
    with torch.no_grad():
        made.captioner.get_parameter(name).view(-1)[-1] += 10.0  # the last entry counts
    assert weights_difference(before, frozen_weights(made.captioner)) is not None


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path: Path) -> None:
    made, modes = task(), []
    loss, generate = made.captioner.loss, made.captioner.generate

    def seen(call: Any) -> Any:
        def noted(*args: Any, **settings: Any) -> Any:
            modes.append((call is loss, made.captioner.gpt.transformer.drop.training, made.encoder.encoder.training))
            return call(*args, **settings)

        return noted

    made.captioner.loss, made.captioner.generate = seen(loss), seen(generate)  # type: ignore[method-assign]
    quiet_trainer(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=1).fit(made, emoji_data())
    assert set(modes) == {(True, True, False), (False, False, False)}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_dim=512\), but OpenCLIPEncoder gives features of width 16"):
        task(captioner=captioner(image_dim=512))
    for settings in ({"text_noise": -1.0}, {"num_beams": 0}, {"label_smoothing": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* is out of range"):
            task(**settings)
    with pytest.raises(ValueError, match="which reach no adapter"):
        task(routed(tiny_encoder()), text_noise=0.1)
    with pytest.raises(ValueError, match="timeout"):
        task(java_timeout=0.0)
    with pytest.raises(ValueError, match="blue"):
        task(metrics=("blue",))
    tokens = captioner()
    tokens.reader = PatchTokens(-2)
    with pytest.raises(ValueError, match="captioner of pooled features"):
        task(captioner=tokens, text_noise=0.016)
    tokens.reader = PatchTokens(5)
    with pytest.raises(ValueError, match="layer=5: this tower has 2 blocks"):
        task(captioner=tokens)


def test_a_loss_reaches_parameters_that_it_does_not_depend_on() -> None:
    """Without a change of its value, also where such a parameter is infinite."""
    used, unused = torch.tensor(3.0, requires_grad=True), torch.full((2, 2), torch.inf, requires_grad=True)
    loss = reaching(used.square(), [unused, used])
    assert loss.item() == 9.0
    (2 * loss).backward()
    assert used.grad == 12.0
    assert torch.equal(unused.grad, torch.zeros(2, 2))
