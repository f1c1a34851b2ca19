"""Token ids as a stage writes them: what a token store says of its tokenizer, and ids that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gmail_lightning.types import DataError


def token_record(tokenizer: Mapping[str, Any], length: int, vocabulary: int) -> dict[str, Any]:
    """What a token store says of how it was made.

    Args:
        tokenizer: What tells the tokenizer from others, in its own words; it goes into a JSON file.
        length: Number of ids of an image, T.
        vocabulary: Number of values that an id may take; ids count from 0.
    """
    return {"tokenizer": dict(tokenizer), "length": length, "vocabulary": vocabulary}


def stored_token_ids(token_ids: np.ndarray, record: Mapping[str, Any], keys: list[str]) -> np.ndarray:
    """Returns token ids in the smallest integers that hold the vocabulary, shape (n, T): a column of a part.

    Args:
        token_ids: Integers, shape (n, T).
        record: See :func:`token_record`.
        keys: What the n images are called in messages.

    Raises:
        DataError: If there are not T ids for each image, or an id is outside the vocabulary.
    """
    length, vocabulary = record["length"], record["vocabulary"]
    if token_ids.shape != (len(keys), length) or token_ids.dtype.kind not in "iu":
        raise DataError(
            f"Token ids of shape {token_ids.shape} and type {token_ids.dtype} for {len(keys)} images: integers of "
            f"shape ({len(keys)}, {length}) are to be stored."
        )
    outside = ((token_ids < 0) | (token_ids >= vocabulary)).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"The token ids of {keys[row]!r} run from {token_ids[row].min()} to {token_ids[row].max()}, and the "
            f"vocabulary has {vocabulary}, from 0 on. Is this another tokenizer's store?"
        )
    return token_ids.astype(np.min_scalar_type(vocabulary - 1))
