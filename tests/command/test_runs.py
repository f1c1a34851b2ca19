"""Folders of runs: which one is taken up again, what they leave, and what they record."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.callbacks import last_checkpoint
from gmail_lightning.command import run_folder
from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.command.resume import newest_state, run_of_job, run_to_resume
from gmail_lightning.command.run_folder import Run, RunFiles, new_folder
from gmail_lightning.command.run_record import make_record, process_start, settings_of
from gmail_lightning.models import LoRA, ModalityEncoder
from gmail_lightning.tasks import AlignmentTask

CONSTANT = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}
ALIGN = [
    "--config", str(recipes_folder() / "emoji/align.yaml"), "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu", "--data.init_args.batch_size=8", "--data.init_args.num_workers=0",
    "--trainer.limit_val_batches=1", "--trainer.callbacks=null", "--trainer.num_sanity_val_steps=0",
    f"--model.init_args.scheduler={json.dumps(CONSTANT)}",
]  # fmt: skip


def status(*args: str) -> int:
    try:
        return main(args)
    except SystemExit as error:
        return int(error.code or 0)


def fit(*args: str, steps: int = 2, interval: int = 2) -> int:
    return status("fit", *ALIGN, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={interval}", *args)


def made(name: str = "emoji-align") -> list[Path]:
    """Folders of the runs of a name, the oldest first."""
    folder = Path("runs") / name
    return sorted(folder.iterdir()) if folder.exists() else []


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.mark.slow
def test_last_takes_the_newest_run_of_the_same_settings_and_seed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert fit("--seed_everything=0") == 0
    assert fit("--seed_everything=1") == 0
    assert fit("--seed_everything=0", "--model.init_args.temperature=0.5") == 0
    first, other_seed, other_settings = made()
    assert [record(f)["seed"] for f in made()] == [0, 1, 0]
    assert record(first)["digest"] == record(other_seed)["digest"] != record(other_settings)["digest"]
    capfd.readouterr()
    assert fit("--seed_everything=0", "--ckpt_path=last", steps=3) == 0
    assert f"--ckpt_path last: {first}/checkpoints/last.ckpt (seed 0, done)" in caplog.text
    assert len(made()) == 3
    assert [state(f)["global_step"] for f in (first, other_seed, other_settings)] == [3, 2, 2]
    assert record(first) == record(first) | {"state": "done", "host": socket.gethostname(), "verb": "fit"}

    assert fit("--seed_everything=2", "--ckpt_path=last") == 2
    told = capfd.readouterr().err
    assert f"{first} has seed 0, this is 2" in told
    assert len(made()) == 3

    assert status("test", *ALIGN, "--seed_everything=1", "--ckpt_path=last", "--trainer.limit_test_batches=1") == 0
    (folder,) = other_seed.glob("test-*")
    assert json.loads((folder / "test_results.json").read_text())["checkpoint"].startswith(str(other_seed))
    assert (record(folder)["verb"], record(folder)["state"]) == ("test", "done")

    # Without a seed of one's own, the run's goes on.
    assert fit("--seed_everything=true", "--ckpt_path=last", "--model.init_args.temperature=0.5", steps=3) == 0
    assert (record(other_settings)["seed"], state(other_settings)["global_step"]) == (0, 3)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_next_batch_wherever_it_ended() -> None:
    assert fit("--name=straight", steps=5, interval=4) == 0
    assert fit("--name=cut", steps=3, interval=2) == 0
    ((straight,), (cut,)) = made("straight"), made("cut")
    assert state(cut)["global_step"] == 3  # and not 2, where the last validation was
    assert fit("--name=cut", "--ckpt_path=last", steps=5, interval=4) == 0
    one, other = state(straight), state(cut)
    assert one["global_step"] == other["global_step"] == 5
    for name, value in one["state_dict"].items():
        assert torch.equal(other["state_dict"][name], value), name


@pytest.mark.slow
def test_the_last_state_does_not_wait_for_a_better_one() -> None:
    """A checkpoint of the user's that watches a value, and would write the same file only where it got better."""
    watch = {"monitor": "val/novel/real_i2t_R@1", "mode": "max", "save_last": True}  # it stays the same
    callbacks = json.dumps([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": watch}])
    assert fit(f"--trainer.callbacks={callbacks}", steps=5, interval=2) == 0
    (folder,) = made()
    assert state(folder)["global_step"] == 5
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert [name for name in names if name.startswith("last")] == ["last.ckpt"]
    assert len(names) == 2  # and the best


@pytest.mark.slow
def test_the_kept_configuration_makes_the_run_anew() -> None:
    assert fit() == 0
    (first,) = made()
    assert fit("--ckpt_path=last", steps=3) == 0  # neither what it went on from nor where it wrote is in it
    text = (first / "config.yaml").read_text()
    kept = yaml.safe_load(text)
    assert str(first) not in text
    assert kept["trainer"].get("check_val_every_n_epoch", 1) is None  # what the recipe sets to null over a default
    assert kept.get("ckpt_path") is kept["trainer"].get("default_root_dir") is kept["trainer"].get("logger") is None
    before = (first / "checkpoints/last.ckpt").read_bytes()
    assert status("fit", "--config", str(first / "config.yaml")) == 0
    assert (first / "checkpoints/last.ckpt").read_bytes() == before
    _, again = made()
    assert state(again)["global_step"] == 3
    assert record(again)["digest"] == record(first)["digest"]
    for name, value in state(first)["state_dict"].items():
        assert torch.equal(state(again)["state_dict"][name], value)


@pytest.mark.slow
def test_a_job_that_is_told_to_end_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AlignmentTask.training_step

    def told(self: AlignmentTask, *args: Any) -> Any:
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTask, "training_step", told)
        assert fit(steps=5, interval=5) == 128 + signal.SIGTERM
    (folder,) = made()
    assert record(folder)["state"] == "interrupted"
    assert state(folder)["global_step"] == 3  # the step under way is finished
    assert fit("--ckpt_path=last", steps=5, interval=5) == 0
    assert record(folder)["state"] == "done"
    assert fit("--name=whole", steps=5, interval=5) == 0
    (whole,) = made("whole")
    for name, value in state(whole)["state_dict"].items():
        assert torch.equal(state(folder)["state_dict"][name], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        ["--data.init_args.batch_size=7"],
        ["--data.init_args.train", '[{"class_path":"ManifestDataset","init_args":{"path":"no.csv"}}]'],
        ["--model.init_args.real_text_weight=1"],
        ["--trainer.callbacks=CollapseGuard"],
    ],
    ids=["batch", "data", "model", "callback"],
)
def test_a_run_that_fails_before_its_first_step_leaves_nothing(wrong: list[str]) -> None:
    assert fit(*wrong) in (2, 3)
    assert not Path("runs").exists()
    assert fit(*wrong, "--trainer.default_root_dir=mine") in (2, 3)
    assert not Path("mine").exists()
    Path("own/empty").mkdir(parents=True)
    assert fit(*wrong, "--trainer.default_root_dir=own/empty") in (2, 3)
    assert not any(Path("own/empty").iterdir())  # a folder that was there stays


@pytest.mark.slow
def test_a_run_that_fails_later_stays_and_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from gmail_lightning.tasks import AlignmentTask

    losses = AlignmentTask.compute_losses

    def explode(self, batch):
        if self.trainer.global_step == 3:
            raise RuntimeError("a fault at the fourth step")
        return losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTask, "compute_losses", explode)
        with pytest.raises(RuntimeError, match="fourth"):
            fit(steps=4)
    (folder,) = made()
    assert (record(folder)["state"], state(folder)["global_step"]) == ("failed", 2)
    assert fit("--ckpt_path=last", steps=4) == 0
    assert made() == [folder]
    assert (record(folder)["state"], state(folder)["global_step"]) == ("done", 4)


@pytest.mark.slow
def test_a_killed_job_finds_its_folder_and_a_running_one_is_left_alone(tmp_path: Path) -> None:
    """One real process, killed; a job is known by its number, others by what was written."""
    command = [sys.executable, "-m", "gmail_lightning", "fit", *ALIGN, "--trainer.max_steps=100000"]
    command += ["--trainer.val_check_interval=2"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "SLURM_JOB_ID": "77"}, stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (folder,) = made()
        assert (record(folder)["state"], record(folder)["job"]) == ("running", "77")
        assert fit("--ckpt_path=last") == 2  # it is running
        assert made() == [folder]
    finally:
        process.send_signal(signal.SIGKILL)
    # Not reaped yet: a process that is only waited for does not run.
    steps = state(folder)["global_step"]
    assert record(folder)["state"] == "running"
    more = steps + 2 - steps % 2
    os.environ["SLURM_JOB_ID"] = "78"
    assert fit(steps=2) == 0  # another job, without a flag: begins anew
    assert len(made()) == 2
    os.environ["SLURM_JOB_ID"] = "77"
    try:
        assert fit(steps=more) == 0
    finally:
        del os.environ["SLURM_JOB_ID"]
    process.wait()
    assert len(made()) == 2
    assert state(folder)["global_step"] == more
    assert (record(folder)["state"], record(folder)["process"]) == ("done", os.getpid())


def test_two_processes_in_the_same_moment_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(run_folder.datetime):
        calls = 0

        @classmethod
        def now(cls, tz=None):
            cls.calls += 1
            return cls(2026, 1, 2, 3, 4, 5, 6000 + 1000 * (cls.calls > 2))

    monkeypatch.setattr(run_folder, "datetime", Stopped)
    assert [new_folder(tmp_path).name for _ in range(2)] == ["20260102-030405-006", "20260102-030405-007"]


def plant(folder: Path, **changes) -> dict:
    """Writes the record of a run with a checkpoint."""
    written = {**make_record("r", "fit", {"a": 1, "b": 2}, 0, None), "state": "done", **changes}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "run.json").write_text(json.dumps(written))
    return written


WANTED = make_record("r", "fit", {"a": 1, "b": 2}, 0, None)


@pytest.mark.parametrize(
    ("changes", "age", "reason"),
    [
        ({}, 0, None),
        ({"state": "failed"}, 0, None),
        ({"state": "interrupted"}, 0, None),
        ({"seed": 3}, 0, "has seed 3, this is 0"),
        ({"seed": False}, 0, "has seed False, this is 0"),
        ({"settings": {"a": 1, "b": 5}}, 0, "has b=5, this is 2"),
        ({"settings": {"a": 0}}, 0, "has a=0, this is 1 and 1 more"),
        ({"verb": "test"}, 0, ""),
        ({"state": "running", "host": "elsewhere", "process": 1}, 0, "is running on elsewhere as process 1"),
        ({"state": "running", "host": "elsewhere", "process": 1}, 3600, None),  # no sign of life for an hour
        ({"state": "running", "process": os.getppid(), "process_start": process_start(os.getppid())}, 3600,
         "is running on"),
        ({"state": "running", "process": os.getppid(), "process_start": "1"}, 0, None),  # another has the number now
        ({"state": "running", "process": 2**22 + 1}, 0, None),  # there is no such process
    ],
)  # fmt: skip
def test_which_run_may_go_on(tmp_path: Path, changes: dict, age: float, reason: str | None) -> None:
    folder = tmp_path / "r" / "a"
    plant(folder, **changes)
    os.utime(folder / "run.json", (time.time() - age,) * 2)
    if reason is None:
        assert run_to_resume(tmp_path, WANTED).folder == folder
        assert not (folder / "run.json").exists()  # taken: nobody else takes it until the new record is there
    else:
        with pytest.raises(MisconfigurationException, match="no checkpoints/last") as caught:
            run_to_resume(tmp_path, WANTED)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "restarts", "name", "found"),
    [
        ({"job": "5", "state": "running", "host": "elsewhere"}, "1", "align", True),
        ({"job": "5", "state": "running", "host": "elsewhere"}, "", "align", False),  # on another node of the job
        ({"job": "5", "state": "failed"}, "1", "align", True),
        ({"job": "5", "state": "done"}, "1", "align", True),
        ({"job": "5", "state": "done"}, "", "align", False),  # the same command once more in the same job
        ({"job": "5", "seed": 1}, "1", "align", False),
        ({"job": "5", "settings": {"a": 1}}, "1", "align", False),
        ({"job": "6", "state": "failed"}, "1", "align", False),
        ({"job": None, "state": "failed"}, "1", "align", False),
        ({"job": "5", "state": "failed"}, "1", "interactive", False),
    ],
)
def test_which_run_is_that_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, restarts: str, name: str, found: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    folder = tmp_path / "r" / "a"
    plant(folder, **changes)
    time.sleep(0.01)
    (folder / "hpc_ckpt_1.ckpt").touch()  # what Lightning wrote when the job was about to end
    answer = run_of_job(tmp_path, {**WANTED, "job": "5"})
    assert (answer is not None) == found
    if answer is not None:
        assert (answer.folder, answer.checkpoint) == (folder, str(folder / "hpc_ckpt_1.ckpt"))


def test_settings_leave_out_what_changes_nothing_in_training() -> None:
    one = {
        "model": {"class_path": "T", "init_args": {"rank": 4, "num_beams": 5, "encoder": {"class_path": "E"}}},
        "data": {"class_path": "D", "init_args": {"train": ["x"], "test": {"a": ["y"]}, "num_workers": 2}},
        "trainer": {"max_steps": 5, "devices": 1, "gradient_clip_val": 1.0},
        "ckpt_path": "last",
    }
    assert settings_of(one, frozenset({"num_beams"})) == {
        "model.class_path": "T",
        "model.init_args.rank": 4,
        "model.init_args.encoder.class_path": "E",
        "data.class_path": "D",
        "data.init_args.train": ["x"],
        "trainer.accumulate_grad_batches": None,
        "trainer.gradient_clip_val": 1.0,
        "trainer.gradient_clip_algorithm": None,
        "trainer.limit_train_batches": None,
    }


@pytest.mark.slow
def test_a_trial_takes_nothing_and_a_folder_at_work_is_refused(tmp_path: Path) -> None:
    assert fit() == 0
    (folder,) = made()
    before = (folder / "run.json").read_bytes()
    assert fit("--ckpt_path=last", "--trainer.fast_dev_run=true") == 0
    assert made() == [folder]
    assert (folder / "run.json").read_bytes() == before
    plant(tmp_path / "own", state="running", host="elsewhere")
    assert fit("--trainer.default_root_dir", str(tmp_path / "own")) == 2
    assert record(tmp_path / "own")["host"] == "elsewhere"


@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
def test_results_outlive_a_late_failure(verb: str) -> None:
    run = Run(Path("a"), make_record("a", verb, {}, 0, None), True)
    run.begin()
    files = RunFiles(run, "")
    trainer = SimpleNamespace(state=SimpleNamespace(fn=verb))
    {"test": files.on_test_batch_end, "predict": files.on_predict_batch_end, "validate": files.on_validation_batch_end}[
        verb
    ](trainer)
    Path("a/results.json").write_text("{}")
    run.end("failed")
    assert Path("a/results.json").exists()
    assert record(Path("a"))["state"] == "failed"


def test_validation_within_a_fit_is_no_step() -> None:
    run = Run(Path("a"), make_record("a", "fit", {}, 0, None), True)
    run.begin()
    RunFiles(run, "").on_validation_batch_end(SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING)))
    run.end("failed")
    assert not Path("a").exists()


@pytest.mark.slow
def test_a_requeued_job_without_a_state_keeps_the_checkpoint_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--name=first") == 0
    (first,) = made("first")
    given = first / "checkpoints/last.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert fit(f"--ckpt_path={given}", "--name=job", steps=4) == 0
    (job,) = made("job")
    (job / "checkpoints/last.ckpt").unlink()  # as one that was killed before its first state
    (job / "run.json").write_text(json.dumps({**record(job), "state": "running", "process": 0, "process_start": "no"}))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit(f"--ckpt_path={given}", "--name=job", steps=4) == 0
    assert made("job") == [job]
    assert record(job)["checkpoint"] == str(given)


@pytest.mark.slow
def test_a_second_fit_in_a_job_starts_from_the_file_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert fit("--name=job") == 0
    (first,) = made("job")
    (first / "run.json").write_text(json.dumps({**record(first), "state": "failed"}))
    given = first / "checkpoints/last.ckpt"
    assert fit(f"--ckpt_path={given}", "--name=job") == 0
    assert len(made("job")) == 2
    assert record(first)["state"] == "failed"
    assert fit("--name=job", "--trainer.fast_dev_run=true") == 0  # a trial goes on with nothing
    assert record(first)["state"] == "failed"


def test_two_processes_of_a_job_do_not_take_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NAME", "align")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    plant(tmp_path / "r" / "a", job="5", state="failed")
    assert run_of_job(tmp_path, {**WANTED, "job": "5"}) is not None
    assert run_of_job(tmp_path, {**WANTED, "job": "5"}) is None


@pytest.mark.slow
def test_variables_of_another_launcher_do_not_make_one_process_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are left in the shell of a cluster; Lightning does not go by them either."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit() == 0


def test_a_kill_between_two_folders_of_states_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    path, part = folder / "last.ckpt", folder / "last.ckpt.part"
    for state in (path, part):
        state.mkdir(parents=True)
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self == part:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        last_checkpoint._rename(part, path, None)
    monkeypatch.undo()
    assert newest_state(tmp_path) == folder / "last.ckpt.before"
    last_checkpoint._rename(part, path, None)
    assert newest_state(tmp_path) == path
    part.write_text("whole")  # in place of a folder
    last_checkpoint._rename(part, path, None)
    assert path.read_text() == "whole"
    assert os.listdir(folder) == ["last.ckpt"]


def test_a_state_of_one_file_per_rank_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path, part = tmp_path / "last.ckpt", tmp_path / "last.ckpt.part"
    for text in ("first", "second"):
        part.mkdir()
        (part / "rank0").write_text(text)
        last_checkpoint._rename(part, path, None)
        assert (path / "rank0").read_text() == text
        assert os.listdir(tmp_path) == ["last.ckpt"]
    part.write_text("third")
    with pytest.raises(OSError, match="disk"):
        last_checkpoint._rename(part, path, OSError("disk full"))
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
def test_the_last_state_knows_of_the_validation_at_its_step(tmp_path: Path) -> None:
    """The state of the last step is saved within the epoch, and once more when its validation is over."""
    seen = []

    class Validated(Callback):
        state_key = "validated"

        def state_dict(self) -> dict[str, Any]:
            return {"validations": len(seen)}

        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(trainer.global_step)

    callbacks = [Validated(), last_checkpoint.LastCheckpoint()]
    settings = {"val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=callbacks, **settings)
    trainer.fit(AlignmentTask(ModalityEncoder(tiny_encoder(), branch=LoRA(rank=2))), emoji_data(mode="paired"))
    assert seen == [2]
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (state["global_step"], state["callbacks"]["validated"]) == (2, {"validations": 1})
