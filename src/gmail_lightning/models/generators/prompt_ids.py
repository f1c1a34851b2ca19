"""Prompts to token ids, as the pipelines of diffusers read them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor


class Tokenize:
    """Texts to token ids as a pipeline feeds them to its text encoder; picklable.

    Args:
        tokenizer: Of transformers.
        context_length: Number of ids per text.
        lower: Whether the pipeline brings texts to lower case first.
    """

    def __init__(self, tokenizer: Any, context_length: int, lower: bool = False) -> None:
        self.tokenizer, self.context_length, self.lower = tokenizer, context_length, lower

    def __call__(self, texts: list[str]) -> Tensor:
        """Maps n texts to ids of shape (n, context_length), padded and truncated."""
        texts = [text.lower().strip() for text in texts] if self.lower else texts
        ids = self.tokenizer(
            texts, padding="max_length", max_length=self.context_length, truncation=True, return_tensors="pt"
        ).input_ids
        return cast(Tensor, ids)


def tokenizers_of(pipeline: Any, options: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """Every tokenizer of a pipeline with the number of ids that its encoder reads.

    Args:
        pipeline: Of diffusers.
        options: Further arguments of its call.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    default = accepted["max_sequence_length"].default if "max_sequence_length" in accepted else 77
    found = []
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        is_clip = "CLIP" in type(pipeline.components[name.replace("tokenizer", "text_encoder")]).__name__
        limit = tokenizer.model_max_length if is_clip else options.get("max_sequence_length", default)
        found.append((tokenizer, min(limit, tokenizer.model_max_length)))
    return found
