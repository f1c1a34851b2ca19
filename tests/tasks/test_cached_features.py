"""Cached features in place of pixels: the same loss and scores, no teacher forward, and what is refused."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from gmail_lightning.callbacks import FeatureWriter
from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset, FeatureStore
from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder, PatchTokens, PooledFeatures
from gmail_lightning.models.branches.feature_record import feature_record, refuse_other_features
from gmail_lightning.tasks import AlignmentTask, EmbeddingTask, RetrievalTask
from gmail_lightning.tasks.encoder_task import EncoderTask
from gmail_lightning.types import Modality

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}
ALIKE = {"novel": AllowedOverlap(["caption", "pixels"], "families share words, and some drawings are alike")}


class Counting(OpenCLIPEncoder):
    """Counts the images that go through the tower."""

    images = 0

    def encode_image(self, image):
        self.images += len(image)
        return super().encode_image(image)


def tiny(seed: int = 0, **vision) -> Counting:
    torch.manual_seed(seed)
    return Counting(config={**TINY, "vision_cfg": {**TINY["vision_cfg"], **vision}}, merges="emoji")


READERS = {None: PooledFeatures(), -2: PatchTokens(-2)}


def wrapped(encoder) -> ModalityEncoder:
    return ModalityEncoder.around(encoder, EncoderTask.route_plain)


def trainer(folder: Path, **kwargs) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, enable_checkpointing=False, max_steps=2, max_epochs=-1, **kwargs,
    )  # fmt: skip


def embed(out: Path, *datasets, encoder=None, batch_size: int = 64, dtype: str = "float16", **kwargs) -> Path:
    task = EmbeddingTask(tiny() if encoder is None else encoder, **kwargs)
    data = MixedModalityDataModule(predict=list(datasets), batch_size=batch_size)
    trainer(out.parent, callbacks=[FeatureWriter(str(out), dtype)]).predict(task, data)
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Real images of both sets, in float16."""
    return embed(tmp_path_factory.mktemp("stores") / "real", EmojiDataset("noto"))


def aligned(folder: Path) -> Path:
    """The checkpoint of an aligner whose branches differ."""
    task = AlignmentTask(ModalityEncoder(tiny(), branch=LoRA(rank=2)))
    for name, parameter in task.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    run = trainer(folder, limit_val_batches=0)
    run.fit(task, pairs())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def pairs(real=lambda dataset: dataset, **kwargs) -> MixedModalityDataModule:
    """Pairs of the two hands, the real one as it is given by ``real``."""
    sets = {name: [real(EmojiDataset("noto", name)), EmojiDataset("fluent_flat", name)] for name in ("novel", "paired")}
    return MixedModalityDataModule(
        sets["paired"], {"novel": sets["novel"]}, batch_size=16, allow_overlap=ALIKE, **kwargs
    )


def train_batch(data: MixedModalityDataModule, task):
    data.input_spec = task.input_spec
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_batch_of_pixels_and_features_is_encoded_in_its_order(chunk_size: int | None) -> None:
    task = AlignmentTask(tiny())
    for name, parameter in task.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    image, features = torch.rand(5, 3, 32, 32), torch.randn(3, 16).half()
    modality = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0])
    batch = {"modality": modality, "image": image, "image_row": torch.tensor([6, 0, 2, 4, 3]),
             "image_features": features, "feature_row": torch.tensor([7, 1, 5])}  # fmt: skip
    encoded = task.encode_images(batch, chunk_size)
    for i, row in enumerate([7, 1, 5]):
        assert torch.equal(encoded[row], features[i].float())
    for i, row in enumerate([6, 0, 2, 4, 3]):
        alone = task.encoder.encode_image(image[i : i + 1], modality[row : row + 1])[0]
        torch.testing.assert_close(encoded[row], alone, rtol=1e-4, atol=1e-5)
    encoded[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())

    cached = {"modality": modality[:3], "image_features": features, "feature_row": torch.tensor([2, 0, 1])}
    assert torch.equal(task.encode_images(cached), features[[1, 2, 0]].float())


def test_pixels_alone_are_encoded_bit_for_bit_as_before() -> None:
    task = AlignmentTask(tiny())
    batch = train_batch(pairs(), task)
    assert torch.equal(task.encode_images(batch), task.encoder.encode_image(batch["image"], batch["modality"]))
    plain = RetrievalTask(tiny().eval())
    assert torch.equal(plain.encode_images(batch), plain.encoder.encode_image(batch["image"]))


@pytest.mark.slow
def test_alignment_on_cached_features_runs_no_teacher(stored: Path) -> None:
    results = []
    for real in (lambda dataset: dataset, lambda dataset: FeatureStore(stored, dataset)):
        encoder = tiny()
        task = AlignmentTask(ModalityEncoder(encoder, branch=LoRA(targets=("q", "v", "fc1"))))
        torch.manual_seed(1)
        for parameter in task.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        batch = train_batch(pairs(real), task)
        encoder.images = 0
        loss = task.compute_losses(batch)["loss"]
        loss.backward()
        gradients = [p.grad for p in task.parameters() if p.requires_grad]
        results.append((encoder.images, batch, loss.detach(), gradients))
    (live_images, live, live_loss, live_gradients), (cached_images, cached, cached_loss, cached_gradients) = results
    assert (live_images, cached_images) == (16, 8)  # the eight generated ones
    assert live["sample_key"] == cached["sample_key"]
    assert cached["feature_row"].tolist() == (live["modality"] == 0).nonzero().flatten().tolist()
    assert cached["image_row"].tolist() == (live["modality"] == 1).nonzero().flatten().tolist()
    assert torch.equal(cached["image"], live["image"][live["modality"] == 1])
    assert torch.equal(cached["text"], live["text"])
    torch.testing.assert_close(cached_loss, live_loss, rtol=1e-3, atol=1e-4)
    for one, other in zip(live_gradients, cached_gradients, strict=True):
        assert one.abs().max() > 1e-5
        torch.testing.assert_close(other, one, rtol=0.02, atol=0.02 * float(one.abs().max()))


@pytest.mark.slow
def test_a_whole_run_on_a_store_has_the_scores_of_live_features(tmp_path: Path, stored: Path) -> None:
    results = []
    for real in (lambda dataset: dataset, lambda dataset: FeatureStore(stored, dataset)):
        encoder = tiny()
        task = AlignmentTask(encoder)
        pl.seed_everything(0)
        trainer(tmp_path, check_val_every_n_epoch=None, val_check_interval=2).fit(task, pairs(real, num_workers=0))
        results.append((task.results["novel"].values, encoder.images))
    (live, live_images), (cached, cached_images) = results
    assert live_images - cached_images == 2 * 8 + 373 - 2  # the fixed image, for the store
    assert cached == {name: pytest.approx(value, abs=0.01) for name, value in live.items()}


@pytest.mark.slow
def test_workers_read_the_store(stored: Path) -> None:
    data = pairs(lambda dataset: FeatureStore(stored, dataset))
    here = train_batch(data, AlignmentTask(tiny()))
    data.num_workers = 1
    there = next(iter(data.train_dataloader()))
    assert torch.equal(here["image_features"], there["image_features"])


@pytest.mark.slow
def test_features_of_another_encoder_are_refused(tmp_path: Path, stored: Path) -> None:
    data = pairs(lambda dataset: FeatureStore(stored, dataset))
    assert len(data.feature_stores) == 1
    with pytest.raises(
        MisconfigurationException, match=r"another encoder. The store has fingerprint [0-9a-f]{12}, this"
    ):
        trainer(tmp_path).fit(AlignmentTask(tiny(seed=1)), data)
    with pytest.raises(MisconfigurationException, match="another encoder"):
        trainer(tmp_path).validate(AlignmentTask(tiny(seed=1)), data)
    larger = tiny(image_size=48)  # the same blocks
    same = {
        name: value for name, value in tiny().state_dict().items() if value.shape == larger.state_dict()[name].shape
    }
    larger.load_state_dict(same, strict=False)
    with pytest.raises(MisconfigurationException, match=r"image_spec .*\[32, 32\].* and .*\[48, 48\].* is needed"):
        trainer(tmp_path).fit(AlignmentTask(larger), data)
    tokens = embed(tmp_path / "tokens", EmojiDataset("noto"), reader=PatchTokens(-2))
    with pytest.raises(MisconfigurationException, match="written with layer -2, and None is needed"):
        trainer(tmp_path).fit(AlignmentTask(tiny()), pairs(lambda dataset: FeatureStore(tokens, dataset)))


def changed_projection(visual) -> None:
    torch.nn.init.normal_(visual.proj, std=float(visual.proj.std()))


def changed_patches(visual) -> None:
    visual.conv1.weight.mul_(2)


def changed_positions(visual) -> None:
    visual.positional_embedding.copy_(visual.positional_embedding.roll(1, 0))


def changed_norm(visual) -> None:
    visual.transformer.resblocks[0].ln_1.weight.mul_(1.5)


def changed_bias(visual) -> None:
    visual.transformer.resblocks[0].mlp.c_proj.bias.add_(0.5 * torch.randn(32))


REPLACED = {
    changed_projection: "proj", changed_patches: "conv1", changed_positions: "positional_embedding",
    changed_norm: "0.ln_1", changed_bias: "0.fc2.bias",
}  # fmt: skip


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("change", [*REPLACED])
def test_another_encoder_with_equal_blocks_is_refused(change, layer: int | None) -> None:
    encoder = tiny()
    record = json.loads(json.dumps(EmbeddingTask(encoder, READERS[layer]).record([Modality.REAL])))
    stores = [{**record, "path": "/stores/a"}]
    changed = tiny()
    with torch.no_grad():
        change(changed.model.visual)
    with pytest.raises(
        MisconfigurationException, match=rf"^/stores/a cannot .* 1 of 40 tensors, most in image\.{REPLACED[change]}: "
    ):
        refuse_other_features(wrapped(changed), stores, READERS[layer], trains=False)
    probe = [value + 0.1 * i for i, value in enumerate(record["probe"]["real"])]
    with pytest.raises(MisconfigurationException, match=r"The real features of a fixed image have cosine 0\.\d{4} "):
        refuse_other_features(wrapped(tiny()), [{**stores[0], "probe": {"real": probe}}], READERS[layer], trains=False)


@pytest.mark.parametrize("layer", [None, -2])
def test_the_same_encoder_is_accepted_however_it_rounds(tmp_path: Path, layer: int | None) -> None:
    encoder = tiny()
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    record = EmbeddingTask(encoder, READERS[layer]).record([Modality.REAL])
    stores = [{**json.loads(json.dumps(record)), "path": "a"}]
    anew = tiny(seed=1)
    anew.load_state_dict(torch.load(tmp_path / "weights.pt"))
    found = feature_record(wrapped(anew), [Modality.REAL], READERS[layer])["probe"]["real"]
    assert found == pytest.approx(record["probe"]["real"], rel=1e-4, abs=1e-5)
    for same in (anew, AlignmentTask(tiny()).encoder, tiny().bfloat16()):
        refuse_other_features(wrapped(same), stores, READERS[layer], trains=False)


def test_the_fixed_image_is_encoded_in_eval_mode_and_without_autocast() -> None:
    dropping = tiny(patch_dropout=0.5).train()
    dropping.model.visual.ln_post.eval()  # frozen by hand
    modes = [module.training for module in dropping.modules()]
    with torch.autocast("cpu", torch.bfloat16):
        features = feature_record(wrapped(dropping), [Modality.REAL], READERS[None])["probe"]["real"]
    assert [module.training for module in dropping.modules()] == modes
    image = (torch.arange(3 * 32 * 32, dtype=torch.float64).cos() / 10 + 0.5).float().view(1, 3, 32, 32)
    expected = dropping.eval().encode_image(image)[0]
    torch.testing.assert_close(torch.tensor(features), expected, rtol=1e-5, atol=1e-6)

    two_branches = ModalityEncoder(tiny(), branch=LoRA(), projection=True)
    torch.nn.init.normal_(two_branches.generated_projection.weight)
    features = feature_record(wrapped(two_branches), list(Modality), READERS[None])["probe"]
    for which in Modality:
        expected = two_branches.encode_image(image, torch.tensor([which]))[0].detach()
        torch.testing.assert_close(torch.tensor(features[which.name.lower()]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["proj", "conv1.weight", "ln_post.bias", "positional_embedding"])
def test_features_of_a_tower_of_which_any_tensor_is_trained_are_refused(name: str) -> None:
    for encoder in (tiny(), AlignmentTask(tiny()).encoder):
        plain = encoder.encoder if isinstance(encoder, ModalityEncoder) else encoder.requires_grad_(False)
        stores = [{**feature_record(wrapped(encoder), [Modality.REAL], READERS[None]), "path": "a"}]
        for parameter in plain.text_parameters():
            parameter.requires_grad_(True)
        refuse_other_features(wrapped(encoder), stores, READERS[None], trains=True)
        plain.model.visual.get_parameter(name).requires_grad_(True)
        refuse_other_features(wrapped(encoder), stores, READERS[None], trains=False)
        with pytest.raises(MisconfigurationException, match="real images, and this run trains the branch"):
            refuse_other_features(wrapped(encoder), stores, READERS[None], trains=True)


@pytest.mark.parametrize("text_side", ["frozen", "lora", "projection", "full"])
def test_a_text_side_may_be_trained_on_cached_features(text_side: str) -> None:
    encoder = ModalityEncoder(tiny(), text_side=text_side)
    stores = [{**feature_record(wrapped(encoder), list(Modality), READERS[None]), "path": "a"}]
    refuse_other_features(wrapped(encoder), stores, READERS[None], trains=True)


@pytest.mark.slow
def test_features_that_the_run_would_change_are_refused(tmp_path: Path, stored: Path) -> None:
    data = pairs(lambda dataset: FeatureStore(stored, dataset))
    with pytest.raises(MisconfigurationException, match="real images, and this run trains the branch"):
        trainer(tmp_path).fit(AlignmentTask(ModalityEncoder(tiny(), branch=LoRA(), real_path="projected")), data)
    with pytest.raises(MisconfigurationException, match="real images, and this run trains the branch"):
        trainer(tmp_path).fit(RetrievalTask(tiny()), data)  # trains the whole encoder
    generated = embed(tmp_path / "generated", EmojiDataset("fluent_flat"))
    hands = [EmojiDataset("noto", "paired"), FeatureStore(generated, EmojiDataset("fluent_flat", "paired"))]
    with pytest.raises(MisconfigurationException, match="generated images, and this run trains the branch"):
        trainer(tmp_path).fit(AlignmentTask(tiny()), MixedModalityDataModule(hands, batch_size=16))


def test_augmentation_that_cached_rows_cannot_follow_is_refused(stored: Path) -> None:
    task = AlignmentTask(tiny())
    flip = torch.nn.Identity()
    with pytest.raises(
        MisconfigurationException, match="augmentation cannot change the features of EmojiDataset row 1"
    ):
        train_batch(pairs(lambda dataset: FeatureStore(stored, dataset), augmentation=flip), task)
    batch = train_batch(pairs(lambda dataset: FeatureStore(stored, dataset), generated_augmentation=flip), task)
    assert "image_features" in batch


@pytest.mark.slow
def test_generated_features_are_those_of_the_aligned_branch(tmp_path: Path) -> None:
    checkpoint = aligned(tmp_path)
    hands = [EmojiDataset("noto", "novel"), EmojiDataset("fluent_flat", "novel")]
    both = embed(tmp_path / "both", *hands, encoder=ModalityEncoder(tiny(), aligned=str(checkpoint)))
    plain = embed(tmp_path / "plain", *hands)

    def data(store: Path | None) -> MixedModalityDataModule:
        return MixedModalityDataModule(
            val={"novel": hands if store is None else [FeatureStore(store, hand) for hand in hands]}, batch_size=64
        )

    def scores(encoder: Counting, store: Path | None) -> tuple[dict[str, float], int]:
        task = AlignmentTask(ModalityEncoder(encoder, branch=LoRA(rank=2)))
        before = encoder.images
        trainer(tmp_path).validate(task, data(store), ckpt_path=checkpoint)  # the adapters come after setup
        return task.results["novel"].values, encoder.images - before

    live, _ = scores(tiny(), None)
    cached, images = scores(tiny(), both)
    assert images == 4  # the fixed image: for the checkpoint, for the store, through either branch
    assert cached == {name: pytest.approx(value, abs=0.01) for name, value in live.items()}
    with pytest.raises(MisconfigurationException, match=r"generated images are of the branch plain tower, and this"):
        scores(tiny(), plain)
    with pytest.raises(MisconfigurationException, match=r"generated images are of the branch [0-9a-f]{12}, and this"):
        trainer(tmp_path).validate(AlignmentTask(ModalityEncoder(tiny(), branch=LoRA(rank=2))), data(both))
