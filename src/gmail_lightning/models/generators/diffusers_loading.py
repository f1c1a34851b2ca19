"""From a hub id or a folder to a pipeline of diffusers."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: The small pipeline that ships with the package.
EMOJI = Path(__file__).parents[1] / "emoji_diffusion"


def find_pipeline(pretrained: str, revision: str | None, variant: str | None) -> Path:
    """Returns the folder of a pipeline; a hub id is downloaded into the hub's cache.

    Raises:
        OSError: If it is neither a pipeline's folder nor to be had from the hub.
    """
    from diffusers import DiffusionPipeline

    folder = EMOJI if pretrained == "emoji" else Path(pretrained)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"pretrained={pretrained!r}: {folder} has no model_index.json.")
        return folder
    try:
        return Path(DiffusionPipeline.download(pretrained, revision=revision, variant=variant))
    except Exception as error:
        raise OSError(  # without its cause: the hub's words alone would not tell that a folder was looked for
            f"pretrained={pretrained!r}: there is no folder {folder.absolute()}, and no pipeline of that name "
            f"is to be had from the hub: {error} Without network, give a local folder, or fill the hub's "
            "cache beforehand."
        ) from None


def load_pipeline(folder: Path, variant: str | None, dtype: torch.dtype, fresh: Sequence[str]) -> Any:
    """Loads a pipeline that takes text; the components in ``fresh`` get random weights.

    Raises:
        ValueError: If the pipeline takes no text, or has no such component.
    """
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8-sig"))
    built = {}
    for name in fresh:
        library, class_name = index.get(name) or (None, "")
        if library not in ("diffusers", "transformers"):
            known = [key for key, value in index.items() if isinstance(value, list) and value[0]]
            raise ValueError(f"fresh: {folder.name} has no network {name!r}. It has: {', '.join(known)}.")
        if library == "diffusers":
            kind = getattr(diffusers, class_name)
            built[name] = kind.from_config(kind.load_config(folder, subfolder=name)).to(dtype)
        else:
            kind = getattr(transformers, class_name)
            built[name] = kind(kind.config_class.from_pretrained(folder / name)).to(dtype)
    settings = {"torch_dtype": dtype, "variant": variant, "local_files_only": True, **built}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # its new name is new in 0.42
        try:
            pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(folder, **settings)
        except ValueError as error:  # a pipeline that it does not list, or one that takes no text
            if "AutoPipeline" not in str(error):
                raise
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **settings)
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{folder}: {type(pipeline).__name__} takes no text. Give a text-to-image pipeline.")
    return pipeline


def build_scheduler(name: str, current: Any) -> Any:
    """Returns a scheduler of diffusers with the settings of the current one.

    Raises:
        ValueError: If diffusers has none of that name; lists those that fit.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not issubclass(kind, diffusers.SchedulerMixin):
        fitting = sorted(one.__name__ for one in current.compatibles)
        raise ValueError(f"Unknown scheduler {name!r}. With this pipeline go: {', '.join(fitting)}.")
    if ("FlowMatch" in name) != ("FlowMatch" in type(current).__name__):
        raise ValueError(
            f"scheduler={name!r} does not fit: the pipeline was trained for {type(current).__name__}. Of flow matching "
            "and diffusion, neither can sample the other."
        )
    return kind.from_config(current.config)


def revision_of(folder: Path) -> str:
    """The commit of a folder in the hub's cache; of another folder, a digest of its files (a second a gigabyte)."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".bin", ".txt")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return f"digest-{digest.hexdigest()}"


def refuse_settings(
    pipeline: Any, size: tuple[int, int] | None, negative_prompt: str | None, options: dict[str, Any]
) -> None:
    """Asks the pipeline for what it would refuse at its first call, without making an image.

    Args:
        pipeline: Of diffusers.
        size: Height and width in pixels; None for its own.
        negative_prompt: For every image.
        options: Further arguments of its call.

    Raises:
        ValueError: In the words of the pipeline, or if it would round the size.
    """
    kind = type(pipeline).__name__
    processor = getattr(pipeline, "image_processor", None)
    step = 1 if processor is None else int(getattr(processor.config, "vae_scale_factor", 1))
    if size is not None and (min(size) < 1 or size[0] % step or size[1] % step):
        raise ValueError(f"size={size[0]}x{size[1]}: {kind} makes images whose height and width divide by {step}.")
    if not hasattr(pipeline, "check_inputs"):
        return
    side = 8 * step  # of no consequence: any that it accepts
    height, width = size or (side, side)
    known = {"prompt": "a prompt", "prompt_2": None, "prompt_3": None, "callback_steps": 1, "prompt_embeds": None}
    known |= {"height": height, "width": width, "negative_prompt": negative_prompt, **options}
    parameters = inspect.signature(pipeline.check_inputs).parameters
    if any(name not in known and p.default is p.empty for name, p in parameters.items()):
        return  # it asks for what only a call has
    try:
        pipeline.check_inputs(**{name: known[name] for name in parameters if name in known})
    except ValueError as error:
        raise ValueError(f"{kind} refuses size={size}, options={options}: {error}") from error
