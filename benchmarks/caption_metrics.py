"""BLEU, ROUGE-L, CIDEr and METEOR of 5,000 images with 5 references each against pycocoevalcap, and whether they agree.

    python benchmarks/caption_metrics.py

Time: CPU seconds of the process and of the Java programs that it starts, one thread, both ways in turn, medians; of the
n-gram metrics the first repetition is dropped. "First" builds the tables of the references, "warm" has them from an
evaluation before. METEOR's first call, which also makes the cache, is reported apart. Captions are synthetic: phrases
of METEOR's own table with Zipf frequencies, about ten words, half of them shared within an image, some of them replaced
by a paraphrase, so that the table has work to do. Needs Java; about five minutes.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import contextlib
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pyarrow.compute as pc
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from gmail_lightning.metrics.captioning.java_tools import packaged
from gmail_lightning.metrics.captioning.meteor import PARAPHRASES, load_table, meteor_scores
from gmail_lightning.metrics.captioning.ngram_matches import ReferenceNgrams
from gmail_lightning.metrics.captioning.ngrams import ngram_scores

IMAGES, REFERENCES, WORDS, PHRASES = 5000, 5, 10, 20_000
Scores = dict[str, np.ndarray]  # of the corpus first, then of each image


def captions() -> tuple[list[str], list[list[str]]]:
    """A hypothesis and references for each image."""
    table = load_table(packaged(PARAPHRASES))
    phrase, paraphrases = table["phrase"].combine_chunks(), table["paraphrases"].combine_chunks()
    plain = pc.match_substring_regex(phrase, "^[a-z]{2,}( [a-z]{2,}){0,2}$").to_numpy(zero_copy_only=False)
    count = np.diff(paraphrases.offsets.to_numpy()) * plain
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.argsort(-count, kind="stable")[:PHRASES])
    texts = phrase.take(rows).to_pylist()
    others = [[phrase[i].as_py() for i in paraphrases[row].as_py()[:3] if plain[i]] for row in rows.tolist()]
    weight = 1 / np.arange(1, PHRASES + 1) ** 1.05

    def draw(count: int) -> list[int]:
        return rng.choice(PHRASES, count, p=weight / weight.sum()).tolist()

    def caption(topic: list[int]) -> str:
        words: list[str] = []
        for i in [unit for pair in zip(draw(WORDS), rng.permutation(topic), strict=True) for unit in pair]:
            text = others[i][0] if others[i] and rng.random() < 0.3 else texts[i]
            words += text.split()
            if len(words) >= WORDS:
                break
        return " ".join(words)

    images = [[caption(topic) for _ in range(REFERENCES + 1)] for topic in (draw(WORDS) for _ in range(IMAGES))]
    return [row[0] for row in images], [row[1:] for row in images]


def cpu_seconds(function: Callable[[], Scores]) -> tuple[float, Scores]:
    def used() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    start = used()
    scores = function()
    return used() - start, scores


def compare(ways: dict[str, Callable[[], Scores]], repetitions: int) -> tuple[dict[str, float], dict[str, Scores]]:
    """Median CPU seconds, and the scores of the last repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, Scores] = {}
    for _ in range(repetitions):
        for name, way in ways.items():
            value, scores[name] = cpu_seconds(way)
            seconds[name].append(value)
    print(", ".join(f"{name} {min(s):.2f} to {max(s):.2f} s" for name, s in seconds.items()), flush=True)
    return {name: median(values[repetitions > 3 :]) for name, values in seconds.items()}, scores


def joined(corpus: dict[str, float], images: Scores) -> Scores:
    return {name: np.array([corpus[name], *images[name]]) for name in corpus}


def pycocoevalcap_ngrams(hypotheses: list[str], references: list[list[str]]) -> Scores:
    given, results = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleus = Bleu(4).compute_score(given, results)
        rouge, rouges = Rouge().compute_score(given, results)
        cider, ciders = Cider().compute_score(given, results)
    scores = {f"Bleu_{k + 1}": np.array([bleu[k], *bleus[k]]) for k in range(4)}
    return {**scores, "ROUGE_L": np.array([rouge, *rouges]), "CIDEr": np.array([cider, *ciders])}


def pycocoevalcap_meteor(hypotheses: list[str], references: list[list[str]]) -> Scores:
    meteor = Meteor()
    score, scores = meteor.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)})
    del meteor  # ends its program, whose time counts from then on
    return {"METEOR": np.array([score, *scores])}


def our_meteor(hypotheses: list[str], references: list[list[str]]) -> Scores:
    score, scores = meteor_scores(hypotheses, references, deadline=time.monotonic() + 600)
    return {"METEOR": np.array([score, *scores])}


def different(scores: Scores, expected: Scores) -> int:
    """Floats that are not equal; prints how many are."""
    equal = {name: int((scores[name] == expected[name]).sum()) for name in expected}
    print("equal floats: " + ", ".join(f"{name} {count} of {IMAGES + 1}" for name, count in equal.items()), flush=True)
    return sum(IMAGES + 1 - count for count in equal.values())


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        made, _ = cpu_seconds(lambda: {"rows": np.array(len(load_table(packaged(PARAPHRASES))))})
        print(f"METEOR's table is searchable after {made:.1f} s, once per machine")
        hypotheses, references = captions()
        words = [len(text.split()) for row in references for text in row]
        print(f"{IMAGES} images, {len(words)} references of {np.mean(words):.1f} words", flush=True)
        kept = ReferenceNgrams(references)
        ngram_scores(hypotheses, kept)
        ngram_seconds, ngrams = compare(
            {
                "pycocoevalcap": lambda: pycocoevalcap_ngrams(hypotheses, references),
                "first": lambda: joined(*ngram_scores(hypotheses, references)),
                "warm": lambda: joined(*ngram_scores(hypotheses, kept)),
            },
            repetitions=6,
        )
        wrong = different(ngrams["first"], ngrams["pycocoevalcap"]) + different(ngrams["warm"], ngrams["pycocoevalcap"])
        meteor_seconds, meteor = compare(
            {
                "pycocoevalcap": lambda: pycocoevalcap_meteor(hypotheses, references),
                "ours": lambda: our_meteor(hypotheses, references),
            },
            repetitions=3,
        )
        wrong += different(meteor["ours"], meteor["pycocoevalcap"])
    first_meteor = meteor_seconds["pycocoevalcap"] / (meteor_seconds["ours"] + made)
    print(f"meteor_first_call_over_ours: {first_meteor:.2f}, with the making of the cache")
    results = [
        ("different_floats", wrong, "<=", 0),
        ("ngrams_first_call", ngram_seconds["pycocoevalcap"] / ngram_seconds["first"], ">=", 4),
        ("ngrams_warm", ngram_seconds["pycocoevalcap"] / ngram_seconds["warm"], ">=", 5),
        ("meteor", meteor_seconds["pycocoevalcap"] / meteor_seconds["ours"], ">=", 1.4),
    ]
    for name, value, sign, goal in results:
        print(f"{name}: {value:.3g} (goal {sign} {goal:g})")
    return int(not all(value >= goal if sign == ">=" else value <= goal for _, value, sign, goal in results))


if __name__ == "__main__":
    sys.exit(main())
