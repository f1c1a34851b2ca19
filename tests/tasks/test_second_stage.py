"""Tasks that follow an alignment: the branch they take over, what they train, and what their checkpoints hold."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_encoders import routed
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.command.main import main
from gmail_lightning.models import ModalityEncoder, stretch_context, stretch_positional_embedding
from gmail_lightning.optim import WarmupCosine
from gmail_lightning.tasks import LinearProbeTask, RetrievalTask, ZeroShotClassificationTask

MODALITY = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def tensors(task) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.encoder.named_parameters()}


@pytest.mark.parametrize("kind", [RetrievalTask, ZeroShotClassificationTask, LinearProbeTask])
def test_the_branches_are_the_aligners(aligned, image, kind) -> None:
    task = kind(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path))).eval()
    with torch.no_grad():
        expected = aligned.task.encoder.encode_image(image, MODALITY)
        assert torch.equal(task.encoder.encode_image(image, MODALITY), expected)
    assert not torch.allclose(expected[1], tiny_encoder().eval().encode_image(image[1:2])[0], atol=1e-3)
    assert not any(p.requires_grad for _, p in task.encoder.image_adapters())


def test_without_alignment_generated_images_are_taken_as_real(image) -> None:
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), text_side="lora"))
    with torch.no_grad():
        plain = tiny_encoder().eval().encode_image(image)
        assert torch.equal(task.encoder.encode_image(image, torch.ones(5, dtype=torch.long)), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "train_adapters", "moved"),
    [
        ("lora", False, ("encoder.lora.text.",)),
        ("projection", False, ("text_side_projection.",)),
        ("lora", True, ("encoder.lora.text.", "encoder.lora.image.", "generated_projection.")),
        ("full", False, ("encoder.model.",)),
    ],
)
def test_what_trains_and_what_a_checkpoint_gives_back(aligned, image, fitted, tmp_path, side, train_adapters, moved):
    settings = {"text_side": side, "text_rank": 2, "text_targets": ("v", "fc2"), "train_adapters": train_adapters}
    path = Path(shutil.copytree(aligned.path.parent, tmp_path / "aligned")) / "last.ckpt"
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(path), **settings))
    before = tensors(task)
    trainer = fitted(task, emoji_data())
    after = tensors(task)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(moved) for name in changed)
    assert {m for m in moved if any(name.startswith(m) for name in changed)} == set(moved)
    assert not any(".visual." in name for name in changed - {n for n in changed if "lora" in n})

    trainer.save_checkpoint(tmp_path / "second.ckpt")
    shutil.rmtree(path.parent)  # no file of the earlier stage is needed again
    text = emoji_data().datasets["train"][0].captions(0)
    tokens = task.encoder.text_spec.encode(text)
    loaded = RetrievalTask.load_from_checkpoint(tmp_path / "second.ckpt", encoder=tiny_encoder()).eval()
    taken = ModalityEncoder.from_checkpoint(tmp_path / "second.ckpt", tiny_encoder())
    with torch.no_grad():
        for encoder in (loaded.encoder, taken):
            assert torch.equal(encoder.encode_text(tokens), task.encoder.encode_text(tokens))
            assert torch.equal(encoder.encode_image(image, MODALITY), task.encoder.encode_image(image, MODALITY))


@pytest.mark.slow
def test_an_untouched_text_side_scores_as_the_plain_encoder(aligned, tmp_path) -> None:
    data = emoji_data()
    plain = RetrievalTask(tiny_encoder())
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), text_side="frozen"))
    for each in (plain, task):
        quiet_trainer(tmp_path).validate(each, data, verbose=False)
    own, expected = task.results["novel"].values, plain.results["novel"].values
    real = [key for key in expected if not key.startswith("generated_")]
    assert {key: own[key] for key in real} == {key: expected[key] for key in real}  # exactly
    assert own["num_images"] == own["generated_num_images"] == 373
    assert own["generated_i2t_median_rank"] != expected["generated_i2t_median_rank"]


def test_frozen_real_features_equal_the_plain_encoders_on_the_same_batch(aligned, image) -> None:
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), text_side="frozen"))
    tokens = task.encoder.text_spec.encode(["one", "two"])
    plain = tiny_encoder().eval().requires_grad_(False)  # as ours: torch picks its attention kernel by that, too
    with torch.no_grad():
        assert torch.equal(task.encode_pixels(image, torch.zeros(5, dtype=torch.long)), plain.encode_image(image))
        assert torch.equal(task.encoder.encode_text(tokens), plain.encode_text(tokens))


def test_a_folder_means_its_newest_run(aligned, image, tmp_path) -> None:
    older = Path(shutil.copytree(aligned.path.parents[1], tmp_path / "a")) / "checkpoints" / "last.ckpt"
    content = torch.load(older, weights_only=True)
    newer = tmp_path / "b" / "checkpoints" / "last.ckpt"
    newer.parent.mkdir(parents=True)
    content["state_dict"] = {k: v * 2 if k.endswith(".B") else v for k, v in content["state_dict"].items()}
    torch.save(content, newer)
    folder = LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=str(tmp_path)))
    assert str(newer) in folder.encoder.describe()
    file = LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=str(newer)))
    with torch.no_grad():
        other = LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=str(older)))
        for task, same in ((folder, True), (other, False)):
            features = [t.encoder.encode_image(image, MODALITY) for t in (task, file)]
            assert torch.equal(*features) == same


def test_refusals(aligned, tmp_path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(tmp_path / "gone.ckpt"), text_side="lora"))
    with pytest.raises(ValueError, match=r"no checkpoints/last.ckpt below"):
        RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(tmp_path), text_side="lora"))
    with pytest.raises(ValueError, match="trained on another base"):
        RetrievalTask(ModalityEncoder(tiny_encoder(seed=9), aligned=str(aligned.path), text_side="lora"))
    with pytest.raises(ValueError, match="aligned brings its own branch"):
        ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), projection=True)
    with pytest.raises(ValueError, match="train_tower trains the encoder itself"):
        ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), train_tower=True)
    with pytest.raises(ValueError, match="text_side='half'"):
        RetrievalTask(ModalityEncoder(tiny_encoder(), text_side="half"))
    with pytest.raises(ValueError, match="give a string"):
        LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=aligned.path))


@pytest.mark.slow
def test_a_later_stage_is_no_alignment(aligned, fitted, tmp_path) -> None:
    """Its own text side would be dropped, or it has no branch at all: said, not done."""
    for number, (start, match) in enumerate([(None, "no branch for generated images"), (str(aligned.path), "dropped")]):
        trainer = fitted(RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=start, text_side="lora")), emoji_data())
        path = tmp_path / f"{number}.ckpt"
        trainer.save_checkpoint(path)
        with pytest.raises(ValueError, match=match):
            RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(path), text_side="frozen"))
    probe = LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=str(path)))  # images alone: no loss
    assert probe.encoder.branch.rank == 3


def test_settings_that_no_tensor_shows_must_agree(aligned, fitted, tmp_path) -> None:
    encoder = ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), text_side="lora")
    trainer = fitted(RetrievalTask(encoder), emoji_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = {**aligned.task.encoder.branch.settings, "alpha": 50.0}
    task = RetrievalTask(routed(tiny_encoder(), **other, projection=True, text_side="lora"))
    with pytest.raises(MisconfigurationException, match=r"alpha=5.0 of its branches, and here it is 50.0"):
        quiet_trainer(tmp_path).validate(task, emoji_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_new_adapters_learn_from_the_task_itself(fitted) -> None:
    settings = {"rank": 2, "alpha": 4.0, "targets": ["q", "v"]}
    task = RetrievalTask(routed(tiny_encoder(), **settings, text_side="lora"))
    before = tensors(task)
    fitted(task, emoji_data())
    changed = {name for name, value in tensors(task).items() if not torch.equal(before[name], value)}
    assert any("lora.image" in name for name in changed)
    assert all("lora" in name for name in changed)


@pytest.mark.slow
def test_a_stretched_table_is_in_checkpoints_of_an_evaluation(fitted, tmp_path) -> None:
    """ModelCheckpoint saves at the end of a validation, where no gradient is recorded."""
    encoder = tiny_encoder()
    stretch_context(encoder, 28, keep=4)
    task = RetrievalTask(ModalityEncoder(encoder, text_side="full"))
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fitted(task, emoji_data(), callbacks=[saver], enable_checkpointing=True, limit_val_batches=1, val_check_interval=2)
    other = tiny_encoder()
    stretch_context(other, 28, keep=4)
    loaded = RetrievalTask.load_from_checkpoint(tmp_path / "last.ckpt", encoder=other)
    key = "encoder.model.positional_embedding"
    assert torch.equal(loaded.state_dict()[key], task.state_dict()[key])
    assert not torch.equal(loaded.state_dict()[key][4:], tiny_stretched_table()[4:])


def tiny_stretched_table() -> torch.Tensor:
    return stretch_positional_embedding(tiny_encoder().model.positional_embedding.detach(), 28, keep=4)


@pytest.mark.slow
def test_the_command_line_needs_no_file_of_the_alignment_again(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = Path(__file__).parents[2] / "recipes" / "emoji"
    small = ["--data.init_args.num_workers=0", "--data.init_args.batch_size=16", "--trainer.max_steps=1"]
    small += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=0"]
    assert main(["fit", "--config", str(recipes / "align.yaml"), *small, "--trainer.callbacks=null"]) == 0
    retrieval = ["--config", str(recipes / "retrieval.yaml")]
    assert main(["fit", *retrieval, *small]) == 0  # aligned: runs/emoji-align
    first = json.loads(next((tmp_path / "runs" / "emoji-retrieval").glob("*/results.json")).read_text())["results"]
    shutil.rmtree(tmp_path / "runs" / "emoji-align")
    limits = ["--data.init_args.num_workers=0", "--data.init_args.batch_size=16", "--trainer.limit_val_batches=1"]
    assert main(["validate", *retrieval, *limits, "--ckpt_path=last"]) == 0
    again = json.loads(next((tmp_path / "runs" / "emoji-retrieval").rglob("validate_results.json")).read_text())
    assert again["results"]["novel"] == pytest.approx(first["novel"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["retrieval", "zeroshot", "linear_probe"])
def test_the_embedded_recipes_train_evaluate_and_reload(recipe, tmp_path, monkeypatch, caplog) -> None:
    """From the command line: two steps, both evaluations in results.json, and a test of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addHandler(caplog.handler)
    config = ["--config", f"{Path(__file__).parents[2]}/recipes/emoji/{recipe}.yaml", "--data.init_args.num_workers=0"]
    config += ["--model.encoder.aligned=null", "--data.init_args.batch_size=16"]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    guard = [] if recipe != "zeroshot" else ["--trainer.callbacks=[ResultsWriter]"]  # two steps prove nothing
    assert main(["fit", *config, *limits, *guard, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    told.removeHandler(caplog.handler)
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    shown = caplog.records[-1].getMessage().splitlines()  # name, before, after of the real images, then the file
    assert shown[-1] == f"All values: {tmp_path / 'run' / 'results.json'}"
    key = "i2t_R@5" if recipe == "retrieval" else "mean_per_class"
    values = [content[when]["novel"][key] for when in ("before", "results")]
    assert f"  {key:<26}{values[0]:>9.3f}{values[1]:>9.3f}" in shown
    assert not any("generated_" in line for line in shown)
    assert content["step"] == 2
    assert content["before"].keys() == content["results"].keys() == {"novel", "paired"}
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["test", *config, f"--ckpt_path={last}", "--trainer.limit_test_batches=1",
                 f"--trainer.default_root_dir={tmp_path}/test"]) == 0  # fmt: skip
    tested = json.loads((tmp_path / "test" / "test_results.json").read_text())
    assert tested["checkpoint"] == str(last)
    # the same rows, and the weights of the last step
    assert tested["results"]["novel"] == pytest.approx(content["results"]["novel"], abs=1e-6)
    assert ("classes" in tested) == (recipe != "retrieval")


def test_a_schedule_of_another_length_than_the_run_is_told(fitted, recwarn) -> None:
    def run(length: int) -> list[str]:
        recwarn.clear()
        task = LinearProbeTask(tiny_encoder(), scheduler=lambda optimizer: WarmupCosine(optimizer, length))
        fitted(task, emoji_data(), steps=1)
        return [str(warning.message) for warning in recwarn if "The schedule is" in str(warning.message)]

    assert run(50) == ["The schedule is 50 steps long and the run 1: set both (scheduler.max_steps)."]
    assert run(1) == []


@pytest.mark.slow
def test_a_checkpoint_says_which_alignment_it_took(aligned, tmp_path: Path) -> None:
    recorded = torch.load(aligned.path, weights_only=True)
    digest = hashlib.sha256()
    for name in sorted(k for k in recorded["state_dict"] if ".lora.image." in k or "generated_projection" in k):
        digest.update(name.removeprefix("encoder.").encode())
        digest.update(recorded["state_dict"][name].numpy().tobytes())
    expected = {"path": str(aligned.path), "step": 1, "digest": digest.hexdigest()[:12]}
    assert recorded["branches"]["alignment"] is None

    task = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(aligned.path), text_side="projection"))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["branches"]["alignment"] == expected

    settings = {"projection": True, "text_side": "projection", "train_adapters": False}
    again = RetrievalTask(routed(tiny_encoder(), 3, 5.0, ("q", "fc1"), **settings))  # needs no file
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(again, emoji_data(), ckpt_path=tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["branches"]["alignment"] == expected
