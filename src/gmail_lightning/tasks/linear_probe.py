"""``LinearProbeTask``: a linear classifier on frozen features."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from gmail_lightning.metrics.retrieval import full_precision
from gmail_lightning.models import ImageEncoder
from gmail_lightning.tasks.classification import ClassificationTask
from gmail_lightning.tasks.encoder_task import frozen_router
from gmail_lightning.types import ImageTextBatch, InputSpec


class LinearProbeTask(ClassificationTask):
    """Logistic regression on the pooled features of a frozen image tower (as in SynCLR, arXiv 2312.17742, table 6).

    The features are normalised and multiplied by the root of their width D, so that their entries are about 1 whatever
    the encoder. Trained on generated images through the aligned branch it is tested on real ones through the frozen
    one. An evaluation set may hold some of the training classes only: it is then classified among its own.

    Args:
        encoder: A ``ModalityEncoder`` with ``aligned``, or the plain encoder, which is frozen; it needs no text tower.
            A branch that trains learns with the head, which is the rival without an alignment.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
    """

    route_plain = staticmethod(frozen_router)

    def __init__(
        self,
        encoder: ImageEncoder,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps)
        self.head: nn.Linear | None = None  # its width is that of the training classes
        self.class_names: list[str] = []
        self._head_is_new = False  # made to evaluate without a checkpoint, or until one is loaded

    @property
    def pretrained(self) -> bool:
        """A head without a checkpoint is untrained, whatever its encoder knows."""
        return False

    @property
    def input_spec(self) -> InputSpec:
        """Pixels alone; the labels come with every batch."""
        return InputSpec(image=self.encoder.image_spec)

    def setup(self, stage: str) -> None:
        """Builds the head for the training classes; a checkpoint that is loaded later brings its own."""
        if stage == "fit":
            self._build_head(self.classes_of(None).names)
        elif stage in ("validate", "test"):
            verb = "test" if stage == "test" else "val"
            sets = getattr(getattr(self.trainer, "datamodule", None), "eval_sets", {verb: ["eval"]}).get(verb)
            if not sets:
                raise MisconfigurationException(
                    f"Nothing to evaluate: the data module has no evaluation sets. Give it some under {verb}."
                )
            if self.head is None or self._head_is_new:
                self._build_head(self.classes_of(sets[0]).names)
                self._head_is_new = True
        super().setup(stage)

    def _build_head(self, class_names: list[str]) -> None:
        """Makes a head of zeros, unless there is one for these classes.

        Raises:
            MisconfigurationException: If there is one for other classes.
        """
        if self.head is not None and not self._head_is_new and class_names != self.class_names:
            raise MisconfigurationException(
                f"The head tells {len(self.class_names)} classes apart, the first is {self.class_names[0]!r}; the data "
                f"have {len(class_names)}, the first is {class_names[0]!r}. Give the data that it was trained on."
            )
        if self.head is None or self._head_is_new:
            self.head = nn.Linear(self.encoder.embed_dim, len(class_names), device=self.device)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.class_names, self._head_is_new = class_names, False

    def logits(self, batch: ImageTextBatch) -> Tensor:
        """Scores of shape (B, C) for the classes of the head, in fp32 whatever autocast says."""
        assert self.head is not None
        features = F.normalize(self.encode_images(batch).float(), dim=-1) * self.encoder.embed_dim**0.5
        with full_precision(features.device):  # of half precision, many of a thousand scores would tie
            scores: Tensor = self.head(features)
        return scores

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Cross-entropy, and the accuracy on the batch."""
        logits, label = self.logits(batch), batch["label"]
        return {"loss": F.cross_entropy(logits, label), "accuracy": (logits.argmax(-1) == label).float().mean()}

    def on_fit_start(self) -> None:
        """Compares the classes of every evaluation set with those of the head, which is restored by now."""
        super().on_fit_start()
        self._check_classes()

    def on_validation_start(self) -> None:
        """As ``on_fit_start``."""
        super().on_validation_start()
        self._check_classes()

    def on_test_start(self) -> None:
        """As ``on_fit_start``."""
        super().on_test_start()
        self._check_classes()

    def _check_classes(self) -> None:
        for eval_set in self.eval_classes:
            self._columns(eval_set)

    def _columns(self, eval_set: str) -> list[int] | None:
        """Columns of the head for the classes of an evaluation set; None where they are the head's own.

        Raises:
            MisconfigurationException: If the head was not trained on one of them, or its name stands for several.
        """
        names = self.eval_classes[eval_set].names
        if names == self.class_names:
            return None
        count, column = Counter(self.class_names), {name: number for number, name in enumerate(self.class_names)}
        unknown = [name for name in names if name not in column]
        if unknown:
            raise MisconfigurationException(
                f"{eval_set}: the probe was not trained on {len(unknown)} of {len(names)} classes, the first is "
                f"{unknown[0]!r}. The class names of training and evaluation data must match."
            )
        twice = [name for name, times in Counter(names).items() if times > 1 or count[name] > 1]
        if twice:
            raise MisconfigurationException(
                f"{eval_set}: the classes are not those of the training data in the same order, and {twice[0]!r} is "
                "the name of several, so that it is not known which is which. Give class_names without duplicates."
            )
        return [column[name] for name in names]

    def scores(self, batch: ImageTextBatch) -> Tensor:
        """The head's scores for the classes of the batch's set; see ``_columns``."""
        logits, columns = self.logits(batch), self._columns(batch["eval_set"])
        return logits if columns is None else logits[:, columns]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of the classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the head that the checkpoint holds."""
        names = checkpoint.get("class_names")
        if not names:
            raise MisconfigurationException("The checkpoint holds no linear probe: it names no classes.")
        self._build_head(list(names))
        super().on_load_checkpoint(checkpoint)
