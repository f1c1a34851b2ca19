"""Branches that are not LoRA, the router around them, and how a step runs through both sides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_encoders import routed
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from torch import Tensor, nn
from torchvision.transforms import Normalize

from gmail_lightning.export import export_checkpoint
from gmail_lightning.models import (
    Branch,
    FullCopy,
    ImageEncoder,
    ImageTokenizer,
    LoRA,
    ModalityEncoder,
    OpenCLIPEncoder,
    TokenCodes,
)
from gmail_lightning.models.branches.routing import ModalityIndex
from gmail_lightning.models.chunks import in_chunks
from gmail_lightning.tasks import AlignmentTask, EmbeddingTask, LinearProbeTask, RetrievalTask
from gmail_lightning.testing import check_branch

MODALITY = torch.tensor([0, 1, 1, 0, 1])


class Bottleneck(Branch):
    """A map behind the tower that starts as nothing."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width = width

    def attach(self, encoder: ImageEncoder) -> None:
        super().attach(encoder)
        self.down = nn.Linear(encoder.embed_dim, self.width)
        self.up = nn.Linear(self.width, encoder.embed_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def encode_image(self, image: Tensor) -> Tensor:
        features = self.tower.encode_image(image)
        return features + self.up(self.down(features).relu())

    @property
    def settings(self) -> dict[str, Any]:
        return {"width": self.width}


BRANCHES = {"lora": LoRA, "copy": FullCopy, "own": Bottleneck}


@pytest.fixture
def image() -> Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def moved(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bias" not in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", BRANCHES)
def test_real_rows_see_the_plain_tower_and_generated_ones_the_branch(kind: str, image: Tensor) -> None:
    plain = tiny_encoder().eval().requires_grad_(False)
    model = ModalityEncoder(tiny_encoder(), branch=BRANCHES[kind]())
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image, MODALITY), plain.encode_image(image))  # to begin with
    moved(model)
    with torch.no_grad():
        features = model.encode_image(image, MODALITY)
        assert torch.equal(features[MODALITY == 0], plain.encode_image(image[MODALITY == 0]))
        assert (features - plain.encode_image(image)).abs()[MODALITY == 1].amin(dim=1).max() > 1e-4
        index = ModalityIndex(torch.tensor([0, 3]), torch.tensor([1, 2, 4]))
        assert torch.equal(model.encode_image(image, index), features)
    model.encode_image(image, MODALITY).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.image_adapters()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BRANCHES)
def test_a_checkpoint_brings_the_branch_to_later_stages(kind: str, image: Tensor, tmp_path: Path) -> None:
    task = AlignmentTask(ModalityEncoder(tiny_encoder(), branch=BRANCHES[kind]()))
    moved(task)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data(mode="paired"))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    held = torch.load(path, weights_only=True)
    assert held["branches"]["branch"]["init_args"] == task.encoder.branch.settings
    assert not [key for key in held["state_dict"] if "transformer" in key and ".visual." not in key]  # no text tower
    expected = task.eval().encoder.encode_image(image, MODALITY).detach()
    again = AlignmentTask.load_from_checkpoint(path, encoder=tiny_encoder()).eval()
    later = [
        again.encoder,
        ModalityEncoder.from_checkpoint(path, tiny_encoder()),
        RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(path), text_side="lora")).eval().encoder,
        LinearProbeTask(ModalityEncoder(tiny_encoder(), aligned=str(path))).eval().encoder,
    ]
    for encoder in later:
        with torch.no_grad():
            found = encoder.encode_image(image, MODALITY)  # attention may take another path where nothing trains
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for _, p in later[2].image_adapters())
    assert later[2].alignment == {**later[3].alignment}


def test_a_full_copy_shares_its_text_tower_and_leaves_the_tower_alone(image: Tensor) -> None:
    encoder = tiny_encoder()
    model = ModalityEncoder(encoder, branch=FullCopy(), text_side="full")
    own = {id(p) for p in model.branch.copied.parameters()} - {id(p) for p in encoder.parameters()}
    visual = {id(p) for p in model.branch.copied.model.visual.parameters()}
    assert own == visual
    assert not any(p.requires_grad for p in encoder.model.visual.parameters())
    model.train()
    assert not any(module.training for module in model.branch.copied.modules())
    pickled = copy.deepcopy(model)
    assert pickled.branch.encoder is pickled.encoder


@pytest.mark.slow
@pytest.mark.parametrize("text_side", ["frozen", "lora", "full"])
def test_a_full_copy_is_exported_beside_the_trained_texts(text_side: str, image: Tensor, tmp_path: Path) -> None:
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), branch=FullCopy(), text_side=text_side))
    moved(task)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    text = task.encoder.text_spec.encode(["cup", "tea"])
    for branch, which in (("generated", 1), ("real", 0)):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / branch, branch=branch, encoder=tiny_encoder())
        peer = open_clip.create_model(f"local-dir:{tmp_path / branch}", require_pretrained=True).eval()
        task.eval()
        with torch.no_grad():
            pixels = Normalize(task.encoder.plain.mean, task.encoder.plain.std)(image)
            ours = task.encoder.encode_image(image, torch.full((5,), which))
            torch.testing.assert_close(peer.encode_image(pixels), ours, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(peer.encode_text(text), task.encoder.encode_text(text), atol=1e-5, rtol=1e-5)


def test_a_branch_that_cannot_be_merged_says_so(tmp_path: Path) -> None:
    task = AlignmentTask(ModalityEncoder(tiny_encoder(), branch=Bottleneck()))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data(mode="paired"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="Bottleneck cannot be merged"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", encoder=tiny_encoder())


class Counting(OpenCLIPEncoder):
    """Counts the images of every pass through the tower."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(config=tiny_encoder().model_config, merges="emoji")
        self.passes: list[tuple[int, bool]] = []
        first = self.model.visual.conv1
        first.register_forward_pre_hook(lambda _, x: self.passes.append((len(x[0]), torch.is_grad_enabled())))


def test_in_chunks_the_frozen_tower_runs_once(image: Tensor) -> None:
    """The generated rows are run again in the backward, the real ones are not."""
    encoder = Counting()
    model = routed(encoder)
    task = AlignmentTask(model, contrastive_chunk_size=2)
    batch = {
        "image": torch.rand(10, 3, 32, 32), "modality": torch.tensor([1, 0] * 5), "image_id": torch.arange(10),
        "pair_id": torch.arange(5).repeat_interleave(2),
    }  # fmt: skip
    task.compute_losses(batch)["loss"].backward()
    real = sum(rows for rows, grad in encoder.passes if not grad)
    generated = sum(rows for rows, grad in encoder.passes if grad)
    # a checkpointed piece runs without a graph first and with one again
    assert (real + generated) == 5 + 2 * 5


def test_chunks_that_no_gradient_reaches_are_not_recomputed() -> None:
    calls: list[int] = []

    def encode(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows.exp()

    rows = torch.ones(5, 2, requires_grad=True)
    for recompute, expected in ((False, [2, 2, 1]), (True, [2, 2, 1, 1, 2, 2])):
        calls.clear()
        in_chunks(encode, rows, chunk_size=2, recompute=recompute).sum().backward()
        assert sorted(calls) == sorted(expected)


def test_patch_and_pooled_features_come_out_of_one_pass() -> None:
    encoder = Counting()
    task = AlignmentTask(routed(encoder), patch_weight=1.0)
    batch = {"image": torch.rand(4, 3, 32, 32), "modality": torch.tensor([1, 0, 1, 0])}
    found = task.read(batch)
    assert sum(rows for rows, _ in encoder.passes) == 4
    modality = batch["modality"]
    torch.testing.assert_close(found["pooled"], task.encoder.encode_image(batch["image"], modality))
    tokens = task.encoder.image_tokens(batch["image"], modality, layer=-2)
    torch.testing.assert_close(found["patch"], tokens.mean(dim=1))


@pytest.mark.parametrize("kind", ["open_clip", "timm", "hf_clip", "hf_siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_features_and_tokens_of_one_pass_are_those_of_two(tiny, pixels, kind: str, layer: int) -> None:
    encoder = tiny(kind).eval()
    image = pixels(encoder, 3)
    with torch.no_grad():
        features, tokens = encoder.image_features_and_tokens(image, layer=layer)
        torch.testing.assert_close(features, encoder.encode_image(image), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(tokens, encoder.image_tokens(image, layer=layer), atol=1e-6, rtol=1e-5)


def test_a_plain_encoder_in_a_task_routes_nothing(image: Tensor, tmp_path: Path) -> None:
    task = RetrievalTask(tiny_encoder())
    assert task.encoder.record() is None
    assert all(p.requires_grad for p in task.encoder.parameters())
    assert torch.equal(task.encoder.encode_image(image, MODALITY), task.encoder.plain.encode_image(image))
    assert task.encoder.encode_image(image).requires_grad
    task.train()
    assert task.encoder.plain.training
    probe = LinearProbeTask(tiny_encoder())
    assert not any(p.requires_grad for p in probe.encoder.parameters())
    router = routed(tiny_encoder())
    assert RetrievalTask(router).encoder is router


class WithHead(RetrievalTask):
    """A task of one's own that is given a module."""

    def __init__(self, encoder: ImageEncoder, head: nn.Module, weight: float = 0.5) -> None:
        super().__init__(encoder)
        self.head, self.weight = head, weight

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().compute_losses(batch)
        extra = self.head(self.encode_images(batch)).square().mean()
        return {**losses, "loss": losses["loss"] + self.weight * extra}


def test_a_subclass_with_a_module_saves_and_loads(tmp_path: Path) -> None:
    task = WithHead(routed(tiny_encoder(), text_side="lora"), nn.Linear(16, 2), weight=0.25)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert held["hyper_parameters"] == {"weight": 0.25}
    again = WithHead.load_from_checkpoint(
        tmp_path / "a.ckpt", encoder=tiny_encoder(), head=nn.Linear(16, 2), weights_only=True
    )
    assert again.weight == 0.25
    assert torch.equal(again.head.weight, task.head.weight)
    assert again.state_dict().keys() == task.state_dict().keys()


class Corners(ImageTokenizer):
    """Each quarter of an image is one of four codes, by its brightness."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(4, 3)

    def encode(self, image: Tensor) -> Tensor:
        return (nn.functional.adaptive_avg_pool2d(image.mean(dim=1), 2).flatten(1) * 4).long().clamp(max=3)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.codes(token_ids)

    def decode(self, token_ids: Tensor) -> Tensor:
        return (token_ids.view(-1, 1, 2, 2) / 4).expand(-1, 3, -1, -1)


def test_rows_of_three_kinds_stand_in_one_batch(image: Tensor) -> None:
    """Pixels and token ids are read as codes, and cached ones were written as such."""
    task = EmbeddingTask(tiny_encoder(), TokenCodes(Corners()))
    assert not any(p.requires_grad for p in task.parameters())
    codes = task.reader.tokenizer.encode(image)
    expected = task.reader.tokenizer.embed(codes)
    batch = {
        "image": image[[0, 3]], "image_row": torch.tensor([0, 3]), "modality": MODALITY,
        "image_features": expected[[1]].half(), "feature_row": torch.tensor([1]),
        "image_token_ids": codes[[2, 4]], "token_row": torch.tensor([2, 4]),
    }  # fmt: skip
    torch.testing.assert_close(task.encode_images(batch), expected, atol=1e-3, rtol=1e-3)
    assert task.reader.width(task.encoder) == 3
    with pytest.raises(TypeError, match="PooledFeatures reads pixels, and the batch holds token ids"):
        EmbeddingTask(tiny_encoder()).encode_images(batch)


@pytest.mark.parametrize("kind", BRANCHES)
def test_our_branches_and_one_of_ones_own_pass_the_checks(kind: str) -> None:
    check_branch(BRANCHES[kind](), tiny_encoder())


class Wrong(Bottleneck):
    """Every fault in turn."""

    fault = ""

    def attach(self, encoder: ImageEncoder) -> None:
        super().attach(encoder)
        if self.fault == "start":
            nn.init.ones_(self.up.bias)
        if self.fault == "unused":
            self.idle = nn.Linear(2, 2)
        if self.fault == "hidden":
            self.hidden = [torch.randn(())]
        if self.fault == "real":
            encoder.model.visual.proj.data.add_(0.1)
        if self.fault == "thaws":
            encoder.model.visual.proj.requires_grad_(True)

    def encode_image(self, image: Tensor) -> Tensor:
        features = super().encode_image(image)
        if self.fault == "width":
            return features[:, :4]
        return features + self.hidden[0] * self.up.weight.mean() if self.fault == "hidden" else features

    @property
    def settings(self) -> dict[str, Any]:
        return {"widths": 3} if self.fault == "settings" else super().settings


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("start", "at first it sees generated images otherwise"), ("unused", "2 of its tensors get no gradient"),
        ("hidden", "built again from settings and state it answers otherwise"), ("width", r"returns shape \(3, 4\)"),
        ("real", "real images are seen otherwise"), ("thaws", "gets a gradient, and is no tensor of the branch"),
        ("settings", "the class with its own settings raises TypeError"),
    ],
)  # fmt: skip
def test_a_faulty_branch_is_told_its_fault(fault: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, "fault", fault)
    with pytest.raises(AssertionError, match=sentence):
        check_branch(Wrong(), tiny_encoder())


def test_a_branch_belongs_to_one_encoder() -> None:
    branch = LoRA(rank=2)
    ModalityEncoder(tiny_encoder(), branch=branch)
    with pytest.raises(ValueError, match="belongs to another encoder already"):
        ModalityEncoder(tiny_encoder(), branch=branch)
