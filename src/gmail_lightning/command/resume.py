"""Which run to go on with: the newest of the same settings and seed, or the one that a SLURM job was at."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from gmail_lightning.command.run_record import RECORD, fits_below, is_running


class Found(NamedTuple):
    """A run to go on with."""

    folder: Path
    record: dict[str, Any]
    checkpoint: str | None


def run_to_resume(runs: Path, wanted: Mapping[str, Any], takes: bool = True) -> Found:
    """The newest fit of the same settings and seed that is not running, and its newest checkpoint.

    Args:
        runs: Folder below which runs are looked for.
        wanted: Record of the run that is to go on; a seed of None takes any.
        takes: Whether this process goes on with it, so that no other may; the record is then to be written anew.

    Raises:
        MisconfigurationException: If there is none; says of the newest ones why not.
    """
    refused = []
    for path, record in fits_below(runs):
        reason = _difference(record, wanted)
        if reason is None and is_running(path, record):
            reason = f"is running on {record['host']} as process {record['process']}"
        checkpoint = newest_state(path.parent)
        if reason is None and checkpoint is None:
            reason = "has no checkpoint"
        if reason is None and takes and not take(path):
            reason = "was just taken by another process"
        if reason is None:
            rank_zero_info(f"--ckpt_path last: {checkpoint} (seed {record['seed']}, {record['state']}).")
            return Found(path.parent, record, str(checkpoint))
        refused.append(f"- {path.parent} {reason}")
    told = "\n".join(["", *refused[:5]])
    raise MisconfigurationException(
        f"--ckpt_path last: no checkpoints/last.ckpt below {runs} of a run with these settings and this seed that is "
        f"not running.{told if refused else ''}\nTo take another one, give its file: --ckpt_path FILE."
    )


def run_of_job(runs: Path, wanted: Mapping[str, Any]) -> Found | None:
    """The run that a SLURM job was at, now this process's own, and its newest checkpoint, if any; None for no such run.

    Args:
        runs: Folder below which runs are looked for.
        wanted: Record of this run; a seed of None takes any. Where it starts from a file, only a requeued job goes on
            with another.
    """
    job, requeued = wanted["job"], int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    if job is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    if wanted["checkpoint"] not in (None, "last") and not requeued:
        return None
    for path, record in fits_below(runs):
        if record["job"] != job or _difference(record, wanted) is not None:
            continue
        here = record["host"] == socket.gethostname()  # a requeued job is over on the host that it was on
        if (record["state"] == "done" and not requeued) or (is_running(path, record) and (here or not requeued)):
            continue
        if not take(path):
            continue
        checkpoint = newest_state(path.parent)
        rank_zero_info(f"Job {job} goes on with {path.parent}, from {checkpoint or 'the beginning'}.")
        return Found(path.parent, record, None if checkpoint is None else str(checkpoint))
    return None


def newest_state(folder: Path) -> Path | None:
    """The newest state in the folder of a run: ``checkpoints/last.ckpt``, or what Lightning wrote to be requeued.

    A process that is killed while it puts one folder of states in the place of another leaves the one before.
    """
    found = [*folder.glob("hpc_ckpt_*.ckpt")]
    found += [*folder.glob("checkpoints/last.ckpt")] or [*folder.glob("checkpoints/last.ckpt.before")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _difference(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """In what a run is another one than that which is wanted; None where it is the same."""
    if wanted["seed"] is not None and repr(record["seed"]) != repr(wanted["seed"]):  # False, none at all, equals 0
        return f"has seed {record['seed']}, this is {wanted['seed']}"
    there, here = record["settings"], wanted["settings"]
    names = [name for name in {**here, **there} if there.get(name, ...) != here.get(name, ...)]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"has {names[0]}={there.get(names[0])!r}, this is {here.get(names[0])!r}{more}"


def take(record: Path) -> bool:
    """Makes the run of a record this process's own; False where another process was faster."""
    taken = record.with_name(f"{RECORD}.{os.getpid()}")  # where the new record is written before it is renamed
    try:
        record.rename(taken)
    except FileNotFoundError:
        return False
    return True
