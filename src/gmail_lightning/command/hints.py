"""Around the parser: errors turned into advice, the names that would have been accepted; options kept what they are."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any, get_args, get_type_hints

EPILOG = """beside them:
  export CHECKPOINT --to open_clip --out DIR   write the trained encoder for open_clip or (hf_clip) transformers, or the
                                               trained pipeline for diffusers
  repair DIR --encoder NAME                    choose a better image for each caption of a generated data set (SynC)
  recipes list | copy NAME [TARGET]            show or copy the recipes that ship with the package
  doctor                                       say what is installed, and what this machine can do
exit status: 0 done, 2 bad configuration, 3 a problem of the data,
             4 done in part (some images failed; the data set's README.md says why),
             143 ended by SIGTERM, 1 anything else
"""


_ROUTER = "of the router that model.encoder is, a ModalityEncoder: --model.encoder."
_BRANCH = "of the branch of the router that model.encoder is, a ModalityEncoder: --model.encoder.branch."
#: Arguments that tasks took in the first edition, and where they are now.
MOVED = {
    **{name: f"{_BRANCH}{name}" for name in ("rank", "alpha", "targets")},
    **{
        name: f"{_ROUTER}{name}"
        for name in (
            "real_path",
            "projection",
            "aligned",
            "text_side",
            "text_rank",
            "text_targets",
            "train_adapters",
        )
    },
    "layer": "what a reader says: --model.reader PatchTokens --model.reader.layer",
    "feature_layer": "what the captioner's reader says: --model.captioner.reader PatchTokens",
}


def hint(message: str) -> str:
    """Advice for an error message of jsonargparse, or an empty string."""
    if names := re.findall(r"Expected a dot import path string: (\S+)", message):
        return _unknown_class(names[-1], message)
    if options := re.findall(r"Option '([^']+)' is not accepted", message):
        owner = re.findall(r"class_path '([^']+)'", message[: message.rindex("Option '")])
        if options[-1] in MOVED and owner and owner[-1].startswith("gmail_lightning.tasks."):
            return f"\n{options[-1]!r} is now {MOVED[options[-1]]}."
        if owner:
            cls = import_class(owner[-1])
            return _advice(options[-1], f"{cls.__name__} accepts", _parameters(cls)) if cls else ""
    if found := re.findall(r"does not accept option '([^']+)'|unrecognized arguments: -*([\w.]+)", message):
        return _unknown_key(next(part for part in found[-1] if part))
    return ""


def _advice(name: str, lead: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"\n{name!r} is not known.{f' Did you mean {close[0]!r}?' if close else ''} {lead}: {', '.join(known)}."


def _unknown_class(name: str, message: str) -> str:
    base = _expected_class(message[: message.rindex(name)])
    if base is None:
        return ""
    known = {c.__name__ for c in _subclasses(base) if not inspect.isabstract(c) and not c.__name__.startswith("_")}
    return (
        _advice(name.rpartition(".")[2], f"Known for {base.__name__}", known) + " Your own class: give its import path."
    )


def _expected_class(before: str) -> type | None:
    """The annotated class of the argument that an error speaks of: of the last parser key, else of the last union."""
    places = re.findall(r"class_path '([^']+)'|Parser key \"([\w.]+)\"", before)
    keys = [key for _, key in places if key]
    owners = [owner for owner, _ in places if owner]
    if keys and keys[-1] in ("model", "data"):
        owners = []
    if owners and keys and (cls := import_class(owners[-1])):
        annotation = get_type_hints(vars(cls)["__init__"]).get(keys[-1].rpartition(".")[2])
        return next((c for c in _classes(annotation) if _subclasses(c)), None)
    unions = re.findall(r"<class '([\w.]+)'>", before)
    return next((c for c in map(import_class, unions) if c is not None and c is not type(None)), None)


def _classes(annotation: Any) -> list[type]:
    """Classes named anywhere in an annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    if isinstance(annotation, (list, tuple)):
        return [c for part in annotation for c in _classes(part)]
    return [c for part in get_args(annotation) for c in _classes(part)]


def _subclasses(cls: type) -> set[type]:
    direct: set[type] = set(type.__subclasses__(cls))
    return direct.union(*(_subclasses(c) for c in direct)) if direct else direct


def _parameters(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def import_class(path: str) -> type | None:
    """The class of an import path, None where there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _unknown_key(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "trainer" and rest:
        from lightning.pytorch import Trainer

        return _advice(rest.partition(".")[0], "trainer accepts", _parameters(Trainer))
    sections = ("trainer", "model", "data")
    if rest:
        return _advice(first, "Sections", sections)
    return _advice(
        first,
        "Top-level keys",
        (*sections, "seed_everything", "name", "allow_untrained", "ckpt_path", "out", "worker", "mode", "dry_run"),
    )


def as_json(arg: str) -> str:
    """An option whose value is written as a Python None, list or dictionary, with that value in JSON."""
    key, is_option, text = arg.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return arg
    return f"{key}={json.dumps(value)}" if is_option and isinstance(value, (type(None), list, dict)) else arg
