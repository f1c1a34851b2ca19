"""What could go wrong silently between a router, its checkpoints and what reads them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import routed
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from torch import Tensor, nn

from gmail_lightning.callbacks.caption_results import _weights_digest
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import Branch, ClipCap, FullCopy, ImageEncoder, LoRA, ModalityEncoder, PatchTokens
from gmail_lightning.models.restoring import restoring
from gmail_lightning.tasks import AlignmentTask, CaptioningTask, LinearProbeTask, RetrievalTask

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


def clipcap() -> ClipCap:
    return ClipCap(image_dim=16, language_model=GPT2, tokenizer="emoji", prefix_length=2)


def saved(task: Any, folder: Path, name: str = "a.ckpt", **data: Any) -> Path:
    trainer = quiet_trainer(folder, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data(**data))
    trainer.save_checkpoint(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "build",
    [
        lambda: RetrievalTask(tiny_encoder()), lambda: LinearProbeTask(tiny_encoder()),
        lambda: AlignmentTask(ModalityEncoder(tiny_encoder(), branch=FullCopy())),
    ],
    ids=["retrieval", "probe", "full copy"],
)  # fmt: skip
def test_a_task_goes_to_a_process_that_is_spawned(build: Callable[[], Any]) -> None:
    task = build()
    again = pickle.loads(pickle.dumps(task))
    assert again.state_dict().keys() == task.state_dict().keys()
    image = torch.rand(2, 3, 32, 32)
    modality = torch.tensor([0, 1])
    assert torch.equal(again.encoder.encode_image(image, modality), task.encoder.encode_image(image, modality))
    again.load_state_dict(task.state_dict())


class Own(RetrievalTask):
    """A task of one's own whose arguments are called as the first edition called the router's."""

    def __init__(self, encoder: ImageEncoder, rank: int = 1, alpha: float = 1.0, projection: bool = False) -> None:
        super().__init__(encoder)
        self.given = rank, alpha, projection


def test_arguments_of_a_subclass_are_not_taken_for_the_routers(tmp_path: Path) -> None:
    path = saved(Own(tiny_encoder(), rank=7, alpha=0.25, projection=True), tmp_path)
    assert Own.load_from_checkpoint(path, encoder=tiny_encoder()).given == (7, 0.25, True)


def test_what_trains_is_the_same_after_reloading(tmp_path: Path) -> None:
    path = saved(AlignmentTask(routed(tiny_encoder(), real_path="projected")), tmp_path, mode="paired")
    settings = {"text_side": "lora", "train_adapters": True}
    task = RetrievalTask(ModalityEncoder(tiny_encoder(), aligned=str(path), **settings))
    later = saved(task, tmp_path, "later.ckpt")
    again = RetrievalTask.load_from_checkpoint(later, encoder=tiny_encoder())
    trained = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (task, again)]
    assert trained[0] == trained[1]
    assert "encoder.real_projection.weight" not in trained[0]


def test_captions_of_another_alignment_are_of_other_weights(tmp_path: Path) -> None:
    path = saved(AlignmentTask(routed(tiny_encoder())), tmp_path, mode="paired")
    digests = []
    for factor in (1.0, 2.0):
        content = torch.load(path, weights_only=True)
        content["state_dict"] = {k: v * factor if k.endswith(".A") else v for k, v in content["state_dict"].items()}
        torch.save(content, tmp_path / "b.ckpt")
        torch.manual_seed(0)
        encoder = ModalityEncoder(tiny_encoder(), aligned=str(tmp_path / "b.ckpt"))
        torch.manual_seed(0)
        digests.append(_weights_digest(CaptioningTask(encoder, clipcap())))
    assert digests[0] != digests[1]


def test_a_choice_of_rows_holds_for_one_loader() -> None:
    data = MixedModalityDataModule(predict=[EmojiDataset("noto", "novel")], input_spec=None)
    data.input_spec = RetrievalTask(tiny_encoder()).input_spec
    data.setup("predict")
    data.predict_only(lambda: torch.arange(3).numpy())
    assert len(data.predict_dataloader().dataset) == 3
    assert len(data.predict_dataloader().dataset) == len(data.predict_rows())


class Scaled(Branch):
    """Changes the encoder itself, and takes the change away while it is off."""

    def attach(self, encoder: ImageEncoder) -> None:
        super().attach(encoder)
        self.scale, self.on = nn.Parameter(torch.ones(())), True
        encoder.register_forward_pre_hook(lambda *_: None)
        first = encoder.model.visual.ln_pre
        first.register_forward_hook(lambda module, given, output: output * self.scale if self.on else output)

    def off(self) -> AbstractContextManager[None]:
        @contextmanager
        def switched() -> Iterator[None]:
            self.on = False
            try:
                yield
            finally:
                self.on = True

        return switched()

    @property
    def settings(self) -> dict[str, Any]:
        return {}


def test_a_branch_that_changes_the_encoder_is_loaded_again(tmp_path: Path) -> None:
    task = AlignmentTask(ModalityEncoder(tiny_encoder(), branch=Scaled()))
    task.encoder.branch.scale.data.fill_(3.0)
    path = saved(task, tmp_path, mode="paired")
    image, modality = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    expected = task.eval().encoder.encode_image(image, modality).detach()
    for encoder in (
        AlignmentTask.load_from_checkpoint(path, encoder=tiny_encoder()).encoder,
        ModalityEncoder.from_checkpoint(path, tiny_encoder()),
        ModalityEncoder(tiny_encoder(), aligned=str(path)),
    ):
        torch.testing.assert_close(encoder.encode_image(image, modality).detach(), expected)


def test_a_full_copy_trains_what_the_patch_tokens_pass(tmp_path: Path) -> None:
    task = AlignmentTask(
        ModalityEncoder(tiny_encoder(), branch=FullCopy()), alignment_weight=0.0, patch_weight=1.0, patch_layer=0
    )
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert any("resblocks.0." in name for name in trained)
    assert not any("resblocks.1." in name or "ln_post" in name or name.endswith("visual.proj") for name in trained)
    saved(task, tmp_path, mode="paired")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    for settings, match in (
        ({"train_adapters": True}, "train_adapters needs something to train"),
        ({"real_path": "adapted"}, "there is none: give one"),
    ):
        with pytest.raises(ValueError, match=match):
            ModalityEncoder(tiny_encoder(), **settings)
    with pytest.raises(ValueError, match="routes modalities already"):
        ModalityEncoder(routed(tiny_encoder()))

    class Live(LoRA):
        @property
        def settings(self) -> dict[str, Any]:
            return {"rank": 4, "where": [Path("a"), held]}

    held: Any = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"Live.settings\['where'\]: a checkpoint cannot hold a Linear"):
        ModalityEncoder(tiny_encoder(), branch=Live())
    held = 2
    record = ModalityEncoder(tiny_encoder(), branch=Live()).record()
    assert record is not None
    assert record["branch"]["init_args"] == {"rank": 4, "where": ["a", 2]}
    plain = {"branches": {"branch": None, "real_path": "frozen", "projection": False}}
    with restoring(plain), pytest.raises(ValueError, match="the checkpoint that is loaded has no branch"):
        ModalityEncoder(tiny_encoder(), aligned="runs/gone")


def test_a_text_side_left_behind_is_told_wherever_texts_are_read(tmp_path: Path) -> None:
    path = saved(RetrievalTask(routed(tiny_encoder(), text_side="lora")), tmp_path)
    builds: list[Callable[[ModalityEncoder], Any]] = [
        RetrievalTask, AlignmentTask, lambda encoder: CaptioningTask(encoder, clipcap(), text_noise=0.016)
    ]  # fmt: skip
    for build in builds:
        with pytest.raises(ValueError, match="the text side that was trained there would be dropped"):
            build(ModalityEncoder(tiny_encoder(), aligned=str(path)))
    CaptioningTask(ModalityEncoder(tiny_encoder(), aligned=str(path)), clipcap())  # images alone


def test_rates_go_by_the_names_of_a_checkpoint() -> None:
    task = RetrievalTask(tiny_encoder(), learning_rates={"encoder": 1e-3, "encoder.model.visual": 1e-5})
    task.trainer = quiet_trainer(Path("."))
    groups = task.configure_optimizers().param_groups
    visual = {id(p) for p in task.encoder.plain.model.visual.parameters()}
    for group in groups:
        assert {id(p) in visual for p in group["params"]} == {group["lr"] == 1e-5}
    assert {group["lr"] for group in groups} == {1e-3, 1e-5}


def test_a_store_of_pictures_refuses_token_ids_for_the_patch_terms() -> None:
    task = AlignmentTask(tiny_encoder(), patch_weight=1.0)
    batch: dict[str, Tensor] = {"image_token_ids": torch.zeros(2, 4, dtype=torch.long), "token_row": torch.arange(2)}
    with pytest.raises(ValueError, match="need the pixels of every row"):
        task.read(batch)
    assert PatchTokens(-1).last_block(task.encoder) == 1
