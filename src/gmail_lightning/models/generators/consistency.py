"""``ReciprocalConsistency``: UniDiff's third term, in each of its readings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gmail_lightning.losses.consistency import (
    Distance,
    StopGradient,
    prediction_contrast_loss,
    reciprocal_consistency_loss,
)
from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.generators.objective import Denoised, DenoisingObjective, Noised
from gmail_lightning.types import ImageSpec

Reading = Literal["none", "feature", "reciprocal_kl", "image", "prediction_contrast"]
#: Distance of each reading that compares features, where none is given.
DISTANCES: dict[str, Distance] = {"feature": "infonce", "reciprocal_kl": "reciprocal_kl", "image": "cosine"}
#: Weight of each reading, where none is given: their terms are of different size, and pull at different parts.
WEIGHTS = {"feature": 0.1, "reciprocal_kl": 0.1, "image": 1.0, "prediction_contrast": 0.1}
NEGATIVES = 2  # of prediction_contrast


class Seen(NamedTuple):
    """What the terms before have made of B rows."""

    noised: Noised
    denoised: Denoised  # under the prompts, of which some may be empty
    context: Tensor  # (B, L, W), the prompts, none empty
    empty_context: Tensor  # (1, L, W)
    image_features: Tensor  # (B, D), of CLIP
    text_features: Tensor  # (B, D), of CLIP
    logit_scale: Tensor
    text: Tensor  # (B, L) token ids of the prompts
    image_id: Tensor  # (B,)

    def of_rows(self, rows: Tensor) -> Seen:
        """The rows of these numbers alone."""
        middle = self.denoised.middle
        return Seen(
            self.noised.of_rows(rows),
            Denoised(self.denoised.prediction[rows], None if middle is None else middle[rows]),
            self.context[rows],
            self.empty_context,
            self.image_features[rows],
            self.text_features[rows],
            self.logit_scale,
            self.text[rows],
            self.image_id[rows],
        )


class ReciprocalConsistency(nn.Module):
    """Reciprocal semantic consistency between a CLIP and a diffusion model that see the same pictures.

    UniDiff (arXiv 2306.00813) names the term; its equation is not public. ``reading`` selects one of its readings, or
    the contrast of predictions of DCR (arXiv 2603.04803):

    - ``feature``: the mean feature behind the UNet's middle block, through a projection, against CLIP's image feature;
    - ``reciprocal_kl``: the same two, each as a distribution over the texts of the batch, drawn to one another;
    - ``image``: the picture that the prediction implies, seen by CLIP, against CLIP's feature of the true one;
    - ``prediction_contrast``: the prediction under a caption is to be like the target and like that under a weaker form
      of the caption (half way to the empty prompt), and unlike those under ``negatives`` other captions of the batch;
    - ``none``: no term; the other two are then the same bit for bit.

    Args:
        reading: As above.
        weight: Of the term; by default 1 of ``image``, whose cosine is small, and 0.1 of the others.
        warmup_steps: Steps over which the weight rises to that, linearly.
        distance: Of the readings that compare features; by default ``infonce``, ``reciprocal_kl`` and ``cosine``.
        condition: What the UNet sees when its feature is taken: the ``empty`` prompt, in a pass of its own up to the
            middle block, so that agreement with the caption is not had for free; or the ``prompt``, in the pass of the
            synthesis term. The other readings take the prompt.
        noise_weight: Weigh each row by ``alpha_bar`` of its timestep, its share of signal; or not at all.
        timesteps: The first of the timesteps that take part, and one past the last; all by default.
        stop_gradient: See ``losses.reciprocal_consistency_loss``. Of the last two readings, where one model is seen
            through the other, ``clip`` keeps every part of CLIP fixed, and ``diffusion`` the UNet.
        temperature: In place of CLIP's own, which is taken without gradient; of ``prediction_contrast`` 0.1.
        negatives: Captions of other rows that each row is contrasted with; each costs one more pass of the UNet.

    Raises:
        ValueError: If a name is unknown or a setting does not belong to the reading.
    """

    def __init__(
        self,
        reading: Reading = "reciprocal_kl",
        weight: float | None = None,
        warmup_steps: int = 0,
        distance: Distance | None = None,
        condition: Literal["empty", "prompt"] = "empty",
        noise_weight: Literal["alpha_bar", "none"] = "alpha_bar",
        timesteps: tuple[int, int] | None = None,
        stop_gradient: StopGradient = "targets",
        temperature: float | None = None,
        negatives: int = NEGATIVES,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("reading", reading, get_args(Reading)),
            ("distance", distance, (*get_args(Distance), None)),
            ("condition", condition, ("empty", "prompt")),
            ("noise_weight", noise_weight, ("alpha_bar", "none")),
            ("stop_gradient", stop_gradient, get_args(StopGradient)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(map(str, known))}.")
        weight = WEIGHTS.get(reading, 0.0) if weight is None else weight
        for name, is_given, readings in (
            (f"distance={distance!r}", distance is not None, tuple(DISTANCES)),
            ("condition='prompt'", condition == "prompt", ("feature", "reciprocal_kl")),
            ("temperature", temperature is not None, ("feature", "reciprocal_kl", "prediction_contrast")),
            ("negatives", negatives != NEGATIVES, ("prediction_contrast",)),
        ):
            if is_given and reading not in readings:
                raise ValueError(f"{name} belongs to {', '.join(readings)}, not to reading={reading!r}.")
        if weight < 0 or warmup_steps < 0 or negatives < 1 or (temperature is not None and temperature <= 0):
            raise ValueError(
                f"weight={weight} and warmup_steps={warmup_steps} may not be negative, negatives={negatives} is at "
                f"least 1, temperature={temperature} positive."
            )
        self.reading: Reading = reading if weight else "none"
        self.weight, self.warmup_steps, self.stop_gradient = weight, warmup_steps, stop_gradient
        self.distance = DISTANCES.get(reading) if distance is None else distance
        self.condition, self.noise_weight, self.timesteps = condition, noise_weight, timesteps
        self.temperature, self.negatives = temperature, negatives
        #: From the UNet's features to CLIP's; only where the reading needs one.
        self.projection: nn.Linear | None = None

    @property
    def reads_middle(self) -> bool:
        """Whether the UNet's own features are compared."""
        return self.reading in ("feature", "reciprocal_kl")

    @property
    def in_synthesis_pass(self) -> bool:
        """Whether these come of the pass of the synthesis term."""
        return self.reads_middle and self.condition == "prompt"

    def build(self, objective: DenoisingObjective, encoder: ImageEncoder) -> None:
        """Makes the projection, from the UNet's width to CLIP's, where the reading needs one.

        Raises:
            ValueError: If ``timesteps`` are none of the objective's, or a CLIP that is kept fixed would be computed
                again in the backward, when it is not.
        """
        if self.reading == "image" and self.stop_gradient == "clip" and _recomputes(encoder):
            raise ValueError(
                "reading='image' with stop_gradient='clip' needs an encoder with grad_checkpointing: false."
            )
        steps = len(objective.alphas_cumprod)
        if self.timesteps is not None and not 0 <= self.timesteps[0] < self.timesteps[1] <= steps:
            raise ValueError(f"timesteps={self.timesteps}: give first < last, from 0 to {steps}.")
        if self.reads_middle:
            self.projection = nn.Linear(objective.middle_width, encoder.embed_dim, bias=False)

    def weight_at(self, step: int) -> float:
        """Weight of the term in the step of this number, from 0."""
        return self.weight * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.weight

    def forward(
        self,
        seen: Seen,
        objective: DenoisingObjective,
        encoder: ImageEncoder,
        encode: Callable[[Tensor], Tensor],
        draws: torch.Generator,
    ) -> Tensor:
        """The term, without its weight.

        Args:
            seen: What the other terms have made of the rows.
            objective: Of the synthesis term.
            encoder: CLIP.
            encode: Its features of pixels in [0, 1] of its own size, shape (B, 3, H, W), each row as its modality asks.
            draws: On the CPU.
        """
        weight = self._row_weight(seen.noised.timestep, objective)
        if self.reading == "prediction_contrast":
            return self._prediction_contrast(seen, objective, weight, draws)
        u = self._diffusion_features(seen, objective, encoder, encode)
        # Of the projection, too, a side that stops trains: what stops is the UNet behind it.
        stop: StopGradient = "none" if self.stop_gradient == "diffusion" else self.stop_gradient
        scale = seen.logit_scale.detach() if self.temperature is None else 1 / self.temperature
        return reciprocal_consistency_loss(
            u,
            seen.image_features,
            seen.text_features,
            distance=self.distance or "reciprocal_kl",
            logit_scale=scale,
            weight=weight,
            stop_gradient=stop,
            ids=seen.image_id,
        )

    def _row_weight(self, timestep: Tensor, objective: DenoisingObjective) -> Tensor | None:
        weight = objective.alpha_bar(timestep) if self.noise_weight == "alpha_bar" else None
        if self.timesteps is None:
            return weight
        inside = ((timestep >= self.timesteps[0]) & (timestep < self.timesteps[1])).float()
        return inside if weight is None else weight * inside

    def _diffusion_features(
        self, seen: Seen, objective: DenoisingObjective, encoder: ImageEncoder, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Shape (B, D)."""
        if self.projection is not None:
            middle = seen.denoised.middle
            if middle is None:
                context = seen.empty_context.expand(len(seen.text), -1, -1)
                middle = objective.middle_features(seen.noised, context)
            middle = middle.detach() if self.stop_gradient == "diffusion" else middle
            projected: Tensor = self.projection(middle.mean(dim=(2, 3)))
            return projected
        prediction = seen.denoised.prediction
        prediction = prediction.detach() if self.stop_gradient == "diffusion" else prediction
        pixels = resized(objective.decode(prediction, seen.noised), encoder.image_spec)
        with fixed(encoder) if self.stop_gradient == "clip" else nullcontext():
            return encode(pixels)

    def _prediction_contrast(
        self, seen: Seen, objective: DenoisingObjective, weight: Tensor | None, draws: torch.Generator
    ) -> Tensor:
        rows = len(seen.text)
        if rows < 2:
            raise ValueError("reading='prediction_contrast' takes captions of other rows, and there is one row.")
        count = min(self.negatives, rows - 1)
        shifts = (torch.randperm(rows - 1, generator=draws)[:count] + 1).tolist()
        others = [torch.arange(rows, device=seen.text.device).roll(-shift) for shift in shifts]
        weaker = (seen.context + seen.empty_context) / 2
        contexts = torch.cat([seen.context, weaker, *(seen.context[other] for other in others)])
        contexts = contexts.detach() if self.stop_gradient == "clip" else contexts
        again = Noised(*(tensor.repeat(2 + count, *[1] * (tensor.ndim - 1)) for tensor in seen.noised))
        with fixed(objective.generator.part("unet")) if self.stop_gradient == "diffusion" else nullcontext():
            found = objective.denoise(again, contexts).prediction.unflatten(0, (2 + count, rows)).transpose(0, 1)
        differs = torch.stack([(seen.text != seen.text[other]).any(dim=1) for other in others], dim=1)
        return prediction_contrast_loss(
            found[:, 0],
            torch.stack([found[:, 1], seen.noised.target], dim=1),
            found[:, 2:],
            temperature=0.1 if self.temperature is None else self.temperature,
            weight=weight,
            is_negative=differs,
        )


def _recomputes(module: nn.Module) -> bool:
    """Whether it drops activations: by the switch of open_clip, or by a forward that was wrapped."""
    return any(
        getattr(m, "grad_checkpointing", False) or isinstance(vars(m).get("forward"), partial) for m in module.modules()
    )


@contextmanager
def fixed(module: nn.Module) -> Iterator[None]:
    """Within it, what a module computes has no gradient for its parameters, but has one for its inputs."""
    training = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


def resized(image: Tensor, spec: ImageSpec) -> Tensor:
    """Resizes pixels, shape (B, 3, H, W), to what an encoder asks for, with gradients.

    The shorter side is resized and the centre cut, whatever the resize mode: pictures of a diffusion model have the
    aspect ratio that a recipe gave them.
    """
    height, width = image.shape[2:]
    scale = max(spec.size[0] / height, spec.size[1] / width)
    size = [max(round(height * scale), spec.size[0]), max(round(width * scale), spec.size[1])]
    image = F.resize(image, size, InterpolationMode(spec.interpolation), antialias=True)
    cut: Tensor = F.center_crop(image, list(spec.size))
    return cut
