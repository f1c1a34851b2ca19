"""Zero-shot classification and linear probes against formulas, and an end to runs that destroy their score."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from torch.nn.functional import normalize

from gmail_lightning.callbacks import CollapseError, CollapseGuard
from gmail_lightning.datasets import DataError, EmojiDataset
from gmail_lightning.tasks import LinearProbeTask, ZeroShotClassificationTask
from gmail_lightning.transforms import resize
from gmail_lightning.types import Classes

PETS = Classes(["cat", "dog", "a bird"], ["{}", "a drawing of a {}.", "{}, small"])


def embeddings(encoder, classes: Classes) -> torch.Tensor:
    """One prompt at a time, in float64."""
    rows = []
    for name in classes.names:
        texts = [template.replace("{}", name) for template in classes.templates]
        features = [encoder.encode_text(encoder.text_spec.encode([text]))[0].double() for text in texts]
        rows.append(normalize(torch.stack([normalize(f, dim=0) for f in features]).mean(0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def test_class_embeddings_are_the_mean_of_normalised_prompts() -> None:
    task = ZeroShotClassificationTask(tiny_encoder(), text_side="frozen")
    torch.testing.assert_close(task.class_embeddings(PETS).double(), embeddings(task.encoder, PETS), atol=1e-6, rtol=0)


def test_the_loss_is_cross_entropy_over_all_classes_by_one_template(fitted) -> None:
    task = ZeroShotClassificationTask(tiny_encoder(), text_side="lora", max_logit_scale=7.0)
    fitted(task, emoji_data("subgroup"), steps=3)  # the next step takes template 3 of 2: the second
    classes = emoji_data("subgroup").classes()
    assert task.trainer.global_step % len(classes.templates) == 1
    torch.manual_seed(0)
    label = torch.tensor([4, 0, 90, 4])
    batch = {"image": torch.rand(4, 3, 32, 32), "modality": torch.tensor([1, 0, 1, 0]), "label": label}
    with torch.no_grad():
        text = embeddings(task.encoder, classes._replace(templates=classes.templates[1:]))
        image = normalize(task.encoder.encode_image(batch["image"]).double(), dim=1)
        logits = 7.0 * image @ text.T
        expected = -logits.log_softmax(1)[torch.arange(4), label].mean()
        assert task.compute_losses(batch)["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def counted(scores: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """Accuracies by a loop; no ties here."""
    hits = [int(row.argmax()) == int(true) for row, true in zip(scores, label, strict=True)]
    five = [int(true) in row.topk(5).indices.tolist() for row, true in zip(scores, label, strict=True)]
    by_class: dict[int, list[bool]] = {}
    for hit, true in zip(hits, label.tolist(), strict=True):
        by_class.setdefault(true, []).append(hit)
    means = [sum(h) / len(h) for h in by_class.values()]
    return {
        "accuracy": sum(hits) / len(hits),
        "top5": sum(five) / len(five),
        "mean_per_class": sum(means) / len(means),
    }


@torch.no_grad()
def test_evaluation_equals_a_loop_for_each_modality(aligned, tmp_path) -> None:
    task = ZeroShotClassificationTask(tiny_encoder(), aligned=str(aligned.path), text_side="frozen")
    data = emoji_data("subgroup")
    quiet_trainer(tmp_path).test(task, data, verbose=False)
    text = embeddings(task.encoder, data.classes("novel")).float()
    for hand, prefix, modality in (("noto", "", 0), ("fluent_flat", "generated_", 1)):
        dataset = EmojiDataset(hand, "novel", classes="subgroup")
        images = torch.stack([resize(dataset.image(i), task.encoder.image_spec) for i in range(len(dataset))])
        features = task.encoder.encode_image(images, torch.full((len(images),), modality))
        expected = counted(normalize(features, dim=1) @ text.T, torch.from_numpy(dataset.label))
        for name, value in expected.items():
            assert task.results["novel"][prefix + name] == pytest.approx(value, abs=1e-6), (hand, name)
    shown = task.class_accuracy["novel"]
    assert list(shown) == dataset.class_names
    seen = [value for value in shown.values() if not math.isnan(value)]
    assert sum(seen) / len(seen) == pytest.approx(task.results["novel"]["mean_per_class"], abs=1e-6)


def test_templates_given_to_the_task_replace_those_of_the_data(fitted) -> None:
    task = ZeroShotClassificationTask(tiny_encoder(), templates="stanford_cars")
    fitted(task, emoji_data(), steps=1)
    assert task._prompts.shape == (8, 9, 16)
    with pytest.raises(ValueError, match=r"needs exactly one {}"):
        ZeroShotClassificationTask(tiny_encoder(), templates=["a photo"])


def test_class_lists_that_do_not_match_are_refused(fitted, tmp_path) -> None:
    data = emoji_data("group")
    data.datasets["train"][1] = EmojiDataset("noto", "novel", classes="subgroup")
    with pytest.raises(DataError, match="the classes do not match"):
        fitted(ZeroShotClassificationTask(tiny_encoder()), data)
    probe = LinearProbeTask(tiny_encoder())
    fitted(probe, emoji_data("group"))
    with pytest.raises(MisconfigurationException, match="was not trained on"):
        quiet_trainer(tmp_path).validate(probe, emoji_data("subgroup"), verbose=False)


def test_a_probe_is_logistic_regression_on_scaled_features(fitted, tmp_path) -> None:
    task = LinearProbeTask(tiny_encoder(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    trainer = fitted(task, emoji_data("concept"), steps=1)
    assert task.head.weight.shape == (373, 16)  # concepts of novel
    trainer.save_checkpoint(tmp_path / "probe.ckpt")
    torch.manual_seed(0)
    label = torch.tensor([1, 0, 5])
    batch = {"image": torch.rand(3, 3, 32, 32), "modality": torch.tensor([1, 0, 1]), "label": label}
    with torch.no_grad():
        features = normalize(task.encoder.encode_image(batch["image"]).double(), dim=1) * 4.0  # the root of 16
        logits = features @ task.head.weight.double().T + task.head.bias.double()
        expected = -logits.log_softmax(1)[torch.arange(3), label].mean()
        assert task.compute_losses(batch)["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert not any(p.requires_grad for p in task.encoder.parameters())

    loaded = LinearProbeTask.load_from_checkpoint(tmp_path / "probe.ckpt", encoder=tiny_encoder())
    for each in (task, loaded):
        quiet_trainer(tmp_path).validate(each, emoji_data("concept"), verbose=False)
    assert loaded.results == task.results
    with pytest.raises(MisconfigurationException, match="tells 373 classes apart"):
        fitted(loaded, emoji_data("group"))


@pytest.mark.parametrize("lr", [0.0, 10.0])
def test_a_run_that_destroys_its_score_is_stopped(lr: float, fitted) -> None:
    from gmail_lightning.models import OpenCLIPEncoder

    task = ZeroShotClassificationTask(
        OpenCLIPEncoder(pretrained="emoji"), text_side="full", optimizer=lambda g: torch.optim.SGD(g, lr=lr)
    )
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "val_check_interval": 1}
    guard = CollapseGuard("accuracy", "novel", max_drop=0.3)
    data = emoji_data("concept", batch_size=64)
    if lr == 0.0:
        fitted(task, data, steps=1, callbacks=[guard], **settings)
        assert task.results["novel"]["accuracy"] == pytest.approx(guard.before)
        return
    with pytest.raises(CollapseError, match=r"novel/accuracy fell from 0.* before training to 0.* at step"):
        fitted(task, data, steps=3, callbacks=[guard], **settings)


def test_the_guard_needs_the_score_before_training(fitted) -> None:
    with pytest.raises(MisconfigurationException, match="num_sanity_val_steps=-1"):
        fitted(LinearProbeTask(tiny_encoder()), emoji_data(), callbacks=[CollapseGuard()], num_sanity_val_steps=0)
