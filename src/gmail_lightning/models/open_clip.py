"""``OpenCLIPEncoder``: any model of open_clip as a dual encoder, and the folder that such a model is saved in."""

from __future__ import annotations

import difflib
import gzip
import json
import shutil
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder, LoRATarget, Tower
from gmail_lightning.models.lora import block_targets
from gmail_lightning.types import ImageSpec, TextSpec

#: The small CLIP that ships with the package.
EMOJI = Path(__file__).parent / "emoji_clip"

_CONFIG, _WEIGHTS, _MERGES = "open_clip_config.json", "open_clip_model.safetensors", "merges.txt.gz"
_RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "longest"}
_OFFLINE = (
    "Without network, give a local file or folder as pretrained, or fill the hub's cache beforehand; HF_HUB_OFFLINE=1 "
    "makes it fail at once instead of retrying."
)


class OpenCLIPEncoder(DualEncoder):
    """A dual encoder of open_clip, https://github.com/mlfoundations/open_clip, with weights in fp32.

    The activation, and mean, standard deviation and resizing of the pixels are those of the model's configuration. A
    bare file of weights carries none of them: they are then taken from ``model_name`` (its activation, and the pixel
    statistics that all its pretrained tags share), so weights fine-tuned from OpenAI's need a ``-quickgelu`` name
    (mlfoundations/open_clip#771). A folder says it all and is the better form.

    Args:
        model_name: Name of an architecture in open_clip, or ``hf-hub:owner/name``.
        pretrained: A tag of ``model_name``; a file of weights; a folder with ``open_clip_config.json`` and weights; or
            ``emoji``, the small CLIP in this package. None: random weights.
        config: open_clip's model configuration (``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu``) in place of
            ``model_name``.
        preprocess: Overrides of ``mean``, ``std``, ``interpolation`` and ``resize_mode`` (shortest, squash, longest).
        merges: Gzipped file of byte-pair merges, where the vocabulary is cut: ``text_cfg.vocab_size`` must be 512 plus
            its merges plus 2. ``emoji``: the file in this package. A folder brings its own.
        grad_checkpointing: Recompute activations in the backward, block by block.

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
    ) -> None:
        folder = _folder(pretrained)
        if sum(source is not None for source in (model_name, folder, config)) != 1:
            raise ValueError(
                "OpenCLIPEncoder needs exactly one description of the model: model_name, config, or a folder in "
                f"pretrained; got model_name={model_name!r}, pretrained={pretrained!r}, config={config!r}."
            )
        reference = f"local-dir:{folder.resolve()}" if folder else model_name
        model_config = deepcopy(config) if config is not None else _model_config(cast(str, reference))
        if folder is None:
            _check_activation(model_name, pretrained, model_config)
        model = _build(reference, pretrained, folder, model_config)
        preprocess_config = _preprocess_config(model, model_name, folder, pretrained, preprocess)
        super().__init__(preprocess_config["mean"], preprocess_config["std"])
        self.model = model
        self.model_config, self.preprocess_config = model_config, preprocess_config
        self.merges = _merges(merges, folder)
        self.tokenizer = _tokenizer(reference, model_config, self.merges)
        self.pretrained = pretrained is not None or (model_name or "").startswith(("hf-hub:", "local-dir:"))
        self.activation = _activation(model_config, model)
        if grad_checkpointing:
            model.set_grad_checkpointing(True)
        size = model_config["vision_cfg"].get("image_size", 224)
        self._image_spec = ImageSpec(
            size=tuple(size) if isinstance(size, (list, tuple)) else (size, size),
            resize_mode=cast(Any, _RESIZE_MODES[preprocess_config["resize_mode"]]),
            interpolation=preprocess_config["interpolation"],
        )
        self._text_spec = TextSpec(self.tokenizer, model_config["text_cfg"].get("context_length", 77))

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
    def logit_bias(self) -> Tensor | None:
        """Parameter of a SigLIP model, else None."""
        bias = cast(Tensor | None, self.model.logit_bias)
        return None if bias is None else bias.squeeze()

    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to unnormalised features of shape (B, D)."""
        return cast(Any, self.model).encode_image(self.normalize_pixels(image))

    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to unnormalised features of shape (B, D)."""
        if text.ndim != 2 or text.shape[1] != self.text_spec.context_length:
            raise ValueError(
                f"Token ids of shape {tuple(text.shape)}, but this text tower has context length "
                f"{self.text_spec.context_length}: tokenise with the encoder's own text_spec."
            )
        return cast(Any, self.model).encode_text(text)

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to patch tokens of one block, shape (B, T, W), before the final norm and without class token.

        Blocks behind ``layer`` are not run.
        """
        visual = cast(Any, self.model.visual)
        if not hasattr(visual, "forward_intermediates"):
            raise NotImplementedError(f"image_tokens needs a vision transformer, not {type(visual).__name__}.")
        blocks = _blocks(self.model, "image")
        if not -len(blocks) <= layer < len(blocks):
            raise IndexError(f"layer={layer}: this tower has {len(blocks)} blocks.")
        output = visual.forward_intermediates(
            self.normalize_pixels(image),
            indices=[layer % len(blocks)],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return cast(Tensor, output["image_intermediates"][0])

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of open_clip's own transformers and of timm's trunks; other towers have none."""
        return block_targets(_blocks(self.model, tower), roles)


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
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, folder / _WEIGHTS)
    if merges is not None:
        shutil.copyfile(merges, folder / _MERGES)


def _folder(pretrained: str | None) -> Path | None:
    folder = EMOJI if pretrained == "emoji" else Path(pretrained) if pretrained and Path(pretrained).is_dir() else None
    if folder is not None and not ((folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()):
        raise ValueError(f"pretrained={pretrained!r}: {folder} lacks {_CONFIG} or {_WEIGHTS}.")
    return folder


def _model_config(reference: str) -> dict[str, Any]:
    import open_clip

    try:
        config = open_clip.get_model_config(reference)
    except Exception as error:
        raise RuntimeError(f"model_name={reference!r} cannot be read: {error} {_OFFLINE}") from error
    if config is None:
        close = difflib.get_close_matches(reference, open_clip.list_models(), n=4)
        raise ValueError(f"model_name={reference!r} is not known to open_clip. Close: {', '.join(close) or 'none'}.")
    return cast(dict[str, Any], config)


def _check_activation(model_name: str | None, pretrained: str | None, model_config: dict[str, Any]) -> None:
    """open_clip only warns when a tag meets the wrong activation; the features would be silently wrong."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model_name, pretrained) if model_name and pretrained else {}
    quick = bool(model_config.get("quick_gelu", False))
    if tag and bool(tag.get("quick_gelu", False)) != quick and "timm_model_name" not in model_config["vision_cfg"]:
        name = cast(str, model_name)
        fix = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        raise ValueError(
            f"pretrained={pretrained!r} was trained with {'GELU' if quick else 'QuickGELU'}, but "
            f"model_name={name!r} builds {'QuickGELU' if quick else 'GELU'}. Use model_name={fix!r}."
        )


def _build(
    reference: str | None, pretrained: str | None, folder: Path | None, model_config: dict[str, Any]
) -> nn.Module:
    import open_clip

    is_tag = reference is not None and pretrained is not None and open_clip.get_pretrained_cfg(reference, pretrained)
    if folder or is_tag or (reference or "").startswith(("hf-hub:", "local-dir:")):
        try:
            tag = pretrained if is_tag else None
            return cast(nn.Module, open_clip.create_model(reference, pretrained=tag, require_pretrained=True))
        except Exception as error:
            raise RuntimeError(f"Weights of {reference} {pretrained or ''} did not load: {error} {_OFFLINE}") from error
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(reference) if reference else []
        raise ValueError(
            f"pretrained={pretrained!r} is neither a file, nor a folder, nor a tag of {reference or 'config'}. "
            f"Tags: {', '.join(tags) or 'none'}."
        )
    settings = deepcopy(model_config)
    settings["vision_cfg"].pop("timm_model_pretrained", None)  # random means random: no download for a part
    if "hf_model_name" in settings["text_cfg"]:
        settings["text_cfg"]["hf_model_pretrained"] = False
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    architecture = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    model = (architecture if custom_text else open_clip.CLIP)(**settings)
    if pretrained is not None:
        try:
            open_clip.load_checkpoint(model, pretrained)
        except Exception as error:
            error.add_note(
                f"while loading {pretrained} into {reference or 'config'}; of a checkpoint of this library, make a "
                "folder first: gmail-lightning export"
            )
            raise
    return cast(nn.Module, model)


def _preprocess_config(
    model: nn.Module, model_name: str | None, folder: Path | None, pretrained: str | None, override: dict[str, Any] | None
) -> dict[str, Any]:
    import open_clip
    from open_clip.transform import PreprocessCfg

    visual = cast(Any, model.visual)
    config = dict(getattr(visual, "preprocess_cfg", None) or vars(PreprocessCfg(size=visual.image_size)))
    names = ("mean", "std", "interpolation", "resize_mode")
    if unknown := set(override or {}) - set(names):
        raise ValueError(f"preprocess has unknown {sorted(unknown)}; known: {', '.join(names)}.")
    if not hasattr(visual, "preprocess_cfg") and model_name is not None:  # weights from a file, or random ones
        tags = [open_clip.get_pretrained_cfg(model_name, t) for t in open_clip.list_pretrained_tags_by_model(model_name)]
        for name in names:
            values = {tuple(v) if isinstance(v := tag.get(name), (list, tuple)) else v for tag in tags} - {None}
            if len(values) > 1 and pretrained is not None and name not in (override or {}):
                raise ValueError(
                    f"pretrained={pretrained!r}: the tags of {model_name} differ in {name} ({values}), and a file does "
                    f"not say which it needs. Give preprocess: {{{name}: ...}}, or a folder with {_CONFIG}."
                )
            if len(values) == 1:
                config[name] = values.pop()
    config.update(override or {})
    if config["resize_mode"] not in _RESIZE_MODES or config["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise ValueError(f"preprocess: unknown resize_mode or interpolation in {config}.")
    if config["interpolation"] == "random":  # open_clip's word for "any of the two while training"
        config["interpolation"] = "bicubic"
    return config


def _merges(merges: str | None, folder: Path | None) -> Path | None:
    if merges is None:
        return folder / _MERGES if folder is not None and (folder / _MERGES).is_file() else None
    path = EMOJI / _MERGES if merges == "emoji" else Path(merges)
    if not path.is_file():
        raise ValueError(f"merges={merges!r}: there is no file {path}.")
    return path


def _tokenizer(reference: str | None, model_config: dict[str, Any], merges: Path | None) -> Any:
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    text = model_config["text_cfg"]
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", 49408)
    hf_name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if merges is not None:
        if hf_name:
            raise ValueError(f"merges={str(merges)!r}: this text tower uses the Hugging Face tokenizer {hf_name!r}.")
        with gzip.open(merges, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:]  # the first line is a header
        wrong = [number for number, line in enumerate(lines, start=2) if len(line.split()) != 2]
        if wrong:
            raise ValueError(f"{merges}, line {wrong[0]}: expected two symbols, got {lines[wrong[0] - 2]!r} (no empty last line).")
        if vocabulary != 512 + len(lines) + 2:
            raise ValueError(
                f"{merges} has {len(lines)} merges, so text_cfg.vocab_size must be {512 + len(lines) + 2}, not {vocabulary}."
            )
        return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=length, **options)
    try:
        if reference is not None:
            tokenizer = open_clip.get_tokenizer(reference)
        elif hf_name:
            tokenizer = HFTokenizer(hf_name, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options)
        else:
            tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
    except Exception as error:
        raise RuntimeError(f"The tokenizer of {reference or hf_name} did not load: {error} {_OFFLINE}") from error
    if tokenizer.context_length != length:
        raise ValueError(f"The tokenizer gives {tokenizer.context_length} ids, but text_cfg.context_length is {length}.")
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"text_cfg.vocab_size is {vocabulary}, but the tokenizer has {tokenizer.vocab_size} ids: give the cut merges "
            "as merges, or a vocab_size that holds them."
        )
    return tokenizer


def _activation(model_config: dict[str, Any], model: nn.Module) -> str:
    """Name of the image tower's activation; timm decides by itself, whatever ``quick_gelu`` says."""
    if "timm_model_name" not in model_config["vision_cfg"]:
        return "quick_gelu" if model_config.get("quick_gelu", False) else "gelu"
    blocks = _blocks(model, "image")
    act = getattr(getattr(blocks[0], "mlp", None), "act", None) if len(blocks) else None
    name = type(act).__name__.lower()
    if name == "geluTanh".lower() or getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return {"gelu": "gelu", "quickgelu": "quick_gelu"}.get(name, name)


def _blocks(model: nn.Module, tower: Tower) -> nn.ModuleList:
    """Transformer blocks of a tower; none where it is no transformer of open_clip or timm."""
    host = cast(Any, model.visual if tower == "image" else getattr(model, "text", model))
    transformer = getattr(host, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None:
        blocks = getattr(getattr(host, "trunk", None), "blocks", None)
    return blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks or [])
