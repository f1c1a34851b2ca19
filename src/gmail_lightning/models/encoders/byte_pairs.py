"""CLIP's vocabulary of byte pairs as a tokenizer of transformers, and the other way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_byte_pairs(merges: str | Path | None) -> list[tuple[str, str]]:
    """The merges in open_clip's gzipped file, as it reads them; None: its own file, of the full vocabulary."""
    from open_clip.tokenizer import default_bpe

    lines = gzip.decompress(Path(merges or default_bpe()).read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])  # the first line is a header
    return [(left, right) for left, right in pairs]


def write_byte_pairs(pairs: list[tuple[str, str]], path: str | Path) -> None:
    """Writes merges as open_clip reads them."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    Path(path).write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))


def clip_tokenizer(pairs: list[tuple[str, str]], context_length: int) -> Any:
    """Transformers' ``CLIPTokenizer`` with the ids of open_clip's, from start to end of a text.

    It fills up with the end token, open_clip with 0, which CLIP's features do not see. (As a padding token 0 is "!",
    and transformers would then read every "!" of a text as padding.) Nor does it mend broken Unicode and HTML entities.
    """
    from transformers import CLIPTokenizer

    vocabulary = {token: number for number, token in enumerate(_tokens(pairs))}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=context_length)


def tokenizer_byte_pairs(tokenizer: Any) -> list[tuple[str, str]]:
    """The merges of a ``CLIPTokenizer`` of transformers.

    Raises:
        ValueError: If open_clip would give other ids than it with these merges.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
    vocabulary = tokenizer.get_vocab()
    if model["type"] != "BPE" or sorted(vocabulary, key=vocabulary.__getitem__) != _tokens(pairs):
        raise ValueError(
            f"The tokenizer, a {type(tokenizer).__name__} of {len(vocabulary)} ids, is none of CLIP's byte pairs "
            f"(bytes, bytes that end a word, merges, {_START}, {_END}), which is all that open_clip takes merges for."
        )
    return pairs


def _tokens(pairs: list[tuple[str, str]]) -> list[str]:
    """Every token, in the order of the ids."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    return [*letters, *(f"{letter}</w>" for letter in letters), *(f"{a}{b}" for a, b in pairs), _START, _END]
