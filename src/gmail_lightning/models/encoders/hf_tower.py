"""``HFImageEncoder``: an image tower of Hugging Face transformers alone; what it shares with the dual encoders."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmail_lightning.models.base import ImageEncoder, LoRATarget, Tower
from gmail_lightning.models.branches.lora import block_targets
from gmail_lightning.models.weights import plain_files
from gmail_lightning.types import ImageSpec

_TOWERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
OFFLINE = (
    "Without network, give a local folder, or fill the hub's cache beforehand; HF_HUB_OFFLINE=1 makes it fail at once "
    "instead of retrying."
)


class HFImageEncoder(ImageEncoder):
    """The image tower alone of a transformers model, in fp32: that of a LLaVA directory, a CLIP or a SigLIP.

    Adapters move between this and the dual encoder that the tower is from: LLaVA 1.5 has that of
    ``openai/clip-vit-large-patch14-336``. Features are those of the tower's own pooling, before any joint space.

    Args:
        model: Folder or hub id of a LLaVA, or of a model of the CLIP or SigLIP family, with its image processor. Only
            the weights of the tower are read.
        grad_checkpointing: Recompute activations in the backward, block by block.

    Raises:
        ValueError: If it has another kind of tower, or lacks weights.
        RuntimeError: If something cannot be fetched.
    """

    def __init__(self, model: str, grad_checkpointing: bool = False) -> None:
        tower, pixels = _load_tower(model)
        super().__init__(pixels["mean"], pixels["std"])
        self.model = tower
        self.pretrained = True
        act = cast(Any, tower.config).hidden_act
        self.activation = ACTIVATIONS.get(act, act)
        self._image_spec = ImageSpec(pixels["size"], pixels["resize_mode"], pixels["interpolation"])
        if grad_checkpointing:
            for layer in tower_layers(tower, "image"):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def image_spec(self) -> ImageSpec:
        """Size from the model's configuration, resizing from that of the image processor."""
        return self._image_spec

    @property
    def embed_dim(self) -> int:
        """Width of the tower."""
        return int(cast(Any, self.model.config).hidden_size)

    @property
    def wrapped(self) -> nn.Module:
        """The transformers tower."""
        return self.model

    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to the tower's pooled output, shape (B, D)."""
        if not len(image):
            return image.new_zeros(0, self.embed_dim)  # towers cannot reshape what is empty
        return cast(Tensor, self.model(pixel_values=self.normalize_pixels(image)).pooler_output)

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """As ``HFCLIPEncoder``'s."""
        return patch_tokens(self.model, self.normalize_pixels(image), layer)

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """``encode_image`` and ``image_tokens`` in one pass."""
        return features_and_tokens(self.model, lambda: self.encode_image(image), layer)

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of the tower that play the given roles, block by block."""
        return block_targets(tower_layers(self.model, "image"), roles) if tower == "image" else []


def features_and_tokens(model: nn.Module, encode: Callable[[], Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """What ``encode`` gives, and on its way the patch tokens of one block."""
    layers, kept = tower_layers(model, "image"), []
    handle = layers[layer].register_forward_hook(lambda block, inputs, output: kept.append(output))
    try:
        features = encode()
    finally:
        handle.remove()
    return features, without_class_token(model, kept[0])


def patch_tokens(model: nn.Module, pixels: Tensor, layer: int) -> Tensor:
    """Hidden states of one block; those behind it are not run."""
    vision, layers = image_tower(model), tower_layers(model, "image")
    if not -len(layers) <= layer < len(layers):
        raise IndexError(f"layer={layer}: this tower has {len(layers)} blocks.")
    hidden = vision.embeddings(pixels)
    if _is_clip(model):
        hidden = vision.pre_layrnorm(hidden)
    for block in layers[: layer % len(layers) + 1]:
        hidden = block(hidden, None)
    return without_class_token(model, hidden)


def without_class_token(model: nn.Module, hidden: Tensor) -> Tensor:
    """The patch tokens among the hidden states of a tower."""
    return hidden[:, 1:] if _is_clip(model) else hidden


def _is_clip(model: nn.Module) -> bool:
    return hasattr(image_tower(model), "pre_layrnorm")  # CLIP alone has it, and a class token


def _load_tower(model: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        settings = AutoConfig.from_pretrained(model)
        vision = getattr(settings, "vision_config", settings)
        if vision.model_type not in _TOWERS:
            raise ValueError(f"{model} has a tower of kind {vision.model_type}; known: {', '.join(_TOWERS)}.")
        with torch.device("meta"):  # older releases of transformers have the tower one level down
            inner = "vision_model." if hasattr(AutoModel.from_config(vision), "vision_model") else ""
        logging.set_verbosity_error()  # of the weights that are not the tower's, and so not read
        with plain_files(model) as plain:
            tower, info = AutoModel.from_pretrained(
                plain,
                config=vision,
                dtype=torch.float32,
                key_mapping={r"^(model\.)?(vision_tower\.)?(vision_model\.)?": inner},
                output_loading_info=True,
            )
        pixels = pixel_settings(vision, AutoImageProcessor.from_pretrained(model))
    except OSError as error:
        raise RuntimeError(f"{model} did not load: {error} {OFFLINE}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ValueError(f"{model} lacks {len(missing)} weights of its image tower: {', '.join(missing[:4])}.")
    return cast(nn.Module, tower), pixels


def tower_size(settings: Any) -> tuple[int, int]:
    """Height and width of the pixels."""
    size = getattr(settings, "vision_config", settings).image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def pixel_settings(settings: Any, processor: Any) -> dict[str, Any]:
    """Reads an image processor; what our three ways of resizing cannot express is refused."""
    size, resized = tower_size(settings), dict(processor.size)
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    interpolation = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample))
    if resized.get("shortest_edge") == min(size) and (crop.get("height"), crop.get("width")) == size:
        mode = "crop"
    elif (resized.get("height"), resized.get("width")) == size:
        mode = "squash"
    else:
        mode = None
    if mode is None or interpolation is None:
        raise ValueError(
            f"The image processor resizes to {resized}, crops to {crop} and filters by {processor.resample} for a "
            f"tower of {size}: only 'shorter side and centre crop' and 'squash', bicubic or bilinear, are known."
        )
    mean, std = processor.image_mean, processor.image_std
    return {"size": size, "resize_mode": mode, "interpolation": interpolation, "mean": mean, "std": std}


def image_tower(model: nn.Module) -> Any:
    """The image tower of a dual encoder, or the model itself where it is one."""
    return getattr(model, "vision_model", model)


def tower_layers(model: nn.Module, tower: Tower) -> nn.ModuleList:
    """The blocks of a tower, first to last."""
    host = image_tower(model) if tower == "image" else cast(Any, model.text_model)
    return cast(nn.ModuleList, host.encoder.layers)
