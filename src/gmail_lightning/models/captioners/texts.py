"""What turns captions and questions into ids in the data workers: a tokenizer, and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmail_lightning.losses.captioning import IGNORED, refuse_masked
from gmail_lightning.models.captioners.chat import ImageChat
from gmail_lightning.types import CaptionIds, CaptionSpec, PromptIds


def padded(rows: list[list[int]], left: bool = False) -> Tensor:
    """Puts rows of ids side by side, shape (B, L), with -100 behind each, or before it.

    Example:
        >>> padded([[5, 6], [7]])
        tensor([[   5,    6],
                [   7, -100]])
    """
    length = max(map(len, rows), default=0)
    ids = torch.full((len(rows), length), IGNORED)
    for row, given in zip(ids, rows, strict=True):
        row[length - len(given) if left else 0 :][: len(given)] = torch.tensor(given, dtype=torch.long)
    return ids


@dataclass(frozen=True)
class PlainTexts(CaptionSpec):
    """Captions as they are, behind an image that is the whole prompt: those of ``ClipCap``.

    Attributes:
        tokenizer: Of Hugging Face.
        max_length: Longest caption in tokens, its end token included; the rest is cut.
        end_id: Token that is put behind every caption that fits; None for none.
    """

    tokenizer: Any
    max_length: int
    end_id: int | None

    def encode(self, captions: list[str], questions: list[str]) -> CaptionIds:
        """See ``CaptionSpec``; surrounding white space is dropped."""
        _refuse_questions(questions)
        texts: list[list[int]] = self.tokenizer([c.strip() for c in captions], add_special_tokens=False).input_ids
        ended = [ids + ([] if self.end_id is None else [self.end_id]) for ids in texts]
        labels = padded([ids[: self.max_length] for ids in ended])
        refuse_masked(labels, captions)
        return {"caption_labels": labels, "caption_length": [len(ids) for ids in ended]}

    def encode_questions(self, questions: list[str]) -> PromptIds:
        """See ``CaptionSpec``; no words stand before a caption."""
        _refuse_questions(questions)
        return {"prompt_ids": torch.zeros(len(questions), 0, dtype=torch.long)}


@dataclass(frozen=True)
class ChatTexts(CaptionSpec):
    """Questions about an image and their answers, as a chat template lays them out: those of ``Llava``.

    How many patch tokens an image has is not known here: its placeholder is one id.

    Attributes:
        chat: Lays out and splits into tokens.
        max_length: Longest row; what lies behind it is cut however few patch tokens there are.
    """

    chat: ImageChat
    max_length: int

    def encode(self, captions: list[str], questions: list[str]) -> CaptionIds:
        """See ``CaptionSpec``."""
        rows = self.chat.tokens(questions, captions)
        starts = [len(prompt) for prompt, _ in rows]
        ids = padded([prompt + answer[: max(self.max_length - len(prompt), 0)] for prompt, answer in rows])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < torch.tensor(starts)[:, None], IGNORED)
        refuse_masked(labels, captions)
        return {
            "caption_ids": ids,
            "caption_labels": labels,
            "caption_length": [len(prompt) + len(answer) for prompt, answer in rows],
            "caption_start": starts,
            "caption_image_column": torch.tensor([prompt.index(self.chat.image_id) for prompt, _ in rows]),
        }

    def encode_questions(self, questions: list[str]) -> PromptIds:
        """See ``CaptionSpec``."""
        prompts = [prompt for prompt, _ in self.chat.tokens(questions, None)]
        length = max(map(len, prompts), default=0)
        columns = [length - len(prompt) + prompt.index(self.chat.image_id) for prompt in prompts]
        return {"prompt_ids": padded(prompts, left=True), "prompt_image_column": torch.tensor(columns)}


def _refuse_questions(questions: list[str]) -> None:
    if any(questions):
        raise ValueError("ClipCap answers no questions, but the data ask some: use Llava.")
