"""Accuracy of multiple choice questions that are answered in words."""

from __future__ import annotations

import re

from torch import Tensor

from gmail_lightning.metrics.states import RowMetric

_FIRST = re.compile(r"[A-E](\. |$)")
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def chosen_letter(text: str) -> str | None:
    """Reads the letter of an answer as LLaVA's evaluation of ScienceQA does (``llava/eval/eval_science_qa.py``).

    The first rule that fits: the text is a letter from A to E (``B``); it begins with one (``B. gravity``);
    ``The answer is B.`` occurs once, where any letter may stand and, as there, any character for the full stop.

    White space around the text is dropped, as LLaVA does when it writes its answers. What is not known here is how many
    options a question has: LLaVA takes a letter beyond them for no answer, here it is a wrong one. The accuracy is the
    same.

    Example:
        >>> [chosen_letter(text) for text in ("B", "B. gravity", "Mass. The answer is B.", "gravity")]
        ['B', 'B', 'B', None]
    """
    text = text.strip()
    if _FIRST.match(text):
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


class MultipleChoice(RowMetric):
    """Share of questions whose letter is right; an answer without a letter is wrong, and counted.

    Questions whose own answer is no letter are not multiple choice and left out: ``questions`` says how many counted.
    ScienceQA's data set here holds the questions with an image alone, so this is LLaVA's ``IMG-Accuracy``.

    Args:
        prefix: Put before the name of every value.
    """

    higher_is_better = True

    def update(self, predictions: list[str], answers: list[str], ids: Tensor | None = None) -> None:
        """Adds B texts, the right answers to their questions, and ids, shape (B,), by which questions are told apart.

        An id that comes twice, as where ranks share a last batch, counts once. Without ids every question counts.

        Raises:
            ValueError: If there are not as many of each.
        """
        if len(predictions) != len(answers) or (ids is not None and len(ids) != len(answers)):
            numbers = f"{len(predictions)} predictions" + ("" if ids is None else f" and {len(ids)} ids")
            raise ValueError(f"{numbers} for {len(answers)} answers: give one for each.")
        right, chosen = [chosen_letter(text) for text in answers], [chosen_letter(text) for text in predictions]
        asked = [row for row, letter in enumerate(right) if letter is not None]
        rows = [(int(chosen[row] == right[row]), int(chosen[row] is None)) for row in asked]
        self.add_rows(rows, None if ids is None else ids[asked])

    def compute(self) -> dict[str, Tensor]:
        """``IMG-Accuracy`` in [0, 1], ``unparsable`` and ``questions``; nothing where no question came.

        Raises:
            ValueError: If an id came with different answers, or some questions have an id and others none.
        """
        rows = self.distinct_rows()
        if len(rows) == 0:
            return {}
        correct, unparsable = rows.sum(dim=0)
        questions = unparsable.new_tensor(len(rows))
        values = {"IMG-Accuracy": correct / questions, "unparsable": unparsable, "questions": questions}
        return {self.prefix + name: value.float() for name, value in values.items()}
