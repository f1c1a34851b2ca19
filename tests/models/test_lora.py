import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gmail_lightning.models import DualEncoder, add_lora, merge_lora
from gmail_lightning.models.base import ROLES
from gmail_lightning.models.branches.lora import lora_disabled, plain_parameter

KINDS = ("open_clip", "timm", "hf_clip", "hf_siglip")


def randomise(encoder: nn.Module) -> None:
    for name, parameter in encoder.named_parameters():
        if "lora." in name:
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_merged_model_is_w_plus_ba(tiny: Callable[..., DualEncoder], pixels, kind: str, tower) -> None:
    plain, encoder = tiny(kind), tiny(kind)
    add_lora(encoder, rank=3, alpha=6.0, targets=ROLES, tower=tower)
    randomise(encoder)

    reference = copy.deepcopy(plain)  # W + alpha / rank * B @ A by hand, in float64
    factors = dict(encoder.lora.named_parameters())
    for target in reference.lora_targets(ROLES, tower):
        key = f"{tower}.{target.block}.{target.role}"
        delta = 2.0 * factors[f"{key}.B"].double() @ factors[f"{key}.A"].double()
        with torch.no_grad():
            rows = getattr(target.module, target.parameter)[target.start : target.stop]
            rows.copy_((rows.double() + delta).float())
    reference.requires_grad_(False)  # torch picks its kernels by requires_grad too
    merged = copy.deepcopy(plain).requires_grad_(False)
    state = merge_lora(encoder)
    assert state.keys() == plain.wrapped.state_dict().keys()
    merged.wrapped.load_state_dict(state)

    image = pixels(encoder, 3)
    text = encoder.text_spec.encode(["a red hand", "cat", ""])
    with torch.no_grad():
        for run in (lambda e: e.encode_image(image), lambda e: e.encode_text(text)):
            for other in (merged, reference):
                torch.testing.assert_close(
                    F.normalize(run(encoder), dim=-1), F.normalize(run(other), dim=-1), atol=1e-6, rtol=0
                )
        adapted = encoder.encode_image(image) if tower == "image" else encoder.encode_text(text)
        before = plain.encode_image(image) if tower == "image" else plain.encode_text(text)
        assert (adapted - before).abs().max() > 0.01
    kept = encoder.state_dict()
    assert all(torch.equal(kept[key], old) for key, old in plain.state_dict().items())  # neither merging nor running


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_adapters_and_nothing_else(tiny, pixels, kind: str) -> None:
    encoder = tiny(kind)
    add_lora(encoder, targets=ROLES)
    randomise(encoder)
    encoder.encode_image(pixels(encoder, 2)).square().sum().backward()
    with_gradient = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == {name for name, _ in encoder.named_parameters() if name.startswith("lora.")}
    assert with_gradient == {name for name, p in encoder.named_parameters() if p.requires_grad}
    blocks = 6 if kind == "timm" else 2
    assert len(with_gradient) == blocks * len(ROLES) * 2


@pytest.mark.parametrize("kind", ["open_clip", "hf_siglip"])
def test_starts_from_the_plain_encoder_and_off_reads_the_stored_parameter_itself(tiny, pixels, kind: str) -> None:
    plain, encoder = tiny(kind).requires_grad_(False), tiny(kind)
    add_lora(encoder, targets=ROLES)
    image = pixels(encoder, 3)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(image), plain.encode_image(image), atol=1e-6, rtol=0)
    randomise(encoder)
    target = encoder.lora_targets(("q",))[1]
    stored = plain_parameter(target.module, target.parameter)
    with torch.no_grad(), lora_disabled(encoder):
        assert getattr(target.module, target.parameter) is stored
        assert torch.equal(encoder.encode_image(image), plain.encode_image(image))
    assert getattr(target.module, target.parameter) is not stored


def test_factors_start_as_in_the_paper(tiny) -> None:
    encoder = tiny()
    add_lora(encoder, rank=64, targets=("v",))
    factors = encoder.lora["image"]["0"]["v"]
    assert factors.B.abs().max() == 0
    assert factors.A.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_keys_are_those_of_the_plain_encoder_and_portable_ones(tiny) -> None:
    plain, encoder = tiny(), tiny()
    add_lora(encoder, targets=("q", "fc1"))
    adapters = {f"lora.image.{b}.{role}.{factor}" for b in (0, 1) for role in ("q", "fc1") for factor in "AB"}
    assert encoder.state_dict().keys() == plain.state_dict().keys() | adapters
    hf = tiny("hf_clip")
    add_lora(hf, targets=("q", "fc1"))
    assert {k for k in hf.state_dict() if k.startswith("lora.")} == adapters
    kept = encoder.state_dict(keep_vars=True)
    assert all(kept[key] is dict(encoder.named_parameters())[key] for key in adapters)


def test_state_round_trip_also_as_a_submodule(tiny, pixels) -> None:
    first, second = tiny(seed=1), tiny(seed=2)
    for encoder in (first, second):
        add_lora(encoder, targets=("q", "out"))
        randomise(encoder)
    nn.ModuleDict({"a": second}).load_state_dict(nn.ModuleDict({"a": first}).state_dict())
    image = pixels(first, 2)
    assert torch.equal(first.encode_image(image), second.encode_image(image))
    plain = tiny(seed=3)  # the state of a plain encoder loads too, all but the adapters
    missing, unexpected = first.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("lora.") for key in missing)
    with torch.no_grad(), lora_disabled(first):
        assert torch.equal(first.encode_image(image), plain.encode_image(image))


def test_second_tower_keeps_the_first_trainable(tiny) -> None:
    encoder = tiny()
    add_lora(encoder, tower="image")
    add_lora(encoder, tower="text", rank=2)
    trainable = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable == {"image", "text"}
    assert not encoder.model.logit_scale.requires_grad
    with pytest.raises(ValueError, match="text tower of this OpenCLIPEncoder has LoRA already"):
        add_lora(encoder, tower="text")


def test_copies_do_not_share_adapters_or_switch(tiny, pixels) -> None:
    encoder = tiny()
    add_lora(encoder)
    twin = copy.deepcopy(encoder)
    randomise(twin)
    image = pixels(encoder, 2)
    with torch.no_grad(), lora_disabled(encoder):
        off = encoder.encode_image(image)
        assert (twin.encode_image(image) - off).abs().max() > 1e-3


def test_roles_that_do_not_exist_are_answered_with_those_that_do(tiny, merges) -> None:
    from tiny_encoders import open_clip_config

    from gmail_lightning.models import OpenCLIPEncoder

    with pytest.raises(ValueError, match=r"\['key'\]. Known roles: q, k, v, out, fc1, fc2"):
        add_lora(tiny(), targets=("q", "key"))
    with pytest.raises(ValueError, match="give a list of roles"):
        add_lora(tiny(), targets="qv")
    with pytest.raises(ValueError, match="rank of at least 1"):
        add_lora(tiny(), rank=0)
    config = open_clip_config()
    config["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    resnet = OpenCLIPEncoder(config=config, merges=str(merges))
    with pytest.raises(ValueError, match=r"has no q, v. It offers: none"):
        add_lora(resnet)
    with pytest.raises(ValueError, match="has no LoRA"):
        merge_lora(tiny())


def test_half_precision_weights_are_refused(tiny, pixels) -> None:
    with pytest.raises(ValueError, match=r"image block 0, q: LoRA needs weights in fp32, got torch.bfloat16"):
        add_lora(tiny().bfloat16())
    encoder = tiny()
    add_lora(encoder)
    encoder.bfloat16()
    with pytest.raises(TypeError, match="LoRA needs weights in fp32"):
        encoder.encode_image(pixels(encoder, 1).bfloat16())


def test_delta_is_summed_in_fp32_under_autocast(tiny) -> None:
    encoder = tiny()
    add_lora(encoder)
    randomise(encoder)
    target = encoder.lora_targets(("v",))[0]
    plain = getattr(target.module, target.parameter)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(getattr(target.module, target.parameter), plain)
