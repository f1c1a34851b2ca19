"""``AlignmentTask``: GMAIL's alignment of the generated-image branch to the frozen real branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.losses import alignment_loss, contrastive_loss, sigmoid_loss
from gmail_lightning.metrics import ImageTextRecall, ModalityGap
from gmail_lightning.models import ImageEncoder, LoRA, ModalityEncoder
from gmail_lightning.models.base import ImageTower
from gmail_lightning.models.encoders.readers import block_number
from gmail_lightning.tasks.base import paired_rows
from gmail_lightning.tasks.encoder_task import EncoderTask, image_index, require_text
from gmail_lightning.tasks.retrieval import update_recall
from gmail_lightning.types import ImageTextBatch, InputSpec

LOWEST_TEMPERATURE = 0.01  # of a learned one: logits of at most 100, as CLIP caps its scale


class AlignmentTask(EncoderTask):
    """Trains LoRA on an image tower so that generated images land where the frozen tower puts their real partners.

    Eq. 1 of GMAIL (arXiv 2602.15368) by default: one-directional InfoNCE from generated to real images. Rows of the
    same real image are never negatives of one another.

    Args:
        encoder: A ``ModalityEncoder`` with the branch that is to learn. A plain encoder gets ``LoRA`` of rank 4.
        loss: ``info_nce`` (Eq. 1) or ``sigmoid`` (SigLIP form).
        temperature: Divides the cosine similarities.
        learnable_temperature: Train the temperature (and the bias of the sigmoid form) with the adapters. That of
            ``info_nce`` is held at 0.01 or above after every step, as CLIP caps its scale.
        symmetric: Add the real-to-generated direction of InfoNCE.
        alignment_weight: Weight of the alignment term; 0 with a text weight is LoRA without alignment.
        cosine_weight: Weight of 1 - paired cosine, which has no negatives. It holds the generated cloud in place, where
            InfoNCE alone lets it drift as a whole; with ``alignment_weight: 0`` it is the plain distillation control.
        generated_text_weight: Weight of the contrastive term between generated images and captions (section 3.1).
        real_text_weight: The same for real images; needs a real path that trains.
        patch_weight: Weight of Eq. 1 on the patch tokens of ``patch_layer``, averaged over each image. Captioners such
            as LLaVA read these tokens, which the pooled features reach only indirectly. The two images of a pair are
            different pictures of one caption, so that no patch belongs to a patch of the other; their means, which do
            not depend on where things are, do. The tower runs a second time for them.
        patch_cosine_weight: Weight of 1 - paired cosine of the same means. All means are alike to begin with, so that
            InfoNCE alone moves them as a whole, and a captioner reads that: give it several times ``patch_weight``.
        patch_layer: Block of the tower; -2 is the last but one. Adapters behind it train with the other terms only.
        contrastive_chunk_size: Encode the batch in chunks of this many rows, with the exact gradients of one batch.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.

    Raises:
        ValueError: If no term has a weight, a text term meets an encoder without text tower or a frozen real path, or
            ``patch_layer`` is no block of the tower; if the temperature is not positive, or a learnable one below 0.01.
    """

    batch_contrastive = True

    def __init__(
        self,
        encoder: ImageEncoder,
        loss: Literal["info_nce", "sigmoid"] = "info_nce",
        temperature: float = 0.07,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        alignment_weight: float = 1.0,
        cosine_weight: float = 0.0,
        generated_text_weight: float = 0.0,
        real_text_weight: float = 0.0,
        patch_weight: float = 0.0,
        patch_cosine_weight: float = 0.0,
        patch_layer: int = -2,
        contrastive_chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps, allow_small_negatives)
        weights = {"alignment": alignment_weight, "cosine": cosine_weight, "generated_text": generated_text_weight}
        self.reads_pooled = max(*weights.values(), real_text_weight) > 0
        self.reads_patches = max(patch_weight, patch_cosine_weight) > 0
        weights.update(patch=patch_weight, patch_cosine=patch_cosine_weight)
        self.weights = {**weights, "real_text": real_text_weight}
        if min(self.weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(
                f"No weight may be negative, and one of {', '.join(weights)} must be above 0: {self.weights}."
            )
        if generated_text_weight or real_text_weight or self.has_texts:
            require_text(self.encoder, "generated_text_weight and real_text_weight are of images and captions")
        if real_text_weight and self.encoder.real_path == "frozen":
            raise ValueError("real_text_weight needs real_path: projected or adapted; a frozen real path cannot train.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive.")
        if learnable_temperature and loss == "info_nce" and temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature={temperature}: a learnable one is held at {LOWEST_TEMPERATURE} or above. Give such a "
                "one, or learnable_temperature: false."
            )
        if symmetric and loss != "info_nce":
            raise ValueError("symmetric=True belongs to loss: info_nce; the sigmoid form is symmetric as it is.")
        self.loss, self.symmetric, self.patch_layer = loss, symmetric, patch_layer
        last_block = block_number(self.encoder, patch_layer, "patch_layer") if self.reads_patches else -1
        if not self.reads_pooled:
            if self.encoder.generated_projection is not None:
                raise ValueError(
                    "A projection acts on pooled features, and no term on these has a weight: leave it out."
                )
            self.encoder.freeze_behind(last_block)  # no loss reaches what lies behind the patch tokens
        self.contrastive_chunk_size = contrastive_chunk_size
        learnable = learnable_temperature and (alignment_weight > 0 or patch_weight > 0)
        #: What a temperature is that does not train: a number, which nobody has to read from a device.
        self.temperature = None if learnable else float(torch.tensor(math.log(temperature)).exp())
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(-10.0), requires_grad=learnable and loss == "sigmoid")

    @staticmethod
    def route_plain(encoder: ImageEncoder) -> ModalityEncoder:
        """A plain encoder gets LoRA."""
        return ModalityEncoder(encoder, branch=LoRA())

    @property
    def pretrained(self) -> bool:
        """An aligner without a checkpoint is untrained, whatever its base knows."""
        return False

    @property
    def has_texts(self) -> bool:
        """Whether captions are read: by a text term, or by the recall of an evaluation."""
        return self.encoder.text_spec is not None

    @property
    def input_spec(self) -> InputSpec:
        """Pixels, and the captions where the encoder has a text tower."""
        texts = {"text": self.encoder.text_spec} if self.has_texts else {}
        return InputSpec(image=self.encoder.image_spec, texts=texts)

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Alignment of the batch's pairs, and the text terms that have a weight."""
        is_generated, is_real = paired_rows(batch)
        ids = batch["image_id"][is_real]
        pairs: dict[str, tuple[Tensor, Tensor]] = {}  # generated and real
        for name, features in self.read(batch, self.contrastive_chunk_size).items():
            real = features[is_real].detach() if self.encoder.real_path == "frozen" else features[is_real]
            pairs[name] = features[is_generated], real  # a detached teacher: no collective in the backward

        terms: dict[str, Callable[[], Tensor]] = {
            "alignment": lambda: self._alignment(*pairs["pooled"], ids),
            "cosine": lambda: _cosine_distance(*pairs["pooled"]),
            "generated_text": lambda: self._text_term(pairs["pooled"][0], batch["text"][is_generated], ids),
            "real_text": lambda: self._text_term(pairs["pooled"][1], batch["text"][is_real], ids),
            "patch": lambda: self._alignment(*pairs["patch"], ids),
            "patch_cosine": lambda: _cosine_distance(*pairs["patch"]),
        }
        losses = {name: terms[name]() for name, weight in self.weights.items() if weight}
        total = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **losses}

    def read(self, batch: ImageTextBatch, chunk_size: int | None = None) -> dict[str, Tensor]:
        """What the terms need of a batch's images: ``pooled`` features (B, D), and the mean ``patch`` token (B, W).

        Both come out of one pass.

        Raises:
            ValueError: If features are cached in place of pixels where patch tokens are needed: a store's are pooled.
        """
        if not self.reads_patches:
            return {"pooled": self.encode_images(batch, chunk_size)}
        if "image_features" in batch or "image_token_ids" in batch:
            raise ValueError("The patch terms need the pixels of every row: give the data sets without their store.")

        def see(tower: ImageTower, image: Tensor) -> Tensor:
            if not self.reads_pooled:
                return tower.image_tokens(image, layer=self.patch_layer).mean(dim=1)
            pooled, tokens = tower.image_features_and_tokens(image, layer=self.patch_layer)
            return torch.cat([pooled.float(), tokens.mean(dim=1).float()], dim=1)  # side by side through the chunks

        found = self.encoder.route(see, batch["image"], image_index(batch), chunk_size)
        width = self.encoder.embed_dim if self.reads_pooled else 0
        return {"patch": found[:, width:], **({"pooled": found[:, :width]} if self.reads_pooled else {})}

    def _alignment(self, generated: Tensor, real: Tensor, ids: Tensor) -> Tensor:
        temperature = self.log_temperature.exp() if self.temperature is None else self.temperature
        if self.loss == "sigmoid":
            return sigmoid_loss(generated, real, 1.0 / temperature, self.bias, ids=ids)
        return alignment_loss(generated, real, temperature=temperature, ids=ids, symmetric=self.symmetric)

    def after_step(self) -> None:
        """Holds a learned temperature where CLIP's cap of the scale would; SigLIP's has none."""
        super().after_step()
        if self.log_temperature.requires_grad and self.loss == "info_nce":
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))

    def _text_term(self, image_features: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            text_features = self.encoder.encode_text(text)
            scale, bias = self.encoder.logit_scale, self.encoder.logit_bias
        return contrastive_loss(image_features, text_features, scale, bias, ids=ids)

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """The gap, also of the patch tokens where these are trained, and with a text tower the image-text recall."""
        built: dict[str, Metric] = {"gap": ModalityGap()}
        if self.reads_patches:
            built["patch_gap"] = ModalityGap(prefix="patch_")
        if self.has_texts:
            built.update({name: ImageTextRecall(prefix=f"{name}_") for name in ("real", "generated")})
        return built

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Real rows go through the real path, generated rows through the adapted branch."""
        found = self.read(batch)
        features = found["pooled"] if "pooled" in found else self.encode_images(batch)
        metrics["gap"].update(features, batch["modality"], batch["image_id"])
        if self.reads_patches:
            metrics["patch_gap"].update(found["patch"], batch["modality"], batch["image_id"])
        if not self.has_texts:
            return
        update_recall(metrics, features, self.encoder.encode_text(batch["text"]), batch)


def _cosine_distance(generated: Tensor, real: Tensor) -> Tensor:
    return 1.0 - F.cosine_similarity(generated.float(), real.float()).mean()
