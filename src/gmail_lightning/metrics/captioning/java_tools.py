"""The Java tools of caption evaluation, each in a child process of its own: whatever happens there is a ``JavaError``.

The jars are those of the package pycocoevalcap. Nothing is written beside them: input and output go through pipes,
and where a tool wants files they lie in a temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gmail_lightning.cache import cache_folder
from gmail_lightning.metrics.captioning.ptb_tokenizer import PUNCTUATION, normalize_whitespace

PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
SPICE_JAR = "spice/spice-1.0.jar"
SPICE_HEAP_GB = 8
SPICE_MODELS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")

#: What helps, whatever the argument is called where the tools are used.
MORE_TIME = "(raise the timeout of the Java tools)"

#: Text in UTF-8 and numbers with a point on any machine; what the virtual machine has to say goes to the errors.
OPTIONS = (
    *("-XX:+IgnoreUnrecognizedVMOptions", "-XX:+DisplayVMOutputToStderr", "-XX:-UsePerfData"),
    *("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"),
)
#: The compiler and the collector that take the least CPU time in runs of seconds.
SHORT_RUN = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
#: SPICE's serialisation library looks into these; Java before 9, which has no modules, does not read the variable.
SPICE_OPENS = tuple(f"java.{name}=ALL-UNNAMED" for name in (
    "base/java.lang", "base/java.math", "base/java.net", "base/java.text", "base/java.util",
    "base/java.util.concurrent", "sql/java.sql",
))  # fmt: skip


class JavaError(RuntimeError):
    """A Java tool is missing, died, took too long, or gave an answer that makes no sense."""


def find_java() -> str:
    """Path of the ``java`` on the PATH, else of the one in JAVA_HOME.

    Raises:
        JavaError: If there is none.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java") or (shutil.which("java", path=os.path.join(home, "bin")) if home else None)
    if java is None:
        raise JavaError("no java on the PATH or in JAVA_HOME; install a Java runtime (8 or newer)")
    return java


def packaged(name: str) -> Path:
    """Path of a file of the package pycocoevalcap.

    Raises:
        JavaError: If it is not there.
    """
    spec = find_spec("pycocoevalcap")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if Path(folder, name).is_file():
            return Path(folder, name)
    if not folders:
        raise JavaError("pycocoevalcap is not installed")
    how = "install pycocoevalcap 1.2 again"
    if name in SPICE_MODELS:
        code = "from pycocoevalcap.spice.spice import Spice; Spice()"
        how = f'with a network pycocoevalcap downloads it: python -c "{code}"'
    raise JavaError(f"{name} is not in {folders[0]}; {how}")


def run_java(
    arguments: Sequence[str], text: str = "", *, deadline: float, heap: str = "2G", opens: Sequence[str] = ()
) -> str:
    """Output of a Java program that reads ``text``.

    Args:
        arguments: Those behind ``java``.
        text: Goes to the standard input.
        deadline: When the program must have ended, by ``time.monotonic()``.
        heap: Largest heap.
        opens: Packages that ``--add-opens`` opens, where Java knows modules.

    Raises:
        JavaError: If it cannot be started, is killed, fails, or takes too long. Its process group is killed then.
    """
    command = [find_java(), *OPTIONS, f"-Xmx{heap}", *arguments]
    given = os.environ.get("JDK_JAVA_OPTIONS", "")
    environment = {**os.environ, "JDK_JAVA_OPTIONS": " ".join([given, *(f"--add-opens={name}" for name in opens)])}
    start = time.monotonic()
    if start >= deadline:
        raise JavaError(f"no time left {MORE_TIME}")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=environment if opens else None,
        )  # fmt: skip
    except OSError as error:
        raise JavaError(f"{command[0]} does not start: {error}") from error
    try:
        # reads both pipes while it writes, so that none of them fills up
        output, complaints = process.communicate(text.encode(errors="replace"), timeout=deadline - start)
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"stopped after {time.monotonic() - start:.0f} s {MORE_TIME}") from error
    finally:
        if process.poll() is None:  # too slow, or this process was interrupted: end the child and what it started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise JavaError(_cause_of_death(process.returncode, complaints.decode(errors="replace")))
    return output.decode(errors="replace")


def _cause_of_death(code: int, complaints: str) -> str:
    if code < 0:
        return f"Java was killed by signal {-code} ({signal.strsignal(-code)})"
    lines = [line for line in complaints.splitlines() if line.strip() and not line.startswith(("\t", "NOTE:"))]
    return f"Java ended with exit code {code}: {lines[-1] if lines else 'without a word'}"


def ptb_tokenize_java(captions: Sequence[str], *, deadline: float) -> list[str]:
    """What ``ptb_tokenize`` gives, by the Stanford tokenizer itself.

    Whether a last "no." or "J." is one token or two depends on what follows, for the program also on another line. So
    that no caption depends on the next one, as it does in pycocoevalcap, a line of ";" follows each: that leaves the
    tokens of a caption alone in a file, and would show if captions were shifted.

    Raises:
        JavaError: If the tokenizer cannot run, or does not answer line by line.
    """
    lines = [normalize_whitespace(caption) for caption in captions]
    program = (*SHORT_RUN, "-cp", str(packaged(PTB_JAR)), "edu.stanford.nlp.process.PTBTokenizer")
    text = "".join(f"{line}\n;\n" for line in lines)
    answer = run_java((*program, "-preserveLines", "-lowerCase"), text, deadline=deadline).split("\n")
    if len(answer) != 2 * len(lines) + 1 or answer[1::2] != [";"] * len(lines):
        raise JavaError(f"the PTB tokenizer answered {len(answer) // 2} lines for {len(lines)} captions")
    rows = (line.rstrip().split(" ") for line in answer[:-1:2])  # a token may hold another kind of space: "1 1/2"
    return [" ".join(token for token in row if token not in PUNCTUATION) for row in rows]


def spice_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, deadline: float
) -> tuple[float, np.ndarray]:
    """SPICE (Anderson et al. 2016, https://arxiv.org/abs/1607.08822) by the authors' jar.

    The parser that it needs, 384 MB, is not part of pycocoevalcap, which downloads it into its own folder when its
    ``Spice`` is built; it is never downloaded here. The jar takes up to 8 GB of memory, and minutes for
    thousands of images.

    Args:
        hypotheses: One per image, tokenised.
        references: Those of each image, tokenised.
        deadline: When it must have ended, by ``time.monotonic()``.

    Returns:
        Mean over the images, and the F score of each, shape (I,).

    Raises:
        JavaError: If it cannot run, or leaves an image without a score.
    """
    jar, _ = packaged(SPICE_JAR), [packaged(name) for name in SPICE_MODELS]
    rows = [
        {"image_id": image, "test": hypothesis, "refs": list(captions)}
        for image, (hypothesis, captions) in enumerate(zip(hypotheses, references, strict=True))
    ]
    try:
        with tempfile.TemporaryDirectory(prefix="gmail_lightning-") as name:
            paths = {key: Path(name, f"{key}.json") for key in ("in", "out")}
            paths["in"].write_text(json.dumps(rows))
            program = ("-jar", str(jar), str(paths["in"]), "-cache", _spice_cache(name), "-out", str(paths["out"]))
            run_java((*program, "-subset", "-silent"), deadline=deadline, heap=f"{SPICE_HEAP_GB}G", opens=SPICE_OPENS)
            results = json.loads(paths["out"].read_text())
        scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in results}
        return float(np.mean(list(scores.values()))), np.array([scores[image] for image in range(len(rows))])
    except OSError as error:
        raise JavaError(f"SPICE works on files, and {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise JavaError(f"SPICE gave no score for some image ({type(error).__name__}: {error})") from error


def _spice_cache(temporary: str) -> str:
    """A folder for the parses, which take most of the time: kept for the next evaluation where that is possible."""
    try:
        folder = cache_folder() / "spice"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        return tempfile.mkdtemp(dir=temporary)
