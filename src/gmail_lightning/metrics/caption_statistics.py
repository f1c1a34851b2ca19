"""What shows a captioner that collapses: the same caption for every image, or captions without end."""

from __future__ import annotations

import hashlib

from torch import Tensor

from gmail_lightning.metrics.states import RowMetric


class CaptionStatistics(RowMetric):
    """Share of different captions, and their mean length in words.

    A captioner that ignores its images writes one caption for all (rmokady/CLIP_prefix_caption#59), and its loss looks
    well. Capital letters and white space make no difference.

    Args:
        prefix: Put before the name of every value.
    """

    higher_is_better = True

    def update(self, captions: list[str], ids: Tensor | None = None) -> None:
        """Adds captions, one per image, and ids, shape (B,), by which images are told apart.

        An id that comes twice, as where ranks share a last batch, counts once. Without ids every caption counts.

        Raises:
            ValueError: If there are not as many ids as captions.
        """
        if ids is not None and len(ids) != len(captions):
            raise ValueError(f"{len(ids)} ids for {len(captions)} captions: give one for each.")
        split = [caption.lower().split() for caption in captions]
        self.add_rows([(_number(words), len(words)) for words in split], ids)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``unique_captions``, in (0, 1], and ``mean_length``; nothing where no caption came.

        Raises:
            ValueError: If an id came with different captions, or some captions have an id and others none.
        """
        rows = self.distinct_rows()
        if len(rows) == 0:
            return {}
        hashes, words = rows.unbind(1)
        values = {
            "unique_captions": hashes.new_tensor(len(hashes.unique())) / len(hashes),
            "mean_length": words.double().mean(),
        }
        return {self.prefix + name: value.float() for name, value in values.items()}


def _number(words: list[str]) -> int:
    """A hash of a caption that is the same in every process."""
    digest = hashlib.sha256(" ".join(words).encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
