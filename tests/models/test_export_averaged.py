"""Exports of what a joint fine-tuning leaves: its average, its LoRA, and the plain models that come of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_pipelines import build
from torch import Tensor
from torchvision.transforms import Normalize
from transformers import CLIPModel

from gmail_lightning.export import export_checkpoint
from gmail_lightning.models import DiffusersGenerator, DualEncoder, FullCopy, LoRA, ModalityEncoder
from gmail_lightning.models.averaging import stored_average
from gmail_lightning.tasks import UniDiffTask

#: What is built around the encoder, and what the task is told to train.
WAYS: dict[str, tuple[Callable[[DualEncoder], DualEncoder], dict[str, Any]]] = {
    "full": (lambda encoder: encoder, {}),
    "lora": (lambda encoder: encoder, {"train": {"vision": 3, "text": 2}}),
    "lora and full": (lambda encoder: encoder, {"train": {"vision": 3, "text": "full"}}),
    "router": (lambda encoder: ModalityEncoder(encoder, branch=LoRA(3), projection=True, text_side="projection"), {}),
    "copy": (lambda encoder: ModalityEncoder(encoder, branch=FullCopy(), text_side="lora"), {}),
}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sd", tmp_path_factory.mktemp("pipeline") / "sd")


def joint(encoder: DualEncoder, generator: Path, **settings: Any) -> UniDiffTask:
    return UniDiffTask(encoder, DiffusersGenerator(str(generator)), text_tower="separate", ema_decay=0.5, **settings)


def save(task: UniDiffTask, path: Path) -> dict[str, Any]:
    """What the trainer writes, as far as an export reads it."""
    content: dict[str, Any] = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return content


def step(task: UniDiffTask) -> None:
    """Moves what trains, and takes it into the average."""
    with torch.no_grad():
        for parameter in task.trained():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    task.average.update()


def features(encoder: DualEncoder, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    routes = isinstance(encoder, ModalityEncoder) and not encoder.train_tower
    with torch.no_grad():
        images = encoder.encode_image(image, torch.ones(len(image))) if routes else encoder.encode_image(image)
        return images, encoder.encode_text(ids)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["open_clip", "hf_clip"])
def test_the_average_is_what_plain_libraries_load(kind: str, way: str, tiny, generator: Path, tmp_path: Path) -> None:
    around, settings = WAYS[way]
    task = joint(around(tiny(kind)), generator, **settings).eval()
    torch.manual_seed(5)
    for _ in range(3):
        step(task)
    save(task, tmp_path / "a.ckpt")
    encoder = task.encoder
    image, ids = torch.rand(3, 3, 32, 32), encoder.text_spec.encode(["a red hand", "cat!", ""])
    latest = features(encoder, image, ids)
    with task.averaged_weights():
        expected = features(encoder, image, ids)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(latest, expected, strict=True))

    for to in ("open_clip", "hf_clip"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / to, to=to, encoder=tiny(kind))
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}", require_pretrained=True).eval()
    hf = CLIPModel.from_pretrained(tmp_path / "hf_clip").eval()
    pixels = Normalize(encoder.mean, encoder.std)(image)
    with torch.no_grad():
        found = {
            "open_clip": (peer.encode_image(pixels), peer.encode_text(ids)),
            "hf_clip": (
                hf.get_image_features(pixel_values=pixels).pooler_output,
                hf.get_text_features(input_ids=ids).pooler_output,
            ),
        }
    for name, given in found.items():
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_before_the_first_step_there_is_no_average(tiny, generator: Path, tmp_path: Path) -> None:
    task = joint(tiny("open_clip"), generator)
    with torch.no_grad():
        task.encoder.plain.model.visual.proj.fill_(0.25)  # as a step that the average has not seen
    content = save(task, tmp_path / "a.ckpt")
    assert stored_average(content) == {}
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", encoder=tiny("open_clip"))
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert (peer.visual.proj == 0.25).all()


@pytest.mark.parametrize("way", ["full", "router"])
def test_an_average_that_does_not_fit_is_refused(way: str, tiny, generator: Path, tmp_path: Path) -> None:
    around, settings = WAYS[way]
    task = joint(around(tiny("open_clip")), generator, **settings)
    step(task)
    content = save(task, tmp_path / "a.ckpt")
    names = content["ema"]["names"]
    for wrong, message in (
        (names[1:], rf"{len(names) - 1} names for {len(names)} averaged"),
        (["encoder.elsewhere", *names[1:]], "elsewhere"),
    ):
        torch.save({**content, "ema": {**content["ema"], "names": wrong}}, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=message):
            export_checkpoint(tmp_path / "b.ckpt", tmp_path / "out", encoder=tiny("open_clip"))
    assert not (tmp_path / "out").exists()
