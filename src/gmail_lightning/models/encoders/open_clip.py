"""``OpenCLIPEncoder``: any model of open_clip as a dual encoder, and the folder that such a model is saved in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder, LoRATarget, Tower
from gmail_lightning.models.branches.lora import block_targets
from gmail_lightning.models.encoders.long_text import KEEP, LONG, read_long_clip, stretch_table
from gmail_lightning.models.encoders.open_clip_loading import (
    CONFIG,
    MERGES,
    RESIZE_MODES,
    SHIPPED,
    WEIGHTS,
    activation_name,
    build_model,
    build_tokenizer,
    check_activation,
    find_folder,
    find_merges,
    read_model_config,
    read_preprocess,
    transformer_blocks,
)
from gmail_lightning.models.weights import plain_names
from gmail_lightning.types import ImageSpec, TextSpec


class OpenCLIPEncoder(DualEncoder):
    """A dual encoder of open_clip, https://github.com/mlfoundations/open_clip, with weights in fp32.

    The activation, and mean, standard deviation and resizing of the pixels are those of the model's configuration. A
    bare file of weights carries none of them: they are then taken from ``model_name`` (its activation, and the pixel
    statistics that all its pretrained tags share), so weights fine-tuned from OpenAI's need a ``-quickgelu`` name
    (mlfoundations/open_clip#771). A folder says it all and is the better form.

    Args:
        model_name: Name of an architecture in open_clip, or ``hf-hub:owner/name``.
        pretrained: A tag of ``model_name``; a file of weights; a folder with ``open_clip_config.json`` and weights; or
            ``emoji`` or ``emoji_scorer``, the small CLIPs in this package. None: random weights.
        config: open_clip's model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu``) in place
            of ``model_name``.
        preprocess: Overrides of ``mean``, ``std``, ``interpolation`` and ``resize_mode`` (shortest, squash, longest).
        merges: Gzipped file of byte-pair merges, where the vocabulary is cut: ``text_cfg.vocab_size`` must be 512 plus
            its merges plus 2. ``emoji``: the file in this package. A folder brings its own.
        grad_checkpointing: Recompute activations in the backward, block by block.
        context_length: Stretch the text tower to so many tokens, as Long-CLIP does: 248 for the usual 77. The published
            Long-CLIP weights, as a file in ``pretrained``, have 248 of themselves.

    Raises:
        ValueError: If the arguments contradict one another, name something unknown, or would load weights silently
            wrong.
        RuntimeError: If weights or a tokenizer cannot be fetched.
    """

    def __init__(
        self,
        model_name: str | None = None,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        preprocess: dict[str, Any] | None = None,
        merges: str | None = None,
        grad_checkpointing: bool = False,
        context_length: int | None = None,
    ) -> None:
        folder = find_folder(pretrained)
        long_clip = read_long_clip(pretrained) if pretrained and folder is None and Path(pretrained).is_file() else None
        if long_clip is not None and context_length not in (None, LONG):
            raise ValueError(f"{pretrained} holds Long-CLIP's weights of context length {LONG}, not {context_length}.")
        if pretrained is not None and folder is None and model_name is None and config is None:
            raise ValueError(
                f"pretrained={pretrained!r} is no folder here, and none of {', '.join(SHIPPED)}. A tag or a file of "
                "weights needs model_name (or config) beside it."
            )
        is_hub = (model_name or "").startswith(("hf-hub:", "local-dir:"))
        if is_hub and pretrained is not None:
            raise ValueError(f"model_name={model_name!r} brings its own weights: leave out pretrained={pretrained!r}.")
        if sum(source is not None for source in (model_name, folder, config)) != 1:
            raise ValueError(
                "OpenCLIPEncoder needs exactly one description of the model: model_name, config, or a folder in "
                f"pretrained; got model_name={model_name!r}, pretrained={pretrained!r}, config={config!r}. "
                "Set the others to null."
            )
        reference = f"local-dir:{folder.resolve()}" if folder else model_name
        model_config = deepcopy(config) if config is not None else read_model_config(cast(str, reference))
        if folder is None and pretrained is not None:
            check_activation(model_name, pretrained, model_config)
        model = build_model(reference, None if long_clip else pretrained, folder, model_config)
        preprocess_config = read_preprocess(model, model_name, pretrained, preprocess)
        super().__init__(preprocess_config["mean"], preprocess_config["std"])
        self.model = model
        self.model_config, self.preprocess_config = model_config, preprocess_config
        self.merges = find_merges(merges, folder)
        self.tokenizer = build_tokenizer(reference, model_config, self.merges)
        self.pretrained = pretrained is not None or is_hub
        self.activation = activation_name(model_config, model)
        if grad_checkpointing:
            cast(Any, model).set_grad_checkpointing(True)
        size = model_config["vision_cfg"].get("image_size", 224)
        self._image_spec = ImageSpec(
            size=tuple(size) if isinstance(size, (list, tuple)) else (size, size),
            resize_mode=cast(Any, RESIZE_MODES[preprocess_config["resize_mode"]]),
            interpolation=preprocess_config["interpolation"],
        )
        self._text_spec = TextSpec(self.tokenizer, model_config["text_cfg"].get("context_length", 77))
        if context_length is not None or long_clip is not None:
            self.stretch_context(context_length or LONG)
        if long_clip is not None:
            self.model.load_state_dict(long_clip)

    @property
    def image_spec(self) -> ImageSpec:
        """Size and resizing of the pixels, from the configuration."""
        return self._image_spec

    @property
    def text_spec(self) -> TextSpec:
        """open_clip's tokenizer, which keeps the end token when it truncates, and the context length."""
        return self._text_spec

    @property
    def embed_dim(self) -> int:
        """Width of the joint space, from the configuration."""
        return int(self.model_config["embed_dim"])

    @property
    def wrapped(self) -> nn.Module:
        """The open_clip model."""
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
        bias = cast(Tensor | None, self.model.logit_bias)
        return None if bias is None else bias.squeeze()

    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to unnormalised features of shape (B, D)."""
        if not len(image):
            return image.new_zeros(0, self.embed_dim)  # towers cannot reshape what is empty
        return cast(Tensor, cast(Any, self.model).encode_image(self.normalize_pixels(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to unnormalised features of shape (B, D)."""
        self.check_token_ids(text)
        if not len(text):
            return text.new_zeros(0, self.embed_dim).float()  # towers cannot reshape what is empty
        return cast(Tensor, cast(Any, self.model).encode_text(text))

    def text_tokens(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to the hidden states behind the final norm, shape (B, L, W).

        Raises:
            NotImplementedError: If the text tower is none of open_clip's own.
        """
        return cast(Tensor, self._text_intermediates(text, tokens_only=True)["text_intermediates"][-1])

    def text_features_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_text`` and ``text_tokens`` in one pass."""
        output = self._text_intermediates(text, tokens_only=False)
        return output["text_features"], output["text_intermediates"][-1]

    def _text_intermediates(self, text: Tensor, tokens_only: bool) -> dict[str, Any]:
        self.check_token_ids(text)
        tower = getattr(self.model, "text", self.model)
        if not hasattr(tower, "forward_intermediates"):
            raise NotImplementedError(f"text_tokens needs a text tower of open_clip's own, not {type(tower).__name__}.")
        if not len(text):
            width = cast(Any, tower).positional_embedding.shape[1]
            features, tokens = text.new_zeros(0, self.embed_dim), text.new_zeros(0, text.shape[1], width)
            return {"text_features": features.float(), "text_intermediates": [tokens.float()]}
        return cast(
            dict[str, Any],
            cast(Any, self.model).forward_intermediates(
                text=text,
                text_indices=1,
                normalize=False,
                normalize_intermediates=True,
                intermediates_only=tokens_only,
            ),
        )

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but those of ``visual``."""
        named = plain_names(dict(self.model.named_parameters()))
        return (p for name, p in named.items() if not name.startswith("visual."))

    def stretch_context(self, length: int = LONG, keep: int = KEEP) -> None:
        """Gives the text tower a longer context, in place; see ``models.stretch_context``."""
        model = cast(Any, self.model)
        tower = getattr(model, "text", model)
        stretch_table(self, tower, "positional_embedding", length, keep)
        for module in {model, tower}:
            module.context_length = length
            if getattr(module, "num_pos", None) is not None:
                module.num_pos = length
            if getattr(module, "attn_mask", None) is not None:
                mask = module.attn_mask[:1, :1]
                module.attn_mask = torch.full_like(mask, -torch.inf).repeat(length, length).triu_(1)
        self.model_config["text_cfg"]["context_length"] = length
        self.tokenizer.context_length = length
        self._text_spec = TextSpec(self.tokenizer, length)

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to patch tokens of one block, shape (B, T, W), before the final norm and without class token.

        Blocks behind ``layer`` are not run.
        """
        return cast(Tensor, self._intermediates(image, layer, tokens_only=True)["image_intermediates"][0])

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """``encode_image`` and ``image_tokens`` in one pass."""
        output = self._intermediates(image, layer, tokens_only=False)
        return output["image_features"], output["image_intermediates"][0]

    def _intermediates(self, image: Tensor, layer: int, tokens_only: bool) -> dict[str, Any]:
        visual = cast(Any, self.model.visual)
        if not hasattr(visual, "forward_intermediates"):
            raise NotImplementedError(f"image_tokens needs a vision transformer, not {type(visual).__name__}.")
        blocks = transformer_blocks(self.model, "image")
        if not -len(blocks) <= layer < len(blocks):
            raise IndexError(f"layer={layer}: this tower has {len(blocks)} blocks.")
        return cast(
            dict[str, Any],
            visual.forward_intermediates(
                self.normalize_pixels(image),
                indices=[layer % len(blocks)],
                stop_early=tokens_only,
                intermediates_only=tokens_only,
                output_fmt="NLC",
            ),
        )

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of open_clip's own transformers and of timm's trunks; other towers have none."""
        return block_targets(transformer_blocks(self.model, tower), roles)


def save_open_clip(
    directory: str | Path,
    model_config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    merges: str | Path | None = None,
) -> None:
    """Writes a folder that ``open_clip.create_model("local-dir:<folder>")`` and ``OpenCLIPEncoder`` load.

    Args:
        directory: Folder, made where it is missing.
        model_config: open_clip's model configuration.
        preprocess: Its preprocess configuration: ``size``, ``mean``, ``std``, ``interpolation``, ``resize_mode``.
        state_dict: The weights, written in their own precision.
        merges: Gzipped byte-pair merges of a cut vocabulary. Plain open_clip needs them by hand:
            ``SimpleTokenizer(bpe_path=<folder>/merges.txt.gz)``.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": dict(model_config), "preprocess_cfg": dict(preprocess)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes for the owner alone
    if merges is not None:
        shutil.copyfile(merges, folder / MERGES)
