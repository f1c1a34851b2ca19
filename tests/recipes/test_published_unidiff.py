"""The recipes of ``recipes/unidiff``, each as its header and docs/unidiff_data.md say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import random_weights
import yaml
from diffusers import DiffusionPipeline
from published import (
    as_subsets,
    exported,
    follow,
    header,
    newest,
    options,
    recipe,
    rivals,
    run,
    runs,
    status,
    working_directory,
)

from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.datasets import classification
from gmail_lightning.generation import product_manifests

pytestmark = [pytest.mark.published, pytest.mark.slow, pytest.mark.xdist_group("published-unidiff")]
DOCS = Path(__file__).parents[2] / "docs/unidiff_data.md"
READINGS = ("none", "feature", "image", "prediction_contrast")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A working directory with ``recipes`` and ``data`` in it; manifests by the commands of the page on data."""
    makers = ("deepfashion", "fashion_mnist", "imagenet")
    with working_directory(tmp_path_factory.mktemp("published-unidiff"), makers) as (folder, patch):
        patch.setattr(classification, "prompt_templates", lambda name: ["a photo of a {}."])  # of 80 for ImageNet
        places = {"deepfashion": folder / "data/deepfashion", "csv": folder / "data/shop"}
        for line in DOCS.read_text().splitlines():
            if line.startswith("python -m gmail_lightning.generation.product_manifests"):
                kind, table, images, manifests, *more = shlex.split(line)[3:]
                there = places.pop(kind)
                words = [kind, str(there / table), str(there / images), manifests, *more, "--test-share", "0.4"]
                product_manifests.main(words)
        assert not places
        yield folder


def readings(name: str, few: dict[str, Any]) -> None:
    """The rivals, and each reading, by one override of the recipe."""
    for rival in rivals(name):
        run("fit", name, few, *rival)
    said = header(name)["Try"]
    assert all(reading in said for reading in READINGS)
    option = options(said)[0]
    for reading in READINGS:
        run("fit", name, few, option, reading, "--name", f"{name}-{reading}")


def pipeline_of(folder: Path) -> None:
    """The one in the run folder, and the one exported from its checkpoint, are those that plain diffusers loads."""
    assert status(["export", str(folder), "--to", "diffusers", "--out", str(folder / "exported-pipeline")]) == 0
    for written in ("pipeline", "exported-pipeline"):
        DiffusionPipeline.from_pretrained(folder / written)("a dress", num_inference_steps=1, output_type="np")


def small(entry: Any) -> Any:
    """Data sets of a recipe, Fashion-MNIST of the four pictures a class that there are."""
    if isinstance(entry, list):
        return [small(one) for one in entry]
    if "class_path" not in entry:
        return {key: small(value) for key, value in entry.items()}
    if entry["class_path"] != "FashionMNIST":
        return entry
    return {**entry, "init_args": {**entry["init_args"], "root": "data/fashion-mnist", "per_class": 4}}


def small_data(content: dict[str, Any]) -> dict[str, Any]:
    data = content["data"]["init_args"]
    return {f"data.init_args.{stage}": small(data[stage]) for stage in ("train", "val", "test") if stage in data}


def test_fashion_mnist(here: Path) -> None:
    name = "fashion_mnist"
    few = {
        **small_data(recipe(name)),
        "data.init_args.batch_size": 4,
        "model.init_args.score.init_args.num_images": 4,
        "trainer.callbacks.init_args.prompts": ["a photo of a bag."],
        **{f"trainer.limit_{stage}_batches": 1 for stage in ("val", "test", "predict")},
    }
    folder = follow(name, few)
    pipeline_of(folder)
    assert list((folder / "samples").glob("*.png"))
    readings(name, few)


@pytest.fixture(scope="module")
def sd15(here: Path) -> dict[str, Any]:
    """What makes the recipe small: two blocks of ViT-L/14, and a pipeline that reads through its text tower."""
    config = random_weights.SHALLOW_L14[224]
    clip = random_weights.open_clip_file(Path("weights/ViT-L-14-shallow.pt"), config)
    random_weights.stable_diffusion(Path("weights/sd15"), clip)
    scorer = {"model_name": None, "pretrained": str(random_weights.open_clip_folder(Path("weights/scorer")))}
    encoder = {"model_name": None, "config": config, "pretrained": str(clip)}
    return {
        **{f"model.init_args.encoder.init_args.{key}": value for key, value in encoder.items()},
        **{f"model.init_args.score.init_args.scorer.init_args.{key}": value for key, value in scorer.items()},
        "model.init_args.generator.init_args.pretrained": "weights/sd15",
        "model.init_args.generator.init_args.num_inference_steps": 1,
        "model.init_args.score.init_args.num_images": 4,
        "data.init_args.batch_size": 4,
        **{f"trainer.limit_{stage}_batches": 1 for stage in ("val", "test", "predict")},
    }


def test_clip_sd15_manifest(sd15: dict[str, Any]) -> None:
    name = "clip_sd15_manifest"
    folder = follow(name, sd15)
    exported(folder)
    pipeline_of(folder)
    readings(name, sd15)


def test_domains(sd15: dict[str, Any]) -> None:
    name = "clip_sd15_manifest"
    said = header(name)["Domains"]
    for path in sorted((recipes_folder() / "domains").glob("*.yaml")):
        assert path.name in said
        domain = as_subsets(yaml.safe_load(path.read_text())["data"]["init_args"])
        run("fit", name, {**sd15, **domain}, "--config", f"recipes/domains/{path.name}", "--name", path.stem)
        used = yaml.safe_load((newest(f"runs/{path.stem}") / "config.yaml").read_text())["data"]["init_args"]
        assert used["train"][0]["init_args"]["path"] == f"manifests/{path.stem}_train.parquet"
        for stage in ("val", "test"):
            assert used[stage]["domain"][0]["init_args"]["path"] == f"manifests/{path.stem}_test.parquet"
    assert runs(name) == Path("runs/unidiff-clip_sd15_manifest")
