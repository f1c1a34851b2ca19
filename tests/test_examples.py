"""The examples run as their first lines say."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.transforms import resize

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("--trainer.max_steps=20", "--trainer.val_check_interval=20", "--trainer.log_every_n_steps=1")
UNWATCHED = ("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0", "--trainer.callbacks=null")


@pytest.fixture(autouse=True)
def in_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])  # the command adds the folder, too


def run(example: str, root: Path, *further: str) -> list[float]:
    """Runs the command of an example's second line for a few steps, and returns the losses."""
    words = (EXAMPLES / example).read_text().splitlines()[1].split()
    assert words[:3] == ["gmail-lightning", "fit", "--config"]
    recipe = recipes_folder() / words[3].removeprefix("../recipes/")
    override = words[4:]
    assert len(override) == 2
    settings = [f"--trainer.default_root_dir={root}", *SHORT, *further]
    assert main(["fit", "--config", str(recipe), *override, *settings]) == 0
    rows = csv.DictReader((root / "csv/version_0/metrics.csv").open())
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


@pytest.mark.parametrize(("example", "most"), [("custom_encoder.py", 40), ("custom_branch.py", 60)])
def test_an_example_is_short(example: str, most: int) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) <= most


@pytest.mark.slow
def test_an_encoder_of_ones_own_is_aligned_by_one_override(tmp_path: Path) -> None:
    losses = run("custom_encoder.py", tmp_path)
    assert (tmp_path / "modality_gap.png").exists()
    assert len(losses) == 20
    assert max(losses[-5:]) < min(losses[:5])


@pytest.mark.slow
def test_a_branch_of_ones_own_is_aligned_by_one_override_and_taken_away(tmp_path: Path) -> None:
    assert len(run("custom_branch.py", tmp_path, *UNWATCHED)) == 20
    checkpoint = tmp_path / "checkpoints/last.ckpt"
    encoder = ModalityEncoder.from_checkpoint(checkpoint)
    assert type(encoder.branch).__module__ == "custom_branch"

    def images(hand: str) -> Tensor:
        drawings = EmojiDataset(hand, "novel")
        return torch.stack([resize(drawings.image(row), encoder.image_spec) for row in range(128)])

    def margin(generated: Tensor, real: Tensor) -> float:
        cosines = F.normalize(generated, dim=1) @ F.normalize(real, dim=1).T
        return float(cosines.diag().mean() - cosines[~torch.eye(128, dtype=torch.bool)].mean())

    with torch.no_grad():
        real, plain = encoder.encode_image(images("noto")), encoder.encode_image(images("fluent_flat"))
        adapted = encoder.encode_image(images("fluent_flat"), torch.ones(128, dtype=torch.long))
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        down, up = ([state[f"encoder.branch.{name}.{part}"] for part in ("weight", "bias")] for name in ("down", "up"))
        torch.testing.assert_close(adapted, plain + F.linear(F.gelu(F.linear(plain, *down)), *up))
        assert torch.equal(real, encoder.plain.encode_image(images("noto")))
    assert margin(adapted, real) > margin(plain, real) + 0.01  # on concepts that it never saw


def test_a_branch_of_ones_own_starts_as_the_plain_tower_and_alone_trains() -> None:
    from custom_branch import Bottleneck
    from custom_encoder import BagOfBytesCLIP

    encoder = ModalityEncoder(BagOfBytesCLIP(), branch=Bottleneck(8))
    image, generated = torch.rand(2, 3, 64, 64), torch.ones(2, dtype=torch.long)
    assert "Generated images: the tower with Bottleneck(width=8). Text side" in encoder.describe()
    features = encoder.encode_image(image, generated)
    assert torch.equal(features, encoder.encode_image(image))
    features.square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == {f"branch.{name}.{part}" for name in ("down", "up") for part in ("weight", "bias")}
    encoder = ModalityEncoder(OpenCLIPEncoder(pretrained="emoji"), branch=Bottleneck(8))
    encoder.freeze_behind(0)  # a loss on patch tokens does not reach the map
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
