"""Noise, targets and the way back by hand in float64 and against diffusers' scheduler; the middle block by a hook."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_pipelines import build, unet

from gmail_lightning.models import DiffusersGenerator
from gmail_lightning.models.generators.objective import DenoisingObjective, Noised, drop_prompts

PREDICTIONS: list[Any] = ["epsilon", "v_prediction"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("objective")
    return {kind: build(kind, root / kind) for kind in ("sd", "pixel", "sd3")}


def objective(folder: Path, prediction_type: Any = None, gamma: float | None = 5.0) -> DenoisingObjective:
    return DenoisingObjective(DiffusersGenerator(str(folder)), prediction_type, gamma)


def rows(made: DenoisingObjective, dtype: torch.dtype = torch.float32) -> tuple[Noised, torch.Tensor]:
    """Five noised rows and what the UNet attends to."""
    shape = (5, 4, 8, 8) if made.generator.in_latent_space else (5, 3, 8, 8)
    draws = torch.Generator().manual_seed(1)
    noised = made.draw(torch.randn(shape, generator=draws, dtype=dtype), draws)
    return noised, made.generator.encode_text(made.generator.text_spec.encode([f"text {i}" for i in range(5)]))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_noise_targets_and_the_way_back_are_those_worked_out_by_hand(
    folders: dict[str, Path], prediction_type: Any
) -> None:
    made = objective(folders["sd"], prediction_type)
    draws = torch.Generator().manual_seed(7)
    clean = torch.randn(6, 4, 8, 8, generator=draws, dtype=torch.float64)
    noised = made.draw(clean, torch.Generator().manual_seed(8))

    again = torch.Generator().manual_seed(8)
    noise = torch.randn(clean.shape, generator=again).double()
    timestep = torch.randint(1000, (6,), generator=again)
    assert torch.equal(noised.timestep, timestep)
    alpha = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[timestep].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # the schedule is held in float32
    torch.testing.assert_close(noised.noisy, noisy, **tolerance)
    torch.testing.assert_close(noised.target, noise if prediction_type == "epsilon" else velocity, **tolerance)
    torch.testing.assert_close(made.snr(timestep), (alpha / (1 - alpha)).flatten().float(), rtol=1e-3, atol=0)
    # A perfect prediction leads back to where it came from.
    torch.testing.assert_close(made.clean(noised.target, noised), clean, rtol=1e-9, atol=1e-9)
    wrong = torch.randn(clean.shape, generator=draws, dtype=torch.float64)
    expected = (noised.noisy - (1 - alpha).sqrt() * wrong) / alpha.sqrt()
    if prediction_type == "v_prediction":
        expected = alpha.sqrt() * noised.noisy - (1 - alpha).sqrt() * wrong
    torch.testing.assert_close(made.clean(wrong, noised), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", ["sd", "pixel"])
def test_they_are_those_of_diffusers(folders: dict[str, Path], kind: str, prediction_type: Any) -> None:
    made = objective(folders[kind], prediction_type)
    scheduler = made.generator.pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler if kind == "sd" else DDPMScheduler)
    clean = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    noised = made.noised(clean, noise, torch.tensor([0, 1, 400, 998, 999]))
    velocity = scheduler.get_velocity(clean, noise, noised.timestep)
    assert torch.equal(noised.noisy, scheduler.add_noise(clean, noise, noised.timestep))
    assert torch.equal(noised.target, noise if prediction_type == "epsilon" else velocity)
    torch.testing.assert_close(made.snr(noised.timestep), compute_snr(scheduler, noised.timestep))
    guess = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    peer = DDPMScheduler.from_config(scheduler.config, clip_sample=False)
    for row, step in enumerate(noised.timestep):
        one = slice(row, row + 1)
        expected = peer.step(guess[one], step, noised.noisy[one]).pred_original_sample
        torch.testing.assert_close(made.clean(guess, noised)[one], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_weighs_timesteps_and_rows(
    folders: dict[str, Path], prediction_type: Any, gamma: float | None
) -> None:
    made = objective(folders["sd"], prediction_type, gamma)
    noised = made.noised(torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([5, 100, 300, 700, 990]))
    guess, weight = torch.randn_like(noised.noisy), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])
    snr = compute_snr(made.generator.pipeline.scheduler, noised.timestep)
    of_timestep = torch.ones(5)
    if gamma is not None:
        of_timestep = snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        assert (snr > gamma).any()
        assert (snr < gamma).any()
    error = (guess - noised.target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(made.loss(guess, noised), (error * of_timestep).mean())
    torch.testing.assert_close(made.loss(guess, noised, weight), (error * of_timestep * weight).mean())


def test_features_of_the_middle_block_are_those_of_the_same_pass(folders: dict[str, Path]) -> None:
    made = objective(folders["sd"])
    network: Any = made.generator.part("unet")
    noised, context = rows(made)
    plain = made.denoise(noised, context)
    assert plain.middle is None
    inside: list[torch.Tensor] = []
    handle = network.mid_block.register_forward_hook(lambda module, inputs, output: inside.append(output))
    both = made.denoise(noised, context, middle=True)
    handle.remove()
    assert len(inside) == 1  # one pass for both
    assert both.middle is inside[0]
    assert both.middle.shape == (5, 16, 4, 4)
    assert torch.equal(both.prediction, plain.prediction)
    assert not network.mid_block._forward_hooks  # and nothing is left behind
    other = made.denoise(noised, context * 0, middle=True)
    assert other.middle is not None
    assert not torch.equal(other.middle, both.middle)  # an earlier answer is not overwritten by a later pass

    network.requires_grad_(True)
    middle = made.denoise(noised, context, middle=True).middle
    assert middle is not None
    middle.mean().backward()
    assert network.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.up_blocks.parameters())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        made.denoise(noised, context[..., :3], middle=True)
    assert not network.mid_block._forward_hooks


def test_a_middle_block_that_cannot_be_seen_is_refused(folders: dict[str, Path]) -> None:
    made = objective(folders["sd"])
    noised, context = rows(made)
    made.generator.parts["unet"] = unet(mid_block_type=None)
    assert made.denoise(noised, context).prediction.shape == noised.noisy.shape
    with pytest.raises(ValueError, match="has no middle block"):
        made.denoise(noised, context, middle=True)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("kind", ["sd", "pixel"])
def test_a_loss_on_decoded_pixels_reaches_the_unet(folders: dict[str, Path], kind: str, prediction_type: Any) -> None:
    made = objective(folders[kind], prediction_type)
    network: Any = made.generator.part("unet").requires_grad_(True)
    noised, context = rows(made)
    prediction = made.denoise(noised, context).prediction
    pixels = made.decode(prediction, noised)
    if kind == "pixel":
        assert torch.equal(pixels, (made.clean(prediction, noised) + 1) / 2)
    else:
        vae = made.generator.part("vae")
        expected = vae.decode(made.clean(prediction, noised) / vae.config.scaling_factor).sample
        assert torch.equal(pixels, (expected + 1) / 2)
    assert pixels.shape == (5, 3, *made.generator.image_spec.size)
    pixels.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.conv_in.weight.grad.abs().sum() > 0
    assert not any(p.grad is not None for name, p in made.generator.named_parameters() if ".vae." in name)

    # The gradient in one direction, against a finite difference in float64.
    made.generator.double()
    clean, step = torch.rand(2, *noised.noisy.shape[1:], dtype=torch.float64, requires_grad=True), 1e-6
    made.generator.decode_pixels(clean).square().sum().backward()
    way = torch.randn_like(clean)
    with torch.no_grad():
        ends = [made.generator.decode_pixels(clean + sign * step * way).square().sum() for sign in (1, -1)]
    assert clean.grad is not None
    torch.testing.assert_close((clean.grad * way).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_decoding_undoes_the_encoding_of_pixels(folders: dict[str, Path]) -> None:
    generator = DiffusersGenerator(str(folders["pixel"]))
    image = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(generator.decode_pixels(generator.encode_pixels(image)), image)
    generator = DiffusersGenerator(str(folders["sd"]))  # a VAE with random weights: as the pipeline's own decoding
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        output = generator.pipeline.vae.decode(latents / 0.5).sample
        shown = generator.pipeline.image_processor.postprocess(output, output_type="pt")
        torch.testing.assert_close(generator.decode_pixels(latents).clamp(0, 1), shown)


def test_some_rows_see_the_empty_prompt() -> None:
    text, empty = torch.arange(1, 1001)[:, None].repeat(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    seen = drop_prompts(text, empty, 0.3, torch.Generator().manual_seed(0))
    expected = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal((seen == 0).all(dim=1), expected)
    assert torch.equal(seen[~expected], text[~expected])
    assert 250 < int(expected.sum()) < 350
    assert torch.equal(drop_prompts(text, empty, 0.0, torch.Generator()), text)


def test_what_has_no_such_objective_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="A denoising objective trains a unet, but StableDiffusion3Pipeline"):
        objective(folders["sd3"])
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        objective(folders["sd"], "sample")


@pytest.mark.slow
def test_a_compiled_pass_that_shows_no_middle_is_refused(folders: dict[str, Path]) -> None:
    made = objective(folders["sd"])
    made.generator.denoiser.compile(backend="eager")
    noised, context = rows(made)
    made.denoise(noised, context)  # compiled without a hook
    with pytest.raises(RuntimeError, match="showed 0 middle blocks, not one: build the generator with compile=False"):
        made.denoise(noised, context, middle=True)
