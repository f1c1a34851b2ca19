"""The forms that a CLIP is written in: folders of plain open_clip and of plain transformers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gmail_lightning.models.encoders.byte_pairs import (
    clip_tokenizer,
    read_byte_pairs,
    tokenizer_byte_pairs,
    write_byte_pairs,
)
from gmail_lightning.models.encoders.clip_configs import hf_clip_config, open_clip_config
from gmail_lightning.models.encoders.conversion import hf_clip_state, open_clip_state
from gmail_lightning.models.encoders.hf_clip import HFCLIPEncoder
from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder, save_open_clip
from gmail_lightning.models.weights import plain_names

Form = Literal["open_clip", "hf_clip"]
CLIPEncoder = OpenCLIPEncoder | HFCLIPEncoder


def write_open_clip(encoder: CLIPEncoder, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Writes what ``open_clip.create_model("local-dir:<folder>")`` loads.

    Args:
        encoder: It says all but the weights.
        state: Weights under the names of ``encoder.wrapped``.
        folder: Made where it is missing, once nothing can be refused any more.
        dtype: Precision of the written weights.

    Raises:
        ValueError: If open_clip has no such model.
    """
    if isinstance(encoder, OpenCLIPEncoder):
        save_open_clip(folder, encoder.model_config, encoder.preprocess_config, _cast(state, dtype), encoder.merges)
        if hasattr(encoder.tokenizer, "save_pretrained"):  # open_clip looks for a Hugging Face tokenizer in the folder
            encoder.tokenizer.save_pretrained(folder)
        return
    config = open_clip_config(encoder.config)
    renamed, pairs = open_clip_state(plain_names(state)), tokenizer_byte_pairs(encoder.tokenizer)
    with tempfile.TemporaryDirectory() as place:
        merges = None if pairs == read_byte_pairs(None) else Path(place) / "merges.txt.gz"
        if merges is not None:
            write_byte_pairs(pairs, merges)
        save_open_clip(folder, config, _preprocess(encoder), _cast(renamed, dtype), merges)


def write_hf_clip(encoder: CLIPEncoder, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Writes what ``transformers.CLIPModel`` and ``AutoProcessor`` load; arguments as ``write_open_clip``'s.

    Raises:
        ValueError: If transformers' CLIP is no such model.
    """
    from transformers import CLIPConfig, CLIPModel

    processor = _image_processor(encoder)
    if isinstance(encoder, OpenCLIPEncoder):
        config, tokenizer = CLIPConfig(**hf_clip_config(encoder.model_config)), _tokenizer(encoder)
        state = hf_clip_state(plain_names(state))
    elif encoder.config.model_type == "clip":
        config, tokenizer = copy.deepcopy(encoder.config), encoder.tokenizer
    else:
        raise ValueError(f"This is a {encoder.config.model_type} of transformers: to='hf_clip' writes its CLIP alone.")
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(config)
    model.load_state_dict({key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    for part in (processor, tokenizer):
        part.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which safetensors writes for the owner alone
        weights.chmod((folder / "config.json").stat().st_mode)


#: By the name that a user types.
FORMS: dict[str, Callable[[CLIPEncoder, Mapping[str, Tensor], Path, torch.dtype], None]] = {
    "open_clip": write_open_clip,
    "hf_clip": write_hf_clip,
}


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def _tokenizer(encoder: OpenCLIPEncoder) -> Any:
    pairs = read_byte_pairs(encoder.merges)
    tokenizer = clip_tokenizer(pairs, encoder.text_spec.context_length)
    vocabulary = encoder.model_config["text_cfg"].get("vocab_size", 49408)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"text_cfg.vocab_size is {vocabulary}, and the tokenizer has {len(tokenizer)} ids: to='hf_clip' needs as "
            "many, for transformers' CLIP finds the end of a text by its id, the highest of the tower."
        )
    return tokenizer


def _image_processor(encoder: CLIPEncoder) -> Any:
    from transformers import CLIPImageProcessor

    spec = encoder.image_spec
    height, width = spec.size
    if spec.resize_mode not in ("crop", "squash"):
        raise ValueError(f"resize_mode {spec.resize_mode!r}: the image processor of transformers' CLIP has none such.")
    crop = spec.resize_mode == "crop"
    return CLIPImageProcessor(
        size={"shortest_edge": min(height, width)} if crop else {"height": height, "width": width},
        do_center_crop=crop,
        crop_size={"height": height, "width": width},
        resample={"bilinear": 2, "bicubic": 3}[spec.interpolation],
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )


def _preprocess(encoder: HFCLIPEncoder) -> dict[str, Any]:
    spec = encoder.image_spec
    return {
        "size": list(spec.size),
        "mode": "RGB",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "interpolation": spec.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[spec.resize_mode],
    }
