"""Text-to-image pipelines of diffusers as a generator, whose parts can also be trained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.generative import GeneratedImages, ImageGenerator
from gmail_lightning.models.generators.diffusers_loading import (
    build_scheduler,
    find_pipeline,
    load_pipeline,
    refuse_settings,
    revision_of,
)
from gmail_lightning.models.generators.prompt_ids import Tokenize, tokenizers_of
from gmail_lightning.types import ImageSpec, TextSpec


def sent_to(device: torch.device, drawn: Tensor) -> Tensor:
    """A tensor of the CPU on the device; the host does not wait for the copy."""
    return (drawn.pin_memory() if device.type == "cuda" and not drawn.is_cuda else drawn).to(device, non_blocking=True)


class DiffusersGenerator(ImageGenerator):
    """A diffusers text-to-image pipeline: Stable Diffusion and its turbo kinds, SDXL, SD3, FLUX, PixArt and others.

    Every image has a CPU generator of its own, so it depends on its prompt and seed alone, up to 1e-5 in fp32
    where batches differ in size.

    Args:
        pretrained: Hub id, local folder in diffusers' layout, or ``emoji``, which ships with the package.
        revision: Branch, tag or commit on the hub.
        variant: Weight variant on the hub, such as ``fp16``.
        dtype: Of all weights.
        scheduler: Class name in diffusers, such as ``DPMSolverMultistepScheduler``, built with the settings of the
            pipeline's own; by default that one.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of classifier-free guidance, by the convention of the pipeline (1 is none in Stable
            Diffusion).
        size: Height and width in pixels, or one number for both; by default the pipeline's own.
        negative_prompt: For every image.
        options: Further arguments of the pipeline's call, such as ``{max_sequence_length: 256}``.
        compile: Compile the denoiser.
        channels_last: Memory format of the denoiser and the VAE.
        vae_slicing: Decode the images of a batch one by one.
        fresh: Components that are built from their configuration with random weights, to be trained.

    Raises:
        ValueError: If the pipeline takes no text, a name is unknown, or it refuses the size or an option.
        OSError: If nothing can be loaded from ``pretrained``.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        scheduler: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        size: int | tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        options: dict[str, Any] | None = None,
        compile: bool = False,
        channels_last: bool = False,
        vae_slicing: bool = False,
        fresh: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.name, self.variant, self.dtype, self.fresh = pretrained, variant, dtype, list(fresh)
        self.folder = find_pipeline(pretrained, revision, variant)
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.size = (size, size) if isinstance(size, int) else size
        self.negative_prompt, self.options = negative_prompt, dict(options or {})
        self.pretrained = not fresh
        self._pipeline = load_pipeline(self.folder, variant, getattr(torch, dtype), fresh)
        if scheduler is not None:
            self._pipeline.scheduler = build_scheduler(scheduler, self._pipeline.scheduler)
        self._pipeline.set_progress_bar_config(disable=True)
        accepted = inspect.signature(self._pipeline.__call__).parameters
        given = {"negative_prompt": negative_prompt, "height": size, **self.options}
        own = {"prompt", "num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "generator"}
        if clash := sorted(own & set(self.options)):
            raise ValueError(f"options: {', '.join(clash)} are arguments of their own; set these.")
        if negative_prompt is not None and "true_cfg_scale" in accepted and self.options.get("true_cfg_scale", 1) <= 1:
            raise ValueError(
                f"{type(self._pipeline).__name__} heeds negative_prompt={negative_prompt!r} only with options: "
                "{true_cfg_scale: ...} above 1."
            )
        unknown = [name for name, value in given.items() if value is not None and name not in accepted]
        if unknown:
            raise ValueError(f"{type(self._pipeline).__name__} takes no {', '.join(unknown)}. It takes: {[*accepted]}.")
        refuse_settings(self._pipeline, self.size, negative_prompt, self.options)
        #: The networks of the pipeline by its own names, so that they move and are stored with this module.
        self.parts = nn.ModuleDict({k: v for k, v in self._pipeline.components.items() if isinstance(v, nn.Module)})
        self.requires_grad_(False).eval()
        if vae_slicing:
            self.part("vae", "vae_slicing needs").enable_slicing()
        if channels_last:
            for name in {self.denoiser_name, "vae"} & set(self.parts):
                self.parts[name].to(memory_format=torch.channels_last)
        if compile:
            self.denoiser.compile()

    def part(self, name: str, complaint: str = "This needs") -> Any:
        """Returns a network of the pipeline by name.

        Raises:
            ValueError: If the pipeline has none of that name.
        """
        if name not in self.parts:
            raise ValueError(
                f"{complaint} a {name}, but {type(self._pipeline).__name__} in {self.name} has {', '.join(self.parts)}."
            )
        return self.parts[name]

    def share_text_encoder(self, encoder: nn.Module) -> None:
        """Puts a text encoder of someone else in the place of the pipeline's own; its owner moves and stores it."""
        self._pipeline.text_encoder = encoder
        del self.parts["text_encoder"]

    @property
    def pipeline(self) -> Any:
        """The pipeline of diffusers; its networks are those of this module."""
        return self._pipeline

    @property
    def denoiser_name(self) -> str:
        """``unet`` or ``transformer``."""
        return "unet" if "unet" in self.parts else "transformer"

    @property
    def denoiser(self) -> Any:
        """The network that is run in every denoising step."""
        return self.part(self.denoiser_name)

    # Generation

    @torch.no_grad()
    def generate(self, captions: list[str], seeds: list[int]) -> GeneratedImages:
        """See the base class; the images are on the device of the pipeline."""
        accepted = inspect.signature(self._pipeline.__call__).parameters
        # Pipelines without an image processor hand over tensors in [-1, 1], but arrays in [0, 1].
        as_tensor = hasattr(self._pipeline, "image_processor")
        settings: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "pt" if as_tensor else "np",
            **self.options,
        }
        if self.negative_prompt is not None:
            settings["negative_prompt"] = [self.negative_prompt] * len(captions)
        if self.size is not None:
            settings["height"], settings["width"] = self.size
        if "clean_caption" in accepted:  # it needs packages of its own, and changes the prompt
            settings.setdefault("clean_caption", False)
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False):  # the trainer's precision is not part of the recipe; dtype is
            output = self._pipeline(prompt=list(captions), **settings)
        images = output.images
        image = images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
        flagged = getattr(output, "nsfw_content_detected", None) or getattr(output, "nsfw_detected", None)
        return GeneratedImages(image.float(), [bool(x) for x in flagged or [False] * len(captions)])

    def truncated(self, captions: list[str]) -> list[bool]:
        """Whether any of the text encoders cuts each caption."""
        cut = [False] * len(captions)
        captions = [caption.lower().strip() for caption in captions] if self._lower else list(captions)
        for tokenizer, limit in self._tokenizers:
            ids = tokenizer(captions, padding=False, truncation=False).input_ids
            cut = [before or len(one) > limit for before, one in zip(cut, ids, strict=True)]
        return cut

    @property
    def _lower(self) -> bool:
        """Whether the pipeline brings prompts to lower case, as those with T5 do."""
        return hasattr(self._pipeline, "_text_preprocessing")

    @cached_property
    def _tokenizers(self) -> list[tuple[Any, int]]:
        return tokenizers_of(self._pipeline, self.options)

    @cached_property
    def _revision(self) -> str:
        return revision_of(self.folder)

    def describe(self) -> dict[str, str | int | float | None]:
        """See the base class; ``revision`` is the commit on the hub, or a digest of the local files."""
        local = Path(self.name)
        size = None if self.size is None else f"{self.size[0]}x{self.size[1]}"
        return {
            "generator": local.name if local.is_dir() else self.name,
            "revision": self._revision,
            "variant": self.variant,
            "fresh": ", ".join(self.fresh) or None,
            "pipeline": type(self._pipeline).__name__,
            "scheduler": type(self._pipeline.scheduler).__name__,
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "size": size,
            "negative_prompt": self.negative_prompt,
            "options": json.dumps(self.options, sort_keys=True) if self.options else None,
            "dtype": self.dtype,
        }

    # What training needs

    @property
    def in_latent_space(self) -> bool:
        """Whether the denoiser works on the latents of a VAE; otherwise on pixels."""
        return "vae" in self.parts

    @property
    def latent_scale(self) -> float:
        """Factor between the VAE's latents and those that are denoised; its configuration must have it."""
        if (scale := self.part("vae").config.get("scaling_factor")) is None:
            raise ValueError(
                f"{self.name}: vae/config.json lacks scaling_factor; that of Stable Diffusion 1 is 0.18215."
            )
        return float(scale)

    @property
    def image_spec(self) -> ImageSpec:
        """Pixels that the denoiser was made for, or those of ``size``."""
        factor = self._pipeline.vae_scale_factor if self.in_latent_space else 1
        side = self.denoiser.config.sample_size
        own = (side * factor, side * factor) if isinstance(side, int) else (side[0] * factor, side[1] * factor)
        return ImageSpec(size=self.size or own)

    @property
    def text_spec(self) -> TextSpec:
        """Tokeniser of the pipeline's only text encoder."""
        tokenizer = self._pipeline.tokenizer
        # The pixel-space pipeline (IF) reads 77 ids, whatever its tokenizer says.
        length = tokenizer.model_max_length if self.in_latent_space else 77
        return TextSpec(encode=Tokenize(tokenizer, length, self._lower), context_length=length)

    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids (B, L) to what the denoiser attends to, shape (B, L, W), as the pipeline does."""
        encoder = self.part("text_encoder")
        masked = not self.in_latent_space or getattr(encoder.config, "use_attention_mask", False)
        return cast(Tensor, encoder(text, attention_mask=self._mask(text) if masked else None)[0])

    def _mask(self, text: Tensor) -> Tensor:
        """1 up to the end of the text, 0 on the padding, shape (B, L)."""
        tokenizer = self._pipeline.tokenizer
        ends = (text == tokenizer.eos_token_id).int()
        return cast(Tensor, ends.cumsum(dim=1) - ends == 0).long()

    def encode_pixels(self, image: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to what is denoised: latents (B, C, h, w), or pixels in [-1, 1].

        Args:
            image: Pixels.
            noise: Draws the latents from the posterior of the VAE; without, its mode is taken.
        """
        if not self.in_latent_space:
            return image * 2 - 1
        vae = self.part("vae")
        with torch.no_grad():
            encoded = vae.encode(image.to(vae.dtype) * 2 - 1)
            if not hasattr(encoded, "latent_dist"):  # AutoencoderTiny has no posterior
                latents = encoded.latents
            else:
                posterior = encoded.latent_dist
                latents = posterior.mode()
                if noise is not None:
                    drawn = torch.randn(latents.shape, generator=noise).to(latents.dtype)
                    latents = latents + posterior.std * sent_to(latents.device, drawn)
        return cast(Tensor, latents.float() * self.latent_scale)

    def decode_pixels(self, clean: Tensor) -> Tensor:
        """Maps what is denoised back to pixels, with gradients: the inverse of ``encode_pixels``.

        Args:
            clean: Latents (B, C, h, w), or pixels in [-1, 1].

        Returns:
            Shape (B, 3, H, W); in [0, 1] but for what the denoiser or the VAE overshoots, as clamping would stop the
            gradient there.
        """
        if self.in_latent_space:
            vae = self.part("vae")
            clean = vae.decode(clean.to(vae.dtype) / self.latent_scale, return_dict=False)[0]
        return (clean + 1) / 2

    def denoise(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The prediction of the UNet, shape as ``noisy``; further channels (a variance) are left out."""
        prediction = self.denoiser(noisy, timestep, encoder_hidden_states=context, return_dict=False)[0]
        return cast(Tensor, prediction[:, : noisy.shape[1]])
