import copy
import json

import pytest
import torch

from gmail_lightning.models import ModalityEncoder, OpenCLIPEncoder, add_lora
from gmail_lightning.models.base import ROLES
from gmail_lightning.models.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.modality import is_adapter_key


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
    assert first["weights"].keys() == {f"{t}.{b}.{r}" for t in ("image", "text") for b in (0, 1) for r in ROLES}

    models = [ModalityEncoder(encoder, targets=ROLES) for encoder in (ours, theirs)]
    for parameter in models[0].parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters = {key: value for key, value in models[0].state_dict().items() if is_adapter_key(key)}
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
    assert "of 12 matrices, most in image." in fingerprint_difference(first, second)
    assert fingerprint_digest(first) != fingerprint_digest(second)
    fine_tuned = tiny(seed=0)
    with torch.no_grad():  # one matrix of one block, moved by 5 % of its size
        weight = fine_tuned.model.visual.transformer.resblocks[1].mlp.c_fc.weight
        weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert "1 of 12 matrices, most in image.1.fc1: wave" in fingerprint_difference(first, fingerprint(fine_tuned))


def test_statistics_are_what_they_say(tiny) -> None:
    encoder = tiny()
    matrix = encoder.model.visual.transformer.resblocks[1].attn.in_proj_weight[64:128].detach().double().flatten()  # k
    n = len(matrix)
    wave = sum(float(value) * torch.tensor(float(i)).double().cos().item() for i, value in enumerate(matrix))
    expected = [matrix.mean().item(), matrix.std().item(), wave / (n / 2) ** 0.5]
    assert fingerprint(encoder)["weights"]["image.1.k"] == pytest.approx(expected, abs=1e-6)


def test_activation_and_pixels_count_and_values_are_plain(tiny) -> None:
    value = fingerprint(tiny())
    assert json.loads(json.dumps(value)) == value
    assert "activation 'gelu' against 'quick_gelu'" in fingerprint_difference(value, fingerprint(tiny("quick_gelu")))
    assert fingerprint_difference(value, {**value, "activation": "gelu_tanh"}) is None
    assert "pixel mean" in fingerprint_difference(value, {**value, "mean": [0.5, 0.5, 0.5]})
    deeper = {**value, "weights": {**value["weights"], "image.2.q": [0.0, 1.0, 0.0]}}
    assert "1 matrices that only one of them has: image.2.q" in fingerprint_difference(value, deeper)
    broken = {**value, "weights": {**value["weights"], "image.0.q": [float("nan"), 1.0, 0.0]}}
    assert "image.0.q" in fingerprint_difference(value, broken)
