"""Every example in a docstring runs."""

import doctest
import importlib
from pathlib import Path

import pytest

import gmail_lightning

ROOT = Path(gmail_lightning.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def test_there_are_examples() -> None:
    assert len(FILES) >= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples(path: Path) -> None:
    module = importlib.import_module(".".join(("gmail_lightning", *path.relative_to(ROOT).with_suffix("").parts)))
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.attempted
    assert not results.failed
