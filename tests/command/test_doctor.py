"""What ``gmail-lightning doctor`` says of Java and of the tools that need it."""

import sys
from pathlib import Path

import pytest

from gmail_lightning.command import doctor
from gmail_lightning.metrics.captioning import java_tools


def test_java_that_is_missing_or_broken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "no java on the PATH" in doctor._java()
    assert "METEOR and SPICE are nan" in doctor._java()
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('needs a license')\n")
    java.chmod(0o755)
    assert doctor._java().endswith("does not work (exit code 1: needs a license)")
    java.write_text(f"#!{sys.executable}\nimport sys\nprint('openjdk 21', file=sys.stderr)\n")
    assert doctor._java() == "java: openjdk 21"


def test_files_of_the_caption_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer, meteor, spice, cache = doctor._caption_metrics()
    assert (tokenizer, meteor) == ("PTB tokenizer: present", "METEOR: present")
    assert "GB; this machine has " in spice
    assert cache.endswith("without METEOR's table, made at its first use")
    (tmp_path / "cache" / "gmail_lightning").mkdir(parents=True)
    (tmp_path / "cache" / "gmail_lightning" / "meteor-0.arrow").touch()
    assert doctor._caption_metrics()[3].endswith("gmail_lightning, with METEOR's table")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written" in doctor._caption_metrics()[3]
    there = {java_tools.SPICE_JAR, *java_tools.SPICE_MODELS}

    def packaged(name: str) -> Path:
        if name not in there:
            raise java_tools.JavaError(f"{name} is not there")
        return tmp_path / name

    monkeypatch.setattr(java_tools, "packaged", packaged)
    lines = doctor._caption_metrics()
    assert lines[0] == "PTB tokenizer: tokenizer/stanford-corenlp-3.4.1.jar is not there"
    assert lines[2].startswith("SPICE: present (its heap may grow to 8 GB")
