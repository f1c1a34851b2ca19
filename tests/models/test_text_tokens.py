"""Hidden states of text towers, as a diffusion model reads them of its text encoder."""

from typing import Any

import pytest
import torch
from tiny_encoders import VOCABULARY
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gmail_lightning.models import ModalityEncoder
from gmail_lightning.models.encoders.hf_tower import tower_layers
from gmail_lightning.models.encoders.open_clip_loading import transformer_blocks

TEXTS = ["a red hand", "cat", "the quick brown fox by the river " * 4]


def text_model(state: dict[str, Tensor], activation: str) -> CLIPTextModel:
    """The text tower of an open_clip model as transformers' own, weight by weight."""
    settings: Any = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 16, "hidden_act": activation,
        "eos_token_id": VOCABULARY - 1,
    }  # fmt: skip
    model = CLIPTextModel(CLIPTextConfig(**settings)).eval()
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    weights = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        **{f"final_layer_norm.{kind}": state[f"ln_final.{kind}"] for kind in ("weight", "bias")},
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    for block in range(2):
        ours, theirs = f"transformer.resblocks.{block}", f"encoder.layers.{block}"
        for kind in ("weight", "bias"):
            for name, part in {**parts, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
                weights[f"{theirs}.{part}.{kind}"] = state[f"{ours}.{name}.{kind}"]
            for role, rows in zip("qkv", state[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                weights[f"{theirs}.self_attn.{role}_proj.{kind}"] = rows
    missing, unknown = model.load_state_dict({f"{prefix}{k}": v for k, v in weights.items()}, strict=False)
    assert not unknown
    assert all(key.endswith("position_ids") for key in missing)
    return model


@pytest.mark.parametrize("kind", ["open_clip", "quick_gelu", "timm"])
def test_of_open_clip_are_those_of_transformers_with_the_same_weights(kind: str, tiny) -> None:
    encoder = tiny(kind)
    state = {key.removeprefix("text."): value for key, value in encoder.model.state_dict().items()}
    model = text_model(state, "quick_gelu" if kind == "quick_gelu" else "gelu")
    ids = encoder.text_spec.encode(TEXTS)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        found = encoder.text_tokens(ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # The end token, projected, is what encode_text gives.
        pooled = found[torch.arange(3), ids.argmax(dim=1)] @ state["text_projection"]
        torch.testing.assert_close(pooled, encoder.encode_text(ids), rtol=1e-4, atol=1e-5)
    assert found.shape == (3, 16, 64)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_of_transformers_are_the_last_hidden_state(family: str, tiny) -> None:
    from transformers import SiglipTextModel

    encoder = tiny(f"hf_{family}")
    kind: Any = CLIPTextModel if family == "clip" else SiglipTextModel
    model = kind(encoder.config.text_config).eval()
    weights = encoder.model.text_model.state_dict()
    inner = getattr(model, "text_model", model)
    inner.load_state_dict(weights)
    ids = encoder.text_spec.encode(TEXTS)
    with torch.no_grad():
        assert torch.equal(encoder.text_tokens(ids), model(input_ids=ids).last_hidden_state)
    assert encoder.text_tokens(ids).shape == (3, 16, 64)


@pytest.mark.parametrize("kind", ["open_clip", "timm", "hf_clip", "hf_siglip"])
def test_they_train_the_tower_and_know_their_length(kind: str, tiny) -> None:
    encoder, recomputing = tiny(kind), tiny(kind, grad_checkpointing=True)
    ids = encoder.text_spec.encode(TEXTS)
    gradients = []
    for one in (encoder, recomputing):
        one.text_tokens(ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert any("token_embedding" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
    assert encoder.text_tokens(ids[:0]).shape == (0, 16, 64)
    with pytest.raises(ValueError, match=r"shape \(3, 9\), but this text tower has context length 16"):
        encoder.text_tokens(ids[:, :9])
    with torch.no_grad():
        routed = ModalityEncoder(encoder, text_side="projection")
        assert torch.equal(routed.text_tokens(ids), encoder.text_tokens(ids))


@pytest.mark.parametrize("kind", ["open_clip", "timm", "hf_clip", "hf_siglip"])
def test_features_and_tokens_come_of_one_pass(kind: str, tiny) -> None:
    encoder = tiny(kind)
    ids = encoder.text_spec.encode(TEXTS)
    blocks = tower_layers(encoder.model, "text") if "hf" in kind else transformer_blocks(encoder.model, "text")
    runs: list[int] = []
    blocks[0].register_forward_hook(lambda *_: runs.append(1))
    features, tokens = encoder.text_features_and_tokens(ids)
    assert len(runs) == 1
    torch.testing.assert_close(features, encoder.encode_text(ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tokens, encoder.text_tokens(ids), rtol=1e-6, atol=1e-6)
    encoder.double()  # in which the order of sums does not show
    trained = [p for p in encoder.text_parameters() if p.numel() > 1]
    features, tokens = encoder.text_features_and_tokens(ids)
    together = torch.autograd.grad(features.square().sum() + tokens.sin().sum(), trained)
    apart = encoder.encode_text(ids).square().sum() + encoder.text_tokens(ids).sin().sum()
    for one, other in zip(together, torch.autograd.grad(apart, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert [tuple(part.shape) for part in encoder.text_features_and_tokens(ids[:0])] == [
        (0, encoder.embed_dim),
        (0, 16, 64),
    ]
    with pytest.raises(ValueError, match=r"shape \(3, 9\), but this text tower has context length 16"):
        encoder.text_features_and_tokens(ids[:, :9])


def test_a_projection_of_the_text_side_acts_on_the_features_alone(tiny) -> None:
    router = ModalityEncoder(tiny(), text_side="projection")
    torch.nn.init.normal_(router.text_side_projection.weight)
    ids = router.text_spec.encode(TEXTS)
    features, tokens = router.text_features_and_tokens(ids)
    torch.testing.assert_close(features, router.encode_text(ids), rtol=1e-6, atol=1e-6)
    assert (features - router.plain.encode_text(ids)).abs().max() > 0.1
    torch.testing.assert_close(tokens, router.plain.text_tokens(ids), rtol=1e-6, atol=1e-6)


def test_an_encoder_without_them_says_so(tiny) -> None:
    encoder = tiny()
    encoder.model.text = torch.nn.Linear(2, 2)  # as a model around a tower of transformers has one
    ids = encoder.text_spec.encode(TEXTS)
    with pytest.raises(NotImplementedError, match="text tower of open_clip's own, not Linear"):
        encoder.text_tokens(ids)
    from gmail_lightning.models.base import DualEncoder

    with pytest.raises(NotImplementedError, match="OpenCLIPEncoder has no text_tokens: implement it to share"):
        DualEncoder.text_tokens(encoder, ids)
