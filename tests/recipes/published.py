"""Runs recipes by the commands of their headers; what is added makes them small and reads local weights."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import published_data
import pytest
import yaml

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder

COUNTED = {"Flickr30k", "ShareGPT4V", "Urban1k", "ScienceQA", "ClassificationDataset"}
#: Folders of recipes at the scale of a paper.
PAPERS = ("gmail", "unidiff")
HERE = {  # a machine of two cores
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.precision": "32-true",
    "trainer.enable_progress_bar": False,
}
STEPS = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1}


@contextmanager
def working_directory(folder: Path, makers: Sequence[str]) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
    """Within it, ``recipes`` and ``data`` of these makers lie in the working directory, and so will runs."""
    (folder / "recipes").symlink_to(recipes_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
        patch.chdir(folder)
        for name in makers:
            published_data.MAKERS[name](folder / "data")
        yield folder, patch


def place(name: str) -> Path:
    """The file of a recipe at paper scale."""
    (found,) = [path for folder in PAPERS for path in (recipes_folder() / folder).glob(f"{name}.yaml")]
    return found


def runs(name: str) -> Path:
    """The folder of its runs."""
    return Path(f"runs/{place(name).parent.name}-{name}")


def recipe(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(place(name).read_text())
    return content


def header(name: str) -> dict[str, str]:
    """The leading comments of a recipe, by the word before the colon; what goes on below is joined."""
    parts: dict[str, str] = {"": ""}
    key = ""
    for line in place(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        if found := re.match(r" ([A-Z][a-z ,]+):\s+(.*)", text):
            key = found[1]
            parts[key] = found[2]
        else:
            parts[key] += " " + text.strip()
    return parts


def command(name: str) -> list[str]:
    """Arguments of the header's command; FILE stands for the run that comes before."""
    words = shlex.split(header(name)["Run"])
    assert words[0] == "gmail-lightning"
    return words[1:]


def options(text: str) -> list[str]:
    """The options that a sentence of a header names, with their values."""
    found = re.findall(r"(--[a-z][\w.]+) ('[^']*'|[^\s;,]+)", text)
    return [word for option, value in found for word in (option, value.strip("'").rstrip(".:"))]


def rivals(name: str) -> list[list[str]]:
    """The overlays that a header offers to compare with, each with a name for its runs."""
    files = re.findall(r"(?:recipes/rivals/)?(\w+)\.yaml", header(name)["Rivals"])
    assert files
    return [["--config", f"recipes/rivals/{file}.yaml", "--name", f"{name}-{file}"] for file in files]


def overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def subsets(name: str) -> dict[str, Any]:
    """The data of a recipe as what they are here, see ``as_subsets``."""
    return as_subsets(recipe(name)["data"]["init_args"])


def as_subsets(data: dict[str, Any]) -> dict[str, Any]:
    """What changes where every data set with published counts says that it is a subset."""

    def told(entry: Any) -> Any:
        if isinstance(entry, list):
            return [told(one) for one in entry]
        if "class_path" not in entry:
            return {key: told(value) for key, value in entry.items()}
        given = entry["init_args"]
        if entry["class_path"] in COUNTED or given.get("protocol"):
            return {**entry, "init_args": {**given, "subset": True}}
        return entry

    stages = ("train", "val", "test", "predict", "captions", "evaluation")
    changed = {stage: told(data[stage]) for stage in stages if stage in data}
    return {f"data.init_args.{stage}": value for stage, value in changed.items() if value != data[stage]}


def arguments(name: str, given: Mapping[str, Any], *more: str, before: str | Path | None = None) -> list[str]:
    """The header's command behind its verb, two steps long, with local weights.

    Args:
        name: The recipe.
        given: Further values, by their dotted names.
        *more: Arguments that the header names itself; they win over its command.
        before: The run that FILE stands for.
    """
    words = [str(before) if word == "FILE" else word for word in command(name)[1:]]
    content = recipe(name)
    settings = content["data"]["init_args"]
    sizes = {"num_workers": 0, "eval_batch_size": 8}
    small = {f"data.init_args.{key}": size for key, size in sizes.items() if key in settings}
    steps = STEPS if "max_steps" in content["trainer"] else {}
    accumulated = {"trainer.accumulate_grad_batches": 1} if "accumulate_grad_batches" in content["trainer"] else {}
    return [*words, *more, *overrides({**small, **steps, **accumulated, **subsets(name), **given})]


def run(verb: str, name: str, given: Mapping[str, Any], *more: str, before: str | Path | None = None) -> None:
    """Runs the header's command with a verb, on this machine; arguments as ``arguments``."""
    assert status([verb, *arguments(name, {**HERE, **given}, *more, before=before)]) == 0, (verb, name)


def follow(name: str, given: Mapping[str, Any], *more: str, before: str | Path | None = None) -> Path:
    """Fits, tests and predicts, the last two from the checkpoint of the first; returns the folder of the run."""
    run("fit", name, given, *more, before=before)
    folder = newest(runs(name))
    run("test", name, given, *more, "--ckpt_path", "last", before=before)
    data = recipe(name)["data"]["init_args"]
    shown = {} if "predict" in data else {"data.init_args.predict": next(iter(evaluation(name).values()))}
    run("predict", name, {**given, **shown}, *more, "--ckpt_path", "last", before=before)
    assert len(list(folder.glob("test-*/test_results.json"))) == 1, sorted(folder.rglob("*"))
    assert list(folder.glob("predict-*/captions.json")) or list(folder.glob("predict-*/predictions-0.pt"))
    return folder


def evaluation(name: str) -> dict[str, Any]:
    """The sets of a recipe that are evaluated, real rows alone."""
    changed = subsets(name).get("data.init_args.val", recipe(name)["data"]["init_args"]["val"])
    return {key: [one for one in rows if one["class_path"] != "TarShards"] for key, rows in changed.items()}


def exported(folder: Path, *more: str) -> None:
    """Exports a run, and loads what was written by open_clip alone."""
    import open_clip
    import torch

    out = folder / "exported"
    assert status(["export", str(folder / "checkpoints/last.ckpt"), "--to", "open_clip", "--out", str(out), *more]) == 0
    model = open_clip.create_model(f"local-dir:{out}")
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.no_grad():
        assert model.encode_image(torch.rand(1, 3, height, width)).isfinite().all()


def status(args: list[str]) -> int:
    try:
        return main(args)
    except SystemExit as error:
        return int(error.code or 0)


def newest(folder: str | Path) -> Path:
    """The folder of the last run below a folder."""
    found = sorted(Path(folder).glob("*/checkpoints/last.ckpt"))
    assert found, f"{folder} has no run"
    return found[-1].parents[1]
