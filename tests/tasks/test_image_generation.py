"""From prompts to images with their scores; what the card makes of them."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.models.base import DualEncoder, LoRATarget
from gmail_lightning.tasks import ImageGenerationTask
from gmail_lightning.types import ImageSpec, InputSpec, PromptBatch, TextSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from generation_ranks import Captions, StubGenerator, generate


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[ord(c) for c in text.ljust(8)[:8]] for text in texts])


class Scorer(DualEncoder):
    """Colours against letters."""

    image_spec = ImageSpec((4, 4))
    text_spec = TextSpec(letters, 8)
    embed_dim = 3
    logit_scale = torch.tensor(1.0)

    def encode_image(self, image):
        assert image.shape[1:] == (3, 4, 4)
        return image.mean(dim=(2, 3)) - 0.2

    def encode_text(self, text):
        return text[:, :3].float() - 110

    def lora_targets(self, roles, tower="image"):
        return []


def batch(texts: list[str]) -> PromptBatch:
    prompts = [f"a drawing of {text}" for text in texts]
    return PromptBatch(
        shard="s", row=list(range(len(texts))), prompt=prompts, caption=texts, seed=list(range(len(texts)))
    )


def test_scores_are_those_of_image_and_caption() -> None:
    texts = ["bzn", "unsafe nan", "kca", "xyz"]
    generator = StubGenerator()
    result = ImageGenerationTask(generator, Scorer()).predict_step(batch(texts), 0)
    expected: list[float | None] = []
    for i, text in enumerate(texts):
        image = generator.draw(text, i)
        assert torch.equal(result.images.image[i].nan_to_num(7), image.nan_to_num(7))
        pixels = F.interpolate((image[None] * 255).round(), (4, 4), mode="bicubic", antialias=True)[0].round()
        ours = pixels.double().numpy().mean(axis=(1, 2)) / 255 - 0.2
        theirs = np.array([ord(c) for c in text[:3]]) - 110.0
        expected.append(2.5 * max(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs), 0))
    assert 0 in expected  # a cosine below zero counts as zero
    assert max(expected[:1] + expected[2:]) > 0.1
    assert result.clip_score[1] is None
    assert result.clip_score_reason == [None, "not finite", None, None]
    for i in (0, 2, 3):
        assert result.clip_score[i] == pytest.approx(expected[i], abs=0.02)
    assert generator.calls[0][0] == ("a drawing of bzn", 0)  # the generator reads the prompt, the scorer the caption
    assert result.images.flagged == [False, True, False, False]


def test_without_a_scorer_there_is_a_reason() -> None:
    task = ImageGenerationTask(StubGenerator())
    result = task.predict_step(batch(["x" * 50, "y"]), 0)
    assert (result.clip_score, result.clip_score_reason) == ([None, None], ["no scorer"] * 2)
    assert result.truncated == [True, False]
    assert task.input_spec == InputSpec()
    assert task.pretrained
    task.generator.pretrained = False
    assert not task.pretrained


def test_scores_go_to_the_manifest_and_the_card(tmp_path: Path) -> None:
    texts = [f"{a}{b}{c}" for a in "akz" for b in "akz" for c in "akz"] + ["nan"]
    generate(tmp_path / "set", PromptDataModule(Captions(texts), split="test"), scorer=Scorer())
    table = pq.read_table(tmp_path / "set/manifest.parquet").to_pylist()
    scores = [row["clip_score"] for row in table if row["clip_score"] is not None]
    assert len(scores) == 27
    card = (tmp_path / "set/README.md").read_text()
    assert f"Mean {np.mean(scores):.3f}, median {np.median(scores):.3f}" in card
    assert "No score: 1 (not finite)." in card
    bars = [line.split() for line in card.splitlines() if line.endswith("#") and " to " in line]
    counts, edges = np.histogram(scores, 12)
    assert [(float(b[0]), int(b[3])) for b in bars] == [
        (pytest.approx(edge, abs=1e-3), n) for edge, n in zip(edges[:-1], counts, strict=True) if n
    ]
    assert "| prompts cut at the text encoder's limit | 0 | 0.00 % |" in card
    assert "| `concept_set`: novel | 14 | 50.00 % |" in card
    assert "Not checked: this split is not for training." in card


class OtherScorer(Scorer):
    """As the first, under another name."""


def test_another_scorer_is_refused_and_the_images_keep_their_names(tmp_path: Path) -> None:
    data = PromptDataModule(Captions(["akz", "zka"]), split="test")
    generate(tmp_path / "set", data, scorer=Scorer())
    (entry,) = json.loads((tmp_path / "set/recipe.json").read_text())["recipes"]
    assert entry["scorer"]["scorer"] == "Scorer"
    assert not any("corer" in str(part) for part in entry["recipe"].items())  # what is hashed
    assert '"scorer": "Scorer"' in (tmp_path / "set/README.md").read_text()
    with pytest.raises(MisconfigurationException, match="scorer: 'Scorer' there, 'OtherScorer' now"):
        generate(tmp_path / "set", data, scorer=OtherScorer())
    with pytest.raises(MisconfigurationException, match="scorer: 'Scorer' there, None now"):
        generate(tmp_path / "set", data)
    generate(tmp_path / "plain", data)
    names = [pq.read_table(tmp_path / name / "manifest.parquet")["key"].to_pylist() for name in ("set", "plain")]
    assert names[0] == names[1]
    content = json.loads((tmp_path / "plain/recipe.json").read_text())
    del content["recipes"][0]["scorer"]  # as it was written before scorers were recorded
    (tmp_path / "plain/recipe.json").write_text(json.dumps(content))
    generate(tmp_path / "plain", data, scorer=Scorer())


def test_a_scorer_is_known_by_its_weights() -> None:
    class Weighed(Scorer):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.matrix = torch.nn.Linear(50, 40, bias=False)
            torch.nn.init.normal_(self.matrix.weight, generator=torch.Generator().manual_seed(seed))

        def lora_targets(self, roles, tower="image"):
            return [LoRATarget(0, "q", self.matrix, "weight", 0, 40)]

    first, again, other = (ImageGenerationTask(StubGenerator(), Weighed(seed)) for seed in (2, 2, 1))
    weight = first.scorer.matrix.weight.detach().double().flatten()
    wave = (weight @ torch.arange(2000).double().cos()).item() / 1000**0.5
    assert first.describe_scorer() == {"scorer": "Weighed", "scorer_weights": f"1 tensors, wave {wave:.4f}"}
    assert again.describe_scorer() == first.describe_scorer() != other.describe_scorer()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true", "bf16-mixed"])
def test_a_precision_that_converts_the_weights_is_refused(precision: str) -> None:
    task = ImageGenerationTask(StubGenerator())
    task.trainer = SimpleNamespace(precision=precision, callbacks=[], accumulate_grad_batches=1)
    if precision.endswith("16-true"):
        with pytest.raises(MisconfigurationException, match=f"precision='{precision}' converts the generator"):
            task.setup("predict")
    else:
        task.setup("predict")


def test_warnings_of_cut_prompts_are_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    names = ["diffusers.pipelines.some", "transformers.tokenization_utils_base"]

    class Loud(StubGenerator):
        def generate(self, captions, seeds):
            for name in names:
                logging.getLogger(name).warning("the prompt was cut")
                logging.getLogger(name).error("it broke")
            return super().generate(captions, seeds)

    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    levels = [logging.getLogger(name).level for name in ("diffusers", names[1])]
    ImageGenerationTask(Loud()).predict_step(batch(["x"]), 0)
    assert {record.message for record in caplog.records} == {"it broke"}
    assert [logging.getLogger(name).level for name in ("diffusers", names[1])] == levels
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
