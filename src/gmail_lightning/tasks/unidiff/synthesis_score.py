"""How good a generator's images are, in the eyes of an encoder that nothing here trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.generative import ImageGenerator
from gmail_lightning.transforms.image import resize

Stage = Literal["val", "test"]


class SynthesisScore(nn.Module):
    """Makes an image for each caption of an evaluation set, with fixed seeds, and scores it.

    KID and CMMD compare the images with the real ones of the set, both at the generator's size, and CLIPScore with
    their captions; all on features of ``scorer``. The usual figures are on Inception's (KID) and on those of CLIP
    ViT-L/14 at 336 pixels (CMMD): compare such only with others of the same scorer.

    Args:
        scorer: A CLIP other than the one that is trained.
        num_images: For the real ones among so many first rows of each set; None: for every real row.
        stages: ``val`` and ``test``, or ``test`` alone.
    """

    def __init__(self, scorer: DualEncoder, num_images: int | None = None, stages: Sequence[Stage] = ("test",)) -> None:
        super().__init__()
        if num_images is not None and num_images < 2:
            raise ValueError(f"num_images={num_images}: a distance between two sets needs at least 2 of each.")
        self.scorer, self.num_images, self.stages = scorer.requires_grad_(False).eval(), num_images, tuple(stages)

    def train(self, mode: bool = True) -> SynthesisScore:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(
        self, metric: Any, generator: ImageGenerator, real: Tensor, captions: list[str], row_ids: Tensor
    ) -> None:
        """Adds a batch to a ``GenerationScore``.

        Args:
            metric: The score.
            generator: Makes the images, each with the number of its row as seed.
            real: Pixels in [0, 1], shape (B, 3, H, W).
            captions: B prompts.
            row_ids: Number of each row in its set, shape (B,).

        Raises:
            RuntimeError: If an image is not finite.
        """
        seeds = row_ids.tolist()
        chosen = [i for i, seed in enumerate(seeds) if self.num_images is None or seed < self.num_images]
        if not chosen:
            empty = real.new_zeros(0, self.scorer.embed_dim)
            metric.update(empty, empty, empty)
            return
        prompts = [captions[i] for i in chosen]
        images = generator.generate(prompts, [seeds[i] for i in chosen]).image.to(real.device)
        if not torch.isfinite(images).all():
            raise RuntimeError("The generator made images that are not finite: the training has diverged.")
        text = self.scorer.text_spec.encode(prompts).to(real.device)
        metric.update(self._features(images), self._features(real[chosen]), self.scorer.encode_text(text).float())

    def _features(self, image: Tensor) -> Tensor:
        """Of pixels in [0, 1], shape (B, 3, H, W), which are rounded to bytes as a file would hold them."""
        pixels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return self.scorer.encode_image(torch.stack([resize(one, self.scorer.image_spec) for one in pixels])).float()
