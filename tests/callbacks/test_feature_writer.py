"""Feature stores as they are written: the very features, whatever interrupts it, and the refusals."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from gmail_lightning.callbacks import FeatureWriter
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import CocoCaptions, DataError, EmojiDataset, FeatureStore
from gmail_lightning.models import OpenCLIPEncoder, PatchTokens
from gmail_lightning.tasks import AlignmentTask, EmbeddingTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}
NOVEL = EmojiDataset("noto", "novel")  # 373 images


def encoder(seed: int = 0) -> OpenCLIPEncoder:
    torch.manual_seed(seed)
    return OpenCLIPEncoder(config=TINY, merges="emoji")


def embed(
    out: Path, *, seed: int = 0, layer: int | None = None, datasets=NOVEL, batch_size: int = 64, limit=1.0,
    callbacks=(), writer: dict | None = None,
) -> None:  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_predict_batches=limit, callbacks=[FeatureWriter(str(out), **(writer or {})), *callbacks],
        default_root_dir=out.parent,
    )  # fmt: skip
    data = MixedModalityDataModule(predict=datasets, batch_size=batch_size)
    trainer.predict(EmbeddingTask(encoder(seed), None if layer is None else PatchTokens(layer)), data)
    assert len(data.predict_dataloader().dataset) == len(data.predict_rows())  # nothing is left out any more


def live(batch_size: int, layer: int | None = None) -> np.ndarray:
    """The features of the plain encoder, straight from the data set."""
    plain = encoder().eval()
    data = MixedModalityDataModule(predict=NOVEL, batch_size=batch_size, input_spec=EmbeddingTask(encoder()).input_spec)
    with torch.no_grad():
        images = torch.cat([batch["image"] for batch in data.predict_dataloader()])
        encode = plain.encode_image if layer is None else lambda image: plain.image_tokens(image, layer=layer)
        return torch.cat([encode(rows) for rows in images.split(batch_size)]).numpy()


def units_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference in units in the last place of the larger value."""
    return float((np.abs(a.astype(np.float64) - b) / np.spacing(np.maximum(np.abs(a), np.abs(b)))).max())


@pytest.mark.parametrize(("dtype", "layer"), [("float16", None), ("float32", None), ("float16", -2)])
def test_features_are_those_of_the_encoder(tmp_path: Path, dtype: str, layer: int | None) -> None:
    embed(tmp_path / "store", layer=layer, writer={"dtype": dtype})
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"features.npy", "rows.parquet", "store.json"}
    store = FeatureStore(tmp_path / "store", NOVEL)
    found = np.stack([store.feature(row).numpy() for row in range(len(NOVEL))])
    expected = live(64, layer)
    assert found.shape == ((373, 16) if layer is None else (373, 4, 32))
    assert np.array_equal(found, expected.astype(dtype))  # bit for bit, in the same batches
    if dtype == "float16":  # in other batches a tower may differ in its last digit
        assert units_apart(found, live(37, layer).astype(dtype)) <= 1
    assert len(np.unique(found.reshape(373, -1), axis=0)) > 300


def test_a_killed_run_goes_on_and_ends_in_the_same_store(tmp_path: Path) -> None:
    embed(tmp_path / "whole", writer={"dtype": "float32"})
    out = tmp_path / "killed"

    class Kill(pl.Callback):
        def on_predict_batch_end(self, *args) -> None:
            if args[4] == 3:
                (out / "parts" / "0000000001-abc.npz.tmp-0123").write_bytes(b"half")  # it was writing
                (out / "features.npy.tmp-0123").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

    class Count(pl.Callback):
        rows = 0

        def on_predict_batch_end(self, trainer, task, outputs, batch, *args) -> None:
            self.rows += len(batch["row_id"])

    settings = {"dtype": "float32", "seconds": 0.0}
    process = multiprocessing.get_context("fork").Process(
        target=embed, args=(out,), kwargs={"callbacks": [Kill()], "writer": settings, "batch_size": 64}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "store.json").exists()
    with pytest.raises(DataError, match="no finished feature store"):
        FeatureStore(out, NOVEL)
    count = Count()
    embed(out, callbacks=[count], writer=settings)
    assert count.rows == 373 - 4 * 64
    assert {path.name for path in out.iterdir()} == {"features.npy", "rows.parquet", "store.json"}
    whole, again = (np.load(folder / "features.npy") for folder in (tmp_path / "whole", out))
    np.testing.assert_allclose(whole, again, rtol=1e-5, atol=1e-6)
    assert pq.read_table(out / "rows.parquet").equals(pq.read_table(tmp_path / "whole" / "rows.parquet"))


def test_a_run_killed_before_the_store_was_made_valid_ends_it(tmp_path: Path) -> None:
    class Break(FeatureWriter):
        def on_predict_end(self, trainer, task) -> None:
            self._store.parts.flush()

    out = tmp_path / "store"
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[Break(str(out))])
    trainer.predict(EmbeddingTask(encoder()), MixedModalityDataModule(predict=NOVEL, batch_size=64))
    assert {path.name for path in out.iterdir()} == {"parts"}
    embed(out)
    assert units_apart(np.load(out / "features.npy"), live(64).astype(np.float16)) <= 1


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "store"
    embed(out, limit=2)
    with pytest.raises(
        MisconfigurationException, match=r"made with something else .another encoder: .*overwrite: true"
    ):
        embed(out, seed=1)
    with pytest.raises(MisconfigurationException, match="layer: None there, -2 now"):
        embed(out, layer=-2)
    with pytest.raises(MisconfigurationException, match="images: "):
        embed(out, datasets=EmojiDataset("fluent", "novel", modality="real"))
    embed(out)
    before = (out / "features.npy").read_bytes()
    with pytest.raises(MisconfigurationException, match=r"finished feature store. Set overwrite: true"):
        embed(out)
    assert (out / "features.npy").read_bytes() == before
    embed(out, seed=1, writer={"overwrite": True})
    assert (out / "features.npy").read_bytes() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(MisconfigurationException, match="no feature store"):
        embed(tmp_path / "other")


def test_images_of_another_folder_are_not_mixed_in(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    captions = [{"id": n, "image_id": n, "caption": "a dog"} for n in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    sets = []
    for seed, name in enumerate(("first", "other")):
        (tmp_path / name).mkdir()
        for n in range(3):
            pixels = np.random.default_rng([seed, n]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{n}.png")
        sets.append(CocoCaptions(tmp_path / "captions.json", tmp_path / name, "generated"))
    embed(tmp_path / "store", datasets=sets[0], batch_size=1, limit=2)
    with pytest.raises(MisconfigurationException, match=r"made with something else .images: "):
        embed(tmp_path / "store", datasets=sets[1])
    embed(tmp_path / "store", datasets=sets[0])
    FeatureStore(tmp_path / "store", sets[0])
    with pytest.raises(DataError, match="has no features of 3 of 3 images"):
        FeatureStore(tmp_path / "store", sets[1])


def test_parts_of_an_encoder_with_equal_blocks_are_refused(tmp_path: Path) -> None:
    def run(scale: float, limit=1.0) -> None:
        changed = encoder()
        with torch.no_grad():
            changed.model.visual.proj.mul_(scale)
        callbacks = [FeatureWriter(str(tmp_path / "store"))]
        trainer = pl.Trainer(accelerator="cpu", logger=False, limit_predict_batches=limit, callbacks=callbacks)
        trainer.predict(EmbeddingTask(changed), MixedModalityDataModule(predict=NOVEL, batch_size=64))

    run(1.0, limit=2)
    with pytest.raises(MisconfigurationException, match=r"another encoder: 1 of 40 tensors, most in image.proj: "):
        run(1.1)
    run(1.0001)  # as another device rounds
    assert len(FeatureStore(tmp_path / "store", NOVEL)) == 373


def test_a_limited_run_makes_no_store(tmp_path: Path) -> None:
    embed(tmp_path / "store", limit=2)
    with pytest.raises(DataError, match="no finished feature store"):
        FeatureStore(tmp_path / "store", NOVEL)


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    class Large(EmbeddingTask):
        def encode_pixels(self, image, modality, chunk_size=None):
            return super().encode_pixels(image, modality, chunk_size) + 70_000.0

    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[FeatureWriter(str(tmp_path / "a"))])
    with pytest.raises(DataError, match=r"'noto/.*not finite in float16; the largest is 7e\+04.*dtype: float32"):
        trainer.predict(Large(encoder()), MixedModalityDataModule(predict=NOVEL, batch_size=64))
    with pytest.raises(DataError, match="373 images to predict are both real and generated, such as 'noto/"):
        embed(tmp_path / "b", datasets=[NOVEL, EmojiDataset("noto", modality="generated")])
    with pytest.raises(ValueError, match="Unknown dtype 'bfloat16'"):
        FeatureWriter("c", dtype="bfloat16")
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    with pytest.raises(MisconfigurationException, match="EmbeddingTask takes no ckpt_path"):
        trainer.predict(
            EmbeddingTask(encoder()), MixedModalityDataModule(predict=NOVEL), ckpt_path=tmp_path / "task.ckpt"
        )
    with pytest.raises(MisconfigurationException, match="FeatureWriter writes what EmbeddingTask makes"):
        trainer.predict(AlignmentTask(encoder()), MixedModalityDataModule(predict=NOVEL))
