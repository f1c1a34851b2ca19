"""METEOR with the paraphrases that can act against METEOR with all of them."""

import functools
import gzip
import os
import shutil
import tempfile
import time

import numpy as np
import pytest

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.metrics.captioning import meteor
from gmail_lightning.metrics.captioning.java_tools import METEOR_JAR, JavaError, packaged, ptb_tokenize_java, run_java
from gmail_lightning.metrics.captioning.meteor import PARAPHRASES, cut_table, load_table, meteor_scores

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
WORDS = [
    "man",
    "guy",
    "person",
    "is",
    "was",
    "riding",
    "sitting",
    "on",
    "upon",
    "a",
    "the",
    "horse",
    "pony",
    "in",
    "front",
]
WORDS += ["of", "near", "t", "shirt", "us", "u.s.", "'s", "don't"]


def soon(seconds: float = 120.0) -> float:
    return time.monotonic() + seconds


def random_phrase(rng: np.random.Generator, longest: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """Thousands of paraphrases among few words in the place of METEOR's own; an empty cache."""
    rng = np.random.default_rng(0)
    pairs = {(random_phrase(rng, 3), random_phrase(rng, 3)) for _ in range(2000)}
    entries = [(f"0.{i}", *pair) for i, pair in enumerate(sorted(pairs, key=lambda pair: hash_of(pair)))]
    path = tmp_path / "a table.gz"
    path.write_bytes(gzip.compress("".join("\n".join(entry) + "\n" for entry in entries).encode()))
    monkeypatch.setattr(meteor, "packaged", lambda name: path if name == PARAPHRASES else packaged(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    return path, entries


def hash_of(pair: tuple[str, str]) -> int:
    """An order that is the same in every run and is not that of the alphabet."""
    return sum(ord(c) * 31**i for i, c in enumerate(" | ".join(pair))) % 10007


def reference_scores(hypotheses, references, table):
    """The jar as pycocoevalcap calls it, with a table."""
    lines = "".join(f"SCORE ||| {' ||| '.join([*r, h])}\n" for h, r in zip(hypotheses, references, strict=True))
    program = ["-jar", str(packaged(METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(table)]
    statistics = run_java(program, lines, deadline=soon()).splitlines()
    answer = run_java(program, f"EVAL ||| {' ||| '.join(statistics)}\n", deadline=soon())
    scores = [float(line) for line in answer.split()]
    return scores[-1], scores[:-1]


def test_the_cut_keeps_what_occurs(small_table) -> None:
    path, entries = small_table
    rng = np.random.default_rng(1)
    captions = [random_phrase(rng, 12) for _ in range(30)] + ["", "horse"]
    words = [f" {caption} " for caption in captions]
    expected: dict[str, list[str]] = {}
    for _, first, second in entries:
        if all(any(f" {phrase} " in caption for caption in words) for phrase in (first, second)):
            expected.setdefault(first, []).append(second)
    lines = gzip.decompress(cut_table(load_table(path), captions)).decode().splitlines()
    actual: dict[str, list[str]] = {}
    for first, second in zip(lines[1::3], lines[2::3], strict=True):
        actual.setdefault(first, []).append(second)
    assert actual == expected  # with the order of the paraphrases of each phrase
    kept = sum(map(len, expected.values()))
    assert 200 < kept < len(entries) - 200
    assert cut_table(load_table(path), ["no such words", ""]) == gzip.compress(b"", 1)


@pytest.mark.slow
@needs_java
def test_scores_equal_those_with_the_whole_table(small_table) -> None:
    path, _ = small_table
    rng = np.random.default_rng(2)
    hypotheses = [random_phrase(rng, 12) for _ in range(60)]
    references = [[random_phrase(rng, 12) for _ in range(rng.integers(1, 5))] for _ in range(60)]
    hypotheses[:3], references[3], references[4] = ["", "mr. smith 's dog", "x-ray é ½ 3.5"], [""], ["", "a horse"]
    corpus, images = reference_scores(hypotheses, references, path)
    score, scores = meteor_scores(hypotheses, references, deadline=soon())
    assert (score, scores.tolist()) == (corpus, images)
    assert images != reference_scores(hypotheses, references, os.devnull)[1]  # the paraphrases matter


@pytest.mark.slow
@needs_java
def test_scores_equal_pycocoevalcap(tmp_path, monkeypatch) -> None:
    """The one test with METEOR's own table, which takes the jar ten seconds to read."""
    from pycocoevalcap.meteor.meteor import Meteor

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = EmojiDataset("noto", "novel")
    captions = [[text.lower() for text in data.captions(i)] for i in range(0, 240, 2)]
    hypotheses, references = [row[-1] for row in captions], [row[:-1] for row in captions]
    hypotheses += ["a man is sitting on a bench in front of the building", "the man 's t-shirt is u.s. made", "a"]
    references += [["a guy sits on a seat before the house", "a person on a bench near a building"]]
    references += [["a t-shirt of the man made in the us", "the guy does n't wear a 3.5 shirt"], ["the"]]
    theirs = Meteor()
    corpus, images = theirs.compute_score(dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)})
    del theirs
    score, scores = meteor_scores(hypotheses, references, deadline=soon())
    assert (score, scores.tolist()) == (corpus, images)
    assert 0.05 < score < 1
    assert len(set(images)) > 20


@needs_java
def test_plain_words_pass_the_normaliser_unchanged() -> None:
    """What makes it right to send only other captions through it."""
    rng = np.random.default_rng(3)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    lines = [" ".join("".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(8)) for _ in range(500)]
    lines += ["no", "mr smith", "nos 5", "a b c", "dotmulti 5"]
    assert all(meteor.PLAIN.fullmatch(line) for line in lines)
    program = ("-cp", str(packaged(METEOR_JAR)), "edu.cmu.meteor.util.Normalizer", "en", "true")
    assert run_java(program, "\n".join(lines) + "\n", deadline=soon()).splitlines() == lines
    for text in ("a-b", "it's", "u.s.", "é", "A", "a,b", "a\u00a0b", "½", "a_b"):
        assert not meteor.PLAIN.fullmatch(text)


@pytest.mark.slow
@needs_java
@pytest.mark.usefixtures("small_table")
def test_separators_long_captions_and_odd_characters(monkeypatch) -> None:
    long = " ".join(f"word{i}" for i in range(10_000))
    tokens = ptb_tokenize_java(
        ["a ||| man ||| ", f"the horse {long}", "a \U0001f600 man \u2028 is", ""], deadline=soon()
    )
    rows = [("a man", ["the ||| horse", "a man |||"]), ("a ||| man", ["the horse", "a man"]), ("a man", ["a man"])]
    rows += [(token, ["the horse is in front of a man", tokens[2]]) for token in tokens]
    _, scores = meteor_scores([row[0] for row in rows], [row[1] for row in rows], deadline=soon())
    assert scores[0] == scores[1] == scores[2] == 1  # as if it were not there
    assert 0 < scores[4] < 0.1 < scores[3] < 1
    assert scores[5] == 1
    assert scores[6] == 0
    monkeypatch.setattr(meteor, "run_java", functools.partial(run_java, heap="64M"))  # 2 GB would not do, but take long
    with pytest.raises(JavaError, match="OutOfMemoryError"):  # its search copies the sentence for every choice
        meteor_scores(["the horse " * 5000], [["the horse is in front of the man", "a man"]], deadline=soon())


def test_the_table_is_cached_by_its_content(small_table, tmp_path, monkeypatch) -> None:
    path, entries = small_table
    folder = tmp_path / "a cache" / "gmail_lightning"
    table = load_table(path)
    (cached,) = folder.iterdir()
    reads: list[object] = []
    read = meteor._read_table
    monkeypatch.setattr(meteor, "_read_table", lambda source: (reads.append(source), read(source))[1])
    assert load_table(path).equals(table)
    assert reads == []
    cached.write_bytes(cached.read_bytes()[:1000])  # as a full disk might leave it
    assert load_table(path).equals(table)
    assert load_table(path).equals(table)
    assert len(reads) == 1
    path.write_bytes(gzip.compress("".join("\n".join(entry) + "\n" for entry in entries[:50]).encode()))
    assert 0 < len(load_table(path)) <= 100  # another table: the cached one is not used
    assert len(reads) == len(list(folder.iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert 0 < len(load_table(path)) <= 100
    path.write_bytes(gzip.compress(b"0.5\na man\n"))
    with pytest.raises(JavaError, match="2 lines, expected three for each paraphrase"):
        load_table(path)


@pytest.mark.slow
@needs_java
def test_without_a_temporary_folder_the_whole_table_is_used(small_table, tmp_path, monkeypatch) -> None:
    path, _ = small_table
    hypotheses, references = ["a guy is on a pony", "the man"], [["the man was riding the horse"], ["a person"]]
    expected = reference_scores(hypotheses, references, path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    score, scores = meteor_scores(hypotheses, references, deadline=soon())
    assert (score, scores.tolist()) == expected


@pytest.mark.usefixtures("small_table")
def test_answers_that_do_not_fit_are_refused(monkeypatch) -> None:
    for answers, message in [
        ([""], "answered 0 lines for 2 images"),
        (["1\n2\n", "1.0\n0.5\n"], "answered 2 scores for 2 images"),
        (["1\n2\n", "1.0\nError: specify\n0.5\n"], "not a number"),
    ]:
        left = list(answers)
        monkeypatch.setattr(meteor, "run_java", lambda *args, left=left, **kwargs: left.pop(0))
        with pytest.raises(JavaError, match=message):
            meteor_scores(["a man", "a horse"], [["a man"], ["a horse"]], deadline=soon())
