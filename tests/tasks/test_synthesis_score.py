"""Images of an evaluation set scored: which sets, which rows, and FID with weights from a file."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from test_unidiff import FAST, data, rates
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torchmetrics.image.fid import NoTrainInceptionV3

from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.models.generative import GeneratedImages, ImageGenerator
from gmail_lightning.tasks import SynthesisScore


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, in torch-fidelity's layout."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(inception.torch, "load", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "none")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # so that what it says of two images differs
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


class Blots(ImageGenerator):
    """An image for each seed; of the captions, those that say so are flagged, and black."""

    pretrained = True

    def generate(self, captions: Any, seeds: Any) -> GeneratedImages:
        draws = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        flagged = ["unsafe" in caption for caption in captions]
        black = [draw * (not bad) for draw, bad in zip(draws, flagged, strict=True)]
        return GeneratedImages(torch.stack(black), flagged)

    def describe(self) -> dict[str, Any]:
        return {}


def frechet(first: Tensor, second: Tensor) -> float:
    """Of rows: the trace of the root of the product of two covariances is a nuclear norm of the centred rows."""
    centred = [(side - side.mean(0)).double() / (len(side) - 1) ** 0.5 for side in (first, second)]
    traces = sum(float(side.square().sum()) for side in centred)
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum()
    return float(shift + traces - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum())


@pytest.mark.slow
def test_fid_is_that_of_the_weights_in_the_file(weights: Path) -> None:
    score = SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), 5, ("val",), fid_weights=str(weights))
    assert not any(parameter.requires_grad for parameter in score.parameters())
    metrics: Any = nn.ModuleDict(score.build_metrics("novel", "val"))
    real = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    for rows in (slice(0, 4), slice(4, 7)):  # of the second batch, one row is among the first five
        score.update(metrics, Blots(), real[rows], ["a cat"] * 7, torch.arange(7)[rows])
    assert metrics["score"].compute()["scorer_num_images"] == 5
    made = Blots().generate([""] * 5, range(5)).image
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    features = [network((side * 255).round().to(torch.uint8)) for side in (made, real[:5])]
    found = float(metrics["fid"].compute()["fid"])
    assert found == pytest.approx(frechet(*features), rel=1e-3, abs=1e-6)
    assert found > 1e-3


@pytest.mark.slow
def test_flagged_images_are_counted_and_left_out(weights: Path) -> None:
    score = SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), None, ("val",), fid_weights=str(weights))
    real = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    captions, kept = ["a cat", "an unsafe cat", "a dog", "a key", "unsafe", "the sun"], [0, 2, 3, 5]
    found, expected = (nn.ModuleDict(score.build_metrics("novel", "val")) for _ in range(2))
    score.update(found, Blots(), real, captions, torch.arange(6))
    score.update(expected, Blots(), real[kept], [captions[row] for row in kept], torch.tensor(kept))
    assert float(found["flagged"].compute()["scorer_num_flagged"]) == 2
    for name in ("score", "fid"):
        for key, value in expected[name].compute().items():
            assert float(found[name].compute()[key]) == pytest.approx(float(value), abs=1e-5), key
    alone: Any = nn.ModuleDict(score.build_metrics("novel", "val"))
    score.update(alone, Blots(), real[:2], ["unsafe", "unsafe"], torch.arange(2))
    assert alone["fid"].compute() == {} == alone["score"].compute()
    with torch.autocast("cpu", torch.bfloat16):
        under: Any = nn.ModuleDict(score.build_metrics("novel", "val"))
        score.update(under, Blots(), real, captions, torch.arange(6))
    assert under["score"].compute()["scorer_kid"] == found["score"].compute()["scorer_kid"]


def test_only_the_sets_that_are_asked_for_get_images(tmp_path: Path) -> None:
    scorer = OpenCLIPEncoder(pretrained="emoji_scorer")
    score = SynthesisScore(scorer, 5, ("val",), eval_sets=["novel"])
    assert score.build_metrics("novel", "val").keys() == {"score", "flagged"}
    assert score.build_metrics("outside", "val") == {} == score.build_metrics("novel", "test")
    task = rates(score=SynthesisScore(scorer, 5, ("val",), eval_sets=["navel"]))
    with pytest.raises(MisconfigurationException, match="no set is called navel: there is novel"):
        pl.Trainer(default_root_dir=tmp_path, **FAST).validate(task, data())


def test_weights_that_are_not_there_are_named() -> None:
    score = SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), fid_weights="nowhere.pth")  # none to predict
    with pytest.raises(ValueError, match=r"fid_weights: nowhere\.pth is no file.*torch-fidelity"):
        score.build_metrics("novel", "test")
    with pytest.raises(ValueError, match="num_images=1"):
        SynthesisScore(OpenCLIPEncoder(pretrained="emoji_scorer"), 1)
