"""``JointTask``: a CLIP and a diffusion model under one roof, and the evaluation of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection

from gmail_lightning.losses.diffusion import denoising_errors
from gmail_lightning.metrics import FeatureSpread, ImageTextRecall, ZeroShotAccuracy
from gmail_lightning.metrics.retrieval import full_precision
from gmail_lightning.models import DualEncoder
from gmail_lightning.models.averaging import EarlierWeights
from gmail_lightning.models.branches.adapters import adapter_ids
from gmail_lightning.models.encoders.conversion import clip_text_model
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.objective import DenoisingObjective
from gmail_lightning.models.generators.shared_text import share_text_tower
from gmail_lightning.models.generators.tuning import require_tunable
from gmail_lightning.tasks.classification import class_embeddings
from gmail_lightning.tasks.encoder_task import EncoderTask, require_text
from gmail_lightning.tasks.image_generation import TunesPipeline
from gmail_lightning.tasks.retrieval import update_recall
from gmail_lightning.tasks.unidiff.synthesis_score import SynthesisScore
from gmail_lightning.types import Classes, ImageTextBatch, InputSpec, Modality

VIEW = "diffusion_image"  # of the picture that the diffusion model is trained on


class JointTask(TunesPipeline, EncoderTask):
    """A CLIP and a diffusion model that read the same pictures, each at its size, and may share a text tower.

    Evaluation gives retrieval and the denoising loss, but of sets whose captions only name classes; zero-shot accuracy
    on the sets that have classes; the spread of both towers' features and their drift from the encoder as it was; as
    ``interpolated_``, retrieval and accuracy of weights half way between that encoder and this, unless it trains
    adapters, whose factors have no such middle. With ``score`` also KID, CMMD and CLIPScore of images made for the
    captions. ``predict`` gives features of pictures, and images of prompts, which ``DatasetWriter`` stores. At the end
    of training the pipeline is written to ``pipeline/`` in the run folder.

    Subclasses say what trains (``_track_earlier`` then takes note of it) and by which loss.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        generator: DiffusersGenerator,
        text_tower: Literal["shared", "separate"],
        min_snr_gamma: float | None,
        score: SynthesisScore | None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps, allow_small_negatives, learning_rates)
        require_text(self.encoder, f"{type(self).__name__} reads images and captions")
        require_tunable(generator, type(self).__name__)
        if text_tower not in ("shared", "separate"):
            raise ValueError(f"text_tower={text_tower!r}: use 'shared' or 'separate'.")
        self.generator, self.text_tower, self.score = generator, text_tower, score
        self.objective = DenoisingObjective(generator, min_snr_gamma=min_snr_gamma)
        self.register_buffer("empty_text", generator.text_spec.encode([""]), persistent=False)
        if text_tower == "shared":
            share_text_tower(generator, self.encoder)
        #: The CLIP as it was; evaluation says how far it has moved.
        self.earlier = EarlierWeights([])
        self._classes: dict[str, Classes] = {}  # of the evaluation sets that have some
        self._embeddings: dict[str, Tensor] = {}  # of these classes, by metric, in the evaluation that is running

    def _track_earlier(self) -> None:
        """Takes note of the CLIP as it is, before it trains."""
        self.earlier = EarlierWeights(p for p in self.encoder.parameters() if p.requires_grad)

    @property
    def input_spec(self) -> InputSpec:
        """Pixels at both sizes; captions for the CLIP, which reads the pipeline's ids where its tower is shared."""
        images = {"image": self.encoder.image_spec, VIEW: self.generator.image_spec}
        if self.text_tower == "shared":
            return InputSpec(images=images, texts={"text": self.generator.text_spec})
        return InputSpec(images=images, texts={"text": self.encoder.text_spec, "prompt": self.generator.text_spec})

    @property
    def pretrained(self) -> bool:
        """False where part of the two models has random weights."""
        return self.encoder.pretrained and self.generator.pretrained

    def _read_texts(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features (B, D), what the UNet attends to (B, L, W), and the same of the empty prompt (1, L, W)."""
        empty = self.get_buffer("empty_text")
        if self.text_tower == "shared":
            features, tokens = self.encoder.text_features_and_tokens(torch.cat([batch["text"], empty]))
            return features[:-1], tokens[:-1], tokens[-1:]
        tokens = self.generator.encode_text(torch.cat([cast(Any, batch)["prompt"], empty]))
        return self.encoder.encode_text(batch["text"]), tokens[:-1], tokens[-1:]

    def _pixels(self, batch: ImageTextBatch) -> Tensor:
        pixels = cast(Any, batch).get(VIEW)
        if pixels is None or len(pixels) != len(batch["modality"]):
            raise MisconfigurationException(
                "UniDiffTask needs the pixels of every row: give the data sets without a store of features or tokens."
            )
        return cast(Tensor, pixels)

    # Evaluation

    def setup(self, stage: str) -> None:
        """Refuses a ``score`` of a set that there is not.

        Raises:
            MisconfigurationException: Naming it and those that there are.
        """
        super().setup(stage)
        sets = getattr(getattr(self.trainer, "datamodule", None), "eval_sets", None) or {}
        known = {name for names in sets.values() for name in names}
        asked = () if self.score is None else self.score.eval_sets or ()
        if known and (unknown := sorted(set(asked) - known)):
            raise MisconfigurationException(
                f"score.eval_sets: no set is called {', '.join(unknown)}: there is {', '.join(sorted(known))}."
            )

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Of both abilities, and of what the features have become."""
        built: dict[str, Metric] = {
            "image_spread": FeatureSpread(self.encoder.embed_dim, prefix="image_"),
            "text_spread": FeatureSpread(self.encoder.embed_dim, prefix="text_"),
        }
        data: Any = getattr(self.trainer, "datamodule", None)
        has_captions = not hasattr(data, "has_captions") or data.has_captions(eval_set)
        if has_captions:
            built["real"], built["generated"] = ImageTextRecall(), ImageTextRecall(prefix="generated_")
            built["denoising"] = cast(Metric, MetricCollection({"denoising_loss": MeanMetric()}))
        if hasattr(data, "has_classes") and data.has_classes(eval_set):
            self._classes[eval_set] = data.classes(eval_set)
            built["zero_shot"] = ZeroShotAccuracy(len(self._classes[eval_set].names))
        adapters = adapter_ids(self.encoder)
        if self.earlier.parameters and not any(id(p) in adapters for p in self.earlier.parameters):
            if has_captions:
                built["interpolated"] = ImageTextRecall(prefix="interpolated_")
            if "zero_shot" in built:
                classes = len(self._classes[eval_set].names)
                built["interpolated_zero_shot"] = ZeroShotAccuracy(classes, prefix="interpolated_")
        if self.score is not None:
            built |= self.score.build_metrics(eval_set, "test" if self.trainer.testing else "val")
        return built

    def on_validation_epoch_start(self) -> None:
        """Forgets the class embeddings of the last evaluation."""
        super().on_validation_epoch_start()
        self._embeddings = {}
        self.earlier.to(self.device)

    def on_test_epoch_start(self) -> None:
        """As ``on_validation_epoch_start``."""
        super().on_test_epoch_start()
        self._embeddings = {}
        self.earlier.to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Takes the weights of before off the device."""
        super().on_validation_epoch_end()
        self.earlier.to("cpu")

    def on_test_epoch_end(self) -> None:
        """As ``on_validation_epoch_end``."""
        super().on_test_epoch_end()
        self.earlier.to("cpu")

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds images and all their captions, or the first, where captions name classes."""
        images, real = self.encode_images(batch), batch["modality"] == Modality.REAL
        first = torch.searchsorted(batch["text_row"], torch.arange(len(images), device=images.device))
        if "real" in metrics:
            texts = self.encoder.encode_text(batch["text"])
            update_recall(metrics, images, texts, batch, same_texts=True)
            texts = texts[first]
        else:
            texts = self.encoder.encode_text(batch["text"][first])
        with self.earlier.swapped_in():
            earlier = self.encode_images(batch)[real], self.encoder.encode_text(batch["text"][first])[real]
        metrics["image_spread"].update(images[real], earlier[0])
        metrics["text_spread"].update(texts[real], earlier[1])
        self._update_zero_shot(metrics, "zero_shot", images[real], batch)
        self._update_interpolated(metrics, batch)
        pixels = self._pixels(batch)
        if "denoising" in metrics:
            self._update_denoising(metrics["denoising"], pixels, batch, first)
        if self.score is not None and "score" in metrics:
            rows = real.nonzero().squeeze(1)
            captions = [batch["caption"][row] for row in rows.tolist()]
            self.score.update(metrics, self.generator, pixels[rows], captions, batch["row_id"][rows])

    def _update_zero_shot(self, metrics: Mapping[str, Any], name: str, images: Tensor, batch: ImageTextBatch) -> None:
        """Adds the real images to the accuracy of this name, if the set has classes."""
        if name not in metrics:
            return
        eval_set, real = batch["eval_set"], batch["modality"] == Modality.REAL
        key = f"{eval_set}/{name}"
        if key not in self._embeddings:
            self._embeddings[key] = class_embeddings(self.encoder, self._classes[eval_set], self.device)
        with full_precision(images.device):
            metrics[name].update(F.normalize(images.float(), dim=-1) @ self._embeddings[key].T, batch["label"][real])

    def _update_interpolated(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        if not {"interpolated", "interpolated_zero_shot"} & metrics.keys():
            return
        real, owner = batch["modality"] == Modality.REAL, batch["text_row"]
        with self.earlier.interpolated():
            images = self.encode_images(batch)[real]
            self._update_zero_shot(metrics, "interpolated_zero_shot", images, batch)
            if "interpolated" in metrics:
                ids, of_real = batch["row_id"], real[owner]
                texts = self.encoder.encode_text(batch["text"])[of_real]
                metrics["interpolated"].update(images, ids[real], texts, ids[owner[of_real]])

    def _update_denoising(self, metric: Any, pixels: Tensor, batch: ImageTextBatch, first: Tensor) -> None:
        """The loss of each row at a timestep and noise that depend on the row alone, so that values compare."""
        noised = self.objective.noise_of_rows(self.generator.encode_pixels(pixels), batch["row_id"].tolist())
        if self.text_tower == "shared":
            context = self.encoder.text_tokens(batch["text"][first])
        else:
            context = self.generator.encode_text(cast(Any, batch)["prompt"][first])
        prediction = self.objective.denoise(noised, context).prediction
        metric.update(denoising_errors(prediction, noised.target))

    # Images

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """An image for each prompt of a ``PromptDataModule``; of pictures their features, as ``EncoderTask``."""
        kind = TunesPipeline if "seed" in batch else EncoderTask
        return kind.predict_step(self, batch, batch_idx)

    def image_scorer(self) -> DualEncoder | None:
        """That of ``score``."""
        return None if self.score is None else self.score.scorer

    def weights_of_images(self) -> Iterable[tuple[str, Tensor]]:
        """Of both models."""
        return chain(self.encoder.named_parameters(), super().weights_of_images())

    def text_encoder_to_write(self) -> nn.Module | None:
        """The CLIP's, where the pipeline reads through it."""
        return clip_text_model(cast(DualEncoder, self.encoder.plain)) if self.text_tower == "shared" else None
