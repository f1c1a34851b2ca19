import copy
import json
import math
import re

import pytest
import timm
import torch
from tiny_encoders import TEXT

from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder, add_lora
from gmail_lightning.models.base import ROLES, ImageEncoder
from gmail_lightning.models.branches.adapters import adapter_keys
from gmail_lightning.models.branches.fingerprint import (
    fingerprint,
    fingerprint_difference,
    fingerprint_digest,
    tensor_statistics,
    weights_difference,
)
from gmail_lightning.models.branches.tensor_names import stored_tensors
from gmail_lightning.models.encoders.long_text import stretch_context
from gmail_lightning.types import ImageSpec


def to_hugging_face(source: OpenCLIPEncoder, target) -> None:
    """Copies the weights of open_clip's form into transformers' form of the same model."""
    state = {}
    for theirs, blocks in (
        ("vision_model", source.model.visual.transformer.resblocks),
        ("text_model", source.model.transformer.resblocks),
    ):
        for i, block in enumerate(blocks):
            layer = f"{theirs}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                fused = getattr(block.attn, f"in_proj_{kind}").chunk(3)
                for role, part in zip("qkv", fused, strict=True):
                    state[f"{layer}.self_attn.{role}_proj.{kind}"] = part
                for path, module in (
                    ("self_attn.out_proj", block.attn.out_proj),
                    ("mlp.fc1", block.mlp.c_fc),
                    ("mlp.fc2", block.mlp.c_proj),
                    ("layer_norm1", block.ln_1),
                    ("layer_norm2", block.ln_2),
                ):
                    state[f"{layer}.{path}.{kind}"] = getattr(module, kind)
    visual, model = source.model.visual, source.model
    for name, module in (("pre_layrnorm", visual.ln_pre), ("post_layernorm", visual.ln_post)):
        state |= {f"vision_model.{name}.{k}": v for k, v in module.state_dict().items()}
    state |= {f"text_model.final_layer_norm.{k}": v for k, v in model.ln_final.state_dict().items()}
    state |= {
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "visual_projection.weight": visual.proj.T,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_projection.weight": model.text_projection.T,
        "logit_scale": model.logit_scale,
    }
    missing, unexpected = target.model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [key for key in missing if "position_ids" not in key]


def names() -> set[str]:
    """Every stored tensor of a CLIP of two blocks on either side, by hand."""
    block = [*ROLES, *(f"{role}.bias" for role in ROLES), *(f"ln_{n}{kind}" for n in (1, 2) for kind in ("", ".bias"))]
    beside = {
        "image": "class_embedding positional_embedding conv1 ln_pre ln_pre.bias ln_post ln_post.bias proj",
        "text": "token_embedding positional_embedding ln_final ln_final.bias text_projection logit_scale",
    }
    blocks = {f"{tower}.{number}.{name}" for tower in beside for number in (0, 1) for name in block}
    return blocks | {f"{tower}.{name}" for tower, rest in beside.items() for name in rest.split()}


def test_both_forms_of_one_tower_share_fingerprint_and_adapters(tiny, pixels) -> None:
    ours, theirs = tiny("quick_gelu"), tiny("hf_clip")
    to_hugging_face(ours, theirs)
    text = ["a red hand", "cat"]
    with torch.no_grad():
        image = pixels(ours, 4)
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(
            ours.encode_text(ours.text_spec.encode(text)),
            theirs.encode_text(theirs.text_spec.encode(text)),
            atol=2e-6,
            rtol=1e-5,
        )
        torch.testing.assert_close(ours.image_tokens(image), theirs.image_tokens(image), atol=2e-6, rtol=1e-5)
    first, second = fingerprint(ours, ("image", "text")), fingerprint(theirs, ("image", "text"))
    assert fingerprint_difference(first, second) is None
    assert first["weights"].keys() == second["weights"].keys() == names()

    models = [ModalityEncoder(encoder, branch=LoRA(targets=ROLES)) for encoder in (ours, theirs)]
    for parameter in models[0].parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters = {key: models[0].state_dict()[key] for key in adapter_keys(models[0])}
    _, unexpected = models[1].load_state_dict(adapters, strict=False)
    assert not unexpected
    modality = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        features = [model.encode_image(image, modality) for model in models]
    torch.testing.assert_close(features[0], features[1], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_and_lora_do_not_count(tiny, dtype) -> None:
    for seed in range(5):
        plain = tiny(seed=seed)
        adapted = copy.deepcopy(plain).to(dtype).float()
        add_lora(adapted, targets=ROLES)
        for parameter in adapted.lora.parameters():
            torch.nn.init.normal_(parameter)
        assert fingerprint_difference(fingerprint(plain), fingerprint(adapted)) is None


def test_other_weights_of_the_same_distribution_differ(tiny) -> None:
    first, second = fingerprint(tiny(seed=0)), fingerprint(tiny(seed=1))
    assert re.search(r"\d\d of 40 tensors, most in image\.", fingerprint_difference(first, second))
    assert fingerprint_digest(first) != fingerprint_digest(second)
    fine_tuned = tiny(seed=0)
    with torch.no_grad():  # one matrix of one block, moved by 5 % of its size
        weight = fine_tuned.model.visual.transformer.resblocks[1].mlp.c_fc.weight
        weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert "1 of 40 tensors, most in image.1.fc1: wave" in fingerprint_difference(first, fingerprint(fine_tuned))


@pytest.mark.parametrize("length", [1, 7, 4096, 200_000])
def test_statistics_are_what_they_say(length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(0))
    exact = values.double().tolist()
    mean = sum(exact) / length
    waves = [
        sum(value * math.cos(f * (i % 65521)) for i, value in enumerate(exact)) / (length / 2) ** 0.5
        for f in (1.0, 2**0.5, 3**0.5, 5**0.5)
    ]
    deviation = (sum((value - mean) ** 2 for value in exact) / length) ** 0.5
    found = tensor_statistics({"a": values})["a"]
    assert found == pytest.approx([mean, deviation, *waves], abs=2e-5)


def resnet(seed: int = 0) -> OpenCLIPEncoder:
    """A tower without a transformer: no matrix of it can be adapted, and it has running means."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {**TEXT, "vocab_size": 6348}}
    encoder = OpenCLIPEncoder(config=config, merges="emoji")
    return encoder.eval()


class Pooled(ImageEncoder):
    """An encoder of one's own, of one matrix."""

    image_spec, embed_dim = ImageSpec((4, 4)), 5

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Linear(3, 5)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.matrix(image.mean(dim=(2, 3)))

    def lora_targets(self, roles, tower="image"):
        return []


def build(kind: str, tiny) -> ImageEncoder:
    torch.manual_seed(0)
    return {"resnet": resnet, "own": Pooled}.get(kind, lambda: tiny(kind))()


def replaced(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """Another one that looks the same: drawn anew with its mean and deviation, or turned around."""
    if how == "reversed" and len(tensor.unique()) > 1:
        return tensor.flatten().flip(0).view(tensor.shape)
    if tensor.numel() == 1:  # a scale or a bias
        return tensor + 0.5
    deviation = float(tensor.std(correction=0)) or 0.05  # of ones and zeros: what a training makes of them
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    return float(tensor.mean()) + deviation * noise


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drawn", "reversed"])
@pytest.mark.parametrize("kind", ["open_clip", "timm", "hf_clip", "hf_siglip", "resnet", "own"])
def test_every_tensor_that_is_replaced_is_named(tiny, kind: str, how: str) -> None:
    encoder, towers = build(kind, tiny), ("image", "text")
    stored, before = stored_tensors(encoder), fingerprint(encoder, towers)
    state = {key: value for key, value in encoder.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert {key for key, _ in stored.values()} == state.keys()  # none is left out
    for key, tensor in state.items():
        kept = tensor.clone()
        tensor.copy_(replaced(kept, how))
        difference = fingerprint_difference(before, fingerprint(encoder, towers))
        own = [name for name, (at, _) in stored.items() if at == key]
        assert difference is not None, key
        assert any(f"most in {name}: " in difference for name in own), (key, difference)
        assert int(difference.split()[0]) <= len(own)
        tensor.copy_(kept)
    assert fingerprint_difference(before, fingerprint(encoder, towers)) is None


@pytest.mark.parametrize("kind", ["open_clip", "timm", "hf_clip", "hf_siglip", "resnet", "own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_copy_agrees(tiny, kind: str, dtype: torch.dtype) -> None:
    first, second = build(kind, tiny), build(kind, tiny)
    second.load_state_dict({key: value.to(dtype).to(value.dtype) for key, value in second.state_dict().items()})
    both = [fingerprint(encoder, ("image", "text")) for encoder in (first, second)]
    assert both[0]["weights"] != both[1]["weights"]
    assert fingerprint_difference(*both) is None


@pytest.mark.parametrize("pretrained", ["emoji", "emoji_scorer"])
def test_the_encoders_that_ship_agree_with_their_rounded_copies(pretrained: str) -> None:
    encoder = OpenCLIPEncoder(pretrained=pretrained)
    before = fingerprint(encoder, ("image", "text"))
    encoder.load_state_dict({key: value.bfloat16().float() for key, value in encoder.state_dict().items()})
    assert fingerprint_difference(before, fingerprint(encoder, ("image", "text"))) is None


def test_siglip_in_timm_and_in_transformers_share_fingerprint(tiny, merges, pixels) -> None:
    """Of one tower: attention pooling behind blocks without class token."""
    theirs = tiny("hf_siglip")
    width = {"embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0, "img_size": 32, "patch_size": 8}
    trunk = timm.create_model(
        "test_vit", num_classes=0, global_pool="map", class_token=False, act_layer="gelu_tanh", **width
    ).eval()

    class Timm(ImageEncoder):
        image_spec, embed_dim, activation = theirs.image_spec, 64, "gelu_tanh"

        def __init__(self) -> None:
            super().__init__(theirs.mean, theirs.std)
            self.model = torch.nn.ModuleDict({"visual": torch.nn.ModuleDict({"trunk": trunk})})

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return trunk(self.normalize_pixels(image))

        def lora_targets(self, roles, tower="image"):
            return []

    state = theirs.model.vision_model.state_dict()
    fused = {"head.attention.in_proj_": lambda kind: state[f"head.attention.in_proj_{kind}"]}
    moved: dict[str, torch.Tensor] = {
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "attn_pool.latent": state["head.probe"],
    }
    for kind in ("weight", "bias"):
        query, *rest = fused["head.attention.in_proj_"](kind).chunk(3)
        moved |= {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": torch.cat(rest)}
        pairs = {
            "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm",
            "attn_pool.proj": "head.attention.out_proj", "attn_pool.norm": "head.layernorm",
            "attn_pool.mlp.fc1": "head.mlp.fc1", "attn_pool.mlp.fc2": "head.mlp.fc2",
        }  # fmt: skip
        for i in (0, 1):
            layer = f"encoder.layers.{i}"
            parts = [state[f"{layer}.self_attn.{role}_proj.{kind}"] for role in "qkv"]
            moved[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            pairs |= {
                f"blocks.{i}.{ours}": f"{layer}.{other}"
                for ours, other in (
                    ("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                    ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                )
            }  # fmt: skip
        moved |= {f"{ours}.{kind}": state[f"{other}.{kind}"] for ours, other in pairs.items()}
    trunk.load_state_dict(moved)
    ours = Timm().eval()
    image = pixels(theirs, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), rtol=1e-3, atol=1e-3)
    first, second = fingerprint(ours), fingerprint(theirs)
    assert first["weights"].keys() == second["weights"].keys()
    assert fingerprint_difference(first, second) is None


def test_what_trains_is_left_out_and_named(tiny) -> None:
    encoder = tiny()
    kept = {"model.visual.conv1.weight", "model.visual.transformer.resblocks.0.attn.in_proj_weight"}
    value = fingerprint(encoder, ("image", "text"), kept)
    assert value["trained"] == ["image.0.k", "image.0.q", "image.0.v", "image.conv1"]
    assert value["probe"] is None
    with torch.no_grad():
        encoder.model.visual.conv1.weight.mul_(2)
        encoder.model.visual.transformer.resblocks[0].attn.in_proj_weight.mul_(2)
    assert fingerprint_difference(value, fingerprint(encoder, ("image", "text"))) is None
    every = set(encoder.state_dict())
    assert fingerprint(encoder, ("image", "text"), every)["towers"] == []


def test_a_fingerprint_of_an_earlier_release_proves_nothing(tiny) -> None:
    value = fingerprint(tiny())
    old = {name: value[name] for name in ("activation", "mean", "std", "towers", "weights")}
    assert "is of an earlier release" in fingerprint_difference(old, value)
    shorter = {name: statistics[:3] for name, statistics in value["weights"].items()}
    assert "is of an earlier release" in fingerprint_difference({**value, "weights": shorter}, value)


def test_the_probe_sees_what_no_tensor_shows(tiny) -> None:
    value = fingerprint(tiny())
    changed = {**value, "probe": [number + i for i, number in enumerate(value["probe"])]}
    assert "the features of a fixed image, which have cosine" in fingerprint_difference(value, changed)


def test_activation_and_pixels_count_and_values_are_plain(tiny) -> None:
    value = fingerprint(tiny())
    assert json.loads(json.dumps(value)) == value
    assert "activation 'gelu' against 'quick_gelu'" in fingerprint_difference(value, fingerprint(tiny("quick_gelu")))
    assert fingerprint_difference(value, {**value, "activation": "gelu_tanh"}) is None
    assert "pixel mean" in fingerprint_difference(value, {**value, "mean": [0.5, 0.5, 0.5]})
    deeper = {**value, "weights": {**value["weights"], "image.2.q": [0.0, 1.0, *[0.0] * 4]}}
    assert "1 tensors that only one of them has: image.2.q" in fingerprint_difference(value, deeper)
    broken = {**value, "weights": {**value["weights"], "image.0.q": [float("nan"), 1.0, *[0.0] * 4]}}
    assert "image.0.q" in fingerprint_difference(value, broken)


BOTH = ("image", "text")


def test_positions_that_were_stretched_are_not_compared(tiny) -> None:
    short, long = tiny(), tiny()
    stretch_context(long, 28, keep=4)
    assert fingerprint_difference(fingerprint(short, BOTH), fingerprint(long, BOTH)) is None
    with torch.no_grad():
        long.model.token_embedding.weight.normal_()
    assert "text.token_embedding" in fingerprint_difference(fingerprint(short, BOTH), fingerprint(long, BOTH))
    other = tiny()
    with torch.no_grad():
        other.model.positional_embedding.normal_()
    assert "text.positional_embedding" in fingerprint_difference(fingerprint(short, BOTH), fingerprint(other, BOTH))


def test_a_mask_that_is_infinite_equals_itself() -> None:
    mask = {"text.attn_mask": torch.full((4, 4), -math.inf).triu(1), "empty": torch.empty(0)}
    assert weights_difference(tensor_statistics(mask), tensor_statistics(mask)) is None
    finite = {**mask, "text.attn_mask": torch.zeros(4, 4)}
    assert "text.attn_mask" in weights_difference(tensor_statistics(mask), tensor_statistics(finite))
