"""A checkpoint of the command line taken away as a pipeline of plain diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.export import export_checkpoint
from gmail_lightning.tasks import TextToImageTask, UniDiffTask

SHORT = ["max_steps=2", "val_check_interval=null", "limit_val_batches=0", "num_sanity_val_steps=0", "callbacks=null"]
FRESH = "--model.init_args.generator.init_args.fresh=[]"  # the recipe trains a UNet from scratch
TUNED = {
    "unidiff": ["--model.score.num_images", "2", "--model.ema_decay", "0.5", "--model.train", "{vision: 2, unet: 2}"],
    "text_to_image": ["--model.init_args.ema_decay", "0.5", "--model.init_args.lora_rank", "2", FRESH],
}


def weights(folder: Path) -> dict[str, Any]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TUNED)
def test_the_pipeline_of_a_checkpoint_is_that_of_its_run(tmp_path: Path, recipe: str) -> None:
    short = [part for setting in SHORT for part in (f"--trainer.{setting}",)]
    config = ["--config", str(recipes_folder() / f"emoji/{recipe}.yaml"), "--data.init_args.batch_size", "4"]
    assert main(["fit", *config, *short, "--trainer.default_root_dir", str(tmp_path / "run"), *TUNED[recipe]]) == 0
    last = next((tmp_path / "run").rglob("last.ckpt"))
    content = torch.load(last, weights_only=True)
    if score := content["hyper_parameters"].get("score"):  # which is of another machine, and not needed
        score["init_args"]["scorer"]["init_args"]["pretrained"] = "nowhere"
    torch.save(content, tmp_path / "moved.ckpt")
    assert main(["export", str(tmp_path / "moved.ckpt"), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 0
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "run/pipeline")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

    kind: Any = {"unidiff": UniDiffTask, "text_to_image": TextToImageTask}[recipe]
    task = kind.load_from_checkpoint(last).eval()
    task.generator.num_inference_steps, task.generator.guidance_scale = 2, 2.0
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    plain.scheduler = task.generator.pipeline.scheduler
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = plain(
        ["a cat", "a dog"], generator=draws, num_inference_steps=2, guidance_scale=2.0, output_type="np"
    ).images
    with task.averaged_weights():
        ours = task.generator.generate(["a cat", "a dog"], [1, 2]).image
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2), atol=1e-5, rtol=0)

    command = ["export", str(tmp_path / "run"), "--to", "diffusers", "--dtype", "bfloat16"]
    assert main([*command, "--out", str(tmp_path / "half")]) == 0
    for name, value in weights(tmp_path / "half").items():
        assert torch.equal(value, expected[name].to(torch.bfloat16)), name


def test_a_checkpoint_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    for name, content, fault in (
        ("python", {"hyper_parameters": {}}, "does not record its task.*save_pipeline"),
        ("align", {"hyper_parameters": {"_class_path": "gmail_lightning.tasks.AlignmentTask"}}, "trains no pipeline"),
    ):
        torch.save(content, tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=rf"{name}\.ckpt: .*{fault}"):
            export_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / "out", to="diffusers")
        assert not (tmp_path / "out").exists()
