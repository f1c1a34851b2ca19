"""Names of recipes and images; tests/datamodules/test_prompts.py has those of prompts."""

import hashlib

from gmail_lightning.generation.images.image_names import image_key, image_seed, prompt_id, prompt_number, recipe_id


def test_a_recipe_has_one_id_in_any_order_and_another_for_any_change() -> None:
    recipe = {"generator": "a", "steps": 4, "guidance": 7.5, "revision": None}
    name = recipe_id(recipe)
    assert len(name) == 8
    assert int(name, 16) >= 0
    assert recipe_id(dict(reversed(recipe.items()))) == name
    assert len({recipe_id({**recipe, key: "other"}) for key in recipe} | {name}) == 5


def test_names_and_seeds_are_what_stores_have_been_made_with() -> None:
    recipe = recipe_id({"steps": 4, "generator": "a"})
    assert recipe == hashlib.blake2b(b'{"generator":"a","steps":4}', digest_size=4).hexdigest()
    key = image_key(prompt_id(prompt_number(7, "a  fox\n")), 12, recipe)
    assert key == f"{hashlib.blake2b(b'7 a fox', digest_size=8).hexdigest()}-012-{recipe}"
    assert image_seed(key) == int(hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), 16) // 2
