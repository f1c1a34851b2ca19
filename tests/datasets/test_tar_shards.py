"""Tar shards against tars written by hand: every column, every complaint, and what a filter leaves out."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tar_fixtures import hash_of, picture, png, sample, store_row, write_manifest, write_store, write_tar
from torch.utils.data import DataLoader

from gmail_lightning.datasets import DataError, Filter, ImageDecodeError, TarShards
from gmail_lightning.datasets.base import decode_image
from gmail_lightning.datasets.tars import files as tar_files
from gmail_lightning.datasets.tars import index as tar_index
from gmail_lightning.generation.images.shard_writer import ImageFormat, ShardFile, store_image
from gmail_lightning.generation.images.store import ShardStore
from gmail_lightning.transforms.image_hash import perceptual_hash


def pixels(data: TarShards, index: int) -> np.ndarray:
    return data[index]["image"].permute(1, 2, 0).numpy()


def stable_id(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def own_id(key: str, image: bytes) -> int:
    """Of an image without a stated id: by its key, its size, and its bytes."""
    assert len(image) <= 8192
    return stable_id(f"{key}/{len(image)}/{hashlib.blake2b(image, digest_size=8).hexdigest()}")


# Stores


def ten_rows() -> list[dict[str, Any]]:
    rows = [store_row(n) for n in range(10)]
    rows[2] |= {"status": "rejected", "reason": "black"}
    rows[5] |= {"status": "failed", "reason": "not_finite", "exact_hash": None, "perceptual_hash": None}
    rows[6] |= {"status": "rejected", "reason": "duplicate"}
    rows[7] |= {"generator": "sdxl", "caption": " two\nlines, süß "}
    rows[8] |= {"modality": "real", "concept_set": None}
    return rows


def test_a_store_gives_the_rows_that_are_ok(tmp_path: Path) -> None:
    data = TarShards(write_store(tmp_path / "a=b", ten_rows()))  # a name that Parquet readers take for a partition
    kept = [0, 1, 3, 4, 7, 8, 9]
    assert len(data) == 7
    for index, number in enumerate(kept):
        row = data[index]
        assert np.array_equal(pixels(data, index), picture(number))
        assert row["sample_key"] == f"k{number:03d}"
        assert row["captions"] == ["two lines, süß" if number == 7 else f"caption {number}"]
        assert (row["image_id"], row["pair_id"], row["label"]) == (1000 + number, number, -1)
        source = {7: "sdxl", 8: "real"}.get(number, "sd15")
        assert (row["modality"], row["source"]) == (int(source != "real"), source)
        assert data.record(index)["number"] == number
        assert data.columns(index) == ({} if number == 8 else {"concept_set": "paired"})
        assert data.column("seed")[index].as_py() == number
    assert data.split == "train"
    hashes = data.perceptual_hashes()
    assert hashes is not None
    assert hashes.tolist() == [hash_of(n) for n in kept]
    assert data.describe(2) == f"{tmp_path}/a=b/train-000000.tar key 'k003'"
    assert data.dropped == {"black": 1, "not_finite": 1, "duplicate": 1}
    assert data.summary == (f"TarShards({tmp_path}/a=b): 10 rows, 7 used; dropped: 1 black, 1 not_finite, 1 duplicate")
    assert data.not_for_training is None
    assert data.weight is None


def test_arguments_stand_over_the_manifest(tmp_path: Path) -> None:
    folder = write_store(tmp_path, ten_rows())
    data = TarShards(folder, modality="generated", source="mine")
    assert set(data.modality) == {1}
    assert data.source(5) == "mine"
    part = TarShards(folder / "train-00000{1,2}.tar", Filter(statuses=["ok", "rejected"]))
    assert [part.sample_key(i) for i in range(len(part))] == ["k004", "k006", "k007", "k008", "k009"]
    assert part.dropped == {"not_finite": 1}
    assert part.not_for_training is not None
    assert np.array_equal(pixels(part, 1), picture(6))
    with pytest.raises(ValueError, match="modality 'fake'"):
        TarShards(folder, modality="fake")  # type: ignore[arg-type]


def test_what_image_generation_writes_is_read_back(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    names, stored = ["train-000000", "train-000001", "train-000002"], {}
    for shard, name in enumerate(names):
        file = ShardFile(tmp_path, name)
        for number in range(shard * 3, shard * 3 + 3):
            image = picture(1 if number == 7 else number, 32).transpose(2, 0, 1)  # number 7 repeats number 1
            data, audit = store_image(image, number not in (4, 5), number == 2, ImageFormat())
            row = store_row(number, shard=name) | {"prompt_id": f"p{number}"} | audit
            file.add(row, data, "webp")
            if data is not None:
                stored[row["key"]] = decode_image(data)
        file.close()
    store.write_recipe({})
    store.merge(names, {}, None)
    data = TarShards(tmp_path)
    assert [data.sample_key(i) for i in range(len(data))] == ["k000", "k001", "k003", "k006", "k008"]
    assert data.dropped == {"safety": 1, "not_finite": 2, "duplicate": 1}
    for index in range(len(data)):
        row = data[index]
        number = int(row["sample_key"][1:])
        assert torch.equal(row["image"], stored[row["sample_key"]])
        assert (row["captions"], row["pair_id"]) == ([f"caption {number}"], number)
        assert data.record(index)["key"] == row["sample_key"]
        assert data.columns(index) == {"concept_set": "paired"}
    hashes = data.perceptual_hashes()
    assert hashes is not None
    assert hashes.tolist() == [perceptual_hash(stored[f"k{n:03d}"]) for n in (0, 1, 3, 6, 8)]


def test_splits_are_told_apart(tmp_path: Path) -> None:
    rows = [store_row(n, split="val" if n > 5 else "train") for n in range(8)]
    folder = write_store(tmp_path, rows)
    with pytest.raises(DataError, match=r"several splits: name one by split=. There are train, val"):
        TarShards(folder)
    with pytest.raises(DataError, match=r"unknown split 'test'. There are train, val"):
        TarShards(folder, split="test")
    data = TarShards(folder, split="val")
    assert [data.sample_key(i) for i in range(len(data))] == ["k006", "k007"]
    assert data.split == "val"
    assert data.dropped == {"of another split": 6}


@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_what_a_plain_loop_keeps(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(40):
        score = None if rng.random() < 0.2 else round(float(rng.random()), 1)  # ties, and no scores
        status = "ok" if rng.random() < 0.7 else "rejected"
        rows.append(store_row(n, clip_score=score, status=status, reason=None if status == "ok" else "black"))
    folder = write_store(tmp_path, rows)
    for statuses in (["ok"], ["rejected"], ["ok", "rejected"]):
        for least in (None, 0.3):
            for share in (None, 0.5, 0.05):
                expected = [n for n, row in enumerate(rows) if row["status"] in statuses]
                if least is not None or share is not None:
                    expected = [n for n in expected if rows[n]["clip_score"] is not None]
                if least is not None:
                    expected = [n for n in expected if rows[n]["clip_score"] >= least]
                if share is not None:
                    best = sorted(expected, key=lambda n: (-rows[n]["clip_score"], n))
                    expected = sorted(best[: max(round(share * len(best)), 1)])
                data = TarShards(folder, Filter(least, statuses, share))
                assert data.pair_id.tolist() == expected
                assert sum(data.dropped.values()) == 40 - len(expected)


def test_what_a_filter_drops_is_counted(tmp_path: Path) -> None:
    rows = [store_row(n) for n in range(10)]
    rows[3]["clip_score"] = None
    rows[4] |= {"status": "rejected", "reason": "safety", "clip_score": None}
    data = TarShards(write_store(tmp_path, rows), Filter(min_clip_score=0.525, top_share=0.5))
    assert data.dropped == {
        "safety": 1, "no clip_score": 1, "clip_score < 0.525": 3, "not among the best 0.5 by clip_score": 3,
    }  # fmt: skip
    assert data.pair_id.tolist() == [8, 9]
    with pytest.raises(DataError, match=r"10 rows, 0 used; dropped: 1 safety, .*8 clip_score < 2.*No rows are left"):
        TarShards(tmp_path, Filter(min_clip_score=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statuses": ["failed"]}, "use 'ok', 'rejected' or both"),
        ({"statuses": []}, "statuses is"),
        ({"top_share": 0.0}, "top_share is 0.0"),
        ({"top_share": 90.0}, "top_share is 90"),
    ],
)
def test_filters_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filter(**arguments)


def test_weights_are_those_of_pcm_net(tmp_path: Path) -> None:
    scores = [0.0, 0.31, 0.99, 1.7, 2.5]
    folder = write_store(tmp_path, [store_row(n, clip_score=score) for n, score in enumerate(scores)])
    data = TarShards(folder, weight="clip_score")
    assert data.weight is not None
    assert data.weight.dtype == np.float32
    assert data.weight.tolist() == pytest.approx([min(max(score / 2.5 * 2.5, 0), 1) for score in scores])
    with pytest.raises(ValueError, match="Unknown weight 'pixel_mean'"):
        TarShards(folder, weight="pixel_mean")  # type: ignore[arg-type]
    write_manifest(folder, [store_row(n, clip_score=score) for n, score in enumerate([None, *scores[1:]])])
    with pytest.raises(DataError, match=r"1 rows in use have no clip_score"):
        TarShards(folder, weight="clip_score")
    assert len(TarShards(folder, Filter(min_clip_score=0), weight="clip_score")) == 4


def test_repaired_pairs_take_caption_and_image_from_two_rows(tmp_path: Path) -> None:
    rows = [store_row(n) for n in range(8)]
    chosen = ["k003", "k003", None, "k003", "k000", "k006", "k001", "k002"]
    for n, key in enumerate(chosen):
        rows[n] |= {"repaired_key": key, "repair_score": 0.9 - n / 10}
    rows[6] |= {"status": "rejected", "reason": "black"}
    folder = write_store(tmp_path, rows)
    data = TarShards(folder, repaired=True)
    assert data.dropped == {"black": 1, "no repaired_key": 1, "whose chosen image is not ok": 1}
    for index, number in enumerate([0, 1, 3, 4, 7]):
        image = int(chosen[number][1:])  # type: ignore[index]
        assert np.array_equal(pixels(data, index), picture(image))
        assert data.captions(index) == [f"caption {number}"]
        assert data.pair_id[index] == number
        assert data.image_id[index] == 1000 + image
        assert data.perceptual_hashes()[index] == hash_of(image)  # type: ignore[index]
    assert len(set(data.picture()[:3])) == 1
    assert len(set(data.picture())) == 3
    assert TarShards(folder, Filter(top_share=0.5), repaired=True).pair_id.tolist() == [0, 1]
    with pytest.raises(DataError, match="needs the whole folder"):
        TarShards(folder / "train-000000.tar", repaired=True)
    with pytest.raises(ValueError, match="own image"):
        TarShards(folder, weight="clip_score", repaired=True)
    rows[7]["repaired_key"] = "k999"
    write_manifest(folder, rows)
    with pytest.raises(DataError, match=r"row 8 \(key 'k007', train-000001.tar\): its repaired_key is no key"):
        TarShards(folder, repaired=True)
    rows[7]["repaired_key"], rows[0]["split"] = "k001", "val"
    write_manifest(folder, rows)
    with pytest.raises(DataError, match=r"key 'k000'.* of another split"):
        TarShards(folder, split="train", repaired=True)
    write_store(folder, ten_rows())
    with pytest.raises(DataError, match=r"no column repaired_key, repair_score. Make them by gmail-lightning repair"):
        TarShards(folder, repaired=True)


def test_a_store_that_is_not_whole(tmp_path: Path) -> None:
    folder = write_store(tmp_path, ten_rows())
    manifest = (folder / "manifest.parquet").rename(folder / "kept")
    with pytest.raises(DataError, match=r"not finished, for there is no manifest.parquet. Run its command again"):
        TarShards(folder)
    manifest.rename(folder / "manifest.parquet")
    tar = (folder / "train-000001.tar").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"row 5 \(key 'k004', train-000001.tar\): the tar of its shard is missing \(4"):
        TarShards(folder)
    tar.rename(folder / "train-000001.tar")
    write_tar(folder / "train-000000.tar", sample("k000", 0, "x") + sample("other", 1, "y"))
    with pytest.raises(DataError, match=r"row 2 \(key 'k001', train-0{6}.tar\): its tar has no image of this key \(3 "):
        TarShards(folder)
    write_manifest(folder, [*ten_rows()[:1], *ten_rows()[4:]])
    assert "1 keys of the tars are not in the manifest" in str(TarShards(folder).summary)
    write_manifest(folder, [*ten_rows(), store_row(3, image_index=1)])
    with pytest.raises(DataError, match=r"manifest.parquet: key 'k003' stands there more than once \(1 such keys\)"):
        TarShards(folder)
    write_manifest(folder, [{"key": "a", "shard": "b"}])
    with pytest.raises(DataError, match=r"no column split, modality, .*\(found: key, shard\)"):
        TarShards(folder)


# Other folders


def downloads(folder: Path, parquet: bool) -> Path:
    """As img2dataset leaves them: two tars, failed downloads only in the Parquet file."""
    folder.mkdir()
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        rows = []
        for n in range(4):
            key, number = f"{shard:05d}{n:04d}", shard * 4 + n
            status = "failed_to_download" if n == 1 else "success"
            record = {"caption": f"caption {number}", "status": status, "url": f"http://x/{n}"}
            record["clip_score"] = number / 10
            rows.append({"key": key, **record})
            if status == "success":
                members += sample(key, number, f"caption {number}", **record)
        write_tar(folder / f"{shard:05d}.tar", members)
        if parquet:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


@pytest.mark.parametrize("parquet", [True, False])
def test_downloads_of_img2dataset(tmp_path: Path, parquet: bool) -> None:
    folder = downloads(tmp_path / "cc3m", parquet)
    data = TarShards(folder / "{00000..00001}.tar", modality="real")
    keys = ["000000000", "000000002", "000000003", "000010000", "000010002", "000010003"]
    assert [data.sample_key(i) for i in range(len(data))] == keys
    for index, number in enumerate([0, 2, 3, 4, 6, 7]):
        assert np.array_equal(pixels(data, index), picture(number))
        assert data.captions(index) == [f"caption {number}"]
        assert data.record(index)["url"] == f"http://x/{number % 4}"
    images = [png(number) for number in (0, 2, 3, 4, 6, 7)]
    assert data.image_id.tolist() == [own_id(key, images[i]) for i, key in enumerate(keys)]
    assert data.pair_id.tolist() == data.image_id.tolist()
    assert set(data.modality) == {0}
    assert data.source(0) == "real"
    assert data.split is None
    assert data.dropped == ({"failed_to_download": 2} if parquet else {})
    assert TarShards(folder, Filter(top_share=0.5), modality="generated", source="sd").pair_id.tolist() == [-1] * 3
    assert TarShards(folder, Filter(min_clip_score=0.35), "val", "real").split == "val"
    with pytest.raises(DataError, match="say modality="):
        TarShards(folder)
    with pytest.raises(DataError, match="repaired=True needs a store"):
        TarShards(folder, modality="real", repaired=True)


def test_captions_and_ids_wherever_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        *sample("a", 0, None, caption="of the record", image_id=7, pair_id="p"),
        *sample("b", 1, "of the text", caption="of the record", image_id="7", pair_id=4),
        *sample("c", 2, "  \n", caption="not used"),
        *sample("d", 3, None),
        *sample("e", 4, "caption", image_id="s7"),
        ("./f.PNG", png(5)), ("./f.txt", b"sub"), ("sub.dir/g.jpg", png(6)), ("sub.dir/g.txt", b"deep"),
        ("h.png", png(7)), ("h.txt", b"\xff\xfe"), ("i.txt", b"no image"), ("README", b""), ("j.seg.png", png(9)),
        ("k.webp", png(10)), ("k.txt", b"caption k"), ("k.json", b"{broken"),
        ("x" * 150 + ".png", png(11)), ("x" * 150 + ".txt", b"a long name"),
    ]  # fmt: skip
    data = TarShards(write_tar(tmp_path / "a.tar", members), modality="generated")
    found = {data.sample_key(i): (data.captions(i)[0], i) for i in range(len(data))}
    captions = {key: caption for key, (caption, _) in found.items()}
    assert captions == {
        "a": "of the record", "b": "of the text", "e": "caption", "f": "sub", "sub.dir/g": "deep",
        "x" * 150: "a long name",
    }  # fmt: skip
    for key, number in {"a": 0, "f": 5, "sub.dir/g": 6, "x" * 150: 11}.items():
        assert np.array_equal(pixels(data, found[key][1]), picture(number))
    ids = dict(zip(captions, data.image_id.tolist(), strict=True))
    own = {key: own_id(key, data.encoded(i)) for key, (_, i) in found.items()}
    assert ids == {**own, "a": 7, "b": 7, "e": stable_id("s7")}
    assert data.pair_id.tolist()[:2] == [stable_id("p"), 4]
    assert data.dropped == {
        "unreadable text": 2, "no image": 1, "no caption": 3, "members without a suffix": 1,
    }  # fmt: skip
    assert any(record.levelno == logging.WARNING and data.summary == record.message for record in caplog.records)
    assert data.record(found["f"][1]) == {}


def test_one_that_does_not_decode_names_tar_and_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"nonsense", "a.txt": b"x"})
    with pytest.raises(ImageDecodeError, match=r"a.tar key 'a': the image does not decode"):
        TarShards(path, modality="real")[0]


# The index


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which tars are indexed."""
    read: list[str] = []
    original = tar_index.index_tar

    def counted(path: Path, described: bool = False) -> pa.Table:
        read.append(path.name)
        return original(path, described)

    monkeypatch.setattr(tar_index, "index_tar", counted)
    return read


def test_the_index_is_built_once_and_only_where_a_tar_changed(
    tmp_path: Path, no_reading: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = downloads(tmp_path / "x", parquet=True)
    TarShards(folder / "00000.tar", modality="real")
    assert no_reading == ["00000.tar"]
    data = TarShards(folder, modality="real")
    assert no_reading == ["00000.tar", "00001.tar"]
    assert not list(folder.glob("*.tmp-*"))
    again = TarShards(folder, modality="real")
    assert no_reading == ["00000.tar", "00001.tar"]
    assert np.array_equal(pixels(again, 4), picture(6))
    assert "changed" not in caplog.text
    os.utime(folder / "00001.parquet", ns=(1, 1))  # captions may have changed
    TarShards(folder, modality="real")
    assert no_reading[2:] == ["00001.tar"]
    old = (folder / "00000.tar").stat()
    members = sample("000000000", 50, "new") + sample("000000002", 2, "caption 2") + sample("000000003", 3, "caption 3")
    write_tar(folder / "00000.tar", members)
    os.utime(folder / "00000.tar", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    tar_files._opened.cache_clear()
    with pytest.raises(DataError, match=r"00000.tar was changed after it was indexed: build the data set anew"):
        data[0]
    changed = TarShards(folder, modality="real")
    assert no_reading[3:] == ["00000.tar"]
    assert "00000.tar changed" in caplog.text
    assert np.array_equal(pixels(changed, 0), picture(50))
    assert np.array_equal(pixels(changed, 4), picture(6))


def test_the_index_of_a_folder_that_cannot_be_written_is_in_the_cache(
    tmp_path: Path, no_reading: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = downloads(tmp_path / "x", parquet=False)
    pq.write_table(pa.table({"mine": [1]}), folder / "index.parquet")  # someone else's file
    monkeypatch.setenv("GMAIL_LIGHTNING_CACHE", str(tmp_path / "cache" / "deep"))
    TarShards(folder, modality="real")
    assert pq.read_table(folder / "index.parquet").column_names == ["mine"]
    (kept,) = (tmp_path / "cache" / "deep").iterdir()
    number = len(no_reading)
    TarShards(folder, modality="real")
    assert len(no_reading) == number == 2
    kept.unlink()
    (folder / "index.parquet").unlink()
    original = pq.write_table

    def refuse(table: pa.Table, where: Path) -> None:
        if Path(where).parent == folder:
            raise PermissionError(13, "Read-only file system", str(where))
        original(table, where)

    monkeypatch.setattr(pq, "write_table", refuse)
    TarShards(folder, modality="real")
    assert [p.name for p in (tmp_path / "cache" / "deep").iterdir()] == [kept.name]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GMAIL_LIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
    assert len(TarShards(folder, modality="real")) == 6
    assert "cannot be kept and is made each time" in caplog.text


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", sample("a", 0, "x") + sample("b", 1, "y")).read_bytes()
    body = whole.rstrip(b"\0")
    for length in [0, 100, 512, 700, 1024, 1536, 2048, len(body) // 2 // 512 * 512, len(body) - 3, len(body)]:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.tar.*(cut short|not a whole)"):
            TarShards(tmp_path / "a.tar", modality="real")
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 2] + b"damaged!" * 64 + whole[512 * 3 :])
    with pytest.raises(DataError, match=r"a\.tar is cut short or damaged after key 'a'"):
        TarShards(tmp_path, modality="real")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"1"), ("a.txt", b"x"), ("a.png", b"2")], r"a.tar: key 'a' has two members .png or two images"),
        ([("a.png", b"1"), ("a.jpg", b"2")], r"key 'a' has two members .jpg or two images"),
        ([("a.png", b"1"), ("a.json", b'{"clip_score": "high"}')], "clip_score is no number"),
    ],
)
def test_members_that_contradict_one_another(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        TarShards(tmp_path, modality="real")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    folder = downloads(tmp_path / "x", parquet=True)
    with pytest.raises(DataError, match=r"x/00002.tar: no such tar \(2 missing\)"):
        TarShards(folder / "{00000..00003}.tar", modality="real")
    with pytest.raises(DataError, match=r"x/9\*.tar: no such tar"):
        TarShards(folder / "9*.tar", modality="real")
    with pytest.raises(DataError, match=r"no \.tar in this folder"):
        TarShards(tmp_path, modality="real")
    for address in ("https://host/{0..3}.tar", "s3://bucket/0.tar", "pipe:cat x.tar"):
        with pytest.raises(DataError, match=r"local tars.*StreamingDataModule"):
            TarShards(address, modality="real")
    write_tar(tmp_path / "0.tar", sample("a", 0, "x"))
    with pytest.raises(DataError, match="one TarShards per folder"):
        TarShards(tmp_path / "{0,x/00000}.tar", modality="real")
    (folder / "00000.tar").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"00000.parquet: its tar is missing"):
        TarShards(folder, modality="real")
    shutil.copy(folder / "00001.tar", folder / "00000.tar")
    with pytest.raises(DataError, match=r"key '000010000' stands there more than once"):
        TarShards(folder, modality="real")
    zipped = folder / "00002.tar.gz"
    zipped.write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    with pytest.raises(DataError, match=r"00002.tar.gz: a compressed tar has no random access. Decompress it"):
        TarShards(folder, modality="real")
    zipped = zipped.rename(tmp_path / "disguised.tar")
    with pytest.raises(DataError, match=r"disguised.tar: not a whole uncompressed tar"):
        TarShards(zipped, modality="real")


def test_braces() -> None:
    assert tar_files.expand_braces("a{08..11}{x,y}") == [f"a{n}{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    assert tar_files.expand_braces("{9..10}") == ["9", "10"]
    assert tar_files.expand_braces("{a}") == ["{a}"]


# Many rows, many tars, many processes


@pytest.mark.slow
def test_few_tars_are_open_at_once(tmp_path: Path) -> None:
    number = tar_files.OPEN_TARS + 40
    for n in range(number):
        write_tar(tmp_path / f"{n:05d}.tar", {f"{n:05d}.png": png(n % 5), f"{n:05d}.txt": b"x"})
    data = TarShards(tmp_path, modality="real")
    tar_files._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    for n in range(number):
        assert np.array_equal(pixels(data, n), picture(n % 5))
    assert len(os.listdir("/proc/self/fd")) - before == tar_files.OPEN_TARS
    tar_files._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_read_what_the_process_reads(tmp_path: Path) -> None:
    data = TarShards(write_store(tmp_path, ten_rows()))
    expected = [data[i]["image"] for i in range(len(data))]  # its tars are open now
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    images = [row["image"] for row in loader]
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert np.array_equal(pickle.loads(pickle.dumps(data))[3]["image"], expected[3])  # as a spawned worker gets it


@pytest.mark.slow
def test_rows_cost_little_memory(tmp_path: Path) -> None:
    count = 4000
    members = [(f"{n:09d}.{suffix}", b"x") for n in range(count) for suffix in ("jpg", "txt")]
    write_tar(tmp_path / "0.tar", members)
    TarShards(tmp_path, modality="real")
    before = pa.total_allocated_bytes()
    data = TarShards(tmp_path, modality="real")
    arrays = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    owned = sum(array.nbytes for array in arrays if array.base is None)
    for _ in range(100):  # Arrow's threads give back late
        if pa.total_allocated_bytes() - before + owned < 150 * count:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"{pa.total_allocated_bytes() - before} + {owned} bytes for {count} rows")
    assert not any(isinstance(value, (list, dict)) and len(value) > 10 for value in vars(data).values())


def test_a_record_is_json_of_the_tar(tmp_path: Path) -> None:
    data = TarShards(write_tar(tmp_path / "a.tar", sample("a", 0, "x", url="süß")), modality="real")
    assert data.record(0) == json.loads('{"key": "a", "url": "süß"}')


@pytest.mark.parametrize("with_parquet", [True, False])
def test_tars_of_a_store_without_its_manifest_are_refused(tmp_path: Path, with_parquet: bool) -> None:
    shard = ShardFile(tmp_path, "train-000000")
    shard.add(store_row(0), png(0), "png")
    shard.close()
    if not with_parquet:
        (tmp_path / "train-000000.parquet").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar is of a store .*copy manifest.parquet too"):
        TarShards(tmp_path, modality="generated")
