"""CLIP between open_clip and transformers: the names of weights, and the text tower by itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.branches.lora import merged_state
from gmail_lightning.models.encoders.clip_configs import hf_clip_config
from gmail_lightning.models.encoders.hf_clip import HFCLIPEncoder
from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder
from gmail_lightning.models.weights import plain_names

_BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
#: open_clip's name, that of transformers, and whether one is the other's transpose. ``N`` stands for a block.
_NAMES = (
    ("logit_scale", "logit_scale", False),
    ("visual.proj", "visual_projection.weight", True),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", False),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", False),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", False),
    *((f"visual.ln_pre.{kind}", f"vision_model.pre_layrnorm.{kind}", False) for kind in ("weight", "bias")),
    *((f"visual.ln_post.{kind}", f"vision_model.post_layernorm.{kind}", False) for kind in ("weight", "bias")),
    ("text_projection", "text_projection.weight", True),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight", False),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", False),
    *((f"ln_final.{kind}", f"text_model.final_layer_norm.{kind}", False) for kind in ("weight", "bias")),
    *(
        (f"{ours}.N.{part}.{kind}", f"{theirs}.N.{name}.{kind}", False)
        for ours, theirs in _BLOCKS.items()
        for part, name in (
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
        for kind in ("weight", "bias")
    ),
)
_TO_HF = {ours: (theirs, transposed) for ours, theirs, transposed in _NAMES}
_TO_OPEN_CLIP = {theirs: (ours, transposed) for ours, theirs, transposed in _NAMES}
_FUSED = re.compile(r"(.+)\.(\d+)\.attn\.in_proj_(weight|bias)")
_APART = re.compile(r"(.+)\.(\d+)\.self_attn\.q_proj\.(weight|bias)")


def hf_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's CLIP under the names of transformers' ``CLIPModel``.

    Args:
        state: State dict of an ``open_clip.CLIP``, or of a ``CustomTextCLIP`` of the same towers.

    Raises:
        ValueError: If it holds a weight that ``CLIPModel`` has no place for.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text.")
        if fused := _FUSED.fullmatch(name):
            host, block, kind = fused.groups()
            for role, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{_block(host, key)}.{block}.self_attn.{role}_proj.{kind}"] = part.clone()
        else:
            found |= _renamed(name, value, _TO_HF, key)
    found["logit_scale"] = found["logit_scale"].squeeze()
    return found


def open_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ``CLIPModel`` under the names of ``open_clip.CLIP``.

    Raises:
        ValueError: If it holds a weight that ``open_clip.CLIP`` has no place for.
    """
    found: dict[str, Tensor] = {}
    hosts = {theirs: ours for ours, theirs in _BLOCKS.items()}
    for key, value in state.items():
        if key.endswith("position_ids") or re.search(r"self_attn\.[kv]_proj\.", key):
            continue  # numbers that count up, and parts that are taken with q
        if apart := _APART.fullmatch(key):
            host, block, kind = apart.groups()
            parts = [state[key.replace(".q_proj.", f".{role}_proj.")] for role in "qkv"]
            found[f"{hosts[host]}.{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        else:
            found |= _renamed(key, value, _TO_OPEN_CLIP, key)
    return found


def _block(host: str, key: str) -> str:
    if host not in _BLOCKS:
        raise ValueError(f"The weight {key} has no place in the other form of CLIP.")
    return _BLOCKS[host]


def _renamed(name: str, value: Tensor, table: Mapping[str, tuple[str, bool]], key: str) -> dict[str, Tensor]:
    number = next(iter(re.findall(r"(?<=\.)\d+(?=\.)", name)), "")
    entry = table.get(name.replace(f".{number}.", ".N.", 1) if number else name)
    if entry is None:
        raise ValueError(f"The weight {key} has no place in the other form of CLIP.")
    return {entry[0].replace(".N.", f".{number}."): value.T.contiguous() if entry[1] else value}


def clip_text_model(encoder: DualEncoder) -> nn.Module:
    """The text tower as a ``CLIPTextModel`` of transformers: a copy in fp32 on the CPU, LoRA merged.

    Its ``last_hidden_state`` is what ``encoder.text_tokens`` gives.

    Args:
        encoder: A plain CLIP: an ``OpenCLIPEncoder`` with open_clip's own text tower, whatever its image tower, or an
            ``HFCLIPEncoder``.

    Raises:
        ValueError: If the text tower is another.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if isinstance(encoder, HFCLIPEncoder) and encoder.config.model_type == "clip":
        tower = copy.deepcopy(cast(Any, encoder.model).text_model.config)
        state = plain_names(merged_state(encoder))
    elif isinstance(encoder, OpenCLIPEncoder):
        # The images play no part: any tower will do, and a bias of the logits.
        texts = {name: encoder.model_config.get(name) for name in ("embed_dim", "quick_gelu", "text_cfg")}
        tower = CLIPTextConfig(**{**hf_clip_config({**texts, "vision_cfg": {}})["text_config"], "pad_token_id": 0})
        aside = ("visual.", "logit_bias")
        state = hf_clip_state({k: v for k, v in plain_names(merged_state(encoder)).items() if not k.startswith(aside)})
    else:
        kind = getattr(getattr(encoder, "config", None), "model_type", type(encoder).__name__)
        raise ValueError(f"A text tower of {kind} is no CLIPTextModel: give a plain OpenCLIPEncoder or HFCLIPEncoder.")
    with torch.random.fork_rng(devices=[]):  # what is made of weights that are there draws nothing
        model = CLIPTextModel(tower).eval()
    own = model.state_dict().keys()
    inner = "text_model." if any(name.startswith("text_model.") for name in own) else ""  # of older transformers
    state = {
        inner + name.removeprefix("text_model."): value.cpu().float()
        for name, value in state.items()
        if name.startswith("text_model.") and not name.endswith("position_ids")
    }
    model.load_state_dict(state, strict=True)
    return cast(nn.Module, model)
