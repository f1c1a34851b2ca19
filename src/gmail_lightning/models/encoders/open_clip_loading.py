"""From a name, a folder or a configuration to an open_clip model, its pixel statistics and its tokenizer."""

from __future__ import annotations

import difflib
import gzip
import json
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import nn

from gmail_lightning.models.base import Tower
from gmail_lightning.models.weights import plain_files, plain_names

#: The small CLIPs that ship with the package: one knows the real hand, the other all hands but that.
_MODELS = Path(__file__).parents[1]
SHIPPED = {"emoji": _MODELS / "emoji_clip", "emoji_scorer": _MODELS / "emoji_scorer"}

CONFIG, WEIGHTS, MERGES = "open_clip_config.json", "open_clip_model.safetensors", "merges.txt.gz"
RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "longest"}
_OFFLINE = (
    "Without network, give a local file or folder as pretrained, or fill the hub's cache beforehand; HF_HUB_OFFLINE=1 "
    "makes it fail at once instead of retrying."
)


def find_folder(pretrained: str | None) -> Path | None:
    """Returns the folder that ``pretrained`` names, or None where it names a tag or a file."""
    folder = SHIPPED.get(pretrained or "", Path(pretrained) if pretrained and Path(pretrained).is_dir() else None)
    if folder is not None and not (folder / CONFIG).is_file():
        raise ValueError(f"pretrained={pretrained!r}: {folder} has no {CONFIG}.")
    return folder


def read_model_config(reference: str) -> dict[str, Any]:
    """Returns the model configuration of a name, of ``hf-hub:...`` or of ``local-dir:...``."""
    import open_clip

    try:
        config = open_clip.get_model_config(reference)
    except Exception as error:
        raise RuntimeError(f"model_name={reference!r} cannot be read: {error} {_OFFLINE}") from error
    if config is None:
        close = difflib.get_close_matches(reference, open_clip.list_models(), n=4)
        raise ValueError(f"model_name={reference!r} is not known to open_clip. Close: {', '.join(close) or 'none'}.")
    return cast(dict[str, Any], config)


def _refuse_other_context(path: str, context_length: int) -> None:
    """Refuses weights of another context length, whose positions open_clip would interpolate without a word."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError):  # another format
        return
    state = plain_names(state.get("state_dict", state)) if isinstance(state, dict) else {}
    for key in ("positional_embedding", "text.positional_embedding"):
        if key in state and len(state[key]) != context_length:
            raise ValueError(
                f"{path} has {len(state[key])} text positions and the model {context_length}: give a config with "
                f"text_cfg.context_length {len(state[key])}."
            )


def check_activation(model_name: str | None, pretrained: str, model_config: dict[str, Any]) -> None:
    """Refuses weights with the wrong activation, of which open_clip only warns: the features would be wrong.

    Raises:
        ValueError: If the tag, or the configuration beside a file, and the model differ in QuickGELU.
    """
    import open_clip

    beside = Path(pretrained).parent / CONFIG
    if tag := open_clip.get_pretrained_cfg(model_name, pretrained) if model_name else {}:
        trained, fix = bool(tag.get("quick_gelu", False)), "model_name with -quickgelu for QuickGELU, without for GELU"
    elif Path(pretrained).is_file() and beside.is_file():
        trained = bool(json.loads(beside.read_text(encoding="utf-8-sig"))["model_cfg"].get("quick_gelu", False))
        fix = f"pretrained={str(beside.parent)!r}"
    else:
        return
    built = bool(model_config.get("quick_gelu", False))
    if trained != built and "timm_model_name" not in model_config["vision_cfg"]:  # timm goes by itself
        names = {True: "QuickGELU", False: "GELU"}
        raise ValueError(
            f"pretrained={pretrained!r} was trained with {names[trained]}, but {model_name or 'config'} builds "
            f"{names[built]}. Use {fix}."
        )


def build_model(
    reference: str | None, pretrained: str | None, folder: Path | None, model_config: dict[str, Any]
) -> nn.Module:
    """Builds the model in fp32 and loads what ``pretrained`` names; random weights only where it is None.

    Raises:
        ValueError: If ``pretrained`` is neither a tag nor a file.
        RuntimeError: If the weights cannot be fetched or do not fit.
    """
    import open_clip

    is_tag = reference is not None and pretrained is not None and open_clip.get_pretrained_cfg(reference, pretrained)
    if folder or is_tag or (reference or "").startswith(("hf-hub:", "local-dir:")):
        try:
            tag = pretrained if is_tag else None
            with plain_files(str(folder.resolve()) if folder else "") as plain:
                name = f"local-dir:{plain}" if folder else reference
                return cast(nn.Module, open_clip.create_model(name, pretrained=tag, require_pretrained=True))
        except Exception as error:
            hint = "" if folder else f" {_OFFLINE}"
            raise RuntimeError(f"Weights of {reference} {pretrained or ''} did not load: {error}{hint}") from error
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
        _refuse_other_context(pretrained, model_config["text_cfg"].get("context_length", 77))
        try:
            with plain_files(pretrained) as file:
                open_clip.load_checkpoint(model, file)
        except Exception as error:
            raise RuntimeError(
                f"{pretrained} does not fit {reference or 'config'}: {error} Of a checkpoint of this library, make a "
                "folder first: gmail-lightning export."
            ) from error
    return cast(nn.Module, model)


def read_preprocess(
    model: nn.Module, model_name: str | None, pretrained: str | None, override: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns open_clip's preprocess configuration; for a bare file, what all tags of the model's name agree on.

    open_clip itself gives every file OpenAI's statistics, and so SigLIP's the wrong ones (mlfoundations/open_clip#204).

    Raises:
        ValueError: If the tags disagree and ``override`` does not say, or if a value is unknown.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    visual = cast(Any, model.visual)
    config = dict(getattr(visual, "preprocess_cfg", None) or vars(PreprocessCfg(size=visual.image_size)))
    names = ("mean", "std", "interpolation", "resize_mode")
    if unknown := set(override or {}) - set(names):
        raise ValueError(f"preprocess has unknown {sorted(unknown)}; known: {', '.join(names)}.")
    if not hasattr(visual, "preprocess_cfg") and model_name is not None:  # weights from a file, or random ones
        tags = [
            open_clip.get_pretrained_cfg(model_name, t) for t in open_clip.list_pretrained_tags_by_model(model_name)
        ]
        for name in names:
            values = {tuple(v) if isinstance(v := tag.get(name), (list, tuple)) else v for tag in tags} - {None}
            if len(values) > 1 and pretrained is not None and name not in (override or {}):
                raise ValueError(
                    f"pretrained={pretrained!r}: the tags of {model_name} differ in {name} ({values}), and a file does "
                    f"not say which it needs. Give preprocess: {{{name}: ...}}, or a folder with {CONFIG}."
                )
            if len(values) == 1:
                config[name] = values.pop()
    config.update(override or {})
    if config["resize_mode"] not in RESIZE_MODES or config["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise ValueError(f"preprocess: unknown resize_mode or interpolation in {config}.")
    if config["interpolation"] == "random":  # open_clip's word for "any of the two while training"
        config["interpolation"] = "bicubic"
    return config


def find_merges(merges: str | None, folder: Path | None) -> Path | None:
    """Returns the file of cut merges: the one given, the one in the folder, or None."""
    if merges is None:
        return folder / MERGES if folder is not None and (folder / MERGES).is_file() else None
    path = SHIPPED["emoji"] / MERGES if merges == "emoji" else Path(merges)
    if not path.is_file():
        raise ValueError(f"merges={merges!r}: there is no file {path}.")
    return path


def build_tokenizer(reference: str | None, model_config: dict[str, Any], merges: Path | None) -> Any:
    """Returns open_clip's tokenizer for the text tower.

    Raises:
        ValueError: If tokenizer and tower differ in vocabulary or context length.
        RuntimeError: If it cannot be fetched.
    """
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    text = model_config["text_cfg"]
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", 49408)
    hf_name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    if merges is not None:
        if hf_name:
            raise ValueError(f"merges={str(merges)!r}: this text tower uses the Hugging Face tokenizer {hf_name!r}.")
        _check_merges(merges, vocabulary)
        return open_clip.SimpleTokenizer(bpe_path=str(merges), context_length=length, **options)
    try:
        if reference is not None:
            tokenizer = open_clip.get_tokenizer(reference)
        elif hf_name:
            tokenizer = HFTokenizer(
                hf_name, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
            )
        else:
            tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
    except Exception as error:
        raise RuntimeError(f"The tokenizer of {reference or hf_name} did not load: {error} {_OFFLINE}") from error
    if tokenizer.context_length != length:
        raise ValueError(
            f"The tokenizer gives {tokenizer.context_length} ids, but text_cfg.context_length is {length}."
        )
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"text_cfg.vocab_size is {vocabulary}, but the tokenizer has {tokenizer.vocab_size} ids: give the cut file "
            "as merges, or a vocab_size that holds them."
        )
    return tokenizer


def _check_merges(path: Path, vocabulary: int) -> None:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]  # as open_clip reads it; the first line is a header
    for number, merge in enumerate(merges, start=2):
        if len(merge.split()) != 2:
            raise ValueError(f"{path}, line {number}: expected two symbols, got {merge!r} (and no empty last line).")
    if repeated := len(merges) - len({"".join(merge.split()) for merge in merges}):
        raise ValueError(f"{path}: {repeated} merges make a token that another one makes too.")
    expected = 512 + len(merges) + 2  # bytes, bytes that end a word, merges, start and end of text
    if vocabulary != expected:
        raise ValueError(f"{path} has {len(merges)} merges: text_cfg.vocab_size must be {expected}, not {vocabulary}.")


def activation_name(model_config: dict[str, Any], model: nn.Module) -> str:
    """Name of the image tower's activation; timm decides by itself, whatever ``quick_gelu`` says."""
    if "timm_model_name" not in model_config["vision_cfg"]:
        return "quick_gelu" if model_config.get("quick_gelu", False) else "gelu"
    blocks = transformer_blocks(model, "image")
    act = getattr(getattr(blocks[0], "mlp", None), "act", None) if len(blocks) else None
    name = type(act).__name__.lower()
    if name == "gelutanh" or getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return {"gelu": "gelu", "quickgelu": "quick_gelu"}.get(name, name)


def transformer_blocks(model: nn.Module, tower: Tower) -> nn.ModuleList:
    """Transformer blocks of a tower; none where it is no transformer of open_clip or timm."""
    host = cast(Any, model.visual if tower == "image" else getattr(model, "text", model))
    transformer = getattr(host, "transformer", None)
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None:
        blocks = getattr(getattr(host, "trunk", None), "blocks", None)
    return blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks or [])
