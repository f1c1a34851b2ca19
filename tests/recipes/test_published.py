"""The recipes of ``recipes/gmail``, each as its header says, in the order in which a user would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import published_data
import pyarrow.parquet as pq
import pytest
import random_weights
import tiny_pipelines
import torch
import yaml
from published import (
    PAPERS,
    arguments,
    exported,
    follow,
    header,
    newest,
    options,
    recipe,
    rivals,
    run,
    subsets,
    working_directory,
)

from gmail_lightning.command.recipes import recipes_folder

pytestmark = [pytest.mark.published, pytest.mark.slow]
FEW = {"data.init_args.batch_size": 4}
SHORT = {"trainer.limit_val_batches": 1}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with ``recipes`` and ``data`` in it; runs and weights come to lie beside them."""
    with working_directory(tmp_path_factory.mktemp("published"), ("coco", "flickr30k")) as (folder, _):
        yield folder


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def b32(here: Path) -> dict[str, Any]:
    random_weights.open_clip_file(Path("weights/ViT-B-32.pt"), "ViT-B-32-quickgelu")
    return {"model.init_args.encoder.init_args.encoder.init_args.pretrained": "weights/ViT-B-32.pt", **FEW}


@pytest.fixture(scope="module")
def aligned_b32(generated: None, b32: dict[str, Any]) -> Path:
    """Step 2, for ViT-B/32."""
    return follow("align_vitb32_coco", b32)


@pytest.fixture(scope="module")
def gpt2(here: Path) -> dict[str, Any]:
    """Of a captioner, what makes it small."""
    random_weights.gpt2(Path("weights/gpt2"))
    return {
        "model.init_args.captioner.init_args.language_model": "weights/gpt2",
        "model.init_args.max_new_tokens": 8,
        **FEW,
    }


@pytest.fixture(scope="module")
def clipcap_b32(b32: dict[str, Any], gpt2: dict[str, Any]) -> dict[str, Any]:
    return {**b32, **gpt2}


@pytest.mark.xdist_group("published-b32")
def test_align_vitb32_coco(aligned_b32: Path) -> None:
    exported(aligned_b32)
    assert (aligned_b32 / "modality_gap.json").exists()


@pytest.mark.xdist_group("published-b32")
def test_caption_clipcap_vitb32_coco(aligned_b32: Path, clipcap_b32: dict[str, Any]) -> None:
    name = "caption_clipcap_vitb32_coco"
    assert "recipes/gmail/align_vitb32_coco.yaml" in header(name)["Before"]
    follow(name, clipcap_b32, before=aligned_b32)
    for rival in rivals(name):
        run("fit", name, {**clipcap_b32, **SHORT}, *rival, before=aligned_b32)
        overlay_holds(rival)


def overlay_holds(rival: list[str]) -> None:
    """The overlay, and not the alignment that the header's command names, is what its run was of."""
    overlay = yaml.safe_load(Path(rival[1]).read_text())
    used = yaml.safe_load((newest(f"runs/{rival[3]}") / "config.yaml").read_text())
    assert_within(overlay, used, rival[1])


def assert_within(part: Any, whole: Any, where: str) -> None:
    """What a file says holds in a configuration, which says more; a class may be named in short."""
    if not isinstance(part, dict):
        assert part == whole or str(whole).endswith(f".{part}"), (where, part, whole)
        return
    for key, value in part.items():
        assert_within(value, whole[key], f"{where}: {key}")


@pytest.mark.xdist_group("published-b32")
def test_generate_sd2_coco(generated: None) -> None:
    for split, captions in (("train", 6 * 5), ("val", 3 * 5)):
        folder = Path("data/coco_generated") / split
        assert pq.read_table(folder / "manifest.parquet").num_rows == captions
        assert (folder / "README.md").exists()
    generate("data/coco_tried/train", *options(header("generate_sd2_coco")["Try"]))
    assert pq.read_table("data/coco_tried/train-dry-run/manifest.parquet").num_rows == 8
    several = header("generate_sd2_coco")["Several"]
    for worker in re.findall(r"--worker (\d)/8", several):
        generate("data/coco_shared/train", "--worker", f"{worker}/8")
    assert several.endswith("--worker 0/8 ... --worker 7/8")


@pytest.mark.xdist_group("published-b32")
def test_text_to_image_sd15_coco(here: Path) -> None:
    name = "text_to_image_sd15_coco"
    tiny_pipelines.build("sd", Path("weights/sd15"))
    small = {
        "model.init_args.generator.init_args.pretrained": "weights/sd15",
        "model.init_args.generator.init_args.num_inference_steps": 2,
        **FEW,
    }
    run("fit", name, small)
    pipeline = newest(f"runs/gmail-{name}") / "pipeline"
    assert "`pretrained` of the generator in generate_sd2_coco.yaml" in header(name)["Then"]
    generate("data/coco_adapted/train", **{"model.init_args.generator.init_args.pretrained": str(pipeline)})
    run("fit", name, small, *options(header(name)["Try"]))


@pytest.fixture(scope="module")
def b16(here: Path) -> dict[str, Any]:
    random_weights.open_clip_file(Path("weights/ViT-B-16.pt"), "ViT-B-16-quickgelu")
    return {"model.init_args.encoder.init_args.encoder.init_args.pretrained": "weights/ViT-B-16.pt", **FEW}


@pytest.fixture(scope="module")
def aligned_b16(generated: None, b16: dict[str, Any]) -> Path:
    return follow("align_vitb16_coco", b16)


@pytest.mark.xdist_group("published-b16")
def test_align_vitb16_coco(aligned_b16: Path) -> None:
    exported(aligned_b16)


@pytest.mark.xdist_group("published-b16")
def test_retrieval_vitb16_coco(aligned_b16: Path, b16: dict[str, Any]) -> None:
    name = "retrieval_vitb16_coco"
    folder = follow(name, b16, before=aligned_b16)
    exported(folder, "--branch", "real")
    run("test", name, b16, before=aligned_b16)  # the plain CLIP row
    for rival in rivals(name):
        run("fit", name, {**b16, **SHORT}, *rival, before=aligned_b16)
        overlay_holds(rival)


@pytest.mark.xdist_group("published-b16")
def test_linear_probe_vitb16_imagenet(aligned_b16: Path, b16: dict[str, Any]) -> None:
    name = "linear_probe_vitb16_imagenet"
    published_data.imagenet(Path("data"))
    few = {**b16, "trainer.limit_val_batches": 2, "trainer.limit_test_batches": 2, "trainer.limit_predict_batches": 1}
    follow(name, few, before=aligned_b16)
    compared = header(name)["Compare"]
    for option in (options(compared)[:2], options(compared)[2:]):
        run("fit", name, few, *option, before=aligned_b16)


@pytest.fixture(scope="module")
def sharegpt4v(generated: None) -> None:
    """ShareGPT4V, Urban1k, and images of the captions of the training split."""
    published_data.sharegpt4v(Path("data"))
    first = recipe("long_retrieval_vitb16_sharegpt4v")["data"]["init_args"]["train"][0]
    generate(
        "data/sharegpt4v_generated/train",
        **{"data.init_args.captions": [{**first, "init_args": first["init_args"] | {"subset": True}}]},
    )


LONG_FEW = {
    "trainer.limit_val_batches": 2,
    "trainer.limit_test_batches": 2,
    "trainer.limit_predict_batches": 1,
    "data.init_args.eval_batch_size": 4,
}


@pytest.mark.xdist_group("published-b16")
def test_long_retrieval_vitb16_sharegpt4v(sharegpt4v: None, b16: dict[str, Any]) -> None:
    name = "long_retrieval_vitb16_sharegpt4v"
    pairs = {"data.init_args.train": subsets(name)["data.init_args.train"]}
    assert "`train` are the two data sets below" in header(name)["Before"]
    run("fit", "align_vitb16_coco", {**b16, **SHORT, **pairs}, "--name", "aligned-long")
    folder = follow(name, {**b16, **LONG_FEW}, before=newest("runs/aligned-long"))
    exported(folder, "--branch", "real")
    tried = options(header(name)["Try"])
    run("fit", name, {**b16, **LONG_FEW, **SHORT}, *tried, before="runs/aligned-long")  # FILE may be the folder


@pytest.fixture(scope="module")
def longclip(here: Path) -> Path:
    """Long-CLIP's file where the recipes have it."""
    return random_weights.long_clip_file(Path("weights/longclip-B.pt"))


@pytest.mark.xdist_group("published-longclip")
def test_long_retrieval_longclip_sharegpt4v(sharegpt4v: None, longclip: Path) -> None:
    name = "long_retrieval_longclip_sharegpt4v"
    pairs = {"data.init_args.train": subsets(name)["data.init_args.train"]}
    before = header(name)["Before"]
    run("fit", "align_vitb16_coco", {**FEW, **SHORT, **pairs}, *options(before), "--name", "aligned-longclip-share")
    folder = follow(name, {**FEW, **LONG_FEW}, before=newest("runs/aligned-longclip-share"))
    exported(folder, "--branch", "real")


@pytest.mark.xdist_group("published-longclip")
def test_retrieval_longclip_coco(generated: None, longclip: Path) -> None:
    name = "retrieval_longclip_coco"
    run("fit", "align_vitb16_coco", {**FEW, **SHORT}, *options(header(name)["Before"]), "--name", "aligned-longclip")
    folder = follow(name, FEW, before=newest("runs/aligned-longclip"))
    exported(folder, "--branch", "real")


def shallow_l14(size: int) -> dict[str, Any]:
    """The encoder of the recipes for ViT-L/14, as two blocks of its width from a local file."""
    path = Path(f"weights/ViT-L-14-{size}-shallow.pt")
    if not path.exists():
        random_weights.open_clip_file(path, random_weights.SHALLOW_L14[size])
    encoder = "model.init_args.encoder.init_args.encoder.init_args"
    described = {"model_name": None, "config": random_weights.SHALLOW_L14[size], "pretrained": str(path)}
    return {**{f"{encoder}.{key}": value for key, value in described.items()}, "data.init_args.batch_size": 4}


@pytest.fixture(scope="module")
def aligned_l14(generated: None) -> Path:
    return follow("align_vitl14_coco", shallow_l14(224))


@pytest.mark.xdist_group("published-l14")
def test_align_vitl14_coco(aligned_l14: Path) -> None:
    exported(aligned_l14)
    run("fit", "align_vitl14_coco", {**shallow_l14(224), **SHORT}, *options(header("align_vitl14_coco")["Try"]))


@pytest.mark.xdist_group("published-l14")
def test_zeroshot_vitl14(aligned_l14: Path) -> None:
    name = "zeroshot_vitl14"
    published_data.imagenet(Path("data"))
    published_data.classes(Path("data"))
    few = {
        **shallow_l14(224),
        "model.init_args.templates": ["a photo of a {}.", "a drawing of a {}."],  # of 80: each names 1,000 classes
        **{f"trainer.limit_{what}_batches": 1 for what in ("val", "test", "predict")},
        "data.init_args.eval_batch_size": 8,
    }
    folder = follow(name, few, before=aligned_l14)
    exported(folder, "--branch", "real")
    run("test", name, few, before=aligned_l14)  # the plain CLIP row
    run("fit", name, {**few, **SHORT}, *options(header(name)["Try"]), before=aligned_l14)


@pytest.fixture(scope="module")
def aligned_for_llava(generated: None) -> Path:
    """ViT-L/14 at 336 pixels, with the options that the header of the projector's recipe gives for its alignment."""
    before = header("caption_llava_projector_coco")["Before"]
    assert before == header("caption_llava_scienceqa")["Before"].partition(" The tower of LLaVA")[0]
    assert header("caption_llava_llama3_coco")["Before"].startswith(before)
    given = options(before)
    assert "ViT-L-14-336-quickgelu" in given
    run("fit", "align_vitl14_coco", shallow_l14(336), *given, "--name", "aligned-llava")
    return newest("runs/aligned-llava")


def llava_few(language_model: str) -> dict[str, Any]:
    return {
        **shallow_l14(336),
        "data.init_args.batch_size": 2,
        "model.init_args.captioner.init_args.language_model": language_model,
        "model.init_args.max_new_tokens": 4,
    }


@pytest.mark.xdist_group("published-l14")
def test_caption_llava_coco_in_two_stages(aligned_for_llava: Path) -> None:
    random_weights.llama(Path("weights/vicuna"))
    few = llava_few("weights/vicuna")
    follow("caption_llava_projector_coco", few, before=aligned_for_llava)
    assert "first stage; FILE is the alignment of that one" in header("caption_llava_lora_coco")["Before"]
    follow("caption_llava_lora_coco", few, before=aligned_for_llava)


@pytest.mark.xdist_group("published-l14")
def test_caption_llava_llama3_coco_in_two_stages(aligned_for_llava: Path) -> None:
    name = "caption_llava_llama3_coco"
    random_weights.llama(Path("weights/llama3"), random_weights.LLAMA3_CHAT)
    few = llava_few("weights/llama3")
    stage1 = options(header(name)["Before"].partition("stage 1, this recipe with")[2])
    assert stage1[:2] == ["--name", recipe(name)["model"]["init_args"]["captioner"]["init_args"]["projector"][5:]]
    run("fit", name, few, *stage1, before=aligned_for_llava)
    follow(name, few, before=aligned_for_llava)


@pytest.mark.xdist_group("published-l14")
def test_caption_llava_scienceqa(aligned_for_llava: Path) -> None:
    name = "caption_llava_scienceqa"
    published_data.scienceqa(Path("data"))
    random_weights.llava(Path("weights/llava"), Path("weights/ViT-L-14-336-shallow.pt"))
    few = {
        "data.init_args.batch_size": 4,
        "model.init_args.encoder.init_args.encoder.init_args.model": "weights/llava",
        "model.init_args.captioner.init_args.pretrained": "weights/llava",
        "model.init_args.max_new_tokens": 4,
    }
    follow(name, few, before=aligned_for_llava)
    run("test", name, few, before=aligned_for_llava)  # LLaVA 1.5 as it is
    run("fit", name, {**few, **SHORT}, *options(header(name)["Rival"]), before=aligned_for_llava)


@pytest.mark.xdist_group("published-b32")
def test_siglip_coco(generated: None, gpt2: dict[str, Any]) -> None:
    encoder = {
        "model.init_args.encoder.init_args.encoder.init_args.model": str(random_weights.siglip(Path("weights/siglip")))
    }
    aligned = follow("align_siglip_coco", {**encoder, **FEW})
    name = "caption_siglip_coco"
    assert "recipes/gmail/align_siglip_coco.yaml" in header(name)["Before"]
    follow(name, {**encoder, **gpt2}, before=aligned)


@pytest.mark.xdist_group("published-b32")
def test_caption_clipcap_flux_coco(aligned_b32: Path, b32: dict[str, Any], clipcap_b32: dict[str, Any]) -> None:
    name = "caption_clipcap_flux_coco"
    said = header(name)["Data"]
    assert "num_inference_steps: 4, guidance_scale: 0.0" in said
    tiny_pipelines.build("flux", Path("weights/flux"))
    generator = {"pretrained": "weights/flux", "num_inference_steps": 4, "guidance_scale": 0.0}
    generate(
        "data/coco_generated_flux/train",
        **{f"model.init_args.generator.init_args.{key}": value for key, value in generator.items()},
    )
    pairs = {"data.init_args.train": recipe(name)["data"]["init_args"]["train"]}
    run("fit", "align_vitb32_coco", {**b32, **pairs}, "--name", "aligned-flux")
    follow(name, clipcap_b32, before=newest("runs/aligned-flux"))
    run("fit", name, {**clipcap_b32, **SHORT}, "--name", "across", before=aligned_b32)  # another generator's branch


@pytest.mark.parametrize(
    ("name", "weights", "before"),
    [
        pytest.param("align_vitb32_coco", "b32", None, marks=pytest.mark.xdist_group("published-b32")),
        pytest.param(
            "caption_clipcap_vitb32_coco", "clipcap_b32", "aligned_b32", marks=pytest.mark.xdist_group("published-b32")
        ),
        pytest.param("retrieval_vitb16_coco", "b16", "aligned_b16", marks=pytest.mark.xdist_group("published-b16")),
    ],
)
def test_two_processes(
    name: str, weights: str, before: str | None, generated: None, request: pytest.FixtureRequest
) -> None:
    """The header's command for several devices, with two processes on the CPU in place of every GPU."""
    several = header(name)["Several"]
    assert several.startswith("--config recipes/trainer/ddp.yaml --data.init_args.batch_size")
    given = {**request.getfixturevalue(weights), **SHORT, "trainer.precision": "32-true"}
    followed = None if before is None else request.getfixturevalue(before)
    run_name = ["--name", f"two-{name}"]
    words = arguments(name, given, "--config", "recipes/trainer/cpu2.yaml", *run_name, before=followed)
    done = subprocess.run(
        [sys.executable, "-m", "gmail_lightning", "fit", *words], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr + done.stdout
    assert torch.load(newest(f"runs/two-{name}") / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
@pytest.mark.xdist_group("published-b16")
def test_retrieval_vitb16_conceptual_captions(name: str, generated: None, b16: dict[str, Any]) -> None:
    published_data.MAKERS[name](Path("data"))
    name = f"retrieval_vitb16_{name}"
    pairs = recipe(name)["data"]["init_args"]["train"]
    generate(pairs[1]["init_args"]["path"], **{"data.init_args.captions": pairs[:1]})
    assert "recipes/gmail/align_vitb16_coco.yaml, whose `train` are the two data sets below" in header(name)["Before"]
    run("fit", "align_vitb16_coco", {**b16, **SHORT, "data.init_args.train": pairs}, "--name", f"aligned-{name}")
    few = {**b16, "trainer.limit_test_batches": 1, "trainer.limit_val_batches": 1}
    exported(follow(name, few, before=newest(f"runs/aligned-{name}")), "--branch", "real")


def test_every_recipe_is_run() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_published*.py"))
    common = {"retrieval_vitb16_cc3m", "retrieval_vitb16_cc12m"}
    names = {path.stem for folder in PAPERS for path in (recipes_folder() / folder).glob("*.yaml")}
    assert common < names
    assert {name for name in names - common if f'"{name}"' not in text} == set()
