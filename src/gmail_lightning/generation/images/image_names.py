"""Names of generated images, and the seeds that follow from them: a hash of what an image is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from gmail_lightning.datasets.base import one_line


def prompt_number(image_id: int, caption: str) -> int:
    """The number behind a prompt id: a hash of the image that a caption belongs to, and of the caption on one line."""
    digest = hashlib.blake2b(f"{image_id} {one_line(caption)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def prompt_id(number: int) -> str:
    """Sixteen hexadecimal digits."""
    return f"{number:016x}"


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits: a hash of all that images depend on besides caption and seed, in any order."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def image_key(prompt: str, image_index: int, recipe: str) -> str:
    """Name of an image: it depends on what the image is, not on where, when or in which order it is made."""
    return f"{prompt}-{image_index:03d}-{recipe}"


def image_keys(prompts: np.ndarray, images_per_prompt: int, recipe: str) -> pa.Array:
    """:func:`image_key` of the numbers (P,) of prompts, all images of a prompt in a row, as P * k strings."""
    count = len(prompts) * images_per_prompt
    digits = np.frombuffer(prompts.astype(">u8").tobytes().hex().encode(), np.uint8).reshape(-1, 16)
    endings = "".join(image_key("", i, recipe) for i in range(images_per_prompt)).encode()
    ending = np.frombuffer(endings, np.uint8).reshape(images_per_prompt, -1)
    letters = np.concatenate(
        [digits.repeat(images_per_prompt, axis=0), np.tile(ending, (len(prompts), 1))], axis=1
    )  # (P * k, 29), ASCII
    key_length = letters.shape[1]
    bounds = np.arange(count + 1, dtype=np.int64) * key_length  # where each key begins, and the last ends
    return pa.LargeStringArray.from_buffers(count, pa.py_buffer(bounds), pa.py_buffer(letters))


def image_seed(key: str) -> int:
    """A seed of 63 bits, from the name of the image: the prompt, the number of the image and the recipe."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
