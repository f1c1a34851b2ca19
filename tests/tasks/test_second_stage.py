"""Tasks that follow an alignment: the branch they take over, what they train, and what their checkpoints hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.main import main
from gmail_lightning.models import ModalityEncoder
from gmail_lightning.tasks import LinearProbeTask, RetrievalTask, ZeroShotClassificationTask

MODALITY = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def tensors(task) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.encoder.named_parameters()}


@pytest.mark.parametrize("kind", [RetrievalTask, ZeroShotClassificationTask, LinearProbeTask])
def test_the_branches_are_the_aligners(aligned, image, kind) -> None:
    side = {} if kind is LinearProbeTask else {"text_side": "frozen"}
    task = kind(tiny_encoder(), aligned=str(aligned.path), **side).eval()
    with torch.no_grad():
        expected = aligned.task.encoder.encode_image(image, MODALITY)
        assert torch.equal(task.encoder.encode_image(image, MODALITY), expected)
    assert not torch.allclose(expected[1], tiny_encoder().eval().encode_image(image[1:2])[0], atol=1e-3)
    assert not any(p.requires_grad for _, p in task.encoder.image_adapters())


def test_without_alignment_generated_images_are_taken_as_real(image) -> None:
    task = RetrievalTask(tiny_encoder(), text_side="lora")
    with torch.no_grad():
        plain = tiny_encoder().eval().encode_image(image)
        assert torch.equal(task.encoder.encode_image(image, torch.ones(5, dtype=torch.long)), plain)


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
    task = RetrievalTask(tiny_encoder(), aligned=str(path), **settings)
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


def test_an_untouched_text_side_scores_as_the_plain_encoder(aligned, tmp_path) -> None:
    data = emoji_data()
    plain = RetrievalTask(tiny_encoder())
    task = RetrievalTask(tiny_encoder(), aligned=str(aligned.path), text_side="frozen")
    for each in (plain, task):
        quiet_trainer(tmp_path).validate(each, data, verbose=False)
    own, expected = task.results["novel"], plain.results["novel"]
    real = [key for key in expected if not key.startswith("generated_")]
    assert {key: own[key] for key in real} == {key: expected[key] for key in real}  # exactly
    assert own["num_images"] == own["generated_num_images"] == 373
    assert own["generated_i2t_median_rank"] != expected["generated_i2t_median_rank"]


def test_frozen_real_features_equal_the_plain_encoders_on_the_same_batch(aligned, image) -> None:
    task = RetrievalTask(tiny_encoder(), aligned=str(aligned.path), text_side="frozen")
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
    folder = LinearProbeTask(tiny_encoder(), aligned=str(tmp_path))
    file = LinearProbeTask(tiny_encoder(), aligned=str(newer))
    with torch.no_grad():
        for task, same in ((folder, True), (LinearProbeTask(tiny_encoder(), aligned=str(older)), False)):
            features = [t.encoder.encode_image(image, MODALITY) for t in (task, file)]
            assert torch.equal(*features) == same


def test_refusals(aligned, tmp_path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint"):
        RetrievalTask(tiny_encoder(), aligned=str(tmp_path / "gone.ckpt"), text_side="lora")
    with pytest.raises(ValueError, match=r"no checkpoints/last.ckpt below"):
        RetrievalTask(tiny_encoder(), aligned=str(tmp_path), text_side="lora")
    with pytest.raises(ValueError, match="trained on another base"):
        RetrievalTask(tiny_encoder(seed=9), aligned=str(aligned.path), text_side="lora")
    with pytest.raises(ValueError, match="say what of the text side is trained"):
        RetrievalTask(tiny_encoder(), aligned=str(aligned.path))
    with pytest.raises(ValueError, match="train_adapters needs aligned"):
        RetrievalTask(tiny_encoder(), text_side="lora", train_adapters=True)
    with pytest.raises(ValueError, match="text_side='half'"):
        RetrievalTask(tiny_encoder(), text_side="half")


@pytest.mark.parametrize("recipe", ["retrieval", "zeroshot", "linear_probe"])
def test_the_embedded_recipes_train_evaluate_and_reload(recipe, tmp_path, monkeypatch) -> None:
    """From the command line: two steps, both evaluations in results.json, and a test of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    config = ["--config", f"{Path(__file__).parents[2]}/recipes/emoji/{recipe}.yaml", "--data.init_args.num_workers=0"]
    config += ["--model.init_args.aligned=null", "--data.init_args.batch_size=16"]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    guard = [] if recipe != "zeroshot" else ["--trainer.callbacks=[ResultsWriter]"]  # two steps prove nothing
    assert main(["fit", *config, *limits, *guard, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["step"] == 2
    assert content["before"].keys() == content["results"].keys() == {"novel", "paired"}
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["test", *config, f"--ckpt_path={last}", "--trainer.limit_test_batches=1",
                 f"--trainer.default_root_dir={tmp_path}/test"]) == 0  # fmt: skip
    tested = json.loads((tmp_path / "test" / "results.json").read_text())
    # the same rows, and the weights of the last step
    assert tested["results"]["novel"] == pytest.approx(content["results"]["novel"], abs=1e-6)
    assert ("classes" in tested) == (recipe != "retrieval")
