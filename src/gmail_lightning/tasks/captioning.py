"""``CaptioningTask``: a captioner on image features of either modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric

from gmail_lightning.metrics import CaptionStatistics, CocoCaptionScore, MultipleChoice
from gmail_lightning.metrics.captioning.coco_score import JAVA_METRICS
from gmail_lightning.models import Captioner, ImageEncoder, PooledFeatures
from gmail_lightning.models.branches.fingerprint import frozen_weights, weights_difference
from gmail_lightning.tasks.accumulation import TokenMean
from gmail_lightning.tasks.encoder_task import EncoderTask, frozen_router, reaching, require_text
from gmail_lightning.tasks.results import EvaluationResult
from gmail_lightning.types import CaptionIds, ImageTextBatch, InputSpec, Modality, PromptIds

PREFIXES = {Modality.REAL: "", Modality.GENERATED: "generated_"}


class CaptioningTask(EncoderTask):
    """Trains a captioner on images of either modality, each seen through its branch, and tests it on real ones.

    The step of GMAIL (arXiv 2602.15368) that follows the alignment: the captioner reads generated images through the
    aligned branch, and real images through the frozen one. Both towers stay as they are. Rows count by their ``weight``
    where a data set has weights (``ManifestDataset``, ``TarShards``). A step is the mean over all its tokens, those of
    all ranks and of all micro-batches of ``accumulate_grad_batches``: 8 devices and 8 micro-batches come to the same.
    Evaluation writes captions by beam search and scores those of real and, as ``generated_...``, of generated images
    apart.

    Args:
        encoder: A ``ModalityEncoder`` with ``aligned``, or the plain encoder, which is frozen.
        captioner: What writes; its ``reader`` says what it sees of an image.
        text_noise: Train on the captions' own text features in place of image features, with Gaussian noise of this
            variance per component, 0.016 in CapDec (arXiv 2211.00575): the rival that needs no image in training. All
            features are then brought to unit norm.
        label_smoothing: Share of the target spread over the vocabulary (DeCap: 0.1).
        metrics: Of ``CocoCaptionScore``. What needs minutes of Java (``meteor``, ``spice``) is left to ``test`` and
            ``validate``.
        num_beams: Width of the beam search.
        max_new_tokens: Longest caption that is written.
        length_penalty: Captions are ranked by log-probability / length ** length_penalty.
        min_unique_captions: An evaluation with a smaller share of different captions warns of a collapse.
        java_timeout: Seconds that the Java tools of one evaluation set and modality may take together. Other ranks wait
            so long, and the process group gives up after 1,800 seconds unless told otherwise (NCCL's own 600 do not
            apply: Lightning sets its limit). SPICE of thousands of images needs more than the default at its first
            run.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        learning_rates: See ``BaseTask``.

    Raises:
        ValueError: If a setting is out of its range or the captioner reads features of another width; or if
            ``text_noise`` meets an encoder without text tower, a captioner of patch tokens, or adapters that train.
    """

    route_plain = staticmethod(frozen_router)
    uses_weights = True
    writes_captions = True
    evaluation_only = frozenset(
        {"metrics", "num_beams", "max_new_tokens", "length_penalty", "min_unique_captions", "java_timeout"}
    )

    def __init__(
        self,
        encoder: ImageEncoder,
        captioner: Captioner,
        text_noise: float | None = None,
        label_smoothing: float = 0.0,
        metrics: Sequence[str] = ("bleu", "rouge", "cider"),
        num_beams: int = 5,
        max_new_tokens: int = 67,
        length_penalty: float = 1.0,
        min_unique_captions: float = 0.1,
        java_timeout: float = 300.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps, learning_rates=learning_rates)
        for name, value, least, most in (
            ("num_beams", num_beams, 1, math.inf),
            ("max_new_tokens", max_new_tokens, 1, math.inf),
            ("text_noise", text_noise or 0.0, 0, math.inf),
            ("label_smoothing", label_smoothing, 0, 1),
            ("min_unique_captions", min_unique_captions, 0, 1),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name}={value} is out of range: from {least} to {most}.")
        CocoCaptionScore(metrics, timeout=java_timeout)  # refuses unknown names now, not after the first epoch
        self.captioner, self.reader = captioner, captioner.reader
        last_block = self.reader.last_block(self.encoder)
        if last_block is not None:
            self.encoder.freeze_behind(last_block)
        self.trained_adapters = [p for _, p in self.encoder.image_adapters() if p.requires_grad]
        self._check(text_noise)
        self.text_noise, self.label_smoothing = text_noise, label_smoothing
        self.score_names, self.min_unique_captions = list(metrics), min_unique_captions
        self.java_timeout = java_timeout
        self.num_beams, self.max_new_tokens, self.length_penalty = num_beams, max_new_tokens, length_penalty
        self._frozen: tuple[frozenset[str], dict[str, list[float]]] | None = None  # names, and what they hold
        self._accumulated = TokenMean()

    def _check(self, text_noise: float | None) -> None:
        name, encoder = type(self.captioner).__name__, type(self.encoder.plain).__name__
        width = self.reader.width(self.encoder)
        if None not in (width, self.captioner.image_dim) and self.captioner.image_dim != width:
            raise ValueError(
                f"{name}(image_dim={self.captioner.image_dim}), but {encoder} gives features of width {width}: set "
                f"image_dim: {width}."
            )
        if text_noise is None:
            return
        require_text(self.encoder, "text_noise trains on text features in place of image features")
        if self.trained_adapters:
            raise ValueError("text_noise trains on texts, which reach no adapter: leave train_adapters out.")
        if not isinstance(self.reader, PooledFeatures):
            raise ValueError(
                f"text_noise trains on text features: it needs a captioner of pooled features, not {name}."
            )

    @property
    def pretrained(self) -> bool:
        """Of the captioner; the encoder's features mean nothing to a new one."""
        return self.captioner.pretrained and self.encoder.pretrained

    @property
    def input_spec(self) -> InputSpec:
        """Pixels, and captions and questions as ids of the captioner."""
        texts = {} if self.text_noise is None else {"text": self.encoder.text_spec}
        return InputSpec(self.encoder.image_spec, texts, captions=self.captioner.caption_spec)

    def setup(self, stage: str) -> None:
        """Forgets what an earlier run found of the frozen captioner."""
        super().setup(stage)
        self._frozen = None

    def on_fit_start(self) -> None:
        """Switches the captioner's dropout on: models of Hugging Face come in eval mode, and Lightning keeps modes."""
        super().on_fit_start()
        self._accumulated = TokenMean()
        self.captioner.train()

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Negative log-likelihood of the captions, weighted by row where the data have weights; how many were cut."""
        if self.text_noise is None:
            features = self.encode_images(batch)
        else:
            with torch.no_grad():
                features = F.normalize(self.encoder.encode_text(batch["text"]).float(), dim=-1)
                features = F.normalize(features + self.text_noise**0.5 * torch.randn_like(features), dim=-1)
        loss = self.captioner.loss(
            features,
            self._caption_ids(batch),
            weight=batch.get("weight"),
            label_smoothing=self.label_smoothing,
        )
        if self.trained_adapters:  # a batch of real rows alone does not pass them
            loss = reaching(loss, self.trained_adapters)
        cut = self.captioner.truncated
        return {"loss": loss, **({"truncated": torch.tensor(float(cut))} if cut else {})}

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """One micro-batch; where gradients accumulate it counts by its tokens, as in one batch of them all."""
        self.captioner.tokens = None
        loss = super().training_step(batch, batch_idx)
        if self.trainer.accumulate_grad_batches == 1:
            return loss
        if self.captioner.tokens is None:
            raise MisconfigurationException(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} needs to know the tokens of every "
                f"micro-batch, and {type(self.captioner).__name__}.loss does not set self.tokens: set it to "
                "losses.counted_tokens(labels, weight)."
            )
        return self._accumulated.weigh(loss, self.captioner.tokens)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Brings accumulated gradients to the mean over all their tokens, before they are clipped."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self._accumulated.divide(parameters, self.trainer.accumulate_grad_batches)

    def _caption_ids(self, batch: ImageTextBatch) -> CaptionIds:
        """Made in the worker; of a batch made by hand, or for evaluation, here."""
        return batch if "caption_labels" in batch else self.captioner.encode(batch["caption"], batch.get("question"))

    def _prompt_ids(self, batch: ImageTextBatch) -> PromptIds:
        """Made in the worker; of a batch made by hand, or for training, here."""
        if "prompt_ids" in batch:
            return batch
        return self.captioner.encode_questions(batch.get("question", [""] * len(batch["modality"])))

    def write(self, batch: ImageTextBatch) -> list[str]:
        """Captions of a batch, one per row."""
        features = self.encode_images(batch)
        return self.captioner.generate(
            features if self.text_noise is None else F.normalize(features.float(), dim=-1),
            self._prompt_ids(batch),
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            length_penalty=self.length_penalty,
        )

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Caption scores and statistics, of each modality; accuracy where the data ask multiple choice questions."""
        fits = self.trainer.state.fn == TrainerFn.FITTING
        names = [name for name in self.score_names if not (fits and name in JAVA_METRICS)]  # minutes of Java
        built: dict[str, Metric] = {}
        for which, prefix in PREFIXES.items():
            if names:
                scores = CocoCaptionScore(names, prefix=prefix, timeout=self.java_timeout)
                built[f"{which.name.lower()}_scores"] = scores
            built[f"{which.name.lower()}_statistics"] = CaptionStatistics(prefix)
            built[f"{which.name.lower()}_choices"] = MultipleChoice(prefix)
        return built

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Writes the captions of a batch and adds them to the scores of their modality."""
        captions = self.result_of(batch.get("eval_set", "eval")).captions = self.write(batch)
        for which in Modality:
            rows = (batch["modality"] == which).nonzero().flatten()
            written = [captions[row] for row in rows.tolist()]
            references = [batch["references"][row] for row in rows.tolist()]
            name, ids = which.name.lower(), batch["row_id"][rows]
            if f"{name}_scores" in metrics:
                metrics[f"{name}_scores"].update(written, references, ids=ids)
            metrics[f"{name}_statistics"].update(written, ids=ids)
            questions = batch.get("question", [""] * len(batch["modality"]))
            asked = [i for i, row in enumerate(rows.tolist()) if questions[row]]
            metrics[f"{name}_choices"].update(
                [written[i] for i in asked], [references[i][0] for i in asked], ids=ids[asked]
            )

    def predict_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Captions of a batch: ``caption`` (B,), ``image_id`` (B,) and ``sample_key``."""
        return {"caption": self.write(batch), "image_id": batch["image_id"], "sample_key": batch["sample_key"]}

    def complete_result(self, name: str, result: EvaluationResult, metrics: Mapping[str, Any]) -> None:
        """Adds what could not be computed and what split the captions; warns where they are too much alike."""
        super().complete_result(name, result, metrics)
        scores = [part for part in metrics.values() if isinstance(part, CocoCaptionScore)]
        result.reasons = {k: reason for score in scores for k, reason in score.reasons.items()}
        used = {score.tokenizer_used for score in scores if score.tokenizer_used}
        result.tokenizer = " and ".join(sorted(used)) or None
        for which, prefix in PREFIXES.items():
            unique = result.values.get(f"{prefix}unique_captions", 1.0)
            if unique < self.min_unique_captions and not self.trainer.sanity_checking:
                rank_zero_warn(
                    f"{name}: only {unique:.1%} of the captions of {which.name.lower()} images differ from one "
                    f"another (min_unique_captions={self.min_unique_captions}), and they have "
                    f"{result.values[f'{prefix}mean_length']:.1f} words on average. The captioner ignores its "
                    "images: train longer, at another rate, or with a warm-up."
                )

    def _frozen_captioner(self) -> dict[str, list[float]]:
        """What the captioner has frozen and the checkpoint leans on; computed once, it does not change."""
        names = frozenset(name for name, p in self.captioner.named_parameters() if not p.requires_grad)
        if self._frozen is None or self._frozen[0] != names:
            self._frozen = names, frozen_weights(self.captioner)
        return self._frozen[1]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what writing depends on and the trained tensors do not show."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["captioner"] = {
            "settings": self.captioner.describe(),
            "frozen": self._frozen_captioner(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a captioner that would write otherwise than the one that was trained."""
        super().on_load_checkpoint(checkpoint)
        recorded = checkpoint.get("captioner", {"settings": {}, "frozen": {}})
        here = self.captioner.describe()
        for name, value in recorded["settings"].items():
            if here.get(name) != value:
                raise MisconfigurationException(
                    f"The captioner of the checkpoint was trained with {name}={value!r}, and here it is "
                    f"{here.get(name)!r}. Give the setting that it was trained with."
                )
        difference = weights_difference(recorded["frozen"], self._frozen_captioner())
        if difference is not None:
            raise MisconfigurationException(
                f"The checkpoint was trained on another frozen language model: {difference}. Give that one."
            )
