"""Runs recipes by the commands of their headers; what is added makes them small and reads local weights."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gmail_lightning.main import main, recipes_folder

COUNTED = {"Flickr30k", "ShareGPT4V", "Urban1k", "ScienceQA", "ClassificationDataset"}
HERE = {  # a machine of two cores
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.precision": "32-true",
    "trainer.enable_progress_bar": False,
}
STEPS = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1}


def recipe(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((recipes_folder() / f"gmail/{name}.yaml").read_text())
    return content


def header(name: str) -> dict[str, str]:
    """The leading comments of a recipe, by the word before the colon; what goes on below is joined."""
    parts: dict[str, str] = {"": ""}
    key = ""
    for line in (recipes_folder() / f"gmail/{name}.yaml").read_text().splitlines():
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
    found = re.findall(r"(--[a-z][\w.]+) ([^\s;,]+)", text)
    return [word for option in found for word in option]


def overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def subsets(name: str) -> dict[str, Any]:
    """The data of a recipe as what they are here: every data set with published counts says that it is a subset."""

    def told(entry: Any) -> Any:
        if isinstance(entry, list):
            return [told(one) for one in entry]
        if "class_path" not in entry:
            return {key: told(value) for key, value in entry.items()}
        given = entry["init_args"]
        if entry["class_path"] in COUNTED or given.get("protocol"):
            return {**entry, "init_args": {**given, "subset": True}}
        return entry

    data = recipe(name)["data"]["init_args"]
    stages = ("train", "val", "test", "predict", "captions", "evaluation")
    changed = {stage: told(data[stage]) for stage in stages if stage in data}
    return {f"data.init_args.{stage}": value for stage, value in changed.items() if value != data[stage]}


def run(verb: str, name: str, given: Mapping[str, Any], *more: str, before: str | Path | None = None) -> None:
    """Runs the header's command with another verb, for two steps where it is ``fit``.

    Args:
        verb: Of the command line.
        name: The recipe.
        given: Further values, by their dotted names.
        *more: Arguments that the header names itself.
        before: The run that FILE stands for.
    """
    words = [str(before) if word == "FILE" else word for word in command(name)[1:]]
    workers = {"data.init_args.num_workers": 0} if "num_workers" in recipe(name)["data"]["init_args"] else {}
    values = {**HERE, **workers, **subsets(name), **(STEPS if "max_steps" in recipe(name)["trainer"] else {}), **given}
    assert status([verb, *words, *more, *overrides(values)]) == 0, (verb, name)


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
