"""``CocoCaptionScore``: values of pycocoevalcap, each image once, and reasons where a value cannot be had."""

import contextlib
import gzip
import io
import shutil
import tempfile

import numpy as np
import pytest
import torch

from gmail_lightning.metrics import CocoCaptionScore
from gmail_lightning.metrics.captioning import coco_score, java_tools, meteor
from gmail_lightning.metrics.captioning.java_tools import JavaError
from gmail_lightning.metrics.captioning.ptb_tokenizer import ptb_tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
CAPTIONS = ["A man's riding a horse.", "two dogs run, in the snow", "A red bus!", "the cat (black) sleeps", "a tree"]
REFERENCES = [
    ["A man rides a brown horse.", "the man on a horse"],
    ["Two dogs are running in snow", "dogs play in the snow", "some dogs run"],
    ["a red double-decker bus", "The bus is red."],
    ["A black cat is asleep.", "the cat sleeps"],
    ["a green tree on a hill", "A tree"],
]
NGRAMS = ("bleu", "rouge", "cider")


def pycocoevalcap(hypotheses, references):
    """Values and per-image values of tokens."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, results = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleus = Bleu(4).compute_score(given, results)
        rouge, rouges = Rouge().compute_score(given, results)
        cider, ciders = Cider().compute_score(given, results)
    values = {f"Bleu_{k + 1}": (bleu[k], bleus[k]) for k in range(4)}
    return {**values, "ROUGE_L": (rouge, rouges), "CIDEr": (cider, ciders)}


def tokenized(captions=CAPTIONS, references=REFERENCES):
    return ptb_tokenize(captions), [ptb_tokenize(row) for row in references]


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)


def test_values_are_those_of_pycocoevalcap() -> None:
    metric = CocoCaptionScore(NGRAMS, prefix="generated_", tokenizer="python")
    for rows in ([3], [], [4, 0], [2, 1]):
        ids = 10 * torch.tensor(rows, dtype=torch.int64)
        metric.update([CAPTIONS[i] for i in rows], [REFERENCES[i] for i in rows], ids)
    values = metric.compute()
    expected = pycocoevalcap(*tokenized())
    assert values == {f"generated_{name}": value for name, (value, _) in expected.items()}
    assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())
    assert 0 < values["generated_Bleu_4"] < values["generated_CIDEr"]
    for name, (_, scores) in expected.items():
        assert metric.per_image[f"generated_{name}"].tolist() == list(scores)
    assert metric.image_ids.tolist() == [0, 10, 20, 30, 40]
    assert (metric.reasons, metric.tokenizer_used) == ({}, "python")


def test_an_image_counts_once() -> None:
    once, twice = (CocoCaptionScore(NGRAMS, tokenizer="python") for _ in range(2))
    once.update(CAPTIONS, REFERENCES, torch.arange(5))
    twice.update(CAPTIONS[2:], REFERENCES[2:], torch.arange(2, 5))
    twice.update(CAPTIONS[:3], REFERENCES[:3], torch.arange(3))
    assert once.compute() == twice.compute()
    assert len(twice.per_image["CIDEr"]) == 5
    unnumbered = CocoCaptionScore(NGRAMS, tokenizer="python")
    unnumbered.update(CAPTIONS, REFERENCES)
    assert unnumbered.compute() == once.compute()
    unnumbered.update(CAPTIONS[:1], REFERENCES[:1])
    assert unnumbered.compute() != once.compute()
    assert unnumbered.image_ids.tolist() == [0, 1, 2, 3, 4, 5]
    twice.update(["another caption"], [REFERENCES[4]], torch.tensor([4]))
    with pytest.raises(ValueError, match=r"id 4 came twice with different captions: .*a tree.*another caption"):
        twice.compute()


def test_no_row_gives_no_value() -> None:
    metric = CocoCaptionScore(tokenizer="python")
    metric.update([], [])
    assert metric.compute() == {}
    metric.update([], [], torch.zeros(0, dtype=torch.int64))
    metric.update(CAPTIONS, REFERENCES, torch.arange(5))
    metric.reset()
    metric.update([], [])
    assert metric.compute() == {}


def test_wrong_input_is_refused() -> None:
    metric = CocoCaptionScore(NGRAMS)
    for captions, references, ids, error, message in [
        (["a"], [], None, ValueError, "got 1, 0 and None"),
        (["a"], [["b"]], torch.arange(2), ValueError, "got 1, 1 and 2"),
        (["a", "b"], [["c"], []], None, ValueError, "No references for the caption 'b'"),
        (["a"], ["b"], None, TypeError, "list of reference captions, got 'a' and 'b'"),
        (["a"], [["b", None]], None, TypeError, r"got 'a' and \['b', None\]"),
        ([3], [["b"]], None, TypeError, r"got 3 and"),
    ]:
        with pytest.raises(error, match=message):
            metric.update(captions, references, ids)
    metric.update(["a"], [["b"]], torch.arange(1))
    with pytest.raises(ValueError, match="ids in every update or in none"):
        metric.update(["a"], [["b"]])
    for arguments, message in [
        ({"metrics": ("bleu", "blue")}, "expected some of bleu, .*got .*'blue'"),
        ({"metrics": "bleu"}, "expected some of"),
        ({"metrics": ()}, "expected some of"),
        ({"tokenizer": "ptb"}, "expected one of auto, java, python, got 'ptb'"),
        ({"timeout": 0.0}, "seconds above 0, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            CocoCaptionScore(**arguments)


def test_planted_characters_and_lengths_are_harmless() -> None:
    """Line breaks are spaces; an empty caption and one of 10,000 words score as pycocoevalcap scores their tokens."""
    clean = [[f"a man riding a horse {i}" for i in range(5)], [[f"the man on horse {i}", "a man"] for i in range(5)]]
    planted = [
        [text.replace("man ", f"man{c}") for text, c in zip(clean[0], ["\n", "\r", "\u2028", "\v", "\f"], strict=True)],
        [[text.replace(" on ", "\u2028on\r\n") for text in row] for row in clean[1]],
    ]
    values = []
    for captions, references in (clean, planted):
        metric = CocoCaptionScore(NGRAMS, tokenizer="python")
        metric.update(captions, references)
        values.append(metric.compute())
    assert values[0] == values[1]
    captions = ["", "the horse " * 5000, "a \U0001f600 man ||| on a horse", "a man\ud800 on a horse", "  "]
    metric.reset()
    metric.update(captions, REFERENCES)
    captions[3] = "a man? on a horse"  # a lone surrogate is no text in any encoding
    expected = pycocoevalcap(*tokenized(captions))
    assert metric.compute() == {name: value for name, (value, _) in expected.items()}


@needs_java
def test_java_tokenizer_and_references_that_are_kept(monkeypatch) -> None:
    lines: list[int] = []
    tokenize = coco_score.ptb_tokenize_java
    monkeypatch.setattr(
        coco_score,
        "ptb_tokenize_java",
        lambda texts, **kwargs: (lines.append(len(texts)), tokenize(texts, **kwargs))[1],
    )
    metric = CocoCaptionScore(NGRAMS)
    metric.update(CAPTIONS, REFERENCES)
    values = metric.compute()
    assert values == {name: value for name, (value, _) in pycocoevalcap(*tokenized()).items()}
    assert metric.tokenizer_used == "java"
    metric.reset()
    metric.update(CAPTIONS[::-1], REFERENCES)
    other = metric.compute()
    fresh = CocoCaptionScore(NGRAMS, tokenizer="python")
    fresh.update(CAPTIONS[::-1], REFERENCES)
    assert other == fresh.compute() != values
    metric.reset()
    metric.update(CAPTIONS, [*REFERENCES[:4], ["a forest", "trees"]])
    assert metric.compute() != values
    assert lines == [5 + 11, 5, 5 + 11]


@pytest.mark.usefixtures("no_java")
def test_without_java_the_others_are_computed() -> None:
    metric = CocoCaptionScore(("bleu", "meteor", "rouge", "cider", "spice"))
    metric.update(CAPTIONS, REFERENCES)
    with pytest.warns(UserWarning, match="The Python tokenizer splits the captions, for that of Java: no java"):
        values = metric.compute()
    assert metric.tokenizer_used == "python"
    assert metric.reasons.keys() == {"METEOR", "SPICE"}
    assert "no java on the PATH" in metric.reasons["METEOR"]
    assert values.pop("METEOR").isnan()
    assert values.pop("SPICE").isnan()
    assert values == {name: value for name, (value, _) in pycocoevalcap(*tokenized()).items()}
    assert np.isnan(metric.per_image["METEOR"]).tolist() == [True] * 5


@pytest.mark.usefixtures("no_java")
def test_a_tokenizer_that_was_asked_for_is_not_replaced() -> None:
    metric = CocoCaptionScore(("bleu", "meteor"), prefix="x_", tokenizer="java")
    metric.update(CAPTIONS, REFERENCES)
    values = metric.compute()
    names = {"x_Bleu_1", "x_Bleu_2", "x_Bleu_3", "x_Bleu_4", "x_METEOR"}
    assert values.keys() == metric.reasons.keys() == metric.per_image.keys() == names
    assert all(value.isnan() for value in values.values())
    assert "the PTB tokenizer: no java" in metric.reasons["x_Bleu_1"]
    assert metric.tokenizer_used == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [(JavaError("killed"), "killed"), (MemoryError("full"), "MemoryError: full"), (ValueError("x"), "ValueError: x")],
)
def test_an_error_in_one_metric_leaves_the_others(monkeypatch, error, reason) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setitem(coco_score.JAVA_METRICS, "meteor", fail)
    monkeypatch.setitem(coco_score.JAVA_METRICS, "spice", lambda h, r, deadline: (0.25, np.full(len(h), 0.25)))
    metric = CocoCaptionScore(("bleu", "spice", "meteor"), tokenizer="python")
    metric.update(CAPTIONS, REFERENCES)
    values = metric.compute()
    assert values["METEOR"].isnan()
    assert metric.reasons == {"METEOR": reason}
    assert values["SPICE"] == 0.25
    assert values["Bleu_1"] == pycocoevalcap(*tokenized())["Bleu_1"][0]


@needs_java
def test_java_has_no_time() -> None:
    metric = CocoCaptionScore(("bleu", "meteor"), timeout=1e-9)
    metric.update(CAPTIONS, REFERENCES)
    with pytest.warns(UserWarning, match="no time left"):
        values = metric.compute()
    assert values["METEOR"].isnan()
    assert values["Bleu_1"] > 0.5
    assert metric.reasons == {"METEOR": "no time left (raise the timeout of the Java tools)"}


@needs_java
def test_nowhere_to_write(tmp_path, monkeypatch) -> None:
    """Neither temporary files nor a cache: SPICE alone cannot do without."""
    small_table(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for name in (java_tools.SPICE_JAR, *java_tools.SPICE_MODELS):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).touch()
    packaged = java_tools.packaged
    monkeypatch.setattr(
        java_tools, "packaged", lambda name: tmp_path / "package" / name if "spice" in name else packaged(name)
    )
    metric = CocoCaptionScore(("bleu", "meteor", "spice"))
    metric.update(CAPTIONS, REFERENCES)
    values = metric.compute()
    assert values.pop("SPICE").isnan()
    assert 0 < values["METEOR"] < 1  # the jar reads the whole table, as no cut one can be written
    assert values["Bleu_1"] == pycocoevalcap(*tokenized())["Bleu_1"][0]
    assert metric.tokenizer_used == "java"
    assert metric.reasons.keys() == {"SPICE"}
    assert metric.reasons["SPICE"].startswith("SPICE works on files, and ")


def test_java_that_dies_leaves_the_others(tmp_path, monkeypatch, fake_java) -> None:
    """The child is killed when it has read everything, first for the tokens and then for METEOR."""
    small_table(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    java = fake_java(
        "text = sys.stdin.read()\n"
        "open(os.path.join(os.path.dirname(__file__), 'calls'), 'a').write(f'{len(text.splitlines())} ')\n"
        "os.kill(os.getpid(), 9)"
    )
    metric = CocoCaptionScore(("bleu", "meteor", "rouge", "cider"), prefix="x_")
    metric.update(CAPTIONS, REFERENCES, torch.arange(5))
    with pytest.warns(UserWarning, match="The Python tokenizer splits the captions, .* killed by signal 9"):
        values = metric.compute()
    assert java.with_name("calls").read_text().split() == [str(2 * (5 + 11)), str(apostrophes_and_hyphens())]
    assert metric.reasons.keys() == {"x_METEOR"}
    assert "Java was killed by signal 9" in metric.reasons["x_METEOR"]
    assert values.pop("x_METEOR").isnan()
    assert np.isnan(metric.per_image["x_METEOR"]).tolist() == [True] * 5
    assert values == {f"x_{name}": value for name, (value, _) in pycocoevalcap(*tokenized()).items()}
    assert metric.tokenizer_used == "python"


def apostrophes_and_hyphens() -> int:
    """Captions that METEOR's normaliser is asked about."""
    captions, references = tokenized()
    return len({text for row in [captions, *references] for text in row if "'" in text or "-" in text})


def small_table(tmp_path, monkeypatch) -> None:
    """Two paraphrases in the place of METEOR's own, which take the jar ten seconds."""
    path, packaged = tmp_path / "paraphrases.gz", meteor.packaged
    path.write_bytes(gzip.compress(b"1\nman\nred bus\n1\nhill\nhorse\n"))
    monkeypatch.setattr(meteor, "packaged", lambda name: path if name == meteor.PARAPHRASES else packaged(name))
