"""METEOR by its own jar, several times as fast and with the same scores to the last bit.

Most of the jar's time goes into reading a table of 5.3 million paraphrases, almost none of which can act: one matches
only where both of its phrases stand, word by word, in the captions. Those few are picked out for the captions at hand,
so that what was picked for others can never be used; what is cached is the table in a form that is quick to search.
Besides, the jar treats each caption with twenty regular expressions, which leave plain words alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from gmail_lightning.cache import cache_folder
from gmail_lightning.metrics.captioning.java_tools import METEOR_JAR, SHORT_RUN, JavaError, packaged, run_java

PARAPHRASES = "meteor/data/paraphrase-en.gz"
PLAIN = re.compile("[a-z0-9 ]*")  # what METEOR's normaliser leaves as it is


def meteor_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, deadline: float
) -> tuple[float, np.ndarray]:
    """METEOR 1.5 (Denkowski and Lavie 2014, https://aclanthology.org/W14-3348) for English.

    The scores are those of pycocoevalcap's ``Meteor().compute_score``. ``|||``, which separates captions in what the
    jar reads, is taken out of the references as well, where there it would break off a piece of the reference.

    Args:
        hypotheses: One per image, tokenised, lower case.
        references: Those of each image, tokenised, lower case, at least one.
        deadline: When it must have ended, by ``time.monotonic()``.

    Returns:
        Score of the corpus, and of each image, shape (I,).

    Raises:
        JavaError: If the jar or its table is missing, cannot run, or does not answer as it should.
    """
    rows = [[*captions, hypothesis] for hypothesis, captions in zip(hypotheses, references, strict=True)]
    words = _normalize({caption for row in rows for caption in row}, deadline)
    text = "".join(f"SCORE ||| {' ||| '.join(words[caption] for caption in row)}\n" for row in rows)
    try:
        with tempfile.NamedTemporaryFile(prefix="gmail_lightning-", suffix=".gz") as file:
            file.write(cut_table(load_table(packaged(PARAPHRASES)), list(words.values())))
            file.flush()
            statistics = _meteor(text, file.name, deadline)
    except OSError:  # nowhere to write: the whole table, slowly
        statistics = _meteor(text, str(packaged(PARAPHRASES)), deadline)
    if len(statistics) != len(rows):
        raise JavaError(f"METEOR answered {len(statistics)} lines for {len(rows)} images")
    answer = _meteor(f"EVAL ||| {' ||| '.join(statistics)}\n", os.devnull, deadline)  # needs no paraphrases
    try:
        scores = [float(line) for line in answer]
    except ValueError as error:
        raise JavaError(f"METEOR's answer is not a number: {error}") from error
    if len(scores) != len(rows) + 1:
        raise JavaError(f"METEOR answered {len(scores)} scores for {len(rows)} images and the corpus")
    return scores[-1], np.array(scores[:-1])


def _meteor(text: str, table: str, deadline: float) -> list[str]:
    """Lines that the jar answers; its input is normalised already."""
    program = (*SHORT_RUN, "-jar", str(packaged(METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-lower", "-a", table)
    return run_java(program, text, deadline=deadline).splitlines()


def _normalize(captions: set[str], deadline: float) -> dict[str, str]:
    """Captions as the jar's ``-norm`` splits them; the jar is asked where there is more than plain words."""
    words = {caption: caption for caption in captions if PLAIN.fullmatch(caption)}
    others = sorted(captions - words.keys())
    if others:
        program = (*SHORT_RUN, "-cp", str(packaged(METEOR_JAR)), "edu.cmu.meteor.util.Normalizer", "en", "true")
        text = "".join(caption.replace("|||", "") + "\n" for caption in others)
        lines = run_java(program, text, deadline=deadline).split("\n")[:-1]
        if len(lines) != len(others):
            raise JavaError(f"METEOR's normaliser answered {len(lines)} lines for {len(others)} captions")
        words.update(zip(others, (line.lower() for line in lines), strict=True))
    return words


def load_table(source: Path) -> pa.Table:
    """METEOR's table of paraphrases, from the cache, where it is put the first time if that folder can be written.

    Args:
        source: The table as METEOR comes with it: gzip, three lines (probability, phrase, paraphrase) each.

    Returns:
        One row per phrase: ``phrase``, and ``paraphrases``, rows of its paraphrases in the order of the file. 96 MB.

    Raises:
        JavaError: If the source is not such a table.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    path = cache_folder() / f"meteor-{digest}.arrow"
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):  # not there yet
        table = _read_table(source)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(path)
    except OSError:  # a full or read-only disk costs the next evaluation some seconds
        with contextlib.suppress(OSError):
            temporary.unlink()
    return table


def _read_table(source: Path) -> pa.Table:
    lines = pyarrow.csv.read_csv(
        source,
        pyarrow.csv.ReadOptions(column_names=["line"], use_threads=False),
        pyarrow.csv.ParseOptions(delimiter="\x01", quote_char=False, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(column_types={"line": pa.string()}, strings_can_be_null=False),
    )["line"]
    if len(lines) == 0 or len(lines) % 3:
        raise JavaError(f"{source}: {len(lines)} lines, expected three for each paraphrase")
    phrases = lines.filter(pa.array(np.arange(len(lines)) % 3 != 0)).combine_chunks().dictionary_encode()
    phrase, paraphrase = phrases.indices.to_numpy().reshape(-1, 2).T
    start = np.searchsorted(np.sort(phrase), np.arange(len(phrases.dictionary) + 1)).astype(np.int32)
    paraphrases = pa.ListArray.from_arrays(pa.array(start), pa.array(paraphrase[np.argsort(phrase, kind="stable")]))
    longest = pc.max(pc.count_substring(phrases.dictionary, " ")).as_py() + 1
    table = pa.table({"phrase": phrases.dictionary, "paraphrases": paraphrases})
    return table.replace_schema_metadata({"longest": str(longest)})


def cut_table(table: pa.Table, captions: Sequence[str]) -> bytes:
    """The paraphrases of which both phrases occur in some caption, in METEOR's format.

    The order among the paraphrases of a phrase, which decides ties in METEOR's search, is that of the whole table.
    """
    occurring = _phrases(captions, longest=int(table.schema.metadata[b"longest"]))
    occurs = pc.is_in(table["phrase"], value_set=occurring).to_numpy()
    paraphrases = table["paraphrases"].combine_chunks()
    first = np.repeat(np.arange(len(table)), np.diff(paraphrases.offsets.to_numpy()))
    second = paraphrases.values.to_numpy()
    kept = occurs[first] & occurs[second]
    pairs = zip(*(table["phrase"].take(pa.array(side[kept])).to_pylist() for side in (first, second)), strict=True)
    return gzip.compress("".join(f"1\n{a}\n{b}\n" for a, b in pairs).encode(), 1)  # METEOR reads no probability


def _phrases(captions: Sequence[str], longest: int) -> pa.Array:
    """Every different run of at most ``longest`` words in a caption."""
    split = pc.split_pattern(pa.array(captions, pa.string()), " ")
    words = split.values
    caption = np.repeat(np.arange(len(captions)), np.diff(split.offsets.to_numpy()))
    runs, different = words, [words.unique()]
    for length in range(2, min(longest, len(words)) + 1):
        start = len(words) - length + 1
        runs = pc.binary_join_element_wise(runs.slice(0, start), words.slice(length - 1), " ")
        different.append(runs.filter(pa.array(caption[:start] == caption[length - 1 :])).unique())
    return pa.concat_arrays(different)
