"""Any pipeline, image by image the same as plain diffusers makes it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tiny_pipelines import KINDS, build

from gmail_lightning.models import DiffusersGenerator

CAPTIONS, SEEDS = ["a red heart", "two dogs", "pizza"], [3, 1 << 62, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: build(kind, root / kind) for kind in KINDS}


def make(folder: Path, **settings: Any) -> DiffusersGenerator:
    return DiffusersGenerator(str(folder), **{"num_inference_steps": 2, "guidance_scale": 3.0, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_plain_diffusers(folders: dict[str, Path], kind: str) -> None:
    generator = make(folders[kind], negative_prompt="blurry")
    plain = DiffusionPipeline.from_pretrained(folders[kind])
    plain.set_progress_bar_config(disable=True)
    images = generator.generate(CAPTIONS, SEEDS)
    further = {"clean_caption": False} if kind == "pixel" else {}
    for i, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        draw = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blurry", **further}
        expected = torch.from_numpy(plain(caption, generator=draw, output_type="np", **settings).images[0])
        torch.testing.assert_close(images.image[i].permute(1, 2, 0), expected, atol=1e-5, rtol=0)
    assert images.flagged == [False] * 3
    assert len(images.image.flatten(1).unique(dim=0)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_its_prompt_and_seed_alone(folders: dict[str, Path], kind: str) -> None:
    generator = make(folders[kind])
    together = generator.generate(CAPTIONS, SEEDS).image
    alone = generator.generate(CAPTIONS[2:], SEEDS[2:]).image
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=0)
    assert not torch.equal(alone, generator.generate(CAPTIONS[2:], [6]).image)


@pytest.mark.slow
def test_settings_reach_the_pipeline(folders: dict[str, Path]) -> None:
    reference = make(folders["sd"]).generate(CAPTIONS, SEEDS).image
    assert reference.shape[2:] == (16, 16)
    assert make(folders["sd"], size=(16, 32)).generate(CAPTIONS, SEEDS).image.shape[2:] == (16, 32)
    for settings in ({"scheduler": "EulerDiscreteScheduler"}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}):
        assert not torch.equal(make(folders["sd"], **settings).generate(CAPTIONS, SEEDS).image, reference)
    same = make(folders["sd"], channels_last=True, vae_slicing=True)
    torch.testing.assert_close(same.generate(CAPTIONS, SEEDS).image, reference, atol=1e-5, rtol=0)
    assert make(folders["sd"], dtype="bfloat16").denoiser.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_broken_decoder_and_a_flag_are_handed_on(folders: dict[str, Path]) -> None:
    generator = make(folders["sd"])
    generator.pipeline.feature_extractor = lambda images, return_tensors: SimpleNamespace(
        to=lambda device: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 8, 8))
    )
    generator.pipeline.safety_checker = lambda images, clip_input: (images, [False, True, False])
    images = generator.generate(CAPTIONS, SEEDS)
    assert images.flagged == [False, True, False]
    assert torch.isfinite(images.image).all()
    torch.nn.init.constant_(generator.part("vae").decoder.conv_out.bias, float("nan"))
    assert torch.isnan(generator.generate(CAPTIONS, SEEDS).image).all()


@pytest.mark.slow
def test_flux(tmp_path: Path) -> None:
    folder, options = build("flux", tmp_path / "flux"), {"max_sequence_length": 48}
    generator = make(folder, size=16, options=options)
    plain = DiffusionPipeline.from_pretrained(folder)
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, **options}
    expected = torch.from_numpy(plain(CAPTIONS, generator=draws, output_type="np", **settings).images).permute(
        0, 3, 1, 2
    )
    images = generator.generate(CAPTIONS, SEEDS).image
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(images[1:2], generator.generate(CAPTIONS[1:2], SEEDS[1:2]).image, atol=1e-5, rtol=0)
    assert generator.truncated(["x " * 46, "x " * 47]) == [False, True]
    with pytest.raises(ValueError, match=r"only with options: \{true_cfg_scale"):
        make(folder, negative_prompt="blurry")
    with pytest.raises(ValueError, match=r"DDIMScheduler' does not fit: .* FlowMatchEulerDiscreteScheduler"):
        make(folder, scheduler="DDIMScheduler")


def test_pixel_space_pipelines_read_lower_case(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator, seen = make(folders["pixel"]), []
    tokenizer = generator.pipeline.tokenizer
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **_: seen.append(texts) or 1 / 0)
    for call in (generator.text_spec.encode, generator.truncated, lambda texts: generator.generate(texts, [1])):
        with pytest.raises(ZeroDivisionError):
            call([" A Cat "])
    assert seen == [["a cat"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), [("sd", 20), ("sdxl", 20), ("sd3", 77), ("pixel", 77)])
def test_truncated_prompts_are_marked(folders: dict[str, Path], kind: str, limit: int) -> None:
    fits, cut = "x " * (limit - 2), "x " * (limit - 1)  # a start and an end besides
    assert make(folders[kind]).truncated([fits, cut, "x"]) == [False, True, False]


@pytest.mark.slow
def test_the_recipe_names_what_images_depend_on(folders: dict[str, Path], tmp_path: Path) -> None:
    described = make(folders["sd"], negative_prompt="x", options={"eta": 0.5}).describe()
    assert {k: described[k] for k in ("generator", "pipeline", "scheduler", "steps", "guidance", "dtype")} == {
        "generator": "sd",
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "steps": 2,
        "guidance": 3.0,
        "dtype": "float32",
    }
    assert json.loads(str(described["options"])) == {"eta": 0.5}
    copied = shutil.copytree(folders["sd"], tmp_path / "sd")
    assert make(copied).describe()["revision"] == described["revision"]
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert make(copied).describe()["revision"] != described["revision"]
    assert make(folders["sd"], fresh=["unet"]).describe()["fresh"] == "unet"


def test_fresh_parts_have_random_weights(folders: dict[str, Path]) -> None:
    generator, stored = make(folders["sd"], fresh=["unet", "text_encoder"]), make(folders["sd"])
    assert stored.pretrained
    assert not generator.pretrained
    assert not torch.equal(generator.denoiser.conv_in.weight, stored.denoiser.conv_in.weight)
    assert torch.equal(generator.part("vae").decoder.conv_out.weight, stored.part("vae").decoder.conv_out.weight)


@pytest.mark.slow
def test_text_and_pixels_are_encoded_as_the_pipeline_does(folders: dict[str, Path]) -> None:
    for kind in ("sd", "pixel"):
        generator = make(folders[kind])
        further = {} if kind == "pixel" else {"device": "cpu", "num_images_per_prompt": 1}
        expected = generator.pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, **further)[0]
        ids = generator.text_spec.encode(CAPTIONS)
        assert ids.shape == (3, generator.text_spec.context_length)
        torch.testing.assert_close(generator.encode_text(ids), expected, atol=0, rtol=0)
    image = torch.rand(2, 3, 16, 16)
    generator = make(folders["sd"])
    posterior = generator.part("vae").encode(image * 2 - 1).latent_dist
    torch.testing.assert_close(generator.encode_pixels(image), posterior.mean * 0.5)
    drawn = generator.encode_pixels(image, torch.Generator().manual_seed(1))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * 0.5)
    assert torch.equal(make(folders["pixel"]).encode_pixels(image), image * 2 - 1)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown scheduler 'Nothing'.*DDIMScheduler"):
        make(folders["sd"], scheduler="Nothing")
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline takes no colour"):
        make(folders["sd"], options={"colour": 1})
    with pytest.raises(ValueError, match="guidance_scale are arguments of their own"):
        make(folders["sd"], options={"guidance_scale": 1.0})
    with pytest.raises(ValueError, match=r"no network 'transformer'.*unet"):
        make(folders["sd"], fresh=["transformer"])
    with pytest.raises(ValueError, match="needs a vae"):
        make(folders["pixel"], vae_slicing=True)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        make(tmp_path)
    with pytest.raises(OSError, match=r"there is no folder .*nobody/nothing, and no pipeline"):
        DiffusersGenerator("nobody/nothing")
    unconditional = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(unconditional, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="DDPMPipeline takes no text"):
        make(tmp_path / "ddpm")


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_the_pipeline_refuses_is_told_before_the_first_image(folders: dict[str, Path], kind: str) -> None:
    for size in (0, *([] if kind in ("sd3", "pixel") else [31])):  # the tiny ones of these two take 31
        with pytest.raises(ValueError, match=r"size|divisible"):
            make(folders[kind], size=size)
