"""The letter of an answer, and the share of right ones."""

import re

import pytest
import torch

from gmail_lightning.metrics import MultipleChoice, chosen_letter


def peer(text: str) -> str | None:
    """LLaVA's rules, written as it writes them, for the text without white space around it."""
    options = ["A", "B", "C", "D", "E"]
    if text in options:
        return text
    if len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        return text[0]
    found = re.findall("The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C \n", "C"),
        ("E", "E"),
        ("F", None),
        ("I", None),
        ("D. copper", "D"),
        ("F. copper", None),
        ("D. copper. The answer is A.", "D"),
        ("The answer is A.", "A"),
        ("The answer is F.", "F"),
        ("The answer is A, as iron conducts", "A"),
        ("The answer is A\nBECAUSE: iron conducts", None),
        ("Iron conducts. The answer is B. BECAUSE: it does", "B"),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is A", None),
        ("the answer is a.", None),
        ("B) gravity", None),
        ("B.gravity", None),
        ("Because. B", None),
        ("AB", None),
        ("A.", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter == peer(text.strip())


def test_accuracy_counts_what_cannot_be_read_as_wrong() -> None:
    metric = MultipleChoice(prefix="generated_")
    metric.update([], [])
    assert metric.compute() == {}
    metric.reset()
    metric.update(["A", "B. iron", "no idea"], ["The answer is A.", "C", "B"])
    metric.update(["The answer is C.", "a red hand"], ["C", "a hand, red"])  # the last is no multiple choice
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {"generated_IMG-Accuracy": 0.5, "generated_unparsable": 1, "generated_questions": 4}
    with pytest.raises(ValueError, match="1 predictions for 2 answers"):
        metric.update(["A"], ["A", "B"])


def test_a_question_that_comes_twice_counts_once() -> None:
    metric = MultipleChoice()
    metric.update(["A", "B", "no idea", "A"], ["A", "C", "B", "not a letter"], ids=torch.tensor([4, 2, 9, 1]))
    metric.update(["no idea", "A"], ["B", "A"], ids=torch.tensor([9, 4]))
    metric.update([], [], ids=torch.tensor([], dtype=torch.int64))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {"IMG-Accuracy": pytest.approx(1 / 3), "unparsable": 1, "questions": 3}
    metric.update(["C"], ["A"], ids=torch.tensor([4]))
    with pytest.raises(ValueError, match="id 4 came twice with different values"):
        metric.compute()
    with pytest.raises(ValueError, match="1 predictions and 2 ids for 1 answers"):
        metric.update(["A"], ["A"], ids=torch.arange(2))
    metric.reset()
    metric.update(["A"], ["A"])
    metric.update(["A", "A"], ["A", "A"], ids=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="2 ids for 3 rows: give ids in every update or in none"):
        metric.compute()
