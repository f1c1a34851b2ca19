"""The command line: what it runs, writes, refuses and answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.tasks import AlignmentTask, RetrievalTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}
RANDOM = {"class_path": "OpenCLIPEncoder", "init_args": {"pretrained": None, "merges": "emoji", "config": TINY}}
SHORT = [
    "--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu",
    "--data.init_args.batch_size=16", "--data.init_args.num_workers=0",
]  # fmt: skip
ALIGN = ["--config", str(recipes_folder() / "emoji/align.yaml"), *SHORT, "--trainer.val_check_interval=3"]
PRETRAIN = ["--config", str(recipes_folder() / "emoji/pretrain.yaml"), *SHORT, "--trainer.limit_val_batches=0"]
UNTRAINED = [f"--model.init_args.encoder.init_args.encoder={json.dumps(RANDOM)}"]


def status(args: list[str]) -> int:
    """Exit status; the parser leaves by ``SystemExit``."""
    try:
        return main(args)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one short run of the embedded recipe."""
    folder = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert status(["fit", *ALIGN]) == 0
    (made,) = (folder / "runs/emoji-align").iterdir()
    return made


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_fit_fills_the_run_folder(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "run.json", "checkpoints", "csv", "modality_gap.png", "modality_gap.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (run / "modality_gap.png").read_bytes()[:4] == b"\x89PNG"
    gap = json.loads((run / "modality_gap.json").read_text())
    assert gap["step"] == 3
    assert set(gap["before"]) == set(gap["after"]) == {"novel", "paired"}
    assert gap["before"]["novel"]["real_i2t_R@1"] == gap["after"]["novel"]["real_i2t_R@1"]
    assert gap["before"]["novel"]["paired_cosine"] != gap["after"]["novel"]["paired_cosine"]
    header = (run / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/novel/g2r_R@1", "val/paired/g2r_R@1"} <= set(header)


@pytest.mark.slow
def test_a_checkpoint_of_the_command_line_needs_no_arguments(run: Path) -> None:
    path = run / "checkpoints/last.ckpt"
    settings = torch.load(path, weights_only=True)["hyper_parameters"]["encoder"]
    assert settings["init_args"]["branch"]["init_args"]["rank"] > 0
    task, encoder = AlignmentTask.load_from_checkpoint(path).eval(), ModalityEncoder.from_checkpoint(path)
    image, modality = torch.rand(4, 3, 64, 64), torch.tensor([1, 0, 1, 0])
    with torch.no_grad():
        assert torch.equal(encoder.encode_image(image, modality), task.encoder.encode_image(image, modality))
        frozen = OpenCLIPEncoder(pretrained="emoji").eval().requires_grad_(False).encode_image(image[modality == 0])
        assert torch.equal(encoder.encode_image(image, modality)[modality == 0], frozen)


@pytest.mark.slow
def test_resume_goes_on_in_the_folder_and_the_users_values_win(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[2])
    assert status(["fit", *ALIGN, "--trainer.max_steps=4", "--ckpt_path", "last"]) == 0
    assert [p.name for p in run.parent.iterdir()] == [run.name]
    assert status(["test", *ALIGN, "--ckpt_path", "last"]) == 0  # writes beside, and not over, what training wrote
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    # Other settings make another run, whatever it starts from.
    more = ["--trainer.max_steps=5", "--model.init_args.temperature=0.5"]
    assert status(["fit", *ALIGN, *more, "--ckpt_path", "last"]) == 2
    assert status(["fit", *ALIGN, *more, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0
    _, other = sorted(run.parent.iterdir())
    held = torch.load(other / "checkpoints/last.ckpt", weights_only=True)
    assert (held["global_step"], held["hyper_parameters"]["temperature"]) == (5, 0.5)
    assert "temperature: 0.5" in (other / "config.yaml").read_text()


def test_lightnings_private_names_are_there() -> None:
    """We override or read these; a release that renames them must fail here and not silently."""
    from lightning.pytorch.core.mixins import hparams_mixin

    assert callable(LightningCLI._parse_ckpt_path)
    assert callable(LightningCLI._instantiate_trainer)
    assert hparams_mixin._given_hyperparameters.get() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "printed"),
    [
        (["--model.init_args.encoder.init_args.encoder.init_args.model_name", "null"], "model_name: null"),
        (["--model.init_args.encoder.init_args.encoder.init_args.model_name=null"], "model_name: null"),
        (['--model.init_args.encoder.init_args.encoder.init_args.config={"a": null, "b": [true, "None"]}'], "a: null"),
        (['--model.init_args.encoder.init_args.encoder.init_args.config={"a": null, "b": [true, "None"]}'], "- None\n"),
        (["--model.init_args.temperature", "null"], "temperature: null"),
    ],
)
def test_null_stays_null_at_any_depth(given: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipes_folder() / "gmail/align_vitb32_coco.yaml"
    assert status(["fit", "--config", str(recipe), *given, "--print_config"]) == 0
    assert printed in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        (["--model", "AlignmntTask"], "Did you mean 'AlignmentTask'"),
        (["--model.init_args.symetric", "true"], "Did you mean 'symmetric'"),
        (["--model.encoder.encoder", "OpenClipEncodr"], "OpenCLIPEncoder"),
        (["--data.init_args.batchsize", "3"], "Did you mean 'batch_size'"),
        (["--trainer.max_stps", "3"], "Did you mean 'max_steps'"),
        (["--modle.x", "3"], "Did you mean 'model'"),
        (["--model.init_args.rank", "3"], "'rank' is now of the branch of the router that model.encoder is"),
        (["--model.init_args.aligned", "runs/a"], "a ModalityEncoder: --model.encoder.aligned."),
    ],
)
def test_a_misspelt_name_is_answered_with_the_known_ones(
    wrong: list[str], answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(["fit", *ALIGN, *wrong]) == 2
    printed = capfd.readouterr().err
    assert answer in printed
    assert "usage:" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "answer"),
    [
        (["validate", *ALIGN, *UNTRAINED], 2, "untrained model"),
        (["test", *ALIGN, *UNTRAINED], 2, "untrained model"),
        (["fit", *ALIGN, "--ckpt_path", "last"], 2, "no checkpoints/last.ckpt below runs/emoji-align"),
        (["fit", *ALIGN, "--trainer.accumulate_grad_batches", "2"], 2, "contrastive_chunk_size"),
        (["fit", *ALIGN, "--trainer.overfit_batches", "2"], 2, "limit_train_batches"),
        (["fit", *ALIGN, "--data.init_args.batch_size", "15"], 2, "15"),
        (["fit", *ALIGN, "--data.init_args.mode", "mixture", "--data.init_args.generated_fraction", "1.5"], 2, "1.5"),
        (["fit", *ALIGN, "--trainer.num_sanity_val_steps", "2"], 2, "num_sanity_val_steps"),
        (["fit", *ALIGN, "--model.init_args.real_text_weight", "1"], 2, "real_path"),
        (["fit", *ALIGN, "--data.init_args.train", '[{"class_path":"ManifestDataset","init_args":{"path":"no.csv"}}]'],
         3, "no.csv"),
    ],
)  # fmt: skip
def test_refusals_have_a_status_and_a_reason(
    args: list[str], code: int, answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(args) == code
    assert answer in capfd.readouterr().err


EMOJI = [{"class_path": "EmojiDataset", "init_args": {"hand": hand}} for hand in ("noto", "fluent_flat")]
ABSENT = [{"class_path": "ManifestDataset", "init_args": {"path": "absent.csv"}}]
HELD = {"train": EMOJI, "val": {"novel": EMOJI}, "test": {"novel": EMOJI}, "predict": EMOJI}
READ = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


def with_data(verb: str, absent: list[str], kind: str = "MixedModalityDataModule", **further: object) -> int:
    """Status of a verb over data of which some are absent."""
    named = {name: {"novel": ABSENT} if isinstance(held, dict) else ABSENT for name, held in HELD.items()}
    settings = {**HELD, **{name: named[name] for name in absent}, **further}
    if kind == "StreamingDataModule":
        settings = {k: v for k, v in settings.items() if k != "train"}
        settings |= {"urls": "absent-{0..3}.tar", "modality": "real", "steps_per_epoch": 1}
    else:
        settings["allow_overlap"] = {
            "novel": {"kinds": ["caption", "image_id", "pixels"], "reason": "the same drawings"}
        }
    data = {"class_path": kind, "init_args": {"batch_size": 8, **settings}}
    branch = {"class_path": "LoRA", "init_args": {"rank": 2}}
    router = {"class_path": "ModalityEncoder", "init_args": {"encoder": RANDOM, "branch": branch}}
    model = {"class_path": "AlignmentTask", "init_args": {"encoder": router}}
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    trainer |= {f"limit_{stage}_batches": 1 for stage in ("val", "test", "predict")}
    Path("own.yaml").write_text(json.dumps({"trainer": trainer, "model": model, "data": data}))
    return status([verb, "--config", "own.yaml", "--allow_untrained", "true"])


@pytest.mark.slow
@pytest.mark.parametrize("verb", READ)
def test_only_what_the_verb_reads_is_built(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert with_data(verb, [name for name in HELD if name not in READ[verb]]) == 0
    kept = next(Path("runs").rglob("config.yaml")).read_text()
    assert verb == "fit" or "absent.csv" in kept  # the configuration is kept whole
    for name in READ[verb]:
        assert with_data(verb, [name]) == 3
        assert "absent.csv" in capfd.readouterr().err


def test_test_reads_the_sets_of_val_where_it_has_none_of_its_own() -> None:
    assert with_data("test", ["train", "predict"], test=None) == 0
    assert with_data("test", ["val"], test=None) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "code"), [("fit", 3), ("validate", 0), ("test", 0), ("predict", 0)])
def test_only_what_the_verb_reads_is_built_beside_a_stream(verb: str, code: int) -> None:
    assert with_data(verb, [], "StreamingDataModule") == code
    assert verb == "fit" or with_data(verb, list(READ[verb]), "StreamingDataModule") == 3


@pytest.mark.slow
def test_untrained_on_purpose(capfd: pytest.CaptureFixture[str]) -> None:
    assert status(["validate", *ALIGN, *UNTRAINED, "--allow_untrained", "true"]) == 0
    assert "val/novel/margin" in capfd.readouterr().out


@pytest.mark.slow
def test_pretraining_then_export_loads_in_plain_open_clip(tmp_path: Path) -> None:
    import open_clip
    from transformers import CLIPModel

    assert status(["fit", *PRETRAIN, "--trainer.default_root_dir", str(tmp_path / "pre")]) == 0
    checkpoint = tmp_path / "pre/checkpoints/last.ckpt"
    assert status(["export", str(checkpoint), "--out", str(tmp_path / "clip")]) == 0
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    task = RetrievalTask.load_from_checkpoint(checkpoint)
    assert torch.equal(plain.visual.proj, task.encoder.encoder.model.visual.proj)
    assert torch.equal(plain.token_embedding.weight, task.encoder.encoder.model.token_embedding.weight)
    assert status(["export", str(checkpoint), "--to", "hf_clip", "--out", str(tmp_path / "hf")]) == 0
    hf = CLIPModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(hf.visual_projection.weight, plain.visual.proj.T)
    assert status(["export", str(checkpoint), "--out", str(tmp_path / "clip")]) == 2


def test_recipes_are_listed_and_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(str(p.relative_to(recipes_folder())) in listed for p in recipes_folder().rglob("*.yaml"))
    assert main(["recipes", "copy", "emoji/align"]) == 0
    assert (tmp_path / "align.yaml").read_text() == (recipes_folder() / "emoji/align.yaml").read_text()
    assert main(["recipes", "copy", "emoji/align"]) == 2
    assert main(["recipes", "copy", "emoji/algin"]) == 2
    assert "emoji/align.yaml" in capsys.readouterr().err


def test_doctor_and_version_work_offline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    answer = capsys.readouterr().out
    for word in (
        "torch ",
        "torchvision works",
        "cpu:",
        "java:",
        "disk:",
        "emoji images present",
        "hub: HF_HUB_OFFLINE",
    ):
        assert word in answer
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gmail-lightning ")


@pytest.mark.slow
def test_exit_status_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gmail_lightning", "fit", *ALIGN, "--trainer.fast_dev_run=true"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
def test_the_working_directory_shadows_nothing(tmp_path: Path) -> None:
    """Names of the standard library, of a dependency and of ours; a class of one's own there is still found."""
    for name in ("random.py", "datasets.py", "torchmetrics.py", "yaml.py"):
        (tmp_path / name).write_text("raise RuntimeError('the file of the working directory')")
    (tmp_path / "mine.py").write_text("from gmail_lightning.tasks import AlignmentTask as Own")
    own = ["--model.class_path", "mine.Own", "--trainer.fast_dev_run=true"]
    for command in ([sys.executable, "-m", "gmail_lightning"], [Path(sys.executable).with_name("gmail-lightning")]):
        answer = subprocess.run(
            [*command, "fit", *ALIGN, *own], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert answer.returncode == 0, answer.stderr[-2000:]


def test_the_limit_of_a_process_group_is_what_we_say() -> None:
    """Lightning's strategies set it, so that the 600 seconds of NCCL do not apply."""
    from lightning.pytorch.strategies import DDPStrategy

    from gmail_lightning.metrics import CocoCaptionScore
    from gmail_lightning.tasks import CaptioningTask

    assert DDPStrategy()._timeout.total_seconds() == 1800
    for told in (CaptioningTask.__doc__, CocoCaptionScore.__doc__):
        assert "1,800 seconds" in " ".join(str(told).split())


def test_what_fails_in_a_worker_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._utils import ExceptionWrapper

    from gmail_lightning.command.main import _fail
    from gmail_lightning.datasets import DataError, ImageDecodeError

    for kind in (DataError, ImageDecodeError):
        try:
            raise kind("a.csv row 2: no file a.png")
        except kind:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(kind) as told:
            wrapped.reraise()
        assert _fail(3, "Data problem", told.value) == 3
        assert capsys.readouterr().err == "Data problem: a.csv row 2: no file a.png\n"


def test_a_checkpoint_that_is_not_there_is_told_before_all_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path / "nope.ckpt")]) == 2
    assert "nope.ckpt: no such checkpoint; a relative path starts from" in capsys.readouterr().err
