"""ScienceQA in both its forms, and its questions on their way into a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import DataError, EmojiDataset, FeatureStore, ScienceQA
from gmail_lightning.datasets.store_files import FEATURES
from gmail_lightning.generation.array_store import ArrayStore
from gmail_lightning.generation.rows import store_columns
from gmail_lightning.types import ImageSpec, InputSpec

PROBLEMS = {
    "5": {
        "question": "Which property do these two objects  have in common?", "choices": ["salty", "hard"], "answer": 1,
        "hint": "Select the better answer.", "image": "image.png", "split": "test",
    },
    "8": {"question": "Which is a noun?", "choices": ["run", "dog", "red"], "answer": 1, "hint": "", "image": None},
    "12": {"question": "What is shown?", "choices": ["A", "B", "C"], "answer": 0, "hint": "", "image": "choice.png"},
    "20": {"question": "Where?", "choices": ["here", "there"], "answer": 0, "hint": "", "image": "image.png"},
}  # fmt: skip
FIRST = "Context: Select the better answer.\nQuestion: Which property do these two objects have in common?\nOptions: "
FIRST += "(A) salty (B) hard"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    from torchvision.io import write_png

    for number, (pid, problem) in enumerate(PROBLEMS.items()):
        if problem["image"]:
            folder = tmp_path / "images" / pid
            folder.mkdir(parents=True)
            write_png(torch.full((3, 4, 6), 40 * number, dtype=torch.uint8), str(folder / problem["image"]))
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["20"], "test": ["5", "8", "12"]}))
    return tmp_path


def llava_file(root: Path, entries: list[dict[str, Any]]) -> Path:
    path = root / "llava_test_CQM-A.json"
    path.write_text(json.dumps(entries))
    return path


def test_problems_and_llavas_file_of_them_give_the_same_rows(root: Path) -> None:
    problems = ScienceQA(root / "problems.json", root / "images", subset=True)
    assert len(problems) == 2
    assert problems.summary is not None
    assert "2 questions with an image; 1 without are left out" in problems.summary
    assert problems.question(0) == FIRST
    assert problems.question(1) == "Context: N/A\nQuestion: What is shown?\nOptions: (A) A (B) B (C) C"
    assert [problems.captions(i) for i in range(2)] == [["The answer is B."], ["The answer is A."]]
    assert torch.equal(problems.image(1).unique(), torch.tensor([80], dtype=torch.uint8))
    assert (problems.sample_key(1), problems.split) == ("12", "test")

    entries = [
        {
            "id": pid,
            **({"image": f"{pid}/{PROBLEMS[pid]['image']}"} if i is not None else {}),
            "conversations": [
                {"from": "human", "value": f"{problems.question(i)}\n<image>" if i is not None else "Which is a noun?"},
                {"from": "gpt", "value": problems.captions(i)[0] if i is not None else "The answer is B."},
            ],
        }
        for pid, i in (("5", 0), ("8", None), ("12", 1))
    ]
    listed = ScienceQA(llava_file(root, entries), root / "images")
    for i in range(2):
        assert listed.question(i) == problems.question(i)
        assert listed.captions(i) == problems.captions(i)
        assert listed.sample_key(i) == problems.sample_key(i)
    assert listed.image_id.tolist() == problems.image_id.tolist()


def test_instruction_letter_and_split(root: Path) -> None:
    made = ScienceQA(
        root / "problems.json", root / "images", "train", "Answer with the letter.", answer="letter", subset=True
    )
    assert made.captions(0) == ["A"]
    assert made.question(0).endswith("Options: (A) here (B) there\nAnswer with the letter.")
    assert made.split == "train"


def test_what_is_no_scienceqa_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="no such annotation file"):
        ScienceQA(root / "nothing.json", root / "images")
    with pytest.raises(DataError, match=r"(?s)neither problems\.json.*'val'"):
        ScienceQA(root / "problems.json", root / "images", "val")
    with pytest.raises(DataError, match=r"no question has|none of its 1 questions"):
        ScienceQA(
            llava_file(
                root, [{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
            ),
            root,
        )
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    with pytest.raises(DataError, match="one question and one answer"):
        ScienceQA(llava_file(root, [{"id": 1, "image": "x.png", "conversations": turns}]), root)
    with pytest.raises(ValueError, match="'all' is train, val or test"):
        ScienceQA(root / "problems.json", root / "images", "all")
    (root / "problems.json").write_text(json.dumps({"5": {**PROBLEMS["5"], "answer": 2}, "8": {}, "12": {}}))
    with pytest.raises(DataError, match="neither problems"):
        ScienceQA(root / "problems.json", root / "images")


def test_questions_reach_the_batches_of_training_and_evaluation(root: Path) -> None:
    trained, tested = (
        ScienceQA(root / "problems.json", root / "images", split, subset=True) for split in ("train", "test")
    )
    plain = EmojiDataset("noto", "novel")
    data = MixedModalityDataModule(
        [trained, plain], {"qa": [tested], "emoji": [plain]}, mode="mixture", generated_fraction=0.0,
        batch_size=len(plain) + 1, input_spec=InputSpec(image=ImageSpec((8, 8), "squash")),
        allow_overlap={"emoji": AllowedOverlap(["caption", "image_id", "pixels"], "the same drawings")},
    )  # fmt: skip
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    asked = dict(zip(batch["sample_key"], batch["question"], strict=True))
    assert {key: question for key, question in asked.items() if question} == {"20": trained.question(0)}
    assert len(asked) == len(plain) + 1
    assert dict(zip(batch["sample_key"], batch["caption"], strict=True))["20"] == "The answer is A."
    qa, emoji = data.val_dataloader()
    batch = next(iter(qa))
    assert dict(zip(batch["sample_key"], batch["question"], strict=True)) == {
        "5": tested.question(0),
        "12": tested.question(1),
    }
    assert dict(zip(batch["sample_key"], batch["references"], strict=True))["12"] == ["The answer is A."]
    assert "question" not in next(iter(emoji))


def test_a_store_of_features_asks_what_its_data_set_asks(root: Path) -> None:
    questions = ScienceQA(root / "problems.json", root / "images", subset=True)
    keys = store_columns([(questions, 0), (questions, 1)])
    made = ArrayStore(root / "store", FEATURES, keys, {"branches": {}})
    made.begin()
    made.parts.add(np.arange(2), {"features": np.ones((2, 3), dtype=np.float16)})
    made.parts.flush()
    made.finish()
    store = FeatureStore(root / "store", questions)
    assert store.has_questions
    assert [store.question(i) for i in range(2)] == [questions.question(i) for i in range(2)]
