"""Damaged images: pixels or an ``ImageDecodeError``, the process alive, memory bounded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("damaged_images.py")
MEMORY = 1500  # MiB, of which the imports take some 690


@pytest.mark.parametrize(
    "count",
    [pytest.param(60, marks=pytest.mark.slow), pytest.param(10_000, marks=[pytest.mark.published, pytest.mark.slow])],
)
def test_damaged_images_give_pixels_or_the_error(count: int) -> None:
    done = subprocess.run([sys.executable, SCRIPT, str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 15
    for one in found:
        assert one["wrong"] == {}, one
        assert one["pixels"] + one["refused"] == count
        assert one["mib"] < MEMORY, one
