"""ScienceQA: multiple choice questions about images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor

from gmail_lightning.datasets.base import (
    DataError,
    ImageTextDataset,
    constant_modality,
    decode_image,
    own_pair_ids,
)
from gmail_lightning.datasets.ids import file_ids
from gmail_lightning.datasets.protocols import compare_counts, subset_of
from gmail_lightning.datasets.tables.parsed import read_json

LETTERS = "ABCDE"
WITH_IMAGE = {"train": 6_218, "val": 2_097, "test": 2_017}  # questions as published
IMAGE = "<image>"  # LLaVA's placeholder; the captioner puts the image where its prompt wants it


class ScienceQA(ImageTextDataset):
    """Questions of ScienceQA (arXiv 2209.09513) with an image; the caption of a row is the answer to its question.

    Questions without an image are left out and counted in ``summary``: what GMAIL and LLaVA report as IMG-Accuracy is
    over the 2,017 of the test set that have one.

    Args:
        annotations: ``problems.json``, beside ``pid_splits.json``, or a file in LLaVA's form, such as
            ``llava_test_CQM-A.json``, whose questions and answers are taken as they are.
        image_root: Folder with ``PID/image.png``: ``images/test``.
        split: Of ``problems.json``; a file in LLaVA's form is one split, which this names.
        instruction: Put behind every question, such as ``Answer with the option's letter from the given choices
            directly.``, which LLaVA 1.5 was trained with.
        answer: Of ``problems.json``: ``sentence`` is ``The answer is B.``, as in LLaVA's files, ``letter`` is ``B``.
        subset: Whether the questions with an image may be others than the 6,218, 2,097 and 2,017 of ``problems.json``;
            ``summary`` says so. A file in LLaVA's form is taken as it is.

    Raises:
        DataError: If a file is missing or malformed, no question has an image, or the counts differ.
    """

    has_questions = True
    captions_are_classes = True  # a letter: training has the same

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        split: Literal["train", "val", "test"] = "test",
        instruction: str = "",
        answer: Literal["sentence", "letter"] = "sentence",
        subset: bool = False,
    ) -> None:
        if split not in ("train", "val", "test") or answer not in ("sentence", "letter"):
            raise ValueError(f"split={split!r} is train, val or test, and answer={answer!r} sentence or letter.")
        self.annotations, self.image_root, self.split = Path(annotations), Path(image_root), split
        content = read_json(self.annotations)
        splits = read_json(self.annotations.with_name("pid_splits.json")) if isinstance(content, dict) else {}
        try:
            if isinstance(content, dict):
                ids = splits[split]
                entries = [_problem(pid, content[pid], answer) for pid in ids]
            else:
                entries = [_conversation(entry) for entry in content]
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{annotations}: neither problems.json of ScienceQA with its pid_splits.json, nor a list of LLaVA's "
                f"conversations of one question and one answer ({error!r})."
            ) from error
        rows = [entry for entry in entries if entry["image"] is not None]
        if not rows:
            raise DataError(f"{annotations}: none of its {len(entries)} questions of the split {split!r} has an image.")
        name, expected = "", {"questions with an image": WITH_IMAGE[split]}
        if isinstance(content, dict):
            if not subset:
                fix = "Read problems.json and pid_splits.json as published, or say subset=True."
                compare_counts(annotations, "scienceqa", {"questions with an image": len(rows)}, expected, fix)
            name = f"{subset_of(expected) if subset else ''}protocol scienceqa, split {split}: "
        self.summary = (
            f"{annotations}: {name}{len(rows):,} questions with an image; {len(entries) - len(rows):,} without are "
            "left out."
        )
        questions = [f"{row['question']}\n{instruction}".strip() for row in rows]
        self._question, self._answer = pa.array(questions), pa.array([row["answer"] for row in rows])
        self._pid, self._file = pa.array([row["pid"] for row in rows]), pa.array([row["image"] for row in rows])
        self.image_id = file_ids(self.image_root, self._file.to_pylist(), "scienceqa")
        self.modality = constant_modality("real", len(rows))
        self.pair_id = own_pair_ids(self)

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image(self.image_file(index).read_bytes())

    def image_file(self, index: int) -> Path:  # noqa: D102
        return self.image_root / str(self._file[index])

    def file_ids(self) -> np.ndarray:  # noqa: D102
        return file_ids(self.image_root, self._file.to_pylist())

    def captions(self, index: int) -> list[str]:
        """Returns the answer."""
        return [self._answer[index].as_py()]

    def question(self, index: int) -> str:
        """Returns context, question and options."""
        text: str = self._question[index].as_py()
        return text

    def sample_key(self, index: int) -> str:
        """Returns the number of the problem."""
        key: str = self._pid[index].as_py()
        return key

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self.annotations} problem {self.sample_key(index)}"


def _problem(pid: str, problem: Mapping[str, Any], answer: str) -> dict[str, str | None]:
    """One problem in the form that LLaVA calls CQM-A: context, question and options, then the letter."""
    context = problem["hint"].strip() or "N/A"
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"]))
    question = f"Context: {context}\nQuestion: {problem['question']}\nOptions: {options}"
    letter = LETTERS[: len(problem["choices"])][problem["answer"]]
    return {
        "pid": pid,
        "image": None if problem["image"] is None else f"{pid}/{problem['image']}",
        "question": question.replace("  ", " "),
        "answer": letter if answer == "letter" else f"The answer is {letter}.",
    }


def _conversation(entry: Mapping[str, Any]) -> dict[str, str | None]:
    asked, answered = entry["conversations"]
    if (asked["from"], answered["from"]) != ("human", "gpt"):
        raise KeyError("human, gpt")
    return {
        "pid": str(entry["id"]),
        "image": entry.get("image"),
        "question": asked["value"].replace(IMAGE, "").strip(),
        "answer": answered["value"].strip(),
    }
