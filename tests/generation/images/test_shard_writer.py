"""Storing one image, and the threads behind the generator."""

import io
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gmail_lightning.generation.images import shard_writer as module
from gmail_lightning.generation.images.shard_writer import BackgroundWriter, ImageFormat, store_image, to_bytes


@pytest.mark.parametrize(
    ("size", "image", "resized", "cropped"),
    [
        (None, (40, 60), (40, 60), (40, 60)),
        (20, (40, 60), (20, 30), (20, 30)),
        (20, (60, 40), (30, 20), (30, 20)),
        (50, (40, 60), (40, 60), (40, 60)),  # not enlarged
        ((20, 20), (40, 60), (20, 30), (20, 20)),
        ((80, 80), (40, 60), (80, 120), (80, 80)),
    ],
)
def test_sizes(size, image, resized, cropped) -> None:
    assert ImageFormat(size).fit(*image) == (resized, cropped)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8))
    stored = module.resize_image(picture, ImageFormat(size))
    assert (stored.height, stored.width) == cropped
    expected = picture.resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
    assert np.array_equal(np.asarray(stored), np.asarray(expected)[top:, left:][: cropped[0], : cropped[1]])


def test_floats_become_the_nearest_bytes_on_either_path() -> None:
    image = torch.cat([torch.rand(4000) * 1.2 - 0.1, torch.arange(256) / 255]).view(1, -1).expand(3, -1)
    expected = np.clip(np.rint(image.double().numpy() * 255), 0, 255)
    on_device, in_thread = to_bytes(image).numpy(), module._to_bytes(image.numpy())
    assert np.array_equal(on_device, in_thread)
    assert np.abs(on_device - expected).max() <= 1  # ties between two bytes, in single precision
    assert (on_device != expected).mean() < 1e-3


def test_the_audit_sees_what_a_reader_will() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    data, row = store_image(image, True, False, ImageFormat(quality=30))
    assert data is not None
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) / 255
    assert np.abs(stored - image.transpose(1, 2, 0) / 255).mean() > 0.02  # the codec changed it
    assert row["pixel_mean"] == pytest.approx(stored.mean(), abs=1 / 255)
    assert row["pixel_std"] == pytest.approx(stored.std(), abs=2 / 255)
    assert (row["status"], row["size"]) == ("ok", "16x16")


def rows(shard: str, *keys: str) -> list[dict]:
    return [{"key": key, "shard": shard, "caption": key} for key in keys]


def test_shards_are_closed_with_their_last_row_and_keep_their_order(tmp_path) -> None:
    writer = BackgroundWriter(tmp_path, {"a": 5, "b": 3}, ImageFormat(name="png"), threads=3)
    images = torch.rand(8, 3, 16, 16)
    writer.put("a", rows("a", "0", "1", "2"), images[:3], [False] * 3)
    writer.put("a", rows("a", "3", "4"), images[3:5], [False] * 2)
    writer.put("b", rows("b", "5", "6"), images[5:7], [False, True])  # its third row never comes
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "a.tar"]
    assert pq.read_table(tmp_path / "a.parquet")["key"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert writer.counts == {"ok": 6, "safety": 1}


def test_memory_is_bounded_where_the_threads_fall_behind(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered, real = threading.Event(), threading.Event(), module.encode_image

    def encode(image, image_format):
        entered.set()
        assert gate.wait(30)
        return real(image, image_format)

    monkeypatch.setattr(module, "encode_image", encode)
    writer = BackgroundWriter(tmp_path, {"a": 10}, ImageFormat(name="png"), threads=1, capacity=2)
    handed: list[int] = []

    def produce() -> None:
        for i in range(10):
            writer.put("a", rows("a", str(i)), torch.rand(1, 3, 16, 16), [False])
            handed.append(i)

    producer = threading.Thread(target=produce)
    producer.start()
    assert entered.wait(30)
    producer.join(timeout=0.5)
    assert producer.is_alive()
    assert len(handed) <= 4  # one in work, two that wait, one more between the two
    gate.set()
    producer.join()
    writer.finish()
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 10


def test_an_error_of_the_threads_reaches_the_caller_and_nothing_hangs(tmp_path, monkeypatch) -> None:
    def encode(image, image_format):
        raise OSError("disk full")

    monkeypatch.setattr(module, "encode_image", encode)
    writer = BackgroundWriter(tmp_path, {"a": 100}, ImageFormat(), threads=2, capacity=1)

    def put_all() -> None:
        for i in range(100):
            writer.put("a", rows("a", str(i)), torch.rand(1, 3, 8, 8), [False])

    with pytest.raises(OSError, match="disk full"):
        put_all()
    writer.stop()
    assert list(tmp_path.iterdir()) == []
