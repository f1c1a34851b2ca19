"""What ``run.json`` says of a run: what it is made of, and whether it is at work."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

RECORD = "run.json"
BEAT = 30.0  # seconds between two signs of life of a run
SILENCE = 300.0  # after so many without one, a run on another host is taken to be dead

#: Settings of the trainer that change what is learned; the others are length, hardware, evaluation and logging.
TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches")
#: Settings of a data module that change nothing in training.
NOT_TRAINED_ON = ("val", "test", "predict", "allow_overlap", "eval_batch_size", "num_workers", "max_replaced_fraction")


def settings_of(config: Mapping[str, Any], evaluation_only: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What makes a run what it is, as plain values by their dotted names.

    Args:
        config: ``model``, ``data`` and ``trainer`` as the parser dumps them.
        evaluation_only: Arguments of the task that training does not read.
    """
    trainer = {name: config["trainer"].get(name) for name in TRAINER}
    flat = dict(_flat({"model": config["model"], "data": config["data"], "trainer": trainer}))
    left_out = [f"model.init_args.{name}" for name in evaluation_only]
    left_out += [f"data.init_args.{name}" for name in NOT_TRAINED_ON]
    return {k: v for k, v in flat.items() if not any(k == name or k.startswith(f"{name}.") for name in left_out)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def make_record(
    recipe: str, verb: str, settings: Mapping[str, Any], seed: int | bool, checkpoint: str | None
) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins now in this process.

    Args:
        recipe: Its name.
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        settings: See ``settings_of``.
        seed: Of ``seed_everything``; False for none.
        checkpoint: What it starts from.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "recipe": recipe,
        "verb": verb,
        "seed": seed,
        "digest": hashlib.sha256(text.encode()).hexdigest()[:12],
        "state": "running",
        "begun": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_start": process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "checkpoint": checkpoint,
        "settings": json.loads(text),
    }


def is_running(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run of this record is at work: its process on this host, signs of life on another.

    Args:
        path: Of its ``run.json``.
        record: What that says.
    """
    if record["state"] != "running":
        return False
    if record["host"] == socket.gethostname():
        itself = record["process"] == os.getpid()  # it was at work in this process, and is over
        start = process_start(record["process"])
        return not itself and start is not None and start == record["process_start"]
    return time.time() - path.stat().st_mtime < SILENCE


def process_start(process: int) -> str | None:
    """When a process began, in ticks where the system tells, else an empty text; None where there is no process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state == "Z" else rest[18]


def fits_below(runs: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Records of the fits below a folder with their files, the newest first."""
    found = []
    for path in runs.rglob(RECORD):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append((record["begun"], path, record))
        except (OSError, ValueError, KeyError, TypeError):  # not ours, or just being taken by another process
            continue
    found.sort(key=lambda entry: entry[:2], reverse=True)
    return [(path, record) for _, path, record in found if record.get("verb") == "fit"]
