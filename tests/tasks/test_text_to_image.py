"""The denoising loss by hand, averages by hand, resuming, and pipelines that plain diffusers loads."""

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_pipelines import build

from gmail_lightning.callbacks import SampleGrid
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.leakage import AllowedOverlap
from gmail_lightning.models import DiffusersGenerator
from gmail_lightning.tasks import TextToImageTask

FAST: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trained")
    return {
        "sd": build("sd", root / "sd"),
        "pixel": build("pixel", root / "pixel", prediction_type="v_prediction"),
        "sdxl": build("sdxl", root / "sdxl"),
    }


def make(folder: Path, **settings: Any) -> TextToImageTask:
    torch.manual_seed(3)  # of the adapters
    generator = DiffusersGenerator(str(folder), num_inference_steps=2, guidance_scale=2.0)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    constant = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # noqa: E731
    return TextToImageTask(generator, **{"optimizer": optimizer, "scheduler": constant, **settings})


def data(**settings: Any) -> MixedModalityDataModule:
    dataset = EmojiDataset("twemoji", "novel")
    train = {"train": dataset, "mode": "mixture", "generated_fraction": 1.0, "batch_size": 4, "seed": 0}
    return MixedModalityDataModule(**{**train, **settings})


def fit(task: TextToImageTask, folder: Path, steps: int, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps, default_root_dir=folder, **{**FAST, "enable_checkpointing": False, **settings}
    )
    trainer.fit(task, data())
    return trainer


def rows(task: TextToImageTask, count: int = 5) -> dict[str, Any]:
    size = task.input_spec.image.size
    text = task.input_spec.texts["text"].encode([f"caption {i}" for i in range(count)])
    return {
        "image": torch.rand(count, 3, *size),
        "text": text,
        "row_id": torch.arange(count),
        "text_row": torch.arange(count),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gamma"), [("sd", None), ("sd", 5.0), ("pixel", 5.0), ("pixel", None)])
def test_the_loss_is_the_one_worked_out_by_hand(
    folders: dict[str, Path], kind: str, gamma: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    task = make(folders[kind], min_snr_gamma=gamma, prompt_dropout=0.5)
    batch = {**rows(task), "weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])}
    loss = task.compute_losses(batch)["loss"]

    number = int.from_bytes(hashlib.blake2b(b"0 0 0", digest_size=8).digest(), "little") >> 1
    draw = torch.Generator().manual_seed(number)
    dropped = torch.rand(5, generator=draw) < 0.5
    assert dropped.any()
    assert not dropped.all()
    pipeline = task.generator.pipeline
    if kind == "sd":
        posterior = pipeline.vae.encode(batch["image"] * 2 - 1).latent_dist
        clean = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)) * 0.5
    else:
        clean = batch["image"] * 2 - 1
    noise = torch.randn(clean.shape, generator=draw)
    timestep = torch.randint(1000, (5,), generator=draw)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = (1 - beta).cumprod(0)[timestep].float()
    signal, sigma = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
    prompts = ["" if gone else f"caption {i}" for i, gone in enumerate(dropped.tolist())]
    further = {} if kind == "pixel" else {"device": "cpu", "num_images_per_prompt": 1}
    context = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **further)[0]
    prediction = pipeline.unet(signal * clean + sigma * noise, timestep, context).sample[:, : clean.shape[1]]
    target = noise if kind == "sd" else signal * noise - sigma * clean
    error = (prediction - target).square().flatten(1).mean(1)
    snr = alpha / (1 - alpha)
    weight = 1.0 if gamma is None else snr.clamp(max=gamma) / (snr if kind == "sd" else snr + 1)
    assert loss.item() == pytest.approx((error * weight * batch["weight"]).mean().item(), rel=1e-4)


@pytest.mark.slow
def test_the_average_is_the_one_worked_out_by_hand(folders: dict[str, Path], tmp_path: Path) -> None:
    task = make(folders["pixel"], ema_decay=0.6)
    name, states = "conv_in.weight", []

    class Record(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(task.unet.state_dict()[name].clone())

    fit(task, tmp_path, 4, callbacks=[Record()])
    average = states[0]  # the first update takes the weights as they are
    for step, state in enumerate(states[1:], start=1):
        decay = min(0.6, 1 - (1 + step) ** -0.75)
        average = decay * average + (1 - decay) * state
    with task.averaged_weights():
        torch.testing.assert_close(task.unet.state_dict()[name], average)
    assert torch.equal(task.unet.state_dict()[name], states[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"), [("sd", {"lora_rank": 2}), ("sd", {"train_text_encoder": True}), ("pixel", {})]
)
def test_plain_diffusers_loads_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    task = make(folders[kind], ema_decay=0.5, **settings)
    fit(task, tmp_path, 3)
    further = {"clean_caption": False} if kind == "pixel" else {}
    plain = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert not any("lora" in key for key in plain.unet.state_dict())
    images = plain(
        ["a cat", "a dog"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
        **further,
    ).images
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    with task.averaged_weights():
        ours = task.generator.generate(["a cat", "a dog"], [1, 2]).image
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    again = DiffusersGenerator(str(tmp_path / "pipeline"), num_inference_steps=2, guidance_scale=2.0)
    torch.testing.assert_close(again.generate(["a cat", "a dog"], [1, 2]).image, expected, atol=1e-5, rtol=0)
    untrained = DiffusersGenerator(str(folders[kind]), num_inference_steps=2, guidance_scale=2.0)
    assert not torch.allclose(untrained.generate(["a cat", "a dog"], [1, 2]).image, expected, atol=1e-3)
    if "train_text_encoder" in settings:
        weight = (
            "text_model.final_layer_norm.weight"
            if hasattr(plain.text_encoder, "text_model")
            else "final_layer_norm.weight"
        )
        assert not torch.equal(plain.text_encoder.state_dict()[weight], torch.ones(16))


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_undisturbed_one_does(folders: dict[str, Path], tmp_path: Path) -> None:
    straight = make(folders["sd"], lora_rank=2)
    half = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    fit(straight, tmp_path / "straight", 3, callbacks=[half], enable_checkpointing=True)
    resumed = make(folders["sd"], lora_rank=2)
    trainer = pl.Trainer(max_steps=3, default_root_dir=tmp_path / "resumed", enable_checkpointing=False, **FAST)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    for (name, expected), found in zip(
        straight.unet.state_dict().items(), resumed.unet.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)
    for expected, found in zip(straight.average.average, resumed.average.average, strict=True):
        torch.testing.assert_close(found, expected)
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora" in key for key in stored["state_dict"])


@pytest.mark.slow
def test_a_checkpoint_is_refused_on_another_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = fit(make(folders["sd"], lora_rank=2), tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = make(build("sd", tmp_path / "other", seed=5), lora_rank=2)
    with pytest.raises(MisconfigurationException, match="was trained on sd at digest-"):
        pl.Trainer(max_steps=2, enable_checkpointing=False, **FAST).fit(other, data(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.slow
def test_evaluation_compares_at_any_batch_size(folders: dict[str, Path]) -> None:
    losses = []
    for batch_size in (2, 5):
        task = make(folders["sd"])
        trainer = pl.Trainer(enable_checkpointing=False, limit_val_batches=10 // batch_size, **FAST)
        dataset = [EmojiDataset("twemoji", "novel")]
        module = data(train=None, val={"set": dataset}, eval_batch_size=batch_size)
        losses.append(trainer.validate(task, module, verbose=False)[0]["val/set/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] > 0


@pytest.mark.slow
def test_samples_are_drawn_at_every_validation(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_steps=2, val_check_interval=1, limit_val_batches=1, default_root_dir=tmp_path, enable_checkpointing=False,
        callbacks=[SampleGrid(["a", "b", "c"], columns=2)], **FAST,
    )  # fmt: skip
    shared = AllowedOverlap(["caption", "image_id", "pixels"], "a test of the samples")
    trainer.fit(
        make(folders["pixel"]), data(val={"set": [EmojiDataset("noto", "paired")]}, allow_overlap={"set": shared})
    )
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step-000001.png", "step-000002.png"]


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has several text encoders"):
        make(folders["sdxl"])
    half = DiffusersGenerator(str(folders["sd"]), dtype="bfloat16")
    with pytest.raises(ValueError, match="small updates vanish in half precision"):
        TextToImageTask(half)
    without_signal = DiffusersGenerator(str(folders["sd"]))
    without_signal.pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="ends without signal"):
        TextToImageTask(without_signal)
    assert TextToImageTask(without_signal, prediction_type="v_prediction").objective.alphas_cumprod[-1] == 0
    task = make(folders["sd"], prediction_type="v_prediction")
    assert task.generator.pipeline.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(MisconfigurationException, match="predict with PromptDataModule"):
        task.predict_step({}, 0)


@pytest.mark.slow
def test_checkpoints_of_the_first_edition_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """They hold the state of diffusers' ``EMAModel``."""
    task = make(folders["pixel"], ema_decay=0.6)
    trainer = fit(task, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    peer = EMAModel(task.unet.parameters(), decay=0.6, use_ema_warmup=True, power=0.75)
    assert content["ema"].keys() - {"names"} == peer.state_dict().keys()
    peer.optimization_step, peer.shadow_params = 9, [torch.full_like(p, 0.25) for p in peer.shadow_params]
    torch.save({**content, "ema": peer.state_dict()}, tmp_path / "first.ckpt")
    again = make(folders["pixel"], ema_decay=0.8)
    pl.Trainer(max_steps=2, enable_checkpointing=False, default_root_dir=tmp_path / "again", **FAST).fit(
        again, data(), ckpt_path=tmp_path / "first.ckpt"
    )
    assert again.average is not None
    assert (again.average.steps, again.average.decay) == (9, 0.8)
    with again.averaged_weights():
        assert all((p == 0.25).all() for p in again.unet.parameters())
    assert not any((p == 0.25).all() for p in again.unet.parameters())


@pytest.mark.slow
def test_parts_train_at_rates_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    rates = {"generator.parts.text_encoder": 1e-4, "generator.parts.unet.conv_in": 1e-5}
    plain = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)  # noqa: E731
    task = make(folders["sd"], train_text_encoder=True, learning_rates=rates, optimizer=plain, prompt_dropout=0.0)
    before = {name: p.detach().clone() for name, p in task.generator.named_parameters()}
    trainer = fit(task, tmp_path, 1)
    moved = {name: (p - before[name]).abs().max().item() for name, p in task.generator.named_parameters()}
    # The first step of Adam moves by the rate, where there is a gradient.
    assert moved["parts.unet.conv_in.weight"] == pytest.approx(1e-5, rel=0.1)
    assert moved["parts.unet.conv_out.weight"] == pytest.approx(1e-3, rel=0.1)
    assert max(value for name, value in moved.items() if "text_encoder" in name) == pytest.approx(1e-4, rel=0.1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["learning_rates"] == rates
    wrong = make(folders["sd"], learning_rates={"generator.unet": 1e-5})
    with pytest.raises(
        ValueError, match=r"'generator.unet'. Parts that train: generator.parts.unet, generator.parts.unet.con"
    ):
        fit(wrong, tmp_path, 1)
