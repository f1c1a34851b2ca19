"""Zero-shot classification and linear probes against formulas, and an end to runs that destroy their score."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from tiny_tasks import TINY, emoji_data, quiet_trainer, tiny_encoder
from torch.nn.functional import normalize

from gmail_lightning.callbacks import CollapseError, CollapseGuard, ResultsWriter
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import DataError, EmojiDataset, ImageFolder
from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.tasks import LinearProbeTask, ZeroShotClassificationTask
from gmail_lightning.tasks.classification import class_embeddings
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
    task = ZeroShotClassificationTask(ModalityEncoder(tiny_encoder(), text_side="frozen"))
    torch.testing.assert_close(
        class_embeddings(task.encoder, PETS, task.device).double(), embeddings(task.encoder, PETS), atol=1e-6, rtol=0
    )


def test_the_loss_is_cross_entropy_over_all_classes_by_one_template(fitted) -> None:
    task = ZeroShotClassificationTask(ModalityEncoder(tiny_encoder(), text_side="lora"), max_logit_scale=7.0)
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


@pytest.mark.slow
@torch.no_grad()
def test_evaluation_equals_a_loop_for_each_modality(aligned, tmp_path) -> None:
    task = ZeroShotClassificationTask(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), text_side="frozen"))
    data = emoji_data("subgroup")
    quiet_trainer(tmp_path).test(task, data, verbose=False)
    text = embeddings(task.encoder, data.classes("novel")).float()
    for hand, prefix, modality in (("noto", "", 0), ("fluent_flat", "generated_", 1)):
        dataset = EmojiDataset(hand, "novel", classes="subgroup")
        images = torch.stack([resize(dataset.image(i), task.encoder.image_spec) for i in range(len(dataset))])
        features = task.encoder.encode_image(images, torch.full((len(images),), modality))
        expected = counted(normalize(features, dim=1) @ text.T, torch.from_numpy(dataset.label))
        for name, value in expected.items():
            assert task.results["novel"].values[prefix + name] == pytest.approx(value, abs=1e-6), (hand, name)
    shown = task.results["novel"].class_accuracy
    assert list(shown) == dataset.class_names
    seen = [value for value in shown.values() if value is not None]
    assert sum(seen) / len(seen) == pytest.approx(task.results["novel"].values["mean_per_class"], abs=1e-6)


def test_templates_given_to_the_task_replace_those_of_the_data(fitted) -> None:
    task = ZeroShotClassificationTask(tiny_encoder(), templates="stanford_cars")
    fitted(task, emoji_data(), steps=1)
    assert task._prompts.shape == (8, 9, 16)
    task = ZeroShotClassificationTask(tiny_encoder(), templates="a {} in the sun")
    assert task.templates == ["a {} in the sun"]
    with pytest.raises(ValueError, match=r"needs exactly one {}"):
        ZeroShotClassificationTask(tiny_encoder(), templates=["a photo"])
    with pytest.raises(ValueError, match="templates is empty"):
        ZeroShotClassificationTask(tiny_encoder(), templates=[])


def test_classes_of_an_evaluation_that_are_not_trained_are_told(fitted, caplog) -> None:
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addHandler(caplog.handler)
    data = emoji_data("group")
    names = data.classes().names
    for dataset in data.datasets["train"]:
        dataset.class_names = ["another", *names[1:]]
    data.evaluation["val"]["novel"] = [EmojiDataset("noto", "novel")]
    fitted(ZeroShotClassificationTask(tiny_encoder()), data)
    told.removeHandler(caplog.handler)
    assert f"novel: 1 of 9 classes are not trained: {names[:1]}." in [r.getMessage() for r in caplog.records]


def test_class_lists_that_do_not_match_are_refused(fitted, tmp_path) -> None:
    data = emoji_data("group")
    data.datasets["train"][1] = EmojiDataset("noto", "novel", classes="subgroup")
    with pytest.raises(DataError, match="the classes do not match"):
        fitted(ZeroShotClassificationTask(tiny_encoder()), data)
    probe = LinearProbeTask(tiny_encoder())
    fitted(probe, emoji_data("group"))
    with pytest.raises(MisconfigurationException, match=r"novel: the probe was not trained on \d+ of 95 classes"):
        quiet_trainer(tmp_path).validate(probe, emoji_data("subgroup"), verbose=False)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.0, 10.0])
def test_a_run_that_destroys_its_score_is_stopped(lr: float, fitted) -> None:
    task = ZeroShotClassificationTask(
        ModalityEncoder(OpenCLIPEncoder(pretrained="emoji"), text_side="full"),
        optimizer=lambda g: torch.optim.SGD(g, lr=lr),
    )
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "val_check_interval": 1}
    guard = CollapseGuard("accuracy", "novel", max_drop=0.3)
    data = emoji_data("concept", batch_size=64)
    if lr == 0.0:
        fitted(task, data, steps=1, callbacks=[guard], **settings)
        assert task.results["novel"].values["accuracy"] == pytest.approx(guard.before)
        return
    with pytest.raises(CollapseError, match=r"novel/accuracy fell from 0.* before training to 0.* at step"):
        fitted(task, data, steps=3, callbacks=[guard], **settings)


def test_the_guard_needs_the_score_before_training(fitted) -> None:
    with pytest.raises(MisconfigurationException, match="num_sanity_val_steps=-1"):
        fitted(LinearProbeTask(tiny_encoder()), emoji_data(), callbacks=[CollapseGuard()], num_sanity_val_steps=0)


def coloured(root: Path, names: list[str], images: int = 4) -> ImageFolder:
    """Classes of one colour each, the first of its folder the darkest, in alphabetical order of the folders."""
    for number, _ in enumerate(names):
        (root / f"{number}").mkdir(parents=True, exist_ok=True)
        for i in range(images):
            grey = 250 * number // len(names) + i
            Image.new("RGB", (32, 32), (grey, 255 - grey, (grey * 7) % 256)).save(root / f"{number}" / f"{i}.png")
    return ImageFolder(root, class_names=names, space=root.name)  # equal images stand for others


def some(root: Path, names: list[str], **evaluation: list[ImageFolder]) -> MixedModalityDataModule:
    return MixedModalityDataModule(
        coloured(root, names), evaluation, mode="mixture", generated_fraction=0.0, batch_size=4
    )


def random_head(probe: LinearProbeTask) -> LinearProbeTask:
    torch.manual_seed(3)
    for parameter in probe.head.parameters():
        torch.nn.init.normal_(parameter)
    return probe


MISSILES = ["missile", "cat", "missile", "dog"]  # as ImageNet has it


def test_classes_of_one_name_keep_columns_of_their_own(fitted, tmp_path) -> None:
    probe = LinearProbeTask(tiny_encoder())
    fitted(probe, some(tmp_path / "train", MISSILES))
    random_head(probe).head.bias.data[2] += 50  # all are taken for the second missile
    held = coloured(tmp_path / "val", MISSILES, images=3)
    quiet_trainer(tmp_path).validate(probe, MixedModalityDataModule(val={"held": held}), verbose=False)
    with torch.no_grad():
        images = torch.stack([resize(held.image(i), probe.encoder.image_spec) for i in range(len(held))])
        logits = 4.0 * normalize(probe.encoder.encode_image(images), dim=1) @ probe.head.weight.T + probe.head.bias
    hits = (logits.argmax(1) == torch.from_numpy(held.label)).float()
    assert probe.results["held"].values["accuracy"] == pytest.approx(hits.mean().item())
    names = ["missile (label 0)", "cat", "missile (label 2)", "dog"]
    assert hits.view(4, 3).mean(1).tolist() == [0, 0, 1, 0]
    assert probe.results["held"].class_accuracy == dict(zip(names, [0, 0, 1, 0], strict=True))
    batch = {"image": images, "modality": torch.zeros(12, dtype=torch.long), "eval_set": "held"}
    with torch.no_grad():
        torch.testing.assert_close(probe.scores(batch), logits)


def test_a_probe_refuses_names_of_several_classes_but_takes_some_of_its_own(fitted, tmp_path) -> None:
    probe = LinearProbeTask(tiny_encoder())
    fitted(probe, some(tmp_path / "train", MISSILES))
    random_head(probe)
    some_own = coloured(tmp_path / "own", ["dog", "cat"])
    quiet_trainer(tmp_path).validate(probe, MixedModalityDataModule(val={"own": some_own}), verbose=False)
    batch = {"image": torch.rand(3, 3, 32, 32), "modality": torch.zeros(3, dtype=torch.long), "eval_set": "own"}
    with torch.no_grad():
        assert torch.equal(probe.scores(batch), probe.logits(batch)[:, [3, 1]])
    for twice, names in (("missile", ["cat", "missile"]), ("cat", ["cat", "dog", "cat"])):
        data = MixedModalityDataModule(val={"other": coloured(tmp_path / twice, names)})
        with pytest.raises(MisconfigurationException, match=f"other: .*'{twice}' is the name of several"):
            quiet_trainer(tmp_path).validate(probe, data, verbose=False)


def test_a_probe_is_compared_with_the_evaluation_sets_before_the_first_batch(fitted, tmp_path, monkeypatch) -> None:
    other = coloured(tmp_path / "other", ["cow", "cat"])
    message = "other: the probe was not trained on 1 of 2 classes, the first is 'cow'"
    probe = LinearProbeTask(tiny_encoder())
    trainer = fitted(probe, some(tmp_path / "train", MISSILES))
    trainer.save_checkpoint(tmp_path / "probe.ckpt")
    own = coloured(tmp_path / "own", MISSILES)
    for step in ("training_step", "validation_step", "test_step"):
        monkeypatch.setattr(LinearProbeTask, step, lambda *args: pytest.fail("a batch came first"))
    with pytest.raises(MisconfigurationException, match=message):
        fitted(LinearProbeTask(tiny_encoder()), some(tmp_path / "train", MISSILES, own=own, other=other))
    for verb in ("validate", "test"):
        run = getattr(quiet_trainer(tmp_path), verb)
        data = MixedModalityDataModule(val={"own": own, "other": other})
        with pytest.raises(MisconfigurationException, match=message):  # known only once the checkpoint is loaded
            run(LinearProbeTask(tiny_encoder()), data, ckpt_path=tmp_path / "probe.ckpt", verbose=False)
        with pytest.raises(MisconfigurationException, match=r"Nothing to evaluate: .* no evaluation sets"):
            run(LinearProbeTask(tiny_encoder()), MixedModalityDataModule(), verbose=False)


@pytest.mark.parametrize("kind", [LinearProbeTask, ZeroShotClassificationTask])
def test_training_without_evaluation_sets(kind, fitted, tmp_path) -> None:
    task = kind(tiny_encoder())
    before = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
    trainer = fitted(task, some(tmp_path / "train", ["cat", "dog"]), steps=2, limit_val_batches=1.0)
    assert trainer.global_step == 2
    assert not task.metrics
    after = dict(task.named_parameters())
    assert all(name in after for name in before)
    assert kind is LinearProbeTask or any(not torch.equal(after[name], p) for name, p in before.items())


def test_a_class_without_images_is_null_in_the_file(tmp_path) -> None:
    data = coloured(tmp_path / "val", ["cat", "dog", "emu"])
    data.set_rows(data._files[:8], data.label[:8].tolist(), "real", "")  # no emus
    data.image_id = np.arange(8)
    task = ZeroShotClassificationTask(tiny_encoder())
    module = MixedModalityDataModule(val={"held": data})
    quiet_trainer(tmp_path, callbacks=[ResultsWriter()]).validate(task, module, verbose=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (file,) = tmp_path.glob("*results.json")
    classes = json.loads(file.read_text(), parse_constant=refuse)["classes"]["held"]
    assert classes.keys() == {"cat", "dog", "emu"}
    assert classes["emu"] is None
    assert classes["cat"] + classes["dog"] == pytest.approx(2 * task.results["held"].values["mean_per_class"])


def test_the_logit_bias_of_a_siglip_stays(fitted, tmp_path) -> None:
    def siglip() -> OpenCLIPEncoder:
        torch.manual_seed(0)
        return OpenCLIPEncoder(config={**TINY, "init_logit_bias": -7.0}, merges="emoji")

    task = ZeroShotClassificationTask(
        ModalityEncoder(siglip(), text_side="full"),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    )
    words = task.encoder.encoder.model.token_embedding.weight.detach().clone()
    trainer = fitted(task, emoji_data(), steps=1)
    assert task.encoder.logit_bias.item() == -7.0
    assert not torch.equal(task.encoder.encoder.model.token_embedding.weight, words)
    trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert all(p.grad is not None for p in trained)
    assert len(trained) == len(list(task.encoder.text_parameters())) - 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ZeroShotClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", encoder=siglip())
    loaded = ModalityEncoder.from_checkpoint(tmp_path / "last.ckpt", encoder=siglip())
    words = task.encoder.encoder.model.token_embedding.weight
    for encoder in (again.encoder, loaded):
        assert torch.equal(encoder.encoder.model.token_embedding.weight, words)
        assert encoder.logit_bias.item() == -7.0
