"""Checkpoints that the first edition wrote are read as they are; tests/first_edition/README.md says how they came."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gmail_lightning.command.main import main
from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder, add_lora
from gmail_lightning.models.branches.first_edition import converted
from gmail_lightning.tasks import AlignmentTask, RetrievalTask

FOLDER = Path(__file__).parents[1] / "first_edition"
ALIGN, RETRIEVAL = FOLDER / "align.ckpt", FOLDER / "retrieval.ckpt"
RECIPES = Path(__file__).parents[2] / "recipes" / "emoji"
MODALITY = torch.tensor([0, 1, 1])


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(image: torch.Tensor) -> torch.Tensor:
    """LoRA put on by hand, with the tensors of the file."""
    plain, adapted = OpenCLIPEncoder(pretrained="emoji").eval(), OpenCLIPEncoder(pretrained="emoji").eval()
    add_lora(adapted, rank=1, alpha=3.0, targets=("q",))
    state = torch.load(ALIGN, weights_only=True)["state_dict"]
    adapted.load_state_dict({key.removeprefix("encoder."): value for key, value in state.items()}, strict=False)
    with torch.no_grad():
        return torch.where(MODALITY[:, None] == 1, adapted.encode_image(image), plain.encode_image(image))


def test_an_alignment_is_taken_over(image: torch.Tensor, expected: torch.Tensor) -> None:
    routers = [
        ModalityEncoder(OpenCLIPEncoder(pretrained="emoji"), aligned=str(ALIGN)),
        ModalityEncoder.from_checkpoint(ALIGN),  # the encoder as it is recorded
        AlignmentTask.load_from_checkpoint(ALIGN).eval().encoder,
        AlignmentTask.load_from_checkpoint(ALIGN, encoder=OpenCLIPEncoder(pretrained="emoji")).eval().encoder,
    ]
    for router in routers:
        assert isinstance(router.branch, LoRA)
        assert router.branch.settings == {"rank": 1, "alpha": 3.0, "targets": ["q"]}
        with torch.no_grad():
            torch.testing.assert_close(router.encode_image(image, MODALITY), expected, atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for p in routers[0].parameters())
    assert all(p.requires_grad for _, p in routers[2].image_adapters())


def test_a_later_stage_loads_without_the_alignment(image: torch.Tensor, expected: torch.Tensor) -> None:
    held = torch.load(RETRIEVAL, weights_only=True)
    task = RetrievalTask.load_from_checkpoint(RETRIEVAL).eval()
    assert task.encoder.text_side == "lora"
    assert {n for n, p in task.named_parameters() if p.requires_grad} == {
        f"encoder.encoder.lora.text.0.v.{factor}" for factor in "AB"
    }
    assert task.encoder.alignment == held["alignment"]
    for name, value in held["state_dict"].items():
        assert torch.equal(task.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(task.encoder.encode_image(image, MODALITY), expected, atol=1e-6, rtol=1e-5)


def test_what_is_of_this_edition_stays_as_it_is() -> None:
    content = converted(torch.load(ALIGN, weights_only=True))
    assert converted(content) == content
    assert content["hyper_parameters"]["encoder"]["class_path"] == "gmail_lightning.models.ModalityEncoder"
    assert not {"rank", "alpha", "targets"} & content["hyper_parameters"].keys()


@pytest.mark.slow
def test_the_command_line_goes_on_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.init_args.num_workers=0", "--data.init_args.batch_size=16", "--trainer.limit_val_batches=1"]
    small += ["--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=0", "--trainer.callbacks=null"]
    branch = json.dumps({"class_path": "LoRA", "init_args": {"rank": 1, "alpha": 3.0, "targets": ["q"]}})
    fit = ["fit", "--config", str(RECIPES / "align.yaml"), *small, "--trainer.max_steps=2"]
    file = shutil.copy(ALIGN, tmp_path / "align.ckpt")
    assert main([*fit, f"--model.init_args.encoder.init_args.branch={branch}", f"--ckpt_path={file}"]) == 0
    written = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert written["global_step"] == 2
    assert written["branches"]["branch"]["init_args"]["alpha"] == 3.0
    side = ["--model.encoder.text_side=lora", "--model.encoder.text_rank=1", "--model.encoder.text_targets=[v]"]
    evaluate = ["validate", "--config", str(RECIPES / "retrieval.yaml"), *small[:3], *side]
    assert main([*evaluate, f"--ckpt_path={RETRIEVAL}"]) == 0  # aligned: runs/emoji-align, of which this one is not
