"""Text towers of open_clip as those of transformers, which pipelines of diffusers are saved with."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.branches.lora import merged_state
from gmail_lightning.models.encoders.hf_clip import HFCLIPEncoder
from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder
from gmail_lightning.models.weights import plain_names


def clip_text_model(encoder: DualEncoder) -> nn.Module:
    """The text tower as a ``CLIPTextModel`` of transformers: a copy on the CPU, LoRA merged.

    Its ``last_hidden_state`` is what ``encoder.text_tokens`` gives.

    Args:
        encoder: A CLIP: an ``OpenCLIPEncoder`` with open_clip's own text tower, or an ``HFCLIPEncoder``.

    Raises:
        ValueError: If the text tower is another.
    """
    from transformers import CLIPTextModel

    if isinstance(encoder, HFCLIPEncoder) and encoder.config.model_type == "clip":
        tower = copy.deepcopy(cast(Any, encoder.model).text_model.config)
        state = _below(_merged(encoder), "text_model.")
    elif isinstance(encoder, OpenCLIPEncoder) and _is_plain(encoder):
        tower, state = _config(encoder), _text_state(_merged(encoder))
    else:
        raise ValueError(
            f"{type(encoder).__name__}: only the text tower of a CLIP (open_clip's own, or that of transformers) "
            "becomes one of transformers."
        )
    model = CLIPTextModel(tower).eval()
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: value.cpu().float() for name, value in state.items()}, strict=True)
    return cast(nn.Module, model)


def _merged(encoder: DualEncoder) -> dict[str, Tensor]:
    """The state of the wrapped model."""
    return plain_names(merged_state(encoder))


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def _is_plain(encoder: OpenCLIPEncoder) -> bool:
    text = encoder.model_config["text_cfg"]
    further = ("hf_model_name", "hf_tokenizer_name", "embed_cls", "no_causal_mask", "pool_type", "proj_type")
    return not any(text.get(name) for name in further) and hasattr(
        getattr(encoder.model, "text", encoder.model), "token_embedding"
    )


def _config(encoder: OpenCLIPEncoder) -> Any:
    from transformers import CLIPTextConfig

    text = encoder.model_config["text_cfg"]
    width, end = text["width"], text["vocab_size"] - 1
    return CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text.get("context_length", 77),
        projection_dim=encoder.embed_dim,
        hidden_act="quick_gelu" if encoder.model_config.get("quick_gelu") else "gelu",
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=0,
    )


def _text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers for those of open_clip's text tower."""
    if any(name.startswith("text.") for name in state):
        state = _below(state, "text.")
    found = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    for number in blocks:
        old, new = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
            found |= {f"{new}.self_attn.{role}_proj.{kind}": part for role, part in zip("qkv", parts, strict=True)}
            found |= {f"{new}.{theirs}.{kind}": state[f"{old}.{ours}.{kind}"] for ours, theirs in names.items()}
    return found
