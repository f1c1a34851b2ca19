"""Two processes against one on the joined rows, also where one of them has none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "distributed" / "metric_ranks.py"

pytestmark = [pytest.mark.xdist_group("launches"), pytest.mark.slow]


def test_ranks_find_together_what_one_process_finds(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MASTER_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(tmp_path)],
            env=outside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(script.RANKS)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    expected = script.values(0, script.IMAGES)
    assert {"kid", "cmmd", "clip_score", "effective_rank", "drift", "t2i_dedup_R@1"} <= set(expected)
    for rank in range(script.RANKS):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(found, expected)
