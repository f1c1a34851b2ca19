"""The recipes of ``recipes/gmail``, each as its header says, in the order in which a user would run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published_data
import pytest
import random_weights
import tiny_pipelines
from published import exported, follow, header, options, recipe, rivals, run

from gmail_lightning.main import recipes_folder

pytestmark = pytest.mark.slow
FEW = {"data.init_args.batch_size": 4}
B32 = {"model.init_args.encoder.init_args.pretrained": "weights/ViT-B-32.pt"}


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with ``recipes`` and ``data`` in it; runs and weights come to lie beside them."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "recipes").symlink_to(recipes_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
        patch.chdir(folder)
        for name in ("coco", "flickr30k"):
            published_data.MAKERS[name](folder / "data")
        yield folder


@pytest.fixture(scope="session")
def generated(here: Path) -> None:
    """Step 1: images of the training captions and, apart, of the validation captions."""
    tiny_pipelines.build("sd", Path("weights/sd2"))
    random_weights.open_clip_folder(Path("weights/scorer"))
    generate("data/coco_generated/train")
    (val,) = recipe("generate_sd2_coco")["data"]["init_args"]["evaluation"]["val"]
    said = header("generate_sd2_coco")["Validation pairs, apart and under their own name"]
    assert options(said) == ["--data.init_args.split", "val"]
    assert said.endswith("captions of split val, and out: data/coco_generated/val")
    generate("data/coco_generated/val", *options(said), **{"data.init_args.captions": [val]})


def generate(out: str, *more: str, **given: Any) -> None:
    (writer,) = recipe("generate_sd2_coco")["trainer"]["callbacks"]
    small = {
        "model.init_args.generator.init_args.pretrained": "weights/sd2",
        "model.init_args.generator.init_args.dtype": "float32",
        "model.init_args.generator.init_args.num_inference_steps": 2,
        "model.init_args.generator.init_args.size": 16,
        "model.init_args.generator.init_args.compile": False,
        "model.init_args.scorer.init_args.model_name": None,
        "model.init_args.scorer.init_args.pretrained": "weights/scorer",
        "trainer.callbacks": [{**writer, "init_args": {**writer["init_args"], "out": out, "size": 16}}],
    }
    run("predict", "generate_sd2_coco", {**small, **given}, *more)


@pytest.fixture(scope="session")
def aligned_b32(generated: None) -> Path:
    """Step 2, for ViT-B/32."""
    random_weights.open_clip_file(Path("weights/ViT-B-32.pt"), "ViT-B-32-quickgelu")
    return follow("align_vitb32_coco", {**B32, **FEW})


@pytest.fixture(scope="session")
def gpt2(here: Path) -> dict[str, Any]:
    random_weights.gpt2(Path("weights/gpt2"))
    return {
        "model.init_args.captioner.init_args.language_model": "weights/gpt2",
        "model.init_args.max_new_tokens": 8,
        **FEW,
    }


@pytest.mark.xdist_group("published-b32")
def test_align_vitb32_coco(aligned_b32: Path) -> None:
    exported(aligned_b32)
    assert (aligned_b32 / "modality_gap.json").exists()


@pytest.mark.xdist_group("published-b32")
def test_caption_clipcap_vitb32_coco(aligned_b32: Path, gpt2: dict[str, Any]) -> None:
    name = "caption_clipcap_vitb32_coco"
    assert "recipes/gmail/align_vitb32_coco.yaml" in header(name)["Before"]
    follow(name, {**B32, **gpt2}, before=aligned_b32)
    for rival in rivals(name):
        run("fit", name, {**B32, **gpt2}, *rival, before=aligned_b32)
