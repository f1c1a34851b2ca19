"""The joint step against its terms apart, what trains, one text tower for both models, and what is written."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_pipelines import build
from torch import Tensor

from gmail_lightning.callbacks import SampleGrid
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.leakage import AllowedOverlap
from gmail_lightning.models import DiffusersGenerator, OpenCLIPEncoder, ReciprocalConsistency
from gmail_lightning.tasks import AlignmentTask, SynthesisScore, UniDiffTask
from gmail_lightning.transforms import resize
from gmail_lightning.types import modality_rows

READINGS = ("feature", "reciprocal_kl", "image", "prediction_contrast")
FAST: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make(consistency: ReciprocalConsistency | None = None, **settings: Any) -> UniDiffTask:
    torch.manual_seed(3)  # of projections and adapters
    encoder = OpenCLIPEncoder(pretrained="emoji")
    generator = DiffusersGenerator("emoji", num_inference_steps=2, guidance_scale=2.0)
    return UniDiffTask(encoder, generator, consistency, **{"ema_decay": None, "prompt_dropout": 0.5, **settings})


def rows(task: UniDiffTask, count: int = 4) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    spec = task.input_spec
    captions = ["a red heart", "a dog", "a slice of pizza", "a rocket", "the sun", "a key"][:count]
    batch: dict[str, Any] = {
        "modality": torch.tensor([0, 0, 0, 1, 0, 1][:count]),
        "image_id": torch.arange(count),
        "text_row": torch.arange(count),
    }
    batch |= {name: torch.rand(count, 3, *view.size, generator=draws) for name, view in spec.images.items()}
    batch |= {name: text.encode(captions) for name, text in spec.texts.items()}
    return {**batch, **modality_rows(batch)}


def gradients(task: UniDiffTask, loss: Tensor) -> dict[str, Tensor]:
    task.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_the_step_is_the_sum_of_its_terms(reading: Any) -> None:
    """Values and gradients; contrast and synthesis are those of runs that have nothing else, bit for bit."""
    task = make(ReciprocalConsistency(reading, weight=0.3), synthesis_weight=2.0)
    batch: Any = rows(task)
    losses = task.compute_losses(batch)
    whole = gradients(task, losses["loss"])
    apart = {
        name: gradients(task, task.compute_losses(batch)[name]) for name in ("contrast", "synthesis", "consistency")
    }
    total = losses["contrast"] + 2.0 * losses["synthesis"] + 0.3 * losses["consistency"]
    torch.testing.assert_close(losses["loss"], total, atol=1e-5, rtol=0)
    assert whole.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
    for name, found in whole.items():
        weighted = ((1.0, "contrast"), (2.0, "synthesis"), (0.3, "consistency"))
        parts = [weight * apart[term][name] for weight, term in weighted if name in apart[term]]
        torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=1e-5, rtol=1e-4)
    without = make(synthesis_weight=2.0).compute_losses(batch)
    assert torch.equal(without["contrast"], losses["contrast"])
    assert torch.equal(without["synthesis"], losses["synthesis"])
    alone = {
        "contrast": make(synthesis_weight=0.0).compute_losses(batch),
        "synthesis": make(contrast_weight=0.0).compute_losses(batch),
    }
    for name, found in alone.items():
        assert torch.equal(found[name], losses[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"train": {"vision": "frozen"}}, {"visual"}),
        ({"train": {"text": "frozen"}}, {"text"}),
        ({"train": {"unet": "frozen"}}, {"unet"}),
        ({"contrast_weight": 0.0}, {"visual"}),
        ({"synthesis_weight": 0.0}, {"unet"}),
        ({"train": {"vision": 2, "unet": 2}}, set()),
        ({"text_tower": "separate", "contrast_weight": 0.0}, {"visual", "text"}),
    ],
)
def test_each_switch_leaves_its_own_parts_without_gradient(settings: dict[str, Any], frozen: set[str]) -> None:
    task = make(**settings)
    found = gradients(task, task.compute_losses(rows(task))["loss"])
    assert found.keys() == {name for name, p in task.named_parameters() if p.requires_grad}
    text = {id(p) for p in task.encoder.plain.text_parameters()}
    of_part: dict[str, list[str]] = {"visual": [], "text": [], "unet": []}
    for name, p in task.named_parameters():
        part = "unet" if ".unet." in name else "text" if id(p) in text else "visual" if "encoder." in name else None
        if part is not None and not name.startswith("generator.parts.text_encoder") and ".vae." not in name:
            of_part[part].append(name)
    trained = {part for part, names in of_part.items() if any(name in found for name in names)}
    assert trained == {"visual", "text", "unet"} - frozen
    if "train" in settings and 2 in settings["train"].values():
        assert all("lora" in name for part in ("visual", "unet") for name in of_part[part] if name in found)


def test_generated_rows_take_part_where_asked() -> None:
    task, few = make(), make(generated_rows=["synthesis"])
    batch: Any = rows(task)
    real: Any = {
        name: value[batch["real_row"]] for name, value in batch.items() if torch.is_tensor(value) and len(value) == 4
    }
    expected = task.compute_losses({**real, **modality_rows(real)})["contrast"]
    found = few.compute_losses(batch)
    torch.testing.assert_close(found["contrast"], expected)
    assert torch.equal(found["synthesis"], task.compute_losses(batch)["synthesis"])


def test_the_pipeline_reads_through_the_tower_of_the_clip() -> None:
    task = make()
    tower = task.generator.pipeline.text_encoder
    assert tower.encoder is task.encoder
    assert not any("text_encoder" in name for name, _ in task.named_parameters())
    before = task.generator.generate(["a dog"], [1]).image
    with torch.no_grad():
        task.encoder.plain.model.ln_final.bias.add_(1.0)
    assert not torch.allclose(task.generator.generate(["a dog"], [1]).image, before, atol=1e-3)


def test_what_would_train_nothing_is_refused(tmp_path: Path) -> None:
    task = make()
    with pytest.raises(MisconfigurationException, match="has 1 row in the batch"):
        task.compute_losses(rows(task, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Consistency holds contrast and synthesis together"):
        make(ReciprocalConsistency(), contrast_weight=0.0)
    with pytest.raises(ValueError, match="one above 0"):
        make(contrast_weight=0.0, synthesis_weight=0.0)
    with pytest.raises(ValueError, match="train: vae: full: the parts are vision, text, unet"):
        make(train={"vae": "full"})
    other = DiffusersGenerator(str(build("sd", tmp_path / "sd")), num_inference_steps=2)
    with pytest.raises(ValueError, match="reads 20 token ids, the CLIP 32"):
        UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), other)
    flow = DiffusersGenerator("emoji")
    flow.pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="does not say what is predicted"):
        UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), flow)
    flow.pipeline.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample': use 'epsilon' or 'v_prediction'"):
        UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), flow)
    bare = DiffusersGenerator("emoji")
    bare.part("vae").register_to_config(scaling_factor=None)
    with pytest.raises(ValueError, match="lacks scaling_factor"):
        UniDiffTask(OpenCLIPEncoder(pretrained="emoji"), bare)


def data() -> MixedModalityDataModule:
    shared = AllowedOverlap(kinds=["caption", "pixels"], reason="drawings that are alike")
    return MixedModalityDataModule(
        train=EmojiDataset("noto", "paired", locale="de"),
        val={"novel": EmojiDataset("noto", "novel", locale="de")},
        mode="mixture",
        generated_fraction=0.0,
        batch_size=4,
        allow_overlap={"novel": shared},
    )


def fit(task: UniDiffTask, folder: Path, steps: int, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "max_steps": steps,
            "default_root_dir": folder,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            **FAST,
            **settings,
        }
    )
    trainer.fit(task, data())
    return trainer


def rates(**settings: Any) -> UniDiffTask:
    constant = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # noqa: E731
    return make(ReciprocalConsistency(), ema_decay=0.5, scheduler=constant, **settings)


@pytest.mark.slow
def test_evaluation_sees_both_abilities_and_plain_diffusers_loads_the_pipeline(tmp_path: Path) -> None:
    score = SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), 6, ("val",))
    task = rates(score=score, conflict_every_n_steps=1)
    trainer = fit(
        task,
        tmp_path,
        2,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        num_sanity_val_steps=-1,
        callbacks=[SampleGrid(["a cat", "a dog"])],
    )
    values = task.results["novel"].values
    names = ("i2t_R@1", "t2i_dedup_R@1", "accuracy", "denoising_loss", "image_effective_rank", "text_drift")
    assert {*names, "scorer_kid", "scorer_cmmd", "scorer_clip_score"} <= values.keys()
    assert values["image_drift"] > 0
    assert "train/conflict/contrast_synthesis" in trainer.callback_metrics
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    images = plain(
        ["a cat", "a dog"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
    ).images
    with task.averaged_weights():
        ours = task.generator.generate(["a cat", "a dog"], [1, 2]).image
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    trainer.validate(task, data(), verbose=False)
    to_test = MixedModalityDataModule(test={"novel": EmojiDataset("noto", "novel", locale="de")}, mode="mixture")
    trainer.limit_test_batches = 1
    trainer.test(task, to_test, verbose=False)
    grids = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert grids == ["step-000000.png", "step-000002.png", "test.png", "validate.png"]


@pytest.mark.slow
def test_interpolated_values_are_those_of_a_clip_half_way(tmp_path: Path) -> None:
    task = rates(learning_rates={"encoder": 1e-3})
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    trainer = fit(task, tmp_path, 3, enable_checkpointing=False, limit_val_batches=2)
    trainer.validate(task, data(), verbose=False)
    half_way = make()
    with task.averaged_weights():
        after = task.encoder.state_dict()
        half_way.encoder.load_state_dict({name: (before[name] + value) / 2 for name, value in after.items()})
    pl.Trainer(default_root_dir=tmp_path, limit_val_batches=2, **FAST).validate(half_way, data(), verbose=False)
    values, expected = task.results["novel"].values, half_way.results["novel"].values
    names = [name for name in values if name.startswith("interpolated_")]
    assert {"interpolated_i2t_R@1", "interpolated_accuracy"} <= set(names)
    for name in names:
        assert values[name] == pytest.approx(expected[name.removeprefix("interpolated_")], abs=1e-6), name
    assert any(values[name] != values[name.removeprefix("interpolated_")] for name in names)
    adapted = make(train={"vision": 2})
    pl.Trainer(default_root_dir=tmp_path, limit_val_batches=1, **FAST).validate(adapted, data(), verbose=False)
    assert not any(name.startswith("interpolated_") for name in adapted.results["novel"].values)  # factors have none


@pytest.mark.slow
def test_predictions_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    task = rates()
    fit(task, tmp_path, 2, enable_checkpointing=False)
    to_predict = MixedModalityDataModule(predict=EmojiDataset("noto", "novel"), mode="mixture", eval_batch_size=3)
    trainer = pl.Trainer(default_root_dir=tmp_path, limit_predict_batches=1, **FAST)
    found: Any = trainer.predict(task, to_predict)
    spec, dataset = task.encoder.image_spec, EmojiDataset("noto", "novel")
    image = torch.stack([resize(dataset.image(row), spec) for row in range(3)])
    trained = task.encoder.encode_image(image, torch.zeros(3, dtype=torch.long))
    with task.averaged_weights():
        averaged = task.encoder.encode_image(image, torch.zeros(3, dtype=torch.long))
    assert not torch.allclose(trained, averaged, atol=1e-4)
    torch.testing.assert_close(found[0]["image_features"], averaged, atol=1e-5, rtol=1e-5)


def test_a_grid_of_samples_needs_a_generator() -> None:
    with pytest.raises(MisconfigurationException, match="AlignmentTask has none"):
        SampleGrid(["a cat"]).setup(pl.Trainer(**FAST), AlignmentTask(OpenCLIPEncoder(pretrained="emoji")), "fit")


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    saved = [ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")]
    straight = rates()
    fit(straight, tmp_path / "a", 4, callbacks=saved)
    resumed = rates()
    trainer = pl.Trainer(
        max_steps=4,
        default_root_dir=tmp_path / "b",
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        **FAST,
    )
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    for (name, expected), (_, found) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert straight.average is not None
    assert resumed.average is not None
    for expected_value, value in zip(straight.average.average, resumed.average.average, strict=True):
        assert torch.equal(expected_value, value)
