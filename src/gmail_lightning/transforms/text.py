"""Prompts that name a class, as published for zero-shot classification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

#: Sets whose prompts and class names are files beside this one; those of ImageNet are in open_clip.
FILES = ("caltech101", "dtd", "fgvc_aircraft", "food101", "oxford_pets", "stanford_cars", "sun397")


def prompt_templates(name: str) -> list[str]:
    """Returns the prompts that CLIP (arXiv 2103.00020) was evaluated with, each with one ``{}`` for the class.

    Args:
        name: ``imagenet``, ``caltech101``, ``dtd``, ``fgvc_aircraft``, ``food101``, ``oxford_pets``, ``stanford_cars``
            or ``sun397``.

    Raises:
        ValueError: If no prompts are known by this name; lists the known ones.
    """
    if name == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return list(_published(name)["templates"])


def prompt_class_names(name: str) -> list[str]:
    """Returns the class names of the same evaluation; ImageNet's are in the order of the WordNet ids.

    The order of the others is that of the publication, which need not be that of the labels.

    Args:
        name: As in :func:`prompt_templates`.

    Raises:
        ValueError: As in :func:`prompt_templates`.
    """
    if name == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return list(_published(name)["classes"])


def given_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns the prompts that a user gives, each with one ``{}`` for the class.

    Args:
        templates: Prompts, a single one, or the name of a published set as in :func:`prompt_templates`.

    Raises:
        ValueError: If there are none, one has not exactly one ``{}``, or no prompts are known by this name.
    """
    if isinstance(templates, str):
        templates = [templates] if "{}" in templates else prompt_templates(templates)
    if not templates:
        raise ValueError("templates is empty: give at least one prompt, such as 'a photo of a {}.'")
    for template in templates:
        fill(template, "")  # complains now, not in a worker
    return list(templates)


def fill(template: str, class_name: str) -> str:
    """Puts the name of a class into a prompt.

    Raises:
        ValueError: If the template has not exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise ValueError(f"Template {template!r} needs exactly one {{}}, where the name of the class goes.")
    return template.replace("{}", class_name)


def _published(name: str) -> dict[str, Any]:
    if name not in FILES:
        raise ValueError(
            f"No published prompts for {name!r}. Known: imagenet, {', '.join(FILES)}. A prompt of one's own has {{}} "
            "where the name of the class goes."
        )
    file = resources.files("gmail_lightning.transforms").joinpath("prompts", f"{name}.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
