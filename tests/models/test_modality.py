import contextlib
import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import routed
from torch import Tensor, nn

from gmail_lightning.models import ImageEncoder, LoRA, LoRATarget, ModalityEncoder, OpenCLIPEncoder
from gmail_lightning.models.branches.adapters import adapter_keys
from gmail_lightning.models.branches.fingerprint import fingerprint
from gmail_lightning.models.branches.lora import block_targets
from gmail_lightning.types import ImageSpec

KINDS = ("open_clip", "timm", "hf_clip", "hf_siglip")
MODALITY = torch.tensor([0, 1, 1, 0, 1])


def step(model: ModalityEncoder, image: Tensor, steps: int = 1, autocast: bool = False) -> None:
    """A few optimiser steps that move every trainable tensor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for _ in range(steps):
        with context:
            features = model.encode_image(image, MODALITY)
        optimizer.zero_grad()
        (features.float() - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_path_is_the_plain_encoder_bit_for_bit(tiny, pixels, kind: str, autocast, checkpointing) -> None:
    plain = tiny(kind).requires_grad_(False)
    model = ModalityEncoder(tiny(kind, grad_checkpointing=checkpointing), branch=LoRA(), projection=True)
    image, real = pixels(plain, 5), MODALITY == 0
    step(model.train(), image, 50 if kind == "open_clip" else 3, autocast)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for mode in (True, False):
        model.train(mode)
        with context:
            features = model.encode_image(image, MODALITY)
            tokens = model.image_tokens(image, MODALITY)
            with torch.no_grad():
                assert torch.equal(features[real], plain.encode_image(image[real]))
                assert torch.equal(tokens[real], plain.image_tokens(image[real]))
                moved = (features[~real] - plain.encode_image(image[~real])).abs()
        assert moved.max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_the_branch_that_ran(tiny, pixels, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = ModalityEncoder(tiny(kind, grad_checkpointing=checkpointing), branch=LoRA(targets=("q", "fc2")))
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                nn.init.normal_(parameter, std=0.1)
        calls = 0
        block = model.lora_targets(("fc2",))[-1].module  # the last thing a block runs

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        block.register_forward_pre_hook(count)
        image = pixels(model, 5)
        model.train().encode_image(image, MODALITY).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert calls == (3 if checkpointing else 2)  # real, generated, and the generated one again
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_rows_keep_their_order_and_either_branch_may_be_empty(tiny, pixels) -> None:
    model = ModalityEncoder(tiny(), branch=LoRA())
    image = pixels(model, 5)
    step(model, image, 3)
    with torch.no_grad():
        real, generated = model.encode_image(image), model.encode_image(image, torch.ones(5))
        mixed = model.encode_image(image, MODALITY)
        tokens = model.image_tokens(image, MODALITY, layer=-1)
        token_branches = (model.image_tokens(image, layer=-1), model.image_tokens(image, torch.ones(5), layer=-1))
    assert torch.equal(real, model.encode_image(image, torch.zeros(5)))
    assert (real - generated).abs().max() > 1e-3
    for row, which in enumerate(MODALITY.tolist()):
        torch.testing.assert_close(mixed[row], (real, generated)[which][row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(tokens[row], token_branches[which][row], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be 0 \(real\) or 1 \(generated\), got \[0, 2\]"):
        model.encode_image(image, torch.tensor([0, 2, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"5 images, but modality has shape \(3,\)"):
        model.encode_image(image, MODALITY[:3])


@pytest.mark.parametrize("real_path", ["projected", "adapted"])
def test_real_paths_that_train(tiny, pixels, real_path) -> None:
    plain, model = tiny().requires_grad_(False), ModalityEncoder(tiny(), branch=LoRA(), real_path=real_path)
    image, real = pixels(plain, 5), MODALITY == 0
    torch.testing.assert_close(model.encode_image(image), plain.encode_image(image), atol=1e-6, rtol=0)  # from identity
    model.encode_image(image[real]).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    lora = {name for name, _ in model.named_parameters() if ".lora." in name}
    assert reached == ({"real_projection.weight"} | (lora if real_path == "adapted" else set()))

    step(model, image, 3)
    state = model.state_dict()
    with torch.no_grad():
        tower = model.encoder.encode_image(image) if real_path == "adapted" else plain.encode_image(image)
        expected = tower @ state["real_projection.weight"].T
        torch.testing.assert_close(model.encode_image(image), expected, atol=1e-5, rtol=1e-5)
        generated = model.encoder.encode_image(image) @ state["generated_projection.weight"].T
        torch.testing.assert_close(model.encode_image(image, torch.ones(5)), generated, atol=1e-5, rtol=1e-5)


def test_identity_projection_changes_nothing_under_autocast(tiny, pixels) -> None:
    model = ModalityEncoder(tiny(), branch=LoRA(), projection=True)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_image(image := pixels(model, 3), torch.ones(3))
        assert torch.equal(features, model.encoder.encode_image(image))


def test_tower_stays_in_eval_and_text_is_frozen(tiny) -> None:
    model = nn.Sequential(ModalityEncoder(tiny(), branch=LoRA(), projection=True)).train()[0]
    assert model.training
    assert model.generated_projection.training
    assert not any(module.training for module in model.encoder.modules())
    text = model.text_spec.encode(["a cat"])
    assert not model.encode_text(text).requires_grad
    assert torch.equal(model.logit_scale, model.encoder.model.logit_scale.exp())


def test_state_dict_has_plain_and_portable_keys(tiny, pixels) -> None:
    plain, model = tiny(), ModalityEncoder(tiny(), branch=LoRA(), real_path="adapted")
    lora = {f"lora.image.{b}.{role}.{factor}" for b in (0, 1) for role in "qv" for factor in "AB"}
    own = lora | {"generated_projection.weight", "real_projection.weight"}
    state = model.state_dict(keep_vars=True)
    assert state.keys() == plain.state_dict().keys() | own
    assert adapter_keys(model) == own
    assert adapter_keys(nn.ModuleDict({"task": model})) == {f"task.{key}" for key in own}
    assert adapter_keys(plain) == set()
    assert {id(state[key]) for key in own} == {id(p) for p in model.parameters() if p.requires_grad}

    other = ModalityEncoder(tiny(seed=1), branch=LoRA(), real_path="adapted")
    image = pixels(model, 5)
    step(model, image)
    nn.ModuleDict({"encoder": other}).load_state_dict(nn.ModuleDict({"encoder": model}).state_dict())
    assert torch.equal(other.encode_image(image, MODALITY), model.encode_image(image, MODALITY))


def test_distributed_checkpoints_know_the_keys(tiny) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    tasks = [nn.ModuleDict({"encoder": ModalityEncoder(tiny(seed=s), branch=LoRA(), projection=True)}) for s in (0, 1)]
    state = get_model_state_dict(tasks[0])
    assert state.keys() == tasks[0].state_dict().keys()
    missing, unexpected = set_model_state_dict(tasks[1], state)
    assert not missing
    assert not unexpected
    assert all(torch.equal(tasks[1].state_dict()[key], value) for key, value in state.items())


class Patches(ImageEncoder):
    """An encoder of somebody's own, without text tower and without wrapped model."""

    def __init__(self) -> None:
        super().__init__(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(192, 8)})})])

    @property
    def image_spec(self) -> ImageSpec:
        return ImageSpec((8, 8))

    @property
    def embed_dim(self) -> int:
        return 8

    def encode_image(self, image: Tensor) -> Tensor:
        return self.blocks[0]["mlp"]["fc1"](self.normalize_pixels(image).flatten(1))

    def lora_targets(self, roles: Collection[str], tower="image") -> list[LoRATarget]:
        linear = self.blocks[0]["mlp"]["fc1"]
        return [LoRATarget(0, "fc1", linear, "weight", 0, 8)] if "fc1" in roles else []


def test_an_image_encoder_of_ones_own() -> None:
    torch.manual_seed(0)
    plain = Patches()
    model = ModalityEncoder(copy.deepcopy(plain), branch=LoRA(targets=("fc1",)))
    image = torch.rand(5, 3, 8, 8)
    step(model, image)
    features = model.encode_image(image, MODALITY)
    weight, lora = plain.blocks[0]["mlp"]["fc1"], model.encoder.lora["image"]["0"]["fc1"]
    flat = (image.flatten(1) - 0.5) / 0.5
    generated = flat @ (weight.weight + 2.0 * lora.B @ lora.A).T + weight.bias
    expected = torch.where(MODALITY[:, None] == 1, generated, flat @ weight.weight.T + weight.bias)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert block_targets([nn.Identity()], ("q", "fc1")) == []
    assert model.text_spec is None
    for asked in (lambda: model.encode_text(torch.zeros(1, 4)), lambda: model.logit_scale):
        with pytest.raises(TypeError, match="Patches has no text tower"):
            asked()
    with pytest.raises(TypeError, match="Patches has no text tower"):
        ModalityEncoder(Patches(), text_side="projection")


def checkpoint(model: ModalityEncoder, path: Path, encoder: dict[str, Any] | None, **settings: Any) -> Path:
    """What a task writes."""
    recorded = {"rank": 4, "alpha": 8.0, "targets": ["q", "v"], "real_path": "frozen", "projection": False, **settings}
    if encoder is not None:
        recorded["encoder"] = encoder
    state = {f"encoder.{k}": model.state_dict()[k] for k in adapter_keys(model)}
    content = {"state_dict": state, "hyper_parameters": recorded, "base_fingerprint": fingerprint(model)}
    torch.save(content, path)
    return path


@pytest.fixture
def recorded(merges, tmp_path):
    """An encoder saved as a folder, and how the command line records it."""
    from tiny_encoders import open_clip_config

    from gmail_lightning.models.encoders.open_clip import save_open_clip

    torch.manual_seed(0)
    encoder = OpenCLIPEncoder(config=open_clip_config(), merges=str(merges))
    save_open_clip(
        tmp_path / "base", encoder.model_config, encoder.preprocess_config, encoder.model.state_dict(), encoder.merges
    )
    return {
        "class_path": "gmail_lightning.models.OpenCLIPEncoder",
        "init_args": {"pretrained": str(tmp_path / "base"), "model_name": None},
    }


@pytest.mark.parametrize("class_path", ["gmail_lightning.models.encoders.open_clip.OpenCLIPEncoder", "OpenCLIPEncoder"])
def test_from_checkpoint_rebuilds_what_the_command_line_recorded(recorded, pixels, tmp_path, class_path) -> None:
    recorded["class_path"] = class_path
    settings = {"rank": 2, "alpha": 6.0, "targets": ["q", "out"], "real_path": "projected", "projection": True}
    model = routed(OpenCLIPEncoder(**recorded["init_args"]), **settings)
    image = pixels(model, 5)
    step(model, image, 2)
    loaded = ModalityEncoder.from_checkpoint(checkpoint(model, tmp_path / "a.ckpt", recorded, **settings))
    assert not loaded.training
    assert loaded.real_path == "projected"
    assert torch.equal(loaded.encode_image(image, MODALITY), model.encode_image(image, MODALITY))


def test_from_checkpoint_of_a_task_built_in_python(recorded, tiny, pixels, tmp_path) -> None:
    model = ModalityEncoder(OpenCLIPEncoder(**recorded["init_args"]), branch=LoRA())
    step(model, image := pixels(model, 5))
    path = checkpoint(model, tmp_path / "a.ckpt", None)
    with pytest.raises(ValueError, match=r"built in Python\). Pass encoder="):
        ModalityEncoder.from_checkpoint(path)
    loaded = ModalityEncoder.from_checkpoint(path, OpenCLIPEncoder(**recorded["init_args"]))
    assert torch.equal(loaded.encode_image(image, MODALITY), model.encode_image(image, MODALITY))
    with pytest.raises(
        ValueError, match=r"another base. The checkpoint has \w{12}, this .* has \w{12}; they differ in"
    ):
        ModalityEncoder.from_checkpoint(path, tiny(seed=5))


def test_from_checkpoint_says_what_is_wrong(recorded, tmp_path) -> None:
    model = ModalityEncoder(OpenCLIPEncoder(**recorded["init_args"]), branch=LoRA())
    path = checkpoint(model, tmp_path / "a.ckpt", recorded, targets=["q", "k"])
    with pytest.raises(ValueError, match=r"lacks \['lora.image.0.k.A'.* unknown \['lora.image.0.v.A'"):
        ModalityEncoder.from_checkpoint(path)
    path = checkpoint(model, tmp_path / "a.ckpt", {"class_path": "collections.OrderedDict", "init_args": {}})
    with pytest.raises(ValueError, match=r"'collections.OrderedDict' is no ImageEncoder"):
        ModalityEncoder.from_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="no branches of an encoder in it"):
        ModalityEncoder.from_checkpoint(path)
    with pytest.raises(ValueError, match="give one of frozen, projected, adapted"):
        ModalityEncoder(OpenCLIPEncoder(**recorded["init_args"]), branch=LoRA(), real_path="shared")


def test_a_router_that_routes_nothing_says_so() -> None:
    said = ModalityEncoder(OpenCLIPEncoder(pretrained="emoji"), train_tower=True).describe()
    assert said.startswith("Images of both modalities, and texts: the plain encoder. ")
    assert "frozen" not in said
