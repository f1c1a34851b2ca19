"""The letter of an answer, and the share of right ones."""

import pytest

from gmail_lightning.metrics import MultipleChoice, chosen_letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" C \n", "C"),
        ("D. copper", "D"),
        ("The answer is A.", "A"),
        ("Iron conducts. The answer is B. BECAUSE: it does", "B"),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is A", None),
        ("the answer is a.", None),
        ("B) gravity", None),
        ("Because. B", None),
        ("AB", None),
        ("A.", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


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
