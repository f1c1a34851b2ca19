"""BLEU, ROUGE-L and CIDEr against pycocoevalcap: every float equal."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from gmail_lightning.metrics.captioning import ngram_tables
from gmail_lightning.metrics.captioning.ngram_matches import ReferenceNgrams
from gmail_lightning.metrics.captioning.ngram_tables import HashIndex, Tokens
from gmail_lightning.metrics.captioning.ngrams import NGRAM_METRICS, ngram_scores

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", "ROUGE_L"]


def peer(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    truth = {i: list(captions) for i, captions in enumerate(references)}
    answer = {i: [caption] for i, caption in enumerate(hypotheses)}
    bleu = Bleu(4).compute_score(truth, answer, verbose=0)
    corpus = {f"Bleu_{k + 1}": score for k, score in enumerate(bleu[0])}
    images = {f"Bleu_{k + 1}": list(scores) for k, scores in enumerate(bleu[1])}
    for name, metric in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        corpus[name], scores = metric.compute_score(truth, answer)
        images[name] = scores.tolist()
    return corpus, images


def assert_equal_floats(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    corpus, images = ngram_scores(hypotheses, references)
    expected_corpus, expected_images = peer(hypotheses, references)
    assert corpus == expected_corpus
    assert {name: scores.tolist() for name, scores in images.items()} == expected_images
    assert all(type(score) is float for score in corpus.values())
    assert all(scores.dtype == np.float64 for scores in images.values())


def captions(rng: random.Random, vocabulary: int, lengths: Sequence[int], odd: bool = False) -> Callable[[], str]:
    """Draws captions with a few frequent and many rare words; odd ones hold white space that is not a single space."""

    def draw() -> str:
        words = [f"w{int(rng.random() ** 3 * vocabulary)}" for _ in range(rng.choice(lengths))]
        if odd and words and rng.random() < 0.3:
            words[rng.randrange(len(words))] = rng.choice(["", "1\xa01/2", "\u2028", "a\tb", "c\x1cd", "\x85"])
        return " ".join(words)

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("vocabulary", [2, 20, 2000])
def test_random_corpora(vocabulary: int, odd: bool) -> None:
    rng = random.Random(vocabulary)
    draw = captions(rng, vocabulary, [0, 1, 2, 3, 4, 6, 9, 12, 20], odd)
    for images in (1, 2, 3, 10, 150):
        references = [[draw() for _ in range(rng.choice([1, 2, 5, 7]))] for _ in range(images)]
        references[0][0] = "w0"  # pycocoevalcap fails where no reference has a word
        assert_equal_floats([draw() for _ in range(images)], references)


def test_copies_strangers_and_nothing() -> None:
    references = [["a b c d e", "a b c"], ["dog"], ["x y", "y x", ""], ["one two three four five"]]
    for hypotheses in (
        ["a b c d e", "dog", "x y", "one two three four five"],
        ["q", "r s", "t u v w", "z"],
        ["", "", "", ""],
        ["a a a a a", "dog dog", "y y x x", "five four three two one"],
    ):
        assert_equal_floats(hypotheses, references)


@pytest.mark.parametrize("hypothesis", ["", "a", "a dog runs in the snow", "q r s t"])
@pytest.mark.parametrize("references", [["a"], ["a dog runs in the snow"], ["", "dogs run"], ["a cat"] * 5])
def test_one_image_and_images_without_any_answer(hypothesis: str, references: list[str]) -> None:
    """Of one image every idf is log 1 = 0, and so is CIDEr."""
    assert_equal_floats([hypothesis], [references])
    assert_equal_floats([hypothesis] * 3, [references, ["two cats"], ["two", "dogs"]])
    assert ngram_scores([hypothesis], [references])[0]["CIDEr"] == 0.0
    assert_equal_floats(["", ""], [references, ["two cats", "a cat"]])


@pytest.mark.slow
def test_hypotheses_longer_than_a_machine_word() -> None:
    rng = random.Random(0)
    draw = captions(rng, 9, [1, 62, 63, 64, 65, 66, 130])
    assert_equal_floats([draw() for _ in range(40)], [[draw(), draw()] for _ in range(40)])


@pytest.mark.slow
def test_ten_thousand_words() -> None:
    rng = random.Random(0)
    short, long = captions(rng, 50, [5, 10]), captions(rng, 50, [10_000])
    hypotheses = [short(), long(), "dog " * 9_999 + "dog", long()]
    references = [[short(), long()], [short()], ["dog " * 8_999 + "dog"], [long()]]
    corpus, images = ngram_scores(hypotheses, references)
    ours = [corpus[f"Bleu_{k}"] for k in (1, 2, 3, 4)]
    truth, answer = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(hypotheses)}
    assert ours == Bleu(4).compute_score(truth, answer, verbose=0)[0]
    assert images["CIDEr"].tolist() == Cider().compute_score(truth, answer)[1].tolist()
    # ROUGE-L by hand, because a table of 10,000 x 10,000 takes the reference code minutes: all 9000 are in common
    precision, recall, beta = 9_000 / 10_000, 1.0, 1.2**2
    assert images["ROUGE_L"][2] == ((1 + beta) * precision * recall) / (recall + beta * precision)


def test_no_reference_has_a_word() -> None:
    corpus, images = ngram_scores(["a dog"], [["", ""]])
    assert corpus["CIDEr"] == 0.0  # pycocoevalcap fails here
    assert images["ROUGE_L"].tolist() == [0.0]
    assert corpus["Bleu_1"] == pytest.approx(0.0, abs=1e-12)


def test_kept_tables_give_the_same_floats() -> None:
    draw = captions(random.Random(3), 100, [0, 3, 8, 12])
    references = [[draw(), draw(), "w1"] for _ in range(30)]
    tables = ReferenceNgrams(references)
    assert len(tables) == 30
    for _ in range(3):
        hypotheses = [draw() for _ in range(30)]
        kept, fresh = ngram_scores(hypotheses, tables), ngram_scores(hypotheses, references)
        assert kept[0] == fresh[0] == peer(hypotheses, references)[0]
        assert all((kept[1][name] == fresh[1][name]).all() for name in NAMES)


def test_each_metric_alone() -> None:
    draw = captions(random.Random(4), 30, [0, 5, 9])
    hypotheses, references = [draw() for _ in range(20)], [[draw(), "w0 w1"] for _ in range(20)]
    together, _ = ngram_scores(hypotheses, references)
    alone: dict[str, float] = {}
    for metric in NGRAM_METRICS:
        corpus, images = ngram_scores(hypotheses, references, [metric])
        assert corpus.keys() == images.keys()
        alone |= corpus
    assert alone == together
    assert sorted(alone) == NAMES
    assert ngram_scores(hypotheses, references, []) == ({}, {})


@pytest.mark.parametrize(
    ("hypotheses", "references", "metrics", "message"),
    [
        (
            ["a"],
            [["a"]],
            ["bleu", "meteor"],
            r"Unknown metrics \['meteor'\]. Available are \['bleu', 'rouge', 'cider'\]",
        ),
        (["a", "b"], [["a"]], ["bleu"], "one hypothesis per image, got 2 for 1 images"),
        (["a", "b"], [["a"], []], ["bleu"], r"Image 1 needs a list of at least one reference, got \[\]"),
        (["a"], ["a cat"], ["bleu"], "Image 0 needs a list of at least one reference, got 'a cat'"),
        ([], [], ["bleu"], "at least one image, got none"),
        ([None], [["a"]], ["bleu"], "Caption 0 is None"),
        (["a"], [["a", None]], ["rouge"], "Caption 1 is None"),
    ],
)
def test_errors(hypotheses: list, references: list, metrics: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram_scores(hypotheses, references, metrics)


INVERSE = pow(ngram_tables._ODD, -1, 1 << 64)


@pytest.mark.parametrize(
    "distinct",
    [
        list(range(700)),
        [i << 40 for i in range(700)],
        [key for i in range(700) if (key := i * INVERSE % (1 << 64)) < 1 << 63],  # all in one slot at first
    ],
    ids=["neighbours", "multiples", "colliding"],
)
def test_hash_index(distinct: list[int]) -> None:
    """Ids as a dict gives them, also for keys whose products share their upper bits."""
    rng = np.random.default_rng(0)
    keys = rng.choice(distinct, 5000)
    index = HashIndex(keys)
    known: dict[int, int] = {}
    expected = [known.setdefault(key, len(known)) for key in keys.tolist()]
    assert index.ids.tolist() == expected
    assert index.first.tolist() == [keys.tolist().index(key) for key in known]
    assert len(index) == len(known)
    wanted = np.concatenate([keys[:10], rng.integers(0, 1 << 62, 1000), [-1]])
    assert index.find(wanted).tolist() == [known.get(key, -1) for key in wanted.tolist()]


def test_hash_index_of_some_keys_and_of_none() -> None:
    index = HashIndex(np.array([5, 7, 5, 9, 7]), among=np.array([0, 2, 3]))
    assert index.ids.tolist() == [0, 1, 0, 2, 3]  # the sevens are taken for distinct
    assert index.find(np.array([5, 7, 9])).tolist() == [0, -1, 2]
    empty = HashIndex(np.empty(0, np.int64))
    assert len(empty) == 0
    assert empty.find(np.array([3])).tolist() == [-1]


def test_tokens_split_as_python_does() -> None:
    texts = ["a b a", "", "a  b", "1\xa01/2 c", "\u2028", "c"]
    tokens = Tokens.split(texts)
    for split, parts in ((tokens, [t.split(" ") for t in texts]), (tokens.words(), [t.split() for t in texts])):
        assert split.lengths.tolist() == [len(words) for words in parts]
        vocabulary = split.vocabulary.to_pylist()
        assert [vocabulary[i] for i in split.ids] == [word for words in parts for word in words]
