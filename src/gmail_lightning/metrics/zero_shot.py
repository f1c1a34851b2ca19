"""Accuracy of zero-shot classification: overall, per class, top 5."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from gmail_lightning.metrics.retrieval import TIE


class ZeroShotAccuracy(Metric):
    """Accuracy from the logits of all classes, such as cosines of an image with the embeddings of the class names.

    Where the true class ties with others, within 1e-6 of the largest logit, the hit is shared evenly among them, which
    is what a random order would give: a classifier that says the same of every class scores at chance and not 1.

    Args:
        num_classes: C.
        prefix: Put before the name of every value.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    hits5: Tensor
    count: Tensor

    def __init__(self, num_classes: int, prefix: str = "") -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: classification needs at least two.")
        self.num_classes, self.prefix = num_classes, prefix
        self._per_class: Tensor | None = None
        for name, dtype in (("hits", torch.float64), ("hits5", torch.float64), ("count", torch.int64)):
            self.add_state(name, default=torch.zeros(num_classes, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Adds images: logits (B, C) and the number of the true class (B,), each image once.

        Raises:
            ValueError: If the shapes disagree, a label is out of range, or a logit is not finite.
        """
        if logits.shape != (len(label), self.num_classes) or label.ndim != 1:
            raise ValueError(
                f"Expected logits (B, {self.num_classes}) and labels (B,), got {tuple(logits.shape)} and "
                f"{tuple(label.shape)}."
            )
        if len(label) == 0:
            return
        if label.min() < 0 or label.max() >= self.num_classes:
            raise ValueError(
                f"Labels in [{label.min()}, {label.max()}], but there are {self.num_classes} classes, numbered from 0: "
                "give the class names of this very data set."
            )
        logits = logits.detach().float()
        if not torch.isfinite(logits).all():
            raise ValueError(f"The logits of {int((~torch.isfinite(logits)).any(dim=1).sum())} images are not finite.")
        above = logits - logits.gather(1, label[:, None])  # (B, C)
        tie = TIE * logits.abs().amax(dim=1, keepdim=True)
        better = (above > tie).sum(dim=1)
        tied = (above >= -tie).sum(dim=1) - better  # the true class too
        for k, hits in ((1, self.hits), (5, self.hits5)):
            hits.index_add_(0, label, ((k - better) / tied).clamp(0, 1).to(hits.dtype))
        self.count += label.bincount(minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Scalars in [0, 1]: ``accuracy``, ``mean_per_class`` over the classes with images, and ``top5`` if C > 5.

        Nothing where no image came at all, as from an evaluation set without images of a modality.
        """
        total = self.count.sum()
        self._per_class = (self.hits / self.count).float()  # NaN where there is no image
        if total == 0:
            return {}
        values = {"accuracy": self.hits.sum() / total, "mean_per_class": self._per_class.nanmean()}
        if self.num_classes > 5:
            values["top5"] = self.hits5.sum() / total
        return {self.prefix + name: value.float() for name, value in values.items()}

    def per_class(self) -> Tensor:
        """Accuracy of every class, shape (C,), NaN for a class without images; after ``reset`` that of the last set.

        Computes first where images came since; under several ranks all of them call it.
        """
        if self._update_count:
            self.compute()
        if self._per_class is None:
            raise ValueError("No image was classified yet.")
        return self._per_class
