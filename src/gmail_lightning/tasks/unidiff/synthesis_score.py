"""How good a generator's images are, in the eyes of an encoder that nothing here trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

from gmail_lightning.metrics.generation import GenerationScore
from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.generative import ImageGenerator
from gmail_lightning.tasks.image_generation import as_bytes, features_of_bytes

Stage = Literal["val", "test"]


class SynthesisScore(nn.Module):
    """Makes an image for each caption of an evaluation set, with fixed seeds, and scores it.

    KID and CMMD compare the images with the real ones of the set, both at the generator's size, and CLIPScore with
    their captions; all on features of ``scorer``. The usual figures are on Inception's (KID) and on those of CLIP
    ViT-L/14 at 336 pixels (CMMD): compare such only with others of the same scorer. FID is torchmetrics', on Inception;
    it is biased below some 10,000 images, so compare equal numbers alone. Images that the generator's safety checker
    flags are left out, and counted: ``scorer_num_flagged``.

    Args:
        scorer: A CLIP other than the one that is trained.
        num_images: For the real ones among so many first rows of each set; None: for every real row.
        stages: ``val`` and ``test``, or ``test`` alone.
        eval_sets: Names of the sets that images are made for; None: of all.
        fid_weights: File of Inception's weights as torch-fidelity publishes them, for FID.

    Raises:
        ValueError: If ``num_images`` is below 2. In an evaluation, if ``fid_weights`` is no file.
        ModuleNotFoundError: In an evaluation, if ``fid_weights`` is given and torch-fidelity is not installed.
    """

    def __init__(
        self,
        scorer: DualEncoder,
        num_images: int | None = None,
        stages: Sequence[Stage] = ("test",),
        eval_sets: Sequence[str] | None = None,
        fid_weights: str | None = None,
    ) -> None:
        super().__init__()
        if num_images is not None and num_images < 2:
            raise ValueError(f"num_images={num_images}: a distance between two sets needs at least 2 of each.")
        self.scorer, self.num_images, self.stages = scorer.requires_grad_(False).eval(), num_images, tuple(stages)
        self.eval_sets = None if eval_sets is None else tuple(eval_sets)
        self.fid_weights = fid_weights
        self.inception: Any = None  # read when it is needed

    def train(self, mode: bool = True) -> SynthesisScore:
        """Stays in eval mode."""
        return super().train(False)

    def build_metrics(self, eval_set: str, stage: Stage) -> dict[str, Metric]:
        """What ``update`` fills for a set: ``scorer_kid``, ``scorer_cmmd``, ``scorer_clip_score``, and ``fid``."""
        if stage not in self.stages or not (self.eval_sets is None or eval_set in self.eval_sets):
            return {}
        built: dict[str, Metric] = {"score": GenerationScore(prefix="scorer_")}
        built["flagged"] = cast(Metric, MetricCollection({"scorer_num_flagged": SumMetric()}))
        if self.fid_weights is not None:
            self.inception = self.inception or _inception(self.fid_weights)
            built["fid"] = _fid(self.inception)
        return built

    @torch.no_grad()
    def update(
        self,
        metrics: Mapping[str, Any],
        generator: ImageGenerator,
        real: Tensor,
        captions: list[str],
        row_ids: Tensor,
    ) -> None:
        """Adds a batch to what ``build_metrics`` gave.

        Args:
            metrics: By their names there; others are left alone.
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
            metrics["score"].update(empty, empty, empty)
            metrics["flagged"].update(0.0)
            return
        found = generator.generate([captions[i] for i in chosen], [seeds[i] for i in chosen])
        if not torch.isfinite(found.image).all():
            raise RuntimeError("The generator made images that are not finite: the training has diverged.")
        shown = [at for at, flagged in enumerate(found.flagged) if not flagged]  # a flagged one is black
        metrics["flagged"].update(float(len(chosen) - len(shown)))
        generated, taken = as_bytes(found.image[shown].to(real.device)), as_bytes(real[[chosen[at] for at in shown]])
        text = self.scorer.text_spec.encode([captions[chosen[at]] for at in shown]).to(real.device)
        with torch.autocast(real.device.type, enabled=False):  # figures that no precision of the training changes
            metrics["score"].update(
                features_of_bytes(self.scorer, generated),
                features_of_bytes(self.scorer, taken),
                self.scorer.encode_text(text).float(),
            )
            if "fid" in metrics and shown:
                metrics["fid"].update(generated, real=False)
                metrics["fid"].update(taken, real=True)


def _fid(inception: nn.Module) -> Metric:
    """FID that says nothing where a set has fewer than two images, as the other scores."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Distance(FrechetInceptionDistance):
        def compute(self) -> Any:
            least = torch.minimum(self.real_features_num_samples, self.fake_features_num_samples)
            return {"fid": super().compute()} if least >= 2 else {}

    return cast(Metric, Distance(inception))


def _inception(weights: str) -> nn.Module:
    if not Path(weights).is_file():
        raise ValueError(
            f"fid_weights: {weights} is no file. Give pt_inception-2015-12-05-6726825d.pth, which torch-fidelity "
            "(github.com/toshas/torch-fidelity) has among its releases."
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fid_weights needs torch-fidelity: pip install 'gmail_lightning[fid]'.") from error
    network.num_features = 2048
    return network
