"""Run folders: what a run is made of, whether it is running, and which one to go on with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from gmail_lightning.distributed import on_first_rank

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
        "process_start": _process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "checkpoint": checkpoint,
        "settings": json.loads(text),
    }


class Run:
    """The folder of a run; the process that decided on it begins it and says how it ended.

    Args:
        folder: Where it writes.
        record: See ``make_record``.
        is_new: Whether nothing but this run is in the folder, so that all in it goes where no step was made.
        was_there: Whether the folder was there before, and stays.
    """

    def __init__(self, folder: Path, record: dict[str, Any], is_new: bool, was_there: bool = False) -> None:
        self.folder, self.record, self.is_new, self.was_there = folder, record, is_new, was_there
        #: Whether there is something to keep.
        self.has_stepped = False
        self._over = threading.Event()

    def begin(self) -> None:
        """Writes the record, and gives signs of life from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self, state: str) -> None:
        """Records how it ended: ``done``, ``failed`` or ``interrupted``; removes what did not get to its first step."""
        self._over.set()
        if state != "done" and self.is_new and not self.has_stepped:
            for path in list(self.folder.iterdir()) if self.was_there else [self.folder]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            for parent in list(self.folder.parents)[:2]:  # runs/NAME and runs, if nothing else is in them
                if parent.parts[:1] == ("runs",) and parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        elif self.folder.exists():
            self.record["state"] = state
            self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                os.utime(self.folder / RECORD)
            except OSError:  # the disk is away for a while
                continue

    def _write(self) -> None:
        part = self.folder / f"{RECORD}.{os.getpid()}"
        part.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        part.replace(self.folder / RECORD)


class RunFiles(Callback):
    """Keeps the configuration in the run folder, and notes that there is something to keep.

    Args:
        run: In the process that began it.
        config: The configuration as text.
    """

    def __init__(self, run: Run | None, config: str) -> None:
        self.run, self.config = run, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``config.yaml``."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        on_first_rank(partial(path.write_text, self.config, encoding="utf-8"), trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step was made."""
        self._keep()

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There are values."""
        self._keep()

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There may be a file."""
        self._keep()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There are values, where validation is all that is done."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._keep()

    def _keep(self) -> None:
        if self.run is not None:
            self.run.has_stepped = True


class Decision(NamedTuple):
    """What all processes of a run must agree on."""

    folder: Path
    checkpoint: str | None
    seed: int | bool
    keeps: bool  # a record and the configuration in the folder


class Found(NamedTuple):
    """A run to go on with."""

    folder: Path
    record: dict[str, Any]
    checkpoint: str | None


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Makes a folder named after the time; two processes that begin in the same moment get one each."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{prefix}{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
        try:
            folder.mkdir()
        except FileExistsError:
            time.sleep(0.001)
        else:
            return folder


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
    for path, record in _fits(runs):
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
    for path, record in _fits(runs):
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
        start = _process_start(record["process"])
        return not itself and start is not None and start == record["process_start"]
    return time.time() - path.stat().st_mtime < SILENCE


def refuse_running(folder: Path) -> None:
    """Raises a MisconfigurationException if a fit is at work in the folder."""
    for path, record in _fits(folder):
        if path.parent == folder and is_running(path, record):
            raise MisconfigurationException(
                f"{folder} is the folder of a run on {record['host']}, process {record['process']}: choose another one."
            )


def _process_start(process: int) -> str | None:
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


def _fits(runs: Path) -> list[tuple[Path, dict[str, Any]]]:
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
