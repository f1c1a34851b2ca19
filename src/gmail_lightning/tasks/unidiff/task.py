"""``UniDiffTask``: contrast, synthesis and reciprocal consistency in one fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from gmail_lightning.distributed import world_size
from gmail_lightning.losses import contrastive_loss
from gmail_lightning.losses.conflict import gradient_cosines
from gmail_lightning.losses.joined_ids import joined_ids
from gmail_lightning.models import DualEncoder
from gmail_lightning.models.averaging import WeightAverage
from gmail_lightning.models.branches.routing import ModalityIndex
from gmail_lightning.models.encoders.logit_scale import CAP, capped_scale, hold_cap
from gmail_lightning.models.generators.consistency import ReciprocalConsistency, Seen
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.objective import drop_prompts
from gmail_lightning.tasks.encoder_task import image_index
from gmail_lightning.tasks.retrieval import number_of_ids
from gmail_lightning.tasks.unidiff.joint import JointTask
from gmail_lightning.tasks.unidiff.parts import How, Part, open_parts
from gmail_lightning.tasks.unidiff.synthesis_score import SynthesisScore
from gmail_lightning.types import ImageTextBatch

Term = Literal["contrast", "synthesis", "consistency"]
TERMS: tuple[Term, ...] = ("contrast", "synthesis", "consistency")


class UniDiffTask(JointTask):
    """Joint fine-tuning of a CLIP and a diffusion model, after UniDiff (arXiv 2306.00813), on few pictures of a domain.

    ``L = contrast_weight L_contrast + synthesis_weight L_synthesis + w L_consistency``: CLIP's loss on the captions as
    they are (rows of one image, or of one caption, are not negatives of one another), the denoising loss with prompts
    dropped, and reciprocal consistency. Both models keep their architecture.
    The paper's equations and weights are not public: every choice is an argument. Each picture is read at CLIP's size
    and at the diffusion model's, under one random draw.

    Evaluation is that of ``JointTask``: retrieval, zero-shot accuracy, denoising, the spread and the drift of the
    features, and with ``score`` KID, CMMD and CLIPScore of images made for the captions. The averaged weights are
    evaluated, and written at the end of training: the pipeline to ``pipeline/`` in the run folder.

    Args:
        encoder: The CLIP; a plain one, or a router whose branch and text side train.
        generator: The pipeline: one with a UNet and one text encoder, in fp32.
        consistency: The third term; none by default.
        contrast_weight: Of the contrastive term; 0 leaves the synthesis alone.
        synthesis_weight: Of the denoising loss; 0 leaves the contrast alone.
        text_tower: ``shared``: the pipeline reads its prompts through the CLIP's text tower, which then trains on both
            terms; ``separate``: through its own text encoder, which stays as it is.
        train: What trains of ``vision``, ``text`` and ``unet``: ``full``, ``frozen``, or a number, the rank of LoRA
            (PEFT's on the UNet). What is not named trains in full.
        prompt_dropout: Share of rows whose synthesis sees the empty prompt, which guidance needs.
        min_snr_gamma: Cap of the signal-to-noise weights of the synthesis (arXiv 2303.09556); None weighs all alike.
        ema_decay: Of the average of all that trains (``WeightAverage``); None keeps none.
        generated_rows: Terms that generated rows take part in, some of contrast, synthesis, consistency; all by
            default.
        conflict_every_n_steps: Log the cosine between the gradients of every two terms on the weights that both reach,
            every so many steps; each costs one more backward for every term. Under DDP the mean of the ranks' own
            cosines. None: never.
        score: Makes and scores images in evaluations.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.
        learning_rates: See ``BaseTask``: ``{encoder: 1.0e-6, generator.parts.unet: 1.0e-5}``.

    Raises:
        ValueError: If no term has a weight, consistency has not both others beside it, a name is unknown, the pipeline
            cannot be trained, or the text tower cannot be shared.
    """

    evaluation_only = frozenset({"score"})

    def __init__(
        self,
        encoder: DualEncoder,
        generator: DiffusersGenerator,
        consistency: ReciprocalConsistency | None = None,
        contrast_weight: float = 1.0,
        synthesis_weight: float = 1.0,
        text_tower: Literal["shared", "separate"] = "shared",
        train: dict[Part, How] | None = None,
        prompt_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        ema_decay: float | None = 0.9999,
        generated_rows: Sequence[Term] = TERMS,
        conflict_every_n_steps: int | None = None,
        score: SynthesisScore | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            encoder,
            generator,
            text_tower,
            min_snr_gamma,
            score,
            optimizer,
            scheduler,
            warmup_steps,
            allow_small_negatives,
            learning_rates,
        )
        self.consistency = ReciprocalConsistency("none") if consistency is None else consistency
        consistent = self.consistency.reading != "none"
        _check(contrast_weight, synthesis_weight, consistent, generated_rows, prompt_dropout)
        self.contrast_weight, self.synthesis_weight = contrast_weight, synthesis_weight
        self.batch_contrastive = contrast_weight > 0
        self.prompt_dropout, self.generated_rows = prompt_dropout, tuple(generated_rows)
        self.conflict_every_n_steps = conflict_every_n_steps
        open_parts(
            self.encoder, generator, train, contrast_weight > 0, synthesis_weight > 0, shared=text_tower == "shared"
        )
        if not self.trained():
            raise ValueError(f"train={train}: nothing is left that trains. Open a part that a term reaches.")
        self._track_earlier()
        self.consistency.build(self.objective, self.encoder)
        if ema_decay is not None:
            self.average = WeightAverage(self.trained(), ema_decay)

    # Training

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """The terms that have a weight, by name, and their weighted sum."""
        self._require_rows(batch)
        draws = self.draws()
        text_features, context, empty = self._read_texts(batch)
        losses: dict[str, Tensor] = {}
        if self.contrast_weight:
            image_features = self.encode_images(batch)
            rows = self._rows(batch, "contrast")
            ids = joined_ids(batch["image_id"], number_of_ids(batch["text"]))
            pairs = image_features, text_features, ids
            image, text, ids = pairs if rows is None else (each[rows] for each in pairs)
            losses["contrast"] = contrastive_loss(image, text, self.scale, self.encoder.logit_bias, ids=ids)
            losses["logit_scale"] = self.scale
        if self.synthesis_weight:
            only = self._diffused(batch)  # what no term looks at does not go through the UNet
            pixels = self._pixels(batch)
            if only is not None:
                pixels, context = pixels[only], context[only]
            noised = self.objective.draw(self.generator.encode_pixels(pixels, draws), draws)
            prompts = drop_prompts(context, empty, self.prompt_dropout, draws)
            denoised = self.objective.denoise(noised, prompts, middle=self.consistency.in_synthesis_pass)
            rows = self._rows(batch, "synthesis") if only is None else None
            of_rows = noised if rows is None else noised.of_rows(rows)
            prediction = denoised.prediction if rows is None else denoised.prediction[rows]
            losses["synthesis"] = self.objective.loss(prediction, of_rows)
        weights = {"contrast": self.contrast_weight, "synthesis": self.synthesis_weight}
        if self.consistency.reading != "none":
            of_clip = image_features, text_features, batch["text"], batch["image_id"]
            image, text, texts, ids = of_clip if only is None else (each[only] for each in of_clip)
            seen = Seen(noised, denoised, context, empty, image, text, self.scale, texts, ids)
            rows = self._rows(batch, "consistency") if only is None else None
            losses["consistency"] = self._consistency(seen if rows is None else seen.of_rows(rows), batch, draws)
            weights["consistency"] = self.consistency.weight_at(self._step_number())
        self._watch_conflicts(losses)
        total = torch.stack([weights[name] * losses[name] for name in TERMS if name in losses]).sum()
        return {"loss": total, **losses}

    def _require_rows(self, batch: ImageTextBatch) -> None:
        """Refuses a batch in which a term has too few rows to say anything."""
        terms = {"contrast": self.contrast_weight, "synthesis": self.synthesis_weight, "consistency": self._consistent}
        for term in (term for term in TERMS if terms[term]):
            rows = self._rows(batch, term)
            count = len(batch["modality"]) if rows is None else len(rows)
            count *= world_size() if term == "contrast" else 1
            if count < (1 if term == "synthesis" else 2):
                left_out = "" if rows is None else ", without the generated ones, which generated_rows leaves out of it"
                raise MisconfigurationException(
                    f"The term {term} has {count} row{'s' * (count != 1)} in the batch{left_out}, of which it says "
                    "nothing: raise data.batch_size, lower data.generated_fraction, or set the weight of the term to 0."
                )

    @property
    def _consistent(self) -> bool:
        return self.consistency.reading != "none"

    def _rows(self, batch: ImageTextBatch, term: Term) -> Tensor | None:
        """Numbers of the rows that take part in a term; None for all."""
        return None if term in self.generated_rows else batch["real_row"]

    def _diffused(self, batch: ImageTextBatch) -> Tensor | None:
        """Numbers of the rows that the UNet has to see; None for all."""
        terms: tuple[Term, ...] = ("synthesis", "consistency") if self._consistent else ("synthesis",)
        return None if any(term in self.generated_rows for term in terms) else batch["real_row"]

    @property
    def scale(self) -> Tensor:
        """The encoder's logit scale; that of a CLIP capped."""
        return capped_scale(self.encoder, CAP)

    def _consistency(self, seen: Seen, batch: ImageTextBatch, draws: torch.Generator) -> Tensor:
        index = image_index(batch)
        if "consistency" not in self.generated_rows:  # all that is seen is real
            index = ModalityIndex(torch.arange(len(seen.text), device=seen.text.device), batch["real_row"][:0])
        encode = partial(self.encode_pixels, modality=index)
        found: Tensor = self.consistency(seen, self.objective, self.encoder, encode, draws)
        return found

    def _step_number(self) -> int:
        return 0 if self._trainer is None else self.trainer.global_step

    def _watch_conflicts(self, losses: Mapping[str, Tensor]) -> None:
        every = self.conflict_every_n_steps
        if every is None or self._trainer is None or (self.trainer.global_step + 1) % every:
            return
        found = gradient_cosines({name: losses[name] for name in TERMS if name in losses}, self.trained())
        values = {f"train/conflict/{name}": value for name, value in found.items()}
        self.log_dict(values, batch_size=1, sync_dist=True)

    def trained(self) -> list[nn.Parameter]:
        """All that trains."""
        return [p for p in self.parameters() if p.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the weights were trained to work with."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["joint"] = self._trained_with()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that were trained to work with another text tower or reading.

        Raises:
            MisconfigurationException: Naming the setting, its value there, and that here.
        """
        for name, value in self._trained_with().items():
            there = checkpoint.get("joint", {}).get(name, value)
            if there != value:
                raise MisconfigurationException(
                    f"The checkpoint was trained with {name}={there!r}, this task has {value!r}: give {there!r}."
                )
        super().on_load_checkpoint(checkpoint)

    def _trained_with(self) -> dict[str, str]:
        return {"text_tower": self.text_tower, "consistency.reading": self.consistency.reading}

    def after_step(self) -> None:
        """Holds the cap of the logit scale."""
        super().after_step()
        hold_cap(self.encoder, CAP)


def _check(contrast: float, synthesis: float, consistent: bool, generated_rows: Sequence[str], dropout: float) -> None:
    if min(contrast, synthesis) < 0 or max(contrast, synthesis) == 0:
        raise ValueError(f"contrast_weight={contrast}, synthesis_weight={synthesis}: none negative, and one above 0.")
    if consistent and min(contrast, synthesis) == 0:
        raise ValueError("Consistency holds contrast and synthesis together: give both a weight, or reading: none.")
    if unknown := sorted(set(generated_rows) - set(TERMS)):
        raise ValueError(f"generated_rows: unknown {', '.join(unknown)}; the terms are {', '.join(TERMS)}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"prompt_dropout={dropout} is a share from 0 to below 1.")
