"""Accuracy of multiple choice questions that are answered in words."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torchmetrics import Metric

_SENTENCE = re.compile(r"The answer is ([A-Z])\.")


def chosen_letter(text: str) -> str | None:
    """Reads the letter of an answer as LLaVA's evaluation of ScienceQA does (arXiv 2304.08485).

    It is the whole text (``B``), begins it (``B. gravity``), or stands in ``The answer is B.``, if that occurs once.

    Example:
        >>> [chosen_letter(text) for text in ("B", "B. gravity", "Mass. The answer is B.", "gravity")]
        ['B', 'B', 'B', None]
    """
    text = text.strip()
    if re.fullmatch(r"[A-Z]", text) or re.match(r"[A-Z]\. ", text):
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


class MultipleChoice(Metric):
    """Share of questions whose letter is right; an answer without a letter is wrong, and counted.

    Questions whose own answer is no letter are not multiple choice and left out: ``questions`` says how many counted.
    ScienceQA's data set here holds the questions with an image alone, so this is LLaVA's ``IMG-Accuracy``.

    Args:
        prefix: Put before the name of every value.
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    unparsable: Tensor
    questions: Tensor

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        for name in ("correct", "unparsable", "questions"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: list[str], answers: list[str]) -> None:
        """Adds B texts and the right answers to their questions, each question once.

        Raises:
            ValueError: If there are not as many of both.
        """
        if len(predictions) != len(answers):
            raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers: give one for each.")
        for prediction, answer in zip(predictions, answers, strict=True):
            right = chosen_letter(answer)
            if right is None:
                continue
            letter = chosen_letter(prediction)
            self.questions += 1
            self.correct += int(letter == right)
            self.unparsable += int(letter is None)

    def compute(self) -> dict[str, Tensor]:
        """``IMG-Accuracy`` in [0, 1], ``unparsable`` and ``questions``; nothing where no question came."""
        if self.questions == 0:
            return {}
        values = {
            "IMG-Accuracy": (self.correct / self.questions).float(),
            "unparsable": self.unparsable.float(),
            "questions": self.questions.float(),
        }
        return {self.prefix + name: value for name, value in values.items()}
