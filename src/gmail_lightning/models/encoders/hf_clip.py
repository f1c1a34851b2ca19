"""``HFCLIPEncoder``: CLIP and SigLIP models of Hugging Face transformers as dual encoders."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmail_lightning.models.base import DualEncoder, LoRATarget, Tower
from gmail_lightning.models.branches.lora import block_targets
from gmail_lightning.models.encoders.hf_tower import (
    ACTIVATIONS,
    OFFLINE,
    features_and_tokens,
    patch_tokens,
    pixel_settings,
    tower_layers,
    tower_size,
)
from gmail_lightning.models.encoders.long_text import KEEP, LONG, stretch_table
from gmail_lightning.models.weights import plain_files, plain_names
from gmail_lightning.types import ImageSpec, TextSpec

_FAMILIES = ("clip", "siglip")


class HFCLIPEncoder(DualEncoder):
    """A dual encoder of transformers: the CLIP and SigLIP families (SigLIP 2 at a fixed resolution too), in fp32.

    Args:
        model: Folder or hub id of a model with its tokenizer and image processor.
        config: A transformers configuration (``model_type``: clip or siglip, ``text_config``, ``vision_config``) in
            place of ``model``: random weights, and the family's usual pixel statistics.
        tokenizer: Folder or hub id of the tokenizer; by default that of ``model``.
        grad_checkpointing: Recompute activations in the backward, block by block.

    Raises:
        ValueError: If the arguments contradict one another, the model is of another family, weights are missing, or
            tokenizer and text tower do not fit.
        RuntimeError: If something cannot be fetched.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        if (model is None) == (config is None) or (model is None and tokenizer is None):
            raise ValueError("HFCLIPEncoder needs either model, or config together with tokenizer.")
        settings, built, words, pixels = _load(model, config, cast(str, tokenizer or model))
        super().__init__(pixels["mean"], pixels["std"])
        self.model, self.config, self.tokenizer = built, settings, words
        self.pretrained = model is not None
        act = settings.vision_config.hidden_act
        self.activation = ACTIVATIONS.get(act, act)
        self._image_spec = ImageSpec(pixels["size"], pixels["resize_mode"], pixels["interpolation"])
        length = settings.text_config.max_position_embeddings
        self._text_spec = TextSpec(partial(_encode, words, context_length=length), length)
        if grad_checkpointing:  # transformers' own switch works in train mode only, and our tower is held in eval
            for layer in (*tower_layers(built, "image"), *tower_layers(built, "text")):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def image_spec(self) -> ImageSpec:
        """Size from the model's configuration, resizing from that of the image processor."""
        return self._image_spec

    @property
    def text_spec(self) -> TextSpec:
        """The tokenizer, padded to the context length as both families were trained, end token kept."""
        return self._text_spec

    @property
    def embed_dim(self) -> int:
        """Width of the joint space, from the configuration."""
        if self.config.model_type == "clip":
            return int(self.config.projection_dim)
        return int(self.config.vision_config.hidden_size)

    @property
    def wrapped(self) -> nn.Module:
        """The transformers model."""
        return self.model

    @property
    def logit_scale(self) -> Tensor:
        """Exponential of the model's parameter."""
        return cast(Tensor, self.model.logit_scale).exp().squeeze()

    @property
    def log_scale(self) -> nn.Parameter:
        """The model's parameter."""
        return cast(nn.Parameter, self.model.logit_scale)

    @property
    def logit_bias(self) -> Tensor | None:
        """Parameter of a SigLIP model, else None."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to unnormalised features of shape (B, D)."""
        if not len(image):
            return image.new_zeros(0, self.embed_dim)  # towers cannot reshape what is empty
        output = cast(Any, self.model).get_image_features(pixel_values=self.normalize_pixels(image))
        return cast(Tensor, output.pooler_output)

    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to unnormalised features of shape (B, D)."""
        self.check_token_ids(text)
        if not len(text):
            return text.new_zeros(0, self.embed_dim).float()  # towers cannot reshape what is empty
        return cast(Tensor, cast(Any, self.model).get_text_features(input_ids=text).pooler_output)

    def text_tokens(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to the hidden states behind the final norm, shape (B, L, W)."""
        self.check_token_ids(text)
        if not len(text):
            return text.new_zeros(0, text.shape[1], self.config.text_config.hidden_size).float()
        return cast(Tensor, cast(Any, self.model).text_model(input_ids=text).last_hidden_state)

    def text_features_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_text`` and ``text_tokens`` in one pass."""
        if not len(text):
            return super().text_features_and_tokens(text)
        self.check_token_ids(text)
        output = cast(Any, self.model).get_text_features(input_ids=text)
        return output.pooler_output, output.last_hidden_state

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but those of the vision model and its projection."""
        return (
            p
            for name, p in plain_names(dict(self.model.named_parameters())).items()
            if not name.startswith(("vision_model.", "visual_projection."))
        )

    def stretch_context(self, length: int = LONG, keep: int = KEEP) -> None:
        """Gives the text tower a longer context, in place; see ``models.stretch_context``."""
        model = cast(Any, self.model)
        embeddings = model.text_model.embeddings
        stretch_table(self, embeddings.position_embedding, "weight", length, keep)
        embeddings.position_embedding.num_embeddings = length
        embeddings.position_ids = torch.arange(length, device=embeddings.position_embedding.weight.device)[None]
        for config in (self.config.text_config, model.config.text_config, model.text_model.config):
            config.max_position_embeddings = length
        self._text_spec = TextSpec(partial(cast(Any, self.text_spec.encode), context_length=length), length)

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to patch tokens of one block, shape (B, T, W), before the final norm and without class token.

        Blocks behind ``layer`` are not run.
        """
        return patch_tokens(self.model, self.normalize_pixels(image), layer)

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """``encode_image`` and ``image_tokens`` in one pass."""
        return features_and_tokens(self.model, lambda: self.encode_image(image), layer)

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of a tower that play the given roles, block by block."""
        return block_targets(tower_layers(self.model, tower), roles)


def _load(
    model: str | None, config: dict[str, Any] | None, tokenizer: str
) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        settings = AutoConfig.for_model(**config) if config is not None else AutoConfig.from_pretrained(model)
        if settings.model_type not in _FAMILIES:
            raise ValueError(
                f"{model or 'config'} is a {settings.model_type} model; known families: {', '.join(_FAMILIES)}."
                + (" HFImageEncoder takes the image tower of a LLaVA." if settings.model_type == "llava" else "")
            )
        if model is None:
            built, pixels = AutoModel.from_config(settings, dtype=torch.float32), _usual_pixels(settings)
        else:
            with plain_files(model) as plain:
                built, info = AutoModel.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
            missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
            if missing:
                raise ValueError(
                    f"{model} lacks {len(missing)} weights: {', '.join(missing[:4])}. Give a whole dual encoder."
                )
            pixels = pixel_settings(settings, AutoImageProcessor.from_pretrained(model))
        words = AutoTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise RuntimeError(f"{model or tokenizer} did not load: {error} {OFFLINE}") from error
    _check_tokenizer(settings, words, tokenizer)
    return settings, built, words, pixels


def _usual_pixels(settings: Any) -> dict[str, Any]:
    from transformers.image_utils import (
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    if settings.model_type == "clip":
        mode, mean, std = "crop", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    else:
        mode, mean, std = "squash", IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    return {"size": tower_size(settings), "resize_mode": mode, "interpolation": "bicubic", "mean": mean, "std": std}


def _check_tokenizer(settings: Any, words: Any, name: str) -> None:
    text = settings.text_config
    if len(words) > text.vocab_size or (settings.model_type == "clip" and len(words) != text.vocab_size):
        raise ValueError(f"{name}: the tokenizer has {len(words)} ids, the text tower {text.vocab_size}.")
    # CLIP pools at the end token: config 2 is the old form, where it must be the highest id.
    end = len(words) - 1 if text.eos_token_id == 2 else text.eos_token_id
    if settings.model_type == "clip" and words.eos_token_id != end:
        raise ValueError(
            f"{name}: the tokenizer ends texts with id {words.eos_token_id}, the text tower pools at {end}."
        )


def _encode(tokenizer: Any, texts: list[str], *, context_length: int) -> Tensor:
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
    ).input_ids
    return cast(Tensor, ids)
