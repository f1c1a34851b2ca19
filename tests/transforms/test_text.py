"""The published prompts, against their counts and against names known from the data sets."""

from __future__ import annotations

import pytest

from gmail_lightning.transforms import fill, prompt_class_names, prompt_templates
from gmail_lightning.transforms.text import given_templates

# CLIP, prompts.md and the notebook of ImageNet: templates, classes, one of each.
PUBLISHED = [
    ("caltech101", 34, 102, "the origami {}.", "off-center face"),
    ("dtd", 8, 47, "a photo of the {} pattern.", "polka-dotted"),
    ("fgvc_aircraft", 2, 100, "a photo of the {}, a type of aircraft.", "F/A-18"),
    ("food101", 1, 101, "a photo of {}, a type of food.", "creme brulee"),
    ("imagenet", 80, 1000, "itap of my {}.", "great white shark"),
    ("oxford_pets", 1, 37, "a photo of a {}, a type of pet.", "Egyptian Mau"),
    ("stanford_cars", 8, 196, "i love my {}!", "Ram C/V Cargo Van Minivan 2012"),
    ("sun397", 2, 397, "a photo of the {}.", "wine cellar barrel storage"),
]


@pytest.mark.parametrize(("name", "templates", "classes", "template", "class_name"), PUBLISHED)
def test_published_prompts(name: str, templates: int, classes: int, template: str, class_name: str) -> None:
    prompts, names = prompt_templates(name), prompt_class_names(name)
    assert len(prompts) == len(set(prompts)) == templates
    assert len(names) == classes
    if name == "imagenet":  # OpenAI's own list names two pairs of classes alike
        assert {one for one in names if names.count(one) > 1} == {"missile", "sunglasses"}
    else:
        assert len(set(names)) == classes
    assert template in prompts
    assert class_name in names
    assert all(one.count("{}") == 1 for one in prompts)


def test_caltech_patterns_come_with_both_articles() -> None:
    group = {
        f"{what} of {article} {{}}."
        for article in ("a", "the")
        for what in (
            "a photo",
            "a painting",
            "a sculpture",
            "a sketch",
            "a tattoo",
            "a rendition",
            "art",
            "graffiti",
            "a drawing",
            "a doodle",
        )
    }
    group |= {
        f"{article} {what} {{}}."
        for article in ("a", "the")
        for what in ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")
    }
    assert set(prompt_templates("caltech101")) == group | {"a {} in a video game.", "the {} in a video game."}


def test_fill() -> None:
    assert fill("a photo of a {}.", "smiley {}") == "a photo of a smiley {}."
    for template in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match="exactly one"):
            fill(template, "cat")
    with pytest.raises(ValueError, match=r"No published prompts for 'cifar10'. Known: imagenet, caltech101"):
        prompt_templates("cifar10")


def test_given_templates_are_a_name_one_template_or_several() -> None:
    assert given_templates("imagenet") == prompt_templates("imagenet")
    assert given_templates("a {} in the sun") == ["a {} in the sun"]
    assert given_templates(("a {}", "the {}")) == ["a {}", "the {}"]
    with pytest.raises(ValueError, match="templates is empty"):
        given_templates([])
    for bad in ("{} and {}", ["a {}", "a photo"], ["imagenet"]):
        with pytest.raises(ValueError, match=r"needs exactly one {}"):
            given_templates(bad)
    with pytest.raises(ValueError, match=r"No published prompts for 'a photo'.*own has {} where"):
        given_templates("a photo")
