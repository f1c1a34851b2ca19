"""``ClassificationTask`` and ``ZeroShotClassificationTask``: classes by the prompts that name them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.metrics import ZeroShotAccuracy
from gmail_lightning.metrics.retrieval import full_precision
from gmail_lightning.models import DualEncoder, ImageEncoder
from gmail_lightning.models.chunks import in_chunks
from gmail_lightning.models.encoders.logit_scale import CAP, capped_scale, check_cap, hold_cap
from gmail_lightning.tasks.encoder_task import EncoderTask, require_text
from gmail_lightning.tasks.results import EvaluationResult, set_key
from gmail_lightning.transforms.text import fill, given_templates
from gmail_lightning.types import Classes, ImageTextBatch, InputSpec, Modality

EVALUATION_PROMPTS = 1024  # encoded at once


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names of classes; those that several have, as ImageNet's two missiles, with the label behind them."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} (label {label})" for label, name in enumerate(names)]


def class_embeddings(encoder: DualEncoder, classes: Classes, device: torch.device) -> Tensor:
    """The mean of the normalised features of a class's prompts, normalised again (CLIP, section 3.1.4).

    Returns:
        Shape (C, D), unit norm, float32.
    """
    total = torch.zeros(len(classes.names), encoder.embed_dim, device=device)
    for template in classes.templates:
        text = prompt_tokens(encoder, classes, template).to(device)
        pieces = [encoder.encode_text(piece) for piece in text.split(EVALUATION_PROMPTS)]
        total += F.normalize(torch.cat(pieces).float(), dim=-1)
    return F.normalize(total, dim=-1)


def prompt_tokens(encoder: DualEncoder, classes: Classes, template: str) -> Tensor:
    """Token ids of every class in one template, shape (C, L)."""
    return encoder.text_spec.encode([fill(template, name) for name in classes.names])


class ClassificationTask(EncoderTask):
    """What tasks that tell classes apart share: the classes come from the data sets, and accuracy is their measure.

    Subclasses implement ``scores``. Real and generated images are evaluated apart.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps)
        self.eval_classes: dict[str, Classes] = {}  # by evaluation set

    def setup(self, stage: str) -> None:
        """Forgets the classes of data that were evaluated before."""
        self.eval_classes = {}
        super().setup(stage)

    @abstractmethod
    def scores(self, batch: ImageTextBatch) -> Tensor:
        """Scores of an evaluation batch for the classes of its set, shape (B, C)."""

    def classes_of(self, eval_set: str | None) -> Classes:
        """Classes of an evaluation set, or of the training data, as the data module names them.

        Raises:
            MisconfigurationException: If the data module names none.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "classes"):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a data module with the method classes(name), such as "
                "MixedModalityDataModule: it names the classes and the prompts of its data sets."
            )
        return cast(Classes, data.classes(eval_set))

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Accuracy over the classes of the set, of each modality."""
        self.eval_classes[eval_set] = self.classes_of(eval_set)
        count = len(self.eval_classes[eval_set].names)
        return {"real": ZeroShotAccuracy(count), "generated": ZeroShotAccuracy(count, prefix="generated_")}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Scores a batch among the classes of its set."""
        scores = self.scores(batch)
        for which in Modality:
            rows = batch["modality"] == which
            metrics[which.name.lower()].update(scores[rows], batch["label"][rows])

    def complete_result(self, name: str, result: EvaluationResult, metrics: Mapping[str, Any]) -> None:
        """Adds the accuracy of every class on real images."""
        super().complete_result(name, result, metrics)
        classes = {set_key(eval_set): classes for eval_set, classes in self.eval_classes.items()}
        if name in classes and "accuracy" in result.values:
            accuracy = zip(distinct_names(classes[name].names), metrics["real"].per_class().tolist(), strict=True)
            result.class_accuracy = {one: None if math.isnan(value) else value for one, value in accuracy}


class ZeroShotClassificationTask(ClassificationTask):
    """Zero-shot classification by an ensemble of prompts (CLIP, arXiv 2103.00020, section 3.1.4).

    The embedding of a class is the mean of the normalised features of its prompts, normalised again. Class names and
    templates are those of each data set, so that one run evaluates several. ``fit`` trains the text side on images of
    the training classes, generated ones through the aligned branch: cross-entropy over all classes, whose prompts are
    encoded anew in every step; the templates take turns, step by step. Real and generated images are evaluated apart.

    Args:
        encoder: A ``ModalityEncoder`` with ``aligned`` and a ``text_side``, or the plain dual encoder, which is trained
            whole.
        templates: Prompts in place of those of the data sets: the name of a published set, one template, or several.
        max_logit_scale: Cap of a trained logit scale (CLIP, section 2.5), held after every step. That of an encoder
            with a logit bias (SigLIP) has none.
        chunk_size: Encode images and prompts in chunks of this many, with the exact gradients of one batch.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.

    Raises:
        ValueError: If the encoder has no text tower, a template is malformed or there is none, or a cap is not positive
            or meets an encoder with a logit bias.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        templates: str | list[str] | None = None,
        max_logit_scale: float = CAP,
        chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps)
        require_text(self.encoder, "ZeroShotClassificationTask names classes by texts")
        for name, parameter in self.encoder.named_parameters():
            if name.endswith(".logit_bias"):  # of a SigLIP; a softmax does not change by it
                parameter.requires_grad_(False)
        check_cap(self.encoder, max_logit_scale)
        self.templates = None if templates is None else given_templates(templates)
        self.max_logit_scale, self.chunk_size = max_logit_scale, chunk_size
        self._prompts = torch.empty(0)  # (templates, C, L) token ids of the training classes
        self._weights: dict[str, Tensor] = {}  # class embeddings (C, D) of the evaluation that is running

    @property
    def input_spec(self) -> InputSpec:
        """Pixels alone; the labels come with every batch."""
        return InputSpec(image=self.encoder.image_spec)

    def setup(self, stage: str) -> None:
        """Reads the classes of the training data."""
        if stage == "fit":
            classes = self.classes_of(None)
            self._prompts = torch.stack(
                [prompt_tokens(self.encoder, classes, template) for template in classes.templates]
            )
        super().setup(stage)
        for name, evaluated in self.eval_classes.items() if stage == "fit" else ():
            unseen = [each for each in evaluated.names if each not in classes.names]
            if unseen:
                rank_zero_info(
                    f"{name}: {len(unseen)} of {len(evaluated.names)} classes are not trained: {unseen[:3]}."
                )

    def classes_of(self, eval_set: str | None) -> Classes:
        """As the data module names them, with the templates given here."""
        classes = super().classes_of(eval_set)
        return classes if self.templates is None else classes._replace(templates=self.templates)

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Cross-entropy over all classes, by the prompts of one template, and the accuracy on the batch."""
        images = F.normalize(self.encode_images(batch, self.chunk_size).float(), dim=-1)
        template = self.trainer.global_step % len(self._prompts)
        prompts = self._prompts[template]
        classes = F.normalize(in_chunks(self.encoder.encode_text, prompts, chunk_size=self.chunk_size).float(), dim=-1)
        with full_precision(images.device):
            logits = capped_scale(self.encoder, self.max_logit_scale) * images @ classes.T
        loss = F.cross_entropy(logits, batch["label"])
        return {"loss": loss, "accuracy": (logits.argmax(dim=-1) == batch["label"]).float().mean()}

    def on_fit_start(self) -> None:
        """Brings the prompts of the training classes to the device, once."""
        super().on_fit_start()
        self._prompts = self._prompts.to(self.device)

    def after_step(self) -> None:
        """Holds the cap of the logit scale."""
        super().after_step()
        hold_cap(self.encoder, self.max_logit_scale)

    def _kept_keys(self) -> set[str]:
        """Also the frozen logit bias where all else of the text side is trained: who loads that looks for all of it."""
        bias = {key for key in self.state_dict() if key.endswith(".logit_bias")}
        return super()._kept_keys() | (bias if self.encoder.text_side == "full" else set())

    def on_validation_epoch_start(self) -> None:
        """Forgets the class embeddings of the last evaluation."""
        super().on_validation_epoch_start()
        self._weights = {}

    def on_test_epoch_start(self) -> None:
        """As ``on_validation_epoch_start``."""
        super().on_test_epoch_start()
        self._weights = {}

    def scores(self, batch: ImageTextBatch) -> Tensor:
        """Cosines with the class embeddings of the batch's set."""
        name = batch["eval_set"]
        if name not in self._weights:
            self._weights[name] = class_embeddings(self.encoder, self.eval_classes[name], self.device)
        images = F.normalize(self.encode_images(batch).float(), dim=-1)
        with full_precision(images.device):
            return images @ self._weights[name].T
