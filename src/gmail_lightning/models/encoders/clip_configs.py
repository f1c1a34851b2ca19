"""Configurations of CLIP between open_clip and transformers, and what the one has that the other lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

#: What is carried over of a configuration of open_clip; anything else must have its default.
_MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs", "patch_dropout"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "pool_type", "eos_id"}


def hf_clip_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' ``CLIPConfig`` for a model configuration of open_clip.

    open_clip pools a text at its highest id, which in CLIP's vocabulary is the end token. Transformers pools at the
    first end token, so the two are one for any text of the tokenizer.

    Raises:
        ValueError: If the model is more than ``CLIPModel`` can be, with all the reasons.
    """
    if faults := list(_unlike_clip(model_config)):
        raise ValueError(f"This model of open_clip has no form in transformers' CLIP: {'; '.join(faults)}.")
    vision = _settings("vision", model_config["vision_cfg"])
    text = _settings("text", model_config["text_cfg"])
    size, end = vision["image_size"], text["vocab_size"] - 1
    end = text["eos_id"] if text["pool_type"] == "eos" else end
    act = "quick_gelu" if model_config.get("quick_gelu") else "gelu"
    dimension = model_config["embed_dim"]
    return {
        "projection_dim": dimension,
        "vision_config": {
            "image_size": size[0] if isinstance(size, (list, tuple)) else size,
            "patch_size": vision["patch_size"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            **_tower(vision, act, dimension),
        },
        "text_config": {
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "num_attention_heads": text["heads"],
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            **_tower(text, act, dimension),
        },
    }


def _tower(settings: Mapping[str, Any], act: str, dimension: int) -> dict[str, Any]:
    return {
        "hidden_size": settings["width"],
        "intermediate_size": int(settings["width"] * settings["mlp_ratio"]),
        "num_hidden_layers": settings["layers"],
        "hidden_act": act,
        "layer_norm_eps": (settings["norm_kwargs"] or {}).get("eps", 1e-5),
        "projection_dim": dimension,
    }


def _defaults(tower: str) -> dict[str, Any]:
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    return {field.name: field.default for field in fields(CLIPVisionCfg if tower == "vision" else CLIPTextCfg)}


def _settings(tower: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**_defaults(tower), **given}


def _unlike_clip(model_config: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration ``CLIPModel`` does not have."""
    for name, value in model_config.items():
        if name not in _MODEL and value not in (None, False):
            yield f"{name}: {value}"
    for tower, carried in (("vision", _VISION), ("text", _TEXT)):
        defaults = _defaults(tower)
        for name, value in model_config[f"{tower}_cfg"].items():
            if name not in carried and value != defaults.get(name):
                yield f"{tower}_cfg.{name}: {value}"
    yield from _unlike_towers(model_config)


def _unlike_towers(model_config: Mapping[str, Any]) -> Iterator[str]:
    vision = _settings("vision", model_config["vision_cfg"])
    text = _settings("text", model_config["text_cfg"])
    if not isinstance(vision["layers"], int):
        yield f"vision_cfg.layers: {vision['layers']} (a ResNet)"
    elif vision["width"] % vision["head_width"]:
        yield f"vision_cfg.head_width: {vision['head_width']} (does not divide width {vision['width']})"
    for name in ("image_size", "patch_size"):
        if isinstance(vision[name], (list, tuple)) and len(set(vision[name])) > 1:
            yield f"vision_cfg.{name}: {vision[name]} (not square)"
    if text["pool_type"] not in ("argmax", "eos"):
        yield f"text_cfg.pool_type: {text['pool_type']}"
    for tower, settings in (("vision", vision), ("text", text)):
        if further := set(settings["norm_kwargs"] or {}) - {"eps"}:
            yield f"{tower}_cfg.norm_kwargs: {', '.join(sorted(further))}"


def open_clip_config(settings: Any) -> dict[str, Any]:
    """A model configuration of open_clip for a ``CLIPConfig`` of transformers.

    Raises:
        ValueError: If open_clip cannot build the model, with all the reasons.
    """
    if faults := list(_unlike_open_clip(settings)):
        raise ValueError(f"This model of transformers has no form in open_clip's CLIP: {'; '.join(faults)}.")
    vision, text = settings.vision_config, settings.text_config
    config = {
        "embed_dim": settings.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_open_tower(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **_open_tower(text),
        },
    }
    if text.eos_token_id not in (2, text.vocab_size - 1):  # 2: the old form, which pools at the highest id
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return config


def _open_tower(tower: Any) -> dict[str, Any]:
    found = {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
    }
    return found if tower.layer_norm_eps == 1e-5 else {**found, "norm_kwargs": {"eps": tower.layer_norm_eps}}


def _unlike_open_clip(settings: Any) -> Iterator[str]:
    if settings.model_type != "clip":
        yield f"model_type: {settings.model_type}"
        return
    vision, text = settings.vision_config, settings.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        yield f"hidden_act: {vision.hidden_act} and {text.hidden_act} (gelu or quick_gelu in both towers)"
    for name, tower in (("vision", vision), ("text", text)):
        ratio = tower.intermediate_size / tower.hidden_size  # open_clip multiplies, and drops what is behind the point
        if int(tower.hidden_size * ratio) != tower.intermediate_size:
            yield f"{name}_config.intermediate_size: {tower.intermediate_size}"
    if vision.num_channels != 3:
        yield f"vision_config.num_channels: {vision.num_channels}"
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        yield f"vision_config.image_size and patch_size: {vision.image_size}, {vision.patch_size} (not one number)"
