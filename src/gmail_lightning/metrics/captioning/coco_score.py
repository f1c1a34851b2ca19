"""The caption metrics of COCO over batches and ranks: what can be computed is exact, what cannot has a reason."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.metrics.captioning.java_tools import JavaError, ptb_tokenize_java, spice_scores
from gmail_lightning.metrics.captioning.meteor import meteor_scores
from gmail_lightning.metrics.captioning.ngram_matches import ReferenceNgrams
from gmail_lightning.metrics.captioning.ngrams import NGRAM_METRICS, ngram_scores
from gmail_lightning.metrics.captioning.ptb_tokenizer import ptb_tokenize
from gmail_lightning.metrics.states import gather_state

Tokenizer = Literal["auto", "java", "python"]
#: The names of the values of each metric.
VALUES = {
    "bleu": ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"), "rouge": ("ROUGE_L",), "cider": ("CIDEr",),
    "meteor": ("METEOR",), "spice": ("SPICE",),
}  # fmt: skip
#: Those that need Java, and how they are computed.
JAVA_METRICS: dict[str, Callable[..., tuple[float, np.ndarray]]] = {"meteor": meteor_scores, "spice": spice_scores}


@dataclass
class CaptionScores:
    """What ``CocoCaptionScore`` computes on one process and sends to the others."""

    corpus: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""

    def fail(self, name: str, images: int, reason: str) -> None:
        """A value that cannot be had."""
        self.corpus[name], self.per_image[name], self.reasons[name] = float("nan"), np.full(images, np.nan), reason


class CocoCaptionScore(Metric):
    """BLEU-1 to 4, ROUGE-L, CIDEr, METEOR and SPICE of captions, as the COCO caption evaluation computes them.

    Captions are split by the Penn Treebank tokenizer first, without punctuation. Every value equals pycocoevalcap's on
    the same tokens. METEOR, SPICE and (if asked for, or present) the tokenizer are Java programs; they run after the
    ranks have exchanged their captions, on rank 0 alone, which sends the values to the others. What cannot run there is
    NaN, and ``reasons`` says why.

    After ``compute``: ``reasons``, by the names of the values; ``tokenizer_used``, "java" or "python"; ``per_image``,
    scores by the names of the values, each of shape (I,), and ``image_ids`` (I,), the rows they belong to.

    Args:
        metrics: Some of "bleu", "rouge", "cider", "meteor", "spice".
        prefix: Put before the name of every value.
        tokenizer: "java", the reference; "python", which needs no Java; "auto", the first where it runs.
        timeout: Seconds that all Java programs together may take in one ``compute``. Other ranks wait so long, and
            the process group gives up after 1,800 seconds unless told otherwise.

    Raises:
        ValueError: If a metric or the tokenizer is unknown, or the timeout is not above 0.
    """

    full_state_update = False
    higher_is_better = True
    text: list[Tensor]
    lengths: list[Tensor]
    num_references: list[Tensor]
    ids: list[Tensor]

    def __init__(
        self,
        metrics: Sequence[str] = ("bleu", "meteor", "rouge", "cider"),
        prefix: str = "",
        tokenizer: Tokenizer = "auto",
        timeout: float = 300.0,
    ) -> None:
        super().__init__(dist_sync_fn=gather_state)
        unknown = [name for name in metrics if name not in VALUES]
        if unknown or isinstance(metrics, str) or len(metrics) == 0:
            raise ValueError(f"metrics: expected some of {', '.join(VALUES)}, got {metrics!r}.")
        if tokenizer not in get_args(Tokenizer):
            raise ValueError(f"tokenizer: expected one of {', '.join(get_args(Tokenizer))}, got {tokenizer!r}.")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout}.")
        self.metrics, self.prefix = tuple(name for name in VALUES if name in metrics), prefix
        self.tokenizer, self.timeout = tokenizer, timeout
        self.reasons: dict[str, str] = {}
        self.tokenizer_used = ""
        self.per_image: dict[str, np.ndarray] = {}
        self.image_ids = np.zeros(0, np.int64)
        self._kept: tuple[bytes, list[list[str]], ReferenceNgrams] | None = None
        for name in ("text", "lengths", "num_references", "ids"):  # of each row the caption, then its references
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, predictions: list[str], references: list[list[str]], ids: Tensor | None = None) -> None:
        """Adds images: a caption each, at least one reference each, and ids, shape (B,), by which they are told apart.

        An id that comes twice, as where ranks share a last batch, counts once. Without ids every row counts.

        Raises:
            ValueError: If the numbers of rows differ or a row has no reference.
            TypeError: If a caption is not a string.
        """
        rows = _checked(predictions, references, ids)
        earlier = [len(some) > 0 for some, count in zip(self.ids, self.num_references, strict=True) if len(count)]
        if rows and (ids is None) in earlier:
            raise ValueError("Give ids in every update or in none; otherwise images could not be told apart.")
        encoded = [caption.encode(errors="replace") for row in rows for caption in row]
        states = {
            "text": torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()),
            "lengths": torch.tensor([len(caption) for caption in encoded], dtype=torch.int64),
            "num_references": torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64),
            "ids": torch.zeros(0, dtype=torch.int64) if ids is None else ids.detach().long(),
        }
        for name, value in states.items():
            getattr(self, name).append(value.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The values as float64 on the CPU, the same on every rank; nothing where no row came at all.

        Raises:
            ValueError: If an id came with different captions, or some ranks gave ids and others none.
        """
        rows, ids = self._rows()
        if not rows:
            return {}
        score = partial(self._score_distinct, rows, ids)
        scores = on_first_rank(score) if self._is_synced else score()
        self.image_ids = np.unique(ids) if len(ids) else np.arange(len(rows))
        self.reasons, self.tokenizer_used, self.per_image = (
            {self.prefix + name: reason for name, reason in scores.reasons.items()},
            scores.tokenizer,
            {self.prefix + name: values for name, values in scores.per_image.items()},
        )
        return {self.prefix + name: torch.tensor(v, dtype=torch.float64) for name, v in scores.corpus.items()}

    def _rows(self) -> tuple[list[list[str]], np.ndarray]:
        """Caption and references of every row, and the ids, none or one each."""
        text, lengths, num_references, ids = (
            dim_zero_cat(state).cpu().numpy() if len(state) else np.zeros(0, np.int64)
            for state in (self.text, self.lengths, self.num_references, self.ids)
        )
        buffer, ends = text.astype(np.uint8).tobytes(), np.cumsum(lengths).tolist()
        captions = [buffer[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
        starts = np.cumsum(num_references + 1).tolist()
        return [captions[a:b] for a, b in zip([0, *starts[:-1]], starts, strict=True)] if starts else [], ids

    def _score_distinct(self, rows: list[list[str]], ids: np.ndarray) -> CaptionScores:
        return self._score(_distinct(rows, ids))

    def _score(self, rows: list[list[str]]) -> CaptionScores:
        scores, deadline = CaptionScores(), time.monotonic() + self.timeout
        try:
            scores.tokenizer, hypotheses, references, tables = self._tokenize(rows, deadline)
        except JavaError as error:
            for metric in self.metrics:
                for name in VALUES[metric]:
                    scores.fail(name, len(rows), f"the PTB tokenizer: {error}")
            return scores
        ngram_metrics = [metric for metric in self.metrics if metric in NGRAM_METRICS]
        if ngram_metrics:
            scores.corpus, scores.per_image = ngram_scores(hypotheses, tables, ngram_metrics)
        for metric in self.metrics:
            if metric in JAVA_METRICS:
                (name,) = VALUES[metric]
                try:
                    value, values = JAVA_METRICS[metric](hypotheses, references, deadline=deadline)
                    scores.corpus[name], scores.per_image[name] = value, values
                except JavaError as error:
                    scores.fail(name, len(rows), str(error))
                except Exception as error:  # the other values of a long run must not be lost over this one
                    scores.fail(name, len(rows), f"{type(error).__name__}: {error}")
        return scores

    def _tokenize(
        self, rows: list[list[str]], deadline: float
    ) -> tuple[str, list[str], list[list[str]], ReferenceNgrams]:
        """The tokenizer that was used, tokens of captions and references, and the tables of the references."""
        if self.tokenizer != "python":
            try:
                return "java", *self._tokens("java", rows, partial(ptb_tokenize_java, deadline=deadline))
            except JavaError as error:
                if self.tokenizer == "java":
                    raise
                warnings.warn(f"The Python tokenizer splits the captions, for that of Java: {error}", stacklevel=2)
        return "python", *self._tokens("python", rows, ptb_tokenize)

    def _tokens(
        self, name: str, rows: list[list[str]], tokenize: Callable[[list[str]], list[str]]
    ) -> tuple[list[str], list[list[str]], ReferenceNgrams]:
        """Keeps what belongs to the references for the next evaluation, which mostly has the same."""
        captions, key = [row[0] for row in rows], _digest(name, rows)
        if self._kept is not None and self._kept[0] == key:
            return tokenize(captions), self._kept[1], self._kept[2]
        tokens = tokenize(captions + [reference for row in rows for reference in row[1:]])
        rest = iter(tokens[len(rows) :])
        references = [[next(rest) for _ in row[1:]] for row in rows]
        self._kept = (key, references, ReferenceNgrams(references))
        return tokens[: len(rows)], references, self._kept[2]


def _checked(predictions: list[str], references: list[list[str]], ids: Tensor | None) -> list[list[str]]:
    """The caption and the references of each row, see ``CocoCaptionScore.update``."""
    if len(predictions) != len(references) or (ids is not None and len(ids) != len(predictions)):
        raise ValueError(
            f"Expected as many predictions as references and ids, got {len(predictions)}, {len(references)} "
            f"and {None if ids is None else len(ids)}."
        )
    for caption, own in zip(predictions, references, strict=True):
        if isinstance(own, str) or not all(isinstance(text, str) for text in (caption, *own)):
            raise TypeError(f"Expected a caption and a list of reference captions, got {caption!r} and {own!r}.")
        if len(own) == 0:
            raise ValueError(f"No references for the caption {caption!r}; every image needs at least one.")
    return [[caption, *own] for caption, own in zip(predictions, references, strict=True)]


def _distinct(rows: list[list[str]], ids: np.ndarray) -> list[list[str]]:
    """Rows in the order of their ids, each id once; as they came where there are no ids."""
    if len(ids) == 0:
        return rows
    if len(ids) != len(rows):
        raise ValueError(f"{len(ids)} ids for {len(rows)} images: some updates had ids and others none.")
    by_id: dict[int, list[str]] = {}
    for image_id, row in zip(ids.tolist(), rows, strict=True):
        if by_id.setdefault(image_id, row) != row:
            raise ValueError(f"id {image_id} came twice with different captions: {by_id[image_id]} and {row}.")
    return [by_id[image_id] for image_id in sorted(by_id)]


def _digest(tokenizer: str, rows: list[list[str]]) -> bytes:
    """Tells apart what the references and their tokenizer may be."""
    digest = hashlib.blake2b(tokenizer.encode())
    for row in rows:
        digest.update(b"\0".join([b"%d" % len(row), *(reference.encode() for reference in row[1:]), b""]))
    return digest.digest()
