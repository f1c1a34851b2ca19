"""What shows a captioner that collapses: the same caption for every image, or captions without end."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torchmetrics import Metric


class CaptionStatistics(Metric):
    """Share of different captions, and their mean length in words.

    A captioner that ignores its images writes one caption for all (rmokady/CLIP_prefix_caption#59), and its loss looks
    well. Capital letters and white space make no difference.

    Args:
        prefix: Put before the name of every value.
    """

    full_state_update = False
    higher_is_better = True
    captions: list[Tensor]
    words: Tensor
    count: Tensor

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.add_state("captions", default=[], dist_reduce_fx="cat")  # a hash of each
        self.add_state("words", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, captions: list[str]) -> None:
        """Adds captions, one per image."""
        split = [caption.lower().split() for caption in captions]
        digests = [hashlib.sha256(" ".join(words).encode()).digest()[:8] for words in split]
        numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
        self.captions.append(torch.tensor(numbers, dtype=torch.int64, device=self.count.device))
        self.words += sum(map(len, split))
        self.count += len(captions)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``unique_captions``, in (0, 1], and ``mean_length``; nothing where no caption came."""
        if self.count == 0:
            return {}
        hashes = torch.cat(self.captions) if isinstance(self.captions, list) else self.captions
        values = {"unique_captions": len(hashes.unique()) / self.count.double(), "mean_length": self.words / self.count}
        return {self.prefix + name: value.float() for name, value in values.items()}
