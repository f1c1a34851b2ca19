"""The projector of LLaVA, and how a LLaVA of Hugging Face transformers is taken apart."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmail_lightning.models.base import ImageReader
from gmail_lightning.models.branches.record import find_checkpoint
from gmail_lightning.models.captioners.language_model import build_language_model, load_tokenizer, writing_model
from gmail_lightning.models.encoders.hf_tower import OFFLINE
from gmail_lightning.models.encoders.readers import PatchTokens
from gmail_lightning.models.weights import plain_files, plain_names

# Names of the two layers: ours and of transformers, or of LLaVA's own files (mm_projector.bin).
_PROJECTOR_KEY = re.compile(
    r"(?:^|\.)(?:projector|mm_projector|multi_modal_projector)\.(linear_[12]|[02])\.(weight|bias)$"
)


class Projector(nn.Module):
    """Two layers with GELU between them (``mlp2x_gelu`` of LLaVA 1.5, arXiv 2310.03744), from patches to words."""

    def __init__(self, image_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(image_dim, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (B, T, W) to (B, T, width)."""
        return cast(Tensor, self.linear_2(F.gelu(self.linear_1(tokens))))


class LlavaParts(NamedTuple):
    """A LLaVA without its vision tower."""

    language_model: Any  # causal, as ``writing_model`` leaves it
    knows_language: bool  # its weights are more than random
    projector: nn.Module  # fp32
    tokenizer: Any  # with a chat template where the tokenizer or the processor has one
    image_token: str
    reader: ImageReader  # what it sees of an image


def llava_from_parts(
    language_model: str | dict[str, Any], tokenizer: str | None, image_dim: int, reader: ImageReader, dtype: str
) -> LlavaParts:
    """Puts a new projector before any causal language model; arguments as ``Llava``."""
    model, words, knows_language = build_language_model(language_model, tokenizer, dtype)
    built: Any = model
    projector = Projector(image_dim, built.get_input_embeddings().embedding_dim)
    image_token = getattr(words, "image_token", None) or "<image>"
    return LlavaParts(built, knows_language, projector, words, image_token, reader)


def load_llava(path: str, tokenizer: str | None = None, dtype: str = "float32") -> LlavaParts:
    """Loads a ``LlavaForConditionalGeneration``.

    Args:
        path: Directory or hub id.
        tokenizer: As ``load_tokenizer``; by default that of the model.
        dtype: Of the language model, see ``build_language_model``; the projector, which trains, is read in fp32.

    Raises:
        ValueError: If it is another kind of model, lacks weights, or reads its tower in a way that ``image_tokens`` of
            an encoder does not.
        RuntimeError: If something cannot be fetched.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
    from transformers import LlavaForConditionalGeneration as Published

    class LlavaForConditionalGeneration(Published):  # type: ignore[misc]
        """By its own name, from which transformers knows how the keys of older files are renamed."""

        __module__ = Published.__module__
        _keep_in_fp32_modules_strict = {"multi_modal_projector"}  # noqa: RUF012

    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "llava":
            raise ValueError(f"{path} is a {config.model_type} model, no llava: build it from parts (language_model).")
        layer = _layer(path, config)
        with plain_files(path) as plain:
            llava, info = LlavaForConditionalGeneration.from_pretrained(plain, dtype=dtype, output_loading_info=True)
        words = load_tokenizer(tokenizer or path)
        if words.chat_template is None and tokenizer is None:  # older files have it beside the processor
            words.chat_template = AutoProcessor.from_pretrained(path).chat_template
    except OSError as error:
        raise RuntimeError(f"{path} did not load: {error} {OFFLINE}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} weights: {', '.join(missing[:4])}.")
    with torch.device("meta"):  # a shell: body and head come from the LLaVA
        causal = AutoModelForCausalLM.from_config(config.text_config)
    setattr(causal, causal.base_model_prefix, llava.model.language_model)
    causal.set_output_embeddings(llava.lm_head)
    hollow = [name for name, tensor in causal.named_parameters() if tensor.is_meta]
    if hollow:
        raise ValueError(f"{path}: its {config.text_config.model_type} has parts that a LLaVA does not hold: {hollow}.")
    image_token = words.convert_ids_to_tokens(config.image_token_id)
    return LlavaParts(
        writing_model(causal), True, llava.model.multi_modal_projector, words, image_token, PatchTokens(layer)
    )


def load_projector(projector: nn.Module, path: str) -> None:
    """Loads the weights of a projector.

    Args:
        projector: To load them into.
        path: A checkpoint of a task whose captioner has one, the folder of its run, or LLaVA's ``mm_projector.bin``.

    Raises:
        ValueError: If there is no such file, or its projector is of other shapes.
    """
    file = find_checkpoint(path)
    if file is None:
        raise ValueError(f"projector={path!r}: no checkpoint there. Run the first stage, or give its file.")
    content = torch.load(file, map_location="cpu", weights_only=True)
    found = {}
    for key, value in plain_names(content.get("state_dict", content)).items():
        if match := _PROJECTOR_KEY.search(key):
            layer = {"0": "linear_1", "2": "linear_2"}.get(match[1], match[1])
            found[f"{layer}.{match[2]}"] = value.float()
    own = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    if own != given:
        raise ValueError(f"{file}: its projector has {given or 'no weights'}, and {own} is needed.")
    projector.load_state_dict(found)


def _layer(path: str, config: Any) -> int:
    """Block of the tower; hidden state n of transformers is what block n - 1 puts out, counted from the front."""
    layers, kind = config.vision_feature_layer, config.vision_config.model_type
    layers = [layers] if isinstance(layers, int) else list(layers)
    if len(layers) != 1 or layers[0] == 0:
        raise ValueError(f"{path} reads the hidden states {layers} of its tower; one block is known here.")
    usual = "default" if kind == "clip_vision_model" else "full"  # with a class token it is dropped
    if config.vision_feature_select_strategy != usual:
        raise ValueError(
            f"{path} has vision_feature_select_strategy {config.vision_feature_select_strategy!r} on a {kind}: only "
            f"{usual!r}, all patch tokens and no class token, is known here."
        )
    layer = int(layers[0])
    return layer if layer < 0 else layer - 1
