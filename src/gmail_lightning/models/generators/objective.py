"""What a diffusion model is trained on: noise, targets, weights, and the way back to pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gmail_lightning.losses.diffusion import PredictionType, denoising_loss, min_snr_weight
from gmail_lightning.models.generators.diffusion import DiffusersGenerator, sent_to


class Noised(NamedTuple):
    """B rows on their way from the data to noise."""

    noisy: Tensor  # (B, C, h, w), sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise
    target: Tensor  # (B, C, h, w), what the UNet is to predict of it
    timestep: Tensor  # (B,) int64

    def of_rows(self, rows: Tensor) -> Noised:
        """The rows of these numbers alone."""
        return Noised(self.noisy[rows], self.target[rows], self.timestep[rows])


class Denoised(NamedTuple):
    """What the UNet makes of B noisy rows in one pass."""

    prediction: Tensor  # (B, C, h, w)
    middle: Tensor | None  # (B, W, h', w') behind the middle block; None where it was not asked for


class _Seen(Exception):
    """Ends a pass that has shown what is wanted of it."""


def _single(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise RuntimeError(
            f"The pass showed {len(seen)} middle blocks, not one: build the generator with compile=False, as a "
            "compiled UNet need not heed hooks."
        )
    return seen[0]


class DenoisingObjective:
    """The denoising loss of a pipeline with a UNet, on latents or pixels, by the pipeline's own noise schedule.

    Tasks hold one beside their other terms. It keeps no state of a pass, and no weights: those are the generator's.

    Args:
        generator: The pipeline; a task holds it too, as a module.
        prediction_type: What the UNet predicts; by default what the scheduler's configuration says. Another one is
            written to the scheduler's configuration, and needs training from scratch or a long fine-tuning.
        min_snr_gamma: Cap of the signal-to-noise weights (arXiv 2303.09556); None weighs all timesteps alike.

    Raises:
        ValueError: If the pipeline has no UNet, predicts something else, or its schedule ends without signal while the
            noise is predicted.
    """

    def __init__(
        self,
        generator: DiffusersGenerator,
        prediction_type: PredictionType | None = None,
        min_snr_gamma: float | None = 5.0,
    ) -> None:
        from diffusers import DDPMScheduler

        generator.part("unet", "A denoising objective trains")
        _ = generator.in_latent_space and generator.latent_scale  # one that is missing is told before the first batch
        scheduler = generator.pipeline.scheduler
        if "prediction_type" not in scheduler.config:
            raise ValueError(
                f"The {type(scheduler).__name__} of {generator.name} does not say what is predicted (prediction_type): "
                "flows are not trained here. Take a pipeline with a DDPM kind of schedule."
            )
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type = cast(PredictionType, schedule.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction_type!r}: use 'epsilon' or 'v_prediction'.")
        if self.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "The schedule ends without signal (rescale_betas_zero_snr), where predicting the noise is trivial: set "
                "prediction_type='v_prediction'."
            )
        self.generator, self.min_snr_gamma = generator, min_snr_gamma
        #: Share of the signal's variance at every timestep, shape (T,), float32.
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod

    # Noise

    def draw(self, clean: Tensor, draws: torch.Generator) -> Noised:
        """Noise of a normal distribution and timesteps of a uniform one, in this order, for each row.

        Args:
            clean: Latents or pixels of ``DiffusersGenerator.encode_pixels``, shape (B, C, h, w).
            draws: On the CPU, so that a seed draws the same on every device.
        """
        noise = sent_to(clean.device, torch.randn(clean.shape, generator=draws).to(clean.dtype))
        timestep = torch.randint(len(self.alphas_cumprod), (len(clean),), generator=draws)
        return self.noised(clean, noise, timestep)

    def noise_of_rows(self, clean: Tensor, row_ids: list[int]) -> Noised:
        """Noise and timestep that depend on the row alone, so that evaluations compare.

        Args:
            clean: Shape (B, C, h, w).
            row_ids: Number of each row in its set.
        """
        draws = [torch.Generator().manual_seed(row) for row in row_ids]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(clean)
        steps = len(self.alphas_cumprod)
        return self.noised(clean, noise, torch.cat([torch.randint(steps, (1,), generator=draw) for draw in draws]))

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Noised:
        """Adds noise; the target is the noise or the velocity (Salimans and Ho, arXiv 2202.00512).

        Args:
            clean: Shape (B, C, h, w).
            noise: Shape (B, C, h, w), of unit variance.
            timestep: Shape (B,), int64; on the CPU or the device of ``clean``.
        """
        timestep = sent_to(clean.device, timestep)
        signal, sigma = self._scales(clean, timestep)
        target = noise if self.prediction_type == "epsilon" else signal * noise - sigma * clean
        return Noised(signal * clean + sigma * noise, target, timestep)

    def alpha_bar(self, timestep: Tensor) -> Tensor:
        """Share of the signal's variance, shape (B,), float32: what UniDiff weighs its consistency term by."""
        self.alphas_cumprod = sent_to(timestep.device, self.alphas_cumprod)  # copied once, at the first batch
        return self.alphas_cumprod[timestep]

    def snr(self, timestep: Tensor) -> Tensor:
        """Signal-to-noise ratio, ``alpha_bar / (1 - alpha_bar)``, shape (B,)."""
        alpha = self.alpha_bar(timestep)
        return alpha / (1 - alpha)

    def _scales(self, like: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the clean rows and of the noise, shape (B, 1, 1, 1) each."""
        alpha = self.alpha_bar(timestep).to(like.dtype).view(-1, 1, 1, 1)
        return alpha**0.5, (1 - alpha) ** 0.5

    # Prediction and loss

    def denoise(self, noised: Noised, context: Tensor, middle: bool = False) -> Denoised:
        """One pass of the UNet.

        Args:
            noised: B rows.
            context: What the UNet attends to, shape (B, L, W): ``DiffusersGenerator.encode_text``.
            middle: Whether the features behind the middle block are wanted, too.

        Raises:
            ValueError: If they are, and the UNet has no middle block.
            RuntimeError: If they are, and the pass did not show them.
        """
        if not middle:
            return Denoised(self.generator.denoise(noised.noisy, noised.timestep, context), None)
        with self._middle_features() as seen:
            prediction = self.generator.denoise(noised.noisy, noised.timestep, context)
        return Denoised(prediction, _single(seen))

    def middle_features(self, noised: Noised, context: Tensor) -> Tensor:
        """The features behind the middle block alone, shape (B, W, h', w'); what follows it is not run.

        Args:
            noised: B rows.
            context: As ``denoise``.

        Raises:
            ValueError: If the UNet has no middle block.
            RuntimeError: If the pass did not show it.
        """
        with self._middle_features(stop=True) as seen, suppress(_Seen):
            self.generator.denoise(noised.noisy, noised.timestep, context)
        return _single(seen)

    @property
    def middle_width(self) -> int:
        """Channels W behind the middle block."""
        return int(self.generator.part("unet").config.block_out_channels[-1])

    @contextmanager
    def _middle_features(self, stop: bool = False) -> Iterator[list[Tensor]]:
        block = self.generator.part("unet").mid_block
        if block is None:
            raise ValueError(f"The UNet in {self.generator.name} has no middle block, whose features are asked for.")
        seen: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen.append(output)
            if stop:
                raise _Seen

        handle = block.register_forward_hook(look)
        try:
            yield seen
        finally:
            handle.remove()

    def loss(self, prediction: Tensor, noised: Noised, weight: Tensor | None = None) -> Tensor:
        """``denoising_loss``, weighted by timestep where ``min_snr_gamma`` is set.

        Args:
            prediction: Shape (B, C, h, w).
            noised: What it was predicted from.
            weight: Of the rows besides, shape (B,).

        Returns:
            Scalar, in fp32.
        """
        if self.min_snr_gamma is not None:
            of_timestep = min_snr_weight(self.snr(noised.timestep), self.min_snr_gamma, self.prediction_type)
            weight = of_timestep if weight is None else of_timestep * weight
        return denoising_loss(prediction, noised.target, weight)

    # The way back

    def clean(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The clean rows that a prediction implies, ``x0`` (Ho et al., arXiv 2006.11239, eq. 15), shape (B, C, h, w).

        An error of the predicted noise comes out ``sqrt((1 - alpha_bar) / alpha_bar)`` times as large: weigh by
        ``alpha_bar``, or leave late timesteps out.
        """
        signal, sigma = self._scales(noised.noisy, noised.timestep)
        if self.prediction_type == "epsilon":
            return (noised.noisy - sigma * prediction) / signal
        return signal * noised.noisy - sigma * prediction

    def decode(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The pixels that a prediction implies, with gradients; see ``DiffusersGenerator.decode_pixels``.

        Returns:
            Shape (B, 3, H, W), about [0, 1], not clamped.
        """
        return self.generator.decode_pixels(self.clean(prediction, noised))


def drop_prompts(text: Tensor, empty: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """Puts the empty prompt in the place of some rows, which classifier-free guidance needs (arXiv 2207.12598).

    Args:
        text: Token ids, shape (B, L), or what the UNet attends to, shape (B, L, W).
        empty: The same of the empty prompt, shape (1, ...).
        share: Of the rows, on average.
        draws: On the CPU.

    Returns:
        As ``text``.
    """
    dropped = sent_to(text.device, torch.rand(len(text), generator=draws) < share)
    return torch.where(dropped.view(-1, *[1] * (text.ndim - 1)), empty, text)
