"""Java tools in child processes, also those that misbehave."""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gmail_lightning.metrics.captioning import java_tools
from gmail_lightning.metrics.captioning.java_tools import (
    JavaError,
    find_java,
    ptb_tokenize_java,
    run_java,
    spice_scores,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


@needs_java
def test_a_planted_character_moves_no_caption() -> None:
    planted = ["\n", "\r", "\r\n", "\u2028", "\u2029", "\v", "\f", "\x85", "\x1c", "\u3000", "\t \n"]
    captions = [f"A planted{text}one." for text in planted]
    captions += ["", " \n ", "a \U0001f600 cat", "a ||| cat", "the dog " * 5000, "a\ud800 cat", "\ufeffa \0cat", "*NL*"]
    between = [f"Number {i}, it's red" for i in range(len(captions))]
    tokens = ptb_tokenize_java([text for pair in zip(captions, between, strict=True) for text in pair], deadline=soon())
    assert tokens[1::2] == [f"number {i} it 's red" for i in range(len(captions))]
    assert tokens[: 2 * len(planted) : 2] == ["a planted one"] * len(planted)
    rest = tokens[2 * len(planted) :: 2]
    assert rest[:5] == ["", "", "a cat", "a | | | cat", "the dog " * 4999 + "the dog"]
    assert rest[6] == "a cat"


@pytest.mark.slow
@needs_java
def test_the_tokens_of_a_caption_do_not_depend_on_the_next_one() -> None:
    pairs = [("my cat no.", "5 cats"), ("my cat no.", "The end"), ("drawn by J.", "The cat"), ("drawn by J.", "a cat")]
    pairs += [("in the U.S.", "The cat"), ("in the U.S.", "a cat"), ("Acme Inc.", "The cat"), ("<a", "b>"), ("<a", "b")]
    tokens = ptb_tokenize_java([caption for pair in pairs for caption in pair], deadline=soon())
    alone = {first: ptb_tokenize_java([first], deadline=soon())[0] for first, _ in pairs}
    assert tokens[::2] == [alone[first] for first, _ in pairs]


def test_without_java_there_is_a_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(JavaError, match="no java on the PATH"):
        ptb_tokenize_java(["a cat"], deadline=soon())
    java = tmp_path / "home" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_bytes(b"\x7fnot a program")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java() == str(java)
    with pytest.raises(JavaError, match=r"java does not start: .*Exec format error"):
        run_java(["-version"], deadline=soon())


def test_pipes_never_fill_up(fake_java) -> None:
    fake_java(
        "sys.stderr.write('x' * 1_000_000); sys.stdout.write('y' * 1_000_000); sys.stdout.write(sys.stdin.read())"
    )
    text = "z" * 1_000_000
    assert run_java([], text, deadline=soon()) == "y" * 1_000_000 + text


def test_a_killed_child_is_reported(fake_java, tmp_path) -> None:
    fake_java(f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)")

    def kill() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(JavaError, match="killed by signal 9"):
        ptb_tokenize_java(["a cat"] * 100_000, deadline=soon())
    killer.join()


def test_a_slow_child_is_stopped_with_what_it_started(fake_java, tmp_path) -> None:
    grandchild = tmp_path / "grandchild"
    fake_java(
        "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(grandchild)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.raises(JavaError, match=r"stopped after \d s \(raise the timeout of the Java tools\)$"):
        run_java([], deadline=soon(1.5))
    assert time.monotonic() - start < 20
    status = Path(f"/proc/{grandchild.read_text()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # dead, if not yet buried
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild still runs")
    with pytest.raises(JavaError, match=r"no time left \(raise the timeout of the Java tools\)$"):
        run_java([], deadline=soon(-1))


def test_the_cause_of_a_failure_is_named(fake_java) -> None:
    fake_java("sys.stderr.write('Exception in main: no heap\\n\\tat a.b.C(D.java:1)\\n'); sys.exit(3)")
    with pytest.raises(JavaError, match=r"exit code 3: Exception in main: no heap$"):
        run_java([], deadline=soon())
    fake_java("sys.exit(1)")
    with pytest.raises(JavaError, match="exit code 1: without a word"):
        run_java([], deadline=soon())


@pytest.mark.parametrize("answer", ["''", "'a cat\\n;\\n'", "'a cat\\n;\\n' * 3", "'a\\ncat\\n;\\n;\\n'"])
def test_lines_that_do_not_fit_are_refused(fake_java, answer) -> None:
    fake_java(f"sys.stdin.read(); print({answer}, end='')")
    with pytest.raises(JavaError, match="lines for 2 captions"):
        ptb_tokenize_java(["a cat", "a dog"], deadline=soon())


SPICE = """
import json
path, out, cache = (sys.argv[sys.argv.index(f) + 1] for f in ('-jar', '-out', '-cache'))
assert '-Xmx8G' in sys.argv and '--add-opens=java.base/java.lang=ALL-UNNAMED' in os.environ['JDK_JAVA_OPTIONS']
assert os.path.basename(path) == 'spice-1.0.jar' and os.path.isdir(cache)
rows = json.load(open(sys.argv[sys.argv.index('-jar') + 2]))
json.dump(rows, open(os.path.join(os.path.dirname(__file__), 'rows.json'), 'w'))
f = lambda row: len(set(row['test'].split()) & set(' '.join(row['refs']).split())) / 7
result = [{'image_id': row['image_id'], 'scores': {'All': {'f': f(row)}, 'Color': {'f': None}}} for row in rows]
json.dump(RESULT, open(out, 'w'))
"""


@pytest.fixture
def spice_package(tmp_path, monkeypatch):
    """pycocoevalcap's folder with the parser that SPICE needs, and a cache folder."""
    for name in (java_tools.SPICE_JAR, *java_tools.SPICE_MODELS):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).touch()
    monkeypatch.setattr(java_tools, "packaged", lambda name: tmp_path / "package" / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    return tmp_path / "package"


@pytest.mark.usefixtures("spice_package")
def test_spice_reads_the_scores_of_the_jar(fake_java, tmp_path) -> None:
    captions, references = ["a cat", "two dogs run", ""], [["the cat", "a cat"], ["dogs that run"], ["a bird"]]
    java = fake_java(SPICE.replace("RESULT", "result[::-1]"))
    score, scores = spice_scores(captions, references, deadline=soon())
    np.testing.assert_array_equal(scores, np.array([2, 2, 0]) / 7)
    assert score == np.mean([0, 2 / 7, 2 / 7])
    assert json.loads(java.with_name("rows.json").read_text()) == [
        {"image_id": i, "test": captions[i], "refs": references[i]} for i in range(3)
    ]
    assert (tmp_path / "a cache" / "gmail_lightning" / "spice").is_dir()
    for wrong in ("result[:2]", "None", "[{**row, 'scores': {'All': {'f': None}}} for row in rows]"):
        fake_java(SPICE.replace("RESULT", wrong))
        with pytest.raises(JavaError, match="no score for some image"):
            spice_scores(captions, references, deadline=soon())


@pytest.mark.usefixtures("spice_package")
def test_spice_without_a_place_for_its_files(fake_java, tmp_path, monkeypatch) -> None:
    fake_java(SPICE.replace("RESULT", "result"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert spice_scores(["a cat"], [["a cat"]], deadline=soon())[0] == 2 / 7  # parses anew each time
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(JavaError, match="SPICE works on files, and "):
        spice_scores(["a cat"], [["a cat"]], deadline=soon())


def test_spice_without_its_parser_names_what_is_missing() -> None:
    with pytest.raises(JavaError, match=r"stanford-corenlp-3.6.0.jar is not in .*pycocoevalcap; with a network"):
        spice_scores(["a cat"], [["a cat"]], deadline=soon())


@pytest.mark.slow
@needs_java
def test_the_library_of_spice_works_with_the_packages_that_are_opened(tmp_path) -> None:
    """It reads private fields, which Java from 17 on refuses unless told otherwise."""
    if shutil.which("javac") is None:
        pytest.skip("no Java compiler")
    (tmp_path / "Copy.java").write_text(
        "import org.nustaq.serialization.FSTConfiguration;\n"
        "public class Copy { public static void main(String[] a) {\n"
        "  FSTConfiguration c = FSTConfiguration.createDefaultConfiguration();\n"
        "  System.out.println(c.asObject(c.asByteArray(new java.util.ArrayList<String>(java.util.List.of(a))))); } }\n"
    )
    libraries = java_tools.packaged("spice/lib/fst-2.47.jar").with_name("*")
    program = ["-cp", str(libraries), str(tmp_path / "Copy.java"), "one", "two"]
    assert run_java(program, deadline=soon(), opens=java_tools.SPICE_OPENS) == "[one, two]\n"
