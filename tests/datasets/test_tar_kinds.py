"""What tars may hold, read at random and as a stream: every member is used or told, and ids are the same."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import logging
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from recorder import SPEC
from tar_fixtures import png, sample, store_row, write_store, write_tar

from gmail_lightning.datamodules import MixedModalityDataModule, StreamingDataModule
from gmail_lightning.datamodules.stream_rows import StreamRows
from gmail_lightning.datamodules.stream_samples import ShardReader
from gmail_lightning.datamodules.training import is_above
from gmail_lightning.datasets import DataError, ManifestDataset, TarShards
from gmail_lightning.datasets.base import ModalityName
from gmail_lightning.datasets.tars import index as tar_index
from gmail_lightning.datasets.tars.members import may_belong
from gmail_lightning.generation.images.prompt_table import PromptTable

Members = list[tuple[str, bytes]]


class Found(NamedTuple):
    captions: dict[str, str]
    image_ids: dict[str, int]
    pair_ids: dict[str, int]
    told: str


def at_random(path: Path, modality: ModalityName = "real", space: str = "") -> Found:
    data = TarShards(path, modality=modality, space=space)
    keys = [data.sample_key(i) for i in range(len(data))]
    ids = (dict(zip(keys, column.tolist(), strict=True)) for column in (data.image_id, data.pair_id))
    return Found({key: data.captions(i)[0] for i, key in enumerate(keys)}, *ids, str(data.summary))


def as_stream(path: Path, modality: ModalityName = "real", space: str = "") -> Found:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gmail_lightning.datamodules.stream_samples")
    logger.addHandler(handler)
    reader = ShardReader(modality, space, any_loss=True)
    paths = [path] if path.is_file() else sorted(path.glob("*.tar"))
    samples = [sample for tar in paths for sample in reader.read(str(tar))]
    logger.removeHandler(handler)
    reasons = [reason for _, reason in reader.reasons]
    return Found(
        {one.key: one.caption for one in samples},
        {one.key: one.image_id for one in samples},
        {one.key: one.pair_id for one in samples},
        "\n".join(told + reasons),
    )


READERS = [at_random, as_stream]
reader = pytest.mark.parametrize("read", READERS)


def pair(key: str, number: int, suffix: str = "png") -> Members:
    return [(f"{key}.{suffix}", png(number)), (f"{key}.txt", f"caption {number}".encode())]


NAMES: dict[str, tuple[Members, dict[str, str], list[str]]] = {
    "dots": ([*pair("Mug 2.0 (new)", 0), *pair("v1.5_007", 1)], {"Mug 2.0 (new)": "0", "v1.5_007": "1"}, []),
    "folders with dots": ([*pair("./a.b/c", 0), *pair("a.b/d", 1)], {"a.b/c": "0", "a.b/d": "1"}, []),
    "capitals": ([("a.PNG", png(0)), ("a.TXT", b"caption 0")], {"a": "0"}, []),
    "compound": (
        [("a.png", png(0)), ("a.seg.png", png(1)), ("a.txt", b"caption 0"), *pair("b", 2)],
        {"a": "0", "b": "2"},
        ["members .seg beside a sample"],
    ),
    "compound, sorted by what follows": (
        [
            ("x/a.b/v1.2.depth.png", png(1)), ("x/a.b/v1.2.meta.json", b"{}"), ("x/a.b/v1.2.png", png(0)),
            ("x/a.b/v1.2.txt", b"caption 0"), *pair("x/a.b/v1.3", 2),
        ],
        {"x/a.b/v1.2": "0", "x/a.b/v1.3": "2"},
        ["members .depth beside a sample", "members .meta beside a sample"],
    ),
    "interleaved": (
        [
            ("x.aa.png", png(0)), ("x.bb.png", png(1)), ("x.aa.txt", b"caption 0"), ("x.bb.txt", b"caption 1"),
            ("x.cc.txt", b"caption 2"), ("x.dd.txt", b"caption 3"), ("x.cc.png", png(2)), ("x.dd.png", png(3)),
        ],
        {"x.aa": "0", "x.bb": "1", "x.cc": "2", "x.dd": "3"},
        [],
    ),
    "masks at the end": (
        [*pair("a", 0), *pair("b", 1), *((f"{key}.crop_{n}.png", png(9)) for key in "ab" for n in (1, 22))],
        {"a": "0", "b": "1"},
        ["members .crop_0 beside a sample"],
    ),
    "a dot, and nothing beside": ([("a.seg.png", png(1)), *pair("b", 2)], {"b": "2"}, ["no caption"]),
    "other members": (
        [*pair("a", 0), ("a.npy", b"x"), ("a.cls", b"3"), ("README", b"x")],
        {"a": "0"},
        ["members .npy", "members .cls", "members without a suffix"],
    ),
    "hidden": ([("._a.png", b"x"), *pair("a", 0), (".DS_Store", b"x")], {"a": "0"}, ["hidden members"]),
    "byte order marks": (
        [
            ("a.png", png(0)), ("a.txt", b"\xef\xbb\xbfcaption 0"),
            ("b.png", png(1)), ("b.json", b"\xef\xbb\xbf" + json.dumps({"caption": "caption 1"}).encode()),
        ],
        {"a": "0", "b": "1"},
        [],
    ),
    "a caption that is a number": ([*pair("a", 0), *sample("b", 1, None, caption=2012)], {"a": "0"}, ["text"]),
    "a caption that is null": ([*pair("a", 0), *sample("b", 1, None, caption=None)], {"a": "0"}, ["no caption"]),
    "deep": ([*pair("a", 0), ("b.png", png(1)), ("b.json", b"[" * 200_000)], {"a": "0"}, []),
    "half of a character": (
        [*pair("a", 0), ("b.png", png(1)), ("b.json", json.dumps({"caption": "x " + chr(0xD83D)}).encode())],
        {"a": "0"},
        [],
    ),
    "no object": ([*pair("a", 0), ("b.png", png(1)), ("b.json", b"[1]")], {"a": "0"}, []),
}  # fmt: skip


@reader
@pytest.mark.parametrize("name", list(NAMES))
def test_every_member_is_used_or_told(tmp_path: Path, read: Callable[..., Found], name: str) -> None:
    members, expected, told = NAMES[name]
    found = read(write_tar(tmp_path / "a.tar", members))
    assert found.captions == {key: f"caption {number}" for key, number in expected.items()}
    for words in told:
        assert words in found.told
    lost = {key for key in ("b",) if any(n.startswith(f"{key}.") for n, _ in members)} - expected.keys()
    assert not lost or ("1 " in found.told and "dropped" in found.told) or all(repr(key) in found.told for key in lost)


def test_keys_that_share_a_dot_are_no_one_group(tmp_path: Path) -> None:
    """Of a stream, only members of related keys are held at once: those before a cut come."""
    tar = write_tar(tmp_path / "a.tar", [m for n in range(10) for m in pair(f"shard.{n}", n)])
    with tarfile.open(tar) as archive:
        cut = next(member for member in archive if member.name == "shard.5.png").offset
    tar.write_bytes(tar.read_bytes()[: cut + 600])
    assert list(as_stream(tar).captions) == [f"shard.{n}" for n in range(5)]
    members = [m for n in range(10) for m in pair(f"shard.{n}", n)]
    tar = write_tar(tmp_path / "a.tar", [members[0], *members[2:]])  # the first has no caption
    tar.write_bytes(tar.read_bytes()[:cut])
    assert list(as_stream(tar).captions) == [f"shard.{n}" for n in range(1, 5)]


@pytest.mark.parametrize(
    ("key", "others", "belongs"),
    [
        ("a", {"a": 1}, True),
        ("a.mask", {"a": 2}, True),
        ("a", {"a.mask": 1}, True),
        ("a.edge", {"a.mask": 1}, True),  # a may follow
        ("a.2", {"a.1": 2}, False),
        ("x.aa", {"x.aa": 1, "x.bb": 2}, True),
        ("b", {"a": 1}, False),
        ("a.b/2", {"a.b/1": 1}, False),  # the dot is of a folder
        ("a.b/1.2", {"a.b/1.1": 1}, True),
    ],
)
def test_what_may_belong_to_a_sample(key: str, others: dict[str, int], belongs: bool) -> None:
    found = {other: dict.fromkeys(["image", "txt"][:number], b"") for other, number in others.items()}
    assert may_belong(key, found) is belongs


@reader
def test_links_are_told(tmp_path: Path, read: Callable[..., Found]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in pair("a", 0):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
        tar.addfile(_folder("c.png"))
    found = read(tmp_path / "a.tar")
    assert found.captions == {"a": "caption 0"}
    assert "links" in found.told


def _folder(name: str) -> tarfile.TarInfo:
    folder = tarfile.TarInfo(name)
    folder.type = tarfile.DIRTYPE
    return folder


@reader
@pytest.mark.parametrize("end", ["record", "block"])
def test_archives_joined_end_to_end_are_read_through(tmp_path: Path, read: Callable[..., Found], end: str) -> None:
    parts = []
    for number in range(3):
        data = write_tar(tmp_path / "part", pair(f"k{number}", number)).read_bytes()
        parts.append(data if end == "record" else data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 1024))
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    assert read(tmp_path / "a.tar").captions == {f"k{n}": f"caption {n}" for n in range(3)}
    (tmp_path / "a.tar").write_bytes(parts[0] + b"no tar" * 200)
    with_rest = None
    try:
        with_rest = read(tmp_path / "a.tar")
    except DataError as error:
        assert "cut short or damaged" in str(error)  # noqa: PT017
    assert with_rest is None or "is cut short, damaged" in with_rest.told


@reader
def test_a_tar_cut_anywhere_is_told(tmp_path: Path, read: Callable[..., Found]) -> None:
    whole = write_tar(tmp_path / "whole", [*pair("a", 0), *pair("b", 1)]).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 1, 128):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        try:
            told = read(tmp_path / "a.tar").told
        except DataError as error:
            told = str(error)
        assert "is cut short" in told or "not a whole" in told, length
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(read(tmp_path / "a.tar").captions) == 2


def test_ids_are_the_same_however_a_tar_is_read(tmp_path: Path) -> None:
    stated = {"a": {"image_id": 7, "pair_id": "p"}, "b": {"image_id": "7.0"}, "c": {"image_id": -5}, "d": {}}
    members = [m for n, (key, ids) in enumerate(stated.items()) for m in sample(key, n, "x", **ids)]
    lines = [{"image": f"{key}.png", "caption": "x", **ids} for key, ids in stated.items() if ids]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for space in ("", "cc3m"):
        folder = tmp_path / f"x{space}"
        folder.mkdir()
        path = write_tar(folder / "0.tar", members)
        random, stream = at_random(path, space=space), as_stream(path, space=space)
        assert random.image_ids == stream.image_ids
        manifest = ManifestDataset(tmp_path / "rows.jsonl", modality="real", space=space)
        assert [random.image_ids[key] for key in "abc"] == manifest.image_id.tolist()
        assert random.pair_ids["a"] == stream.pair_ids["a"] == manifest.pair_id[0]
        moved = path.rename(tmp_path / f"moved{space}.tar")
        assert at_random(moved, space=space).image_ids == random.image_ids
    assert (
        at_random(tmp_path / "moved.tar").image_ids["d"]
        != at_random(tmp_path / "movedcc3m.tar", space="cc3m").image_ids["d"]
    )


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, 1e300])
@reader
def test_what_is_no_id_is_named(tmp_path: Path, read: Callable[..., Found], value: Any) -> None:
    path = write_tar(tmp_path / "a.tar", sample("k", 0, "x", image_id=value))
    with pytest.raises(DataError, match=r"a\.tar:? [kK]ey 'k': .* id"):
        read(path)


@reader
def test_folders_that_count_alike_share_no_ids(tmp_path: Path, read: Callable[..., Found]) -> None:
    found = []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        for shard in range(2):
            write_tar(
                tmp_path / name / f"{shard}.tar",
                [m for n in range(2) for m in pair(f"{shard}000{n}", 100 * number + 10 * shard + n)],
            )
        found.append(read(tmp_path / name))
    assert not set(found[0].image_ids.values()) & set(found[1].image_ids.values())
    for one in found:
        assert len(set(one.image_ids.values())) == 4
        assert one.pair_ids == one.image_ids  # real rows that state no pair have one of their own
    assert set(read(tmp_path / "one", modality="generated").pair_ids.values()) == {-1}


def test_ids_of_a_parquet_file_beside_a_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [*pair("a", 0), *pair("b", 1), *pair("c", 2)])
    table = pa.table({"key": ["a", "b", "c"], "image_id": [1.0, float("nan"), 3.0], "caption": ["x"] * 3})
    pq.write_table(table, tmp_path / "00000.parquet")
    data = TarShards(tmp_path, modality="real")
    assert [data.image_id[0], data.image_id[2]] == [1, 3]
    assert data.image_id[1] not in (-1, 0, 1, 3)  # missing, so that it goes by its key


@pytest.mark.parametrize("name", ["run [v2]", "a*b", "{x}", "{0..1}", "q?"])
def test_a_path_with_brackets_is_a_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", pair(f"k{shard}", shard))
    write_tar(folder / "[2].tar", pair("k2", 2))
    for path, rows in ((folder, 3), (folder / "0.tar", 1), (folder / "[2].tar", 1), (folder / "{0..1}.tar", 2)):
        assert len(TarShards(path, modality="real")) == rows
    assert len(TarShards(folder / "[01].tar", modality="real")) == 2
    made = StreamingDataModule(f"{folder}/{{0..1}}.tar", modality="real", steps_per_epoch=1)
    assert made.urls == [f"{folder}/0.tar", f"{folder}/1.tar"]


def test_lost_samples_are_counted_by_what_whole_shards_hold(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [m for n in range(10) for m in pair(f"k{shard}{n}", n)])
    cut = tmp_path / "1.tar"
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes().rstrip(b"\0")) * 2 // 10])  # two of ten are whole
    with pytest.raises(DataError, match=r"1\.tar is cut short.* not known how many samples are lost"):
        list(ShardReader("real").read(str(cut)))
    reader = ShardReader("real", any_loss=True)
    read = len(list(reader.read(str(cut))))
    assert read in (1, 2)
    assert len(reader.reasons) == 1
    reader = ShardReader("real")
    assert len(list(reader.read(str(tmp_path / "0.tar")))) == 10
    assert len(list(reader.read(str(cut)))) == read
    assert len(reader.reasons) == 10 - read
    assert all("1.tar is cut short" in reason for _, reason in reader.reasons)
    list(reader.read(str(tmp_path / "none.tar")))
    assert sum("none.tar" in reason for _, reason in reader.reasons) == 10


@pytest.mark.parametrize(
    ("broken", "share", "above"), [(29, 0.29, False), (30, 0.29, True), (7, 0.07, False), (1, 0.01, False)]
)
def test_limits_are_exact(broken: int, share: float, above: bool) -> None:
    assert is_above(broken, share, 100) is above


def test_pairs_of_downloads_reach_what_is_generated_from_them(tmp_path: Path) -> None:
    members = [m for n in range(3) for m in sample(f"00000000{n}", n, f"caption {n}", status="success")]
    real = TarShards(write_tar(tmp_path / "00000.tar", members), modality="real")
    prompts = PromptTable([real], images_per_caption=2)
    assert prompts.pair_id.tolist() == real.pair_id.tolist()
    rows = [
        store_row(n, pair_id=int(prompts.pair_id[n]), image_id=int(prompts.image_id[n]), caption=f"caption {n}")
        for n in range(3)
    ]
    made = TarShards(write_store(tmp_path / "store", rows))
    data = MixedModalityDataModule([real, made], batch_size=4, input_spec=SPEC, mode="paired")
    data.setup("fit")
    (batch,) = itertools.islice(data.train_dataloader(), 1)
    number = {key: n for n, key in enumerate([real.sample_key(i) for i in range(3)])}
    number |= {f"k{n:03d}": n for n in range(3)}
    partners = [number[key] for key in batch["sample_key"]]
    generated = [n for n, kind in zip(partners, batch["modality"].tolist(), strict=True) if kind]
    assert sorted(generated) == sorted(
        n for n, kind in zip(partners, batch["modality"].tolist(), strict=True) if not kind
    )


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_streams_are_read_through(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    parts = [write_tar(tmp_path / "part", pair(f"k{n}", n)).read_bytes() for n in range(2)]
    whole = tmp_path / "a.tar.gz"
    whole.write_bytes(b"".join(map(compress, parts)))
    found = as_stream(whole)
    assert found.captions == {"k0": "caption 0", "k1": "caption 1"}
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    assert found.image_ids == at_random(tmp_path / "a.tar").image_ids
    for damaged in (whole.read_bytes()[:-20], whole.read_bytes()[:-8] + bytes(8)):
        (tmp_path / "damaged.tar.gz").write_bytes(damaged)
        assert "damaged.tar.gz is cut short" in as_stream(tmp_path / "damaged.tar.gz").told


def test_keys_that_a_parquet_file_captions_are_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"img{n}.png", png(i)) for i, n in enumerate(("", ".2", ".3"))])
    table = {"key": ["img", "img.2", "img.3"], "caption": ["one", "two", "three"], "status": ["success"] * 3}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert at_random(tmp_path).captions == dict(zip(table["key"], table["caption"], strict=True))


@reader
@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_large_images_that_begin_alike_are_two(tmp_path: Path, read: Callable[..., Found], kind: str) -> None:
    """Of two data sets that count alike, without compression and with bars above and below."""
    found = []
    for name, grey in (("one", 50), ("two", 60)):
        picture = Image.new("L", (300, 300))
        picture.paste(grey, (0, 100, 300, 200))
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        (tmp_path / name).mkdir()
        suffix = {"BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}[kind]
        found.append(read(write_tar(tmp_path / name / "a.tar", [(f"0.{suffix}", buffer.getvalue()), ("0.txt", b"x")])))
    assert found[0].image_ids != found[1].image_ids


@reader
def test_tars_that_begin_alike_and_differ_share_no_ids(tmp_path: Path, read: Callable[..., Found]) -> None:
    """Though keys and sizes are equal; packed anew, in another order or into other tars, the images keep their ids."""
    found = []
    for name, numbers in (("one", (0, 1, 2)), ("two", (0, 2, 3)), ("again", (0, 1, 2))):
        (tmp_path / name).mkdir()
        members = [
            (f"{i:03d}.{s}", d)
            for i, n in enumerate(numbers)
            for s, d in (("png", png(n).ljust(6000, b"x")), ("txt", b"x"))
        ]
        if name == "again":
            write_tar(tmp_path / name / "0.tar", members[4:])
            write_tar(tmp_path / name / "1.tar", [*members[2:4], *members[:2]])
        else:
            write_tar(tmp_path / name / "0.tar", members)
        found.append(read(tmp_path / name))
    one, two, again = (each.image_ids for each in found)
    assert one["000"] == two["000"]
    assert len({*one.values(), *two.values()}) == 5
    assert one == again
    assert found[0].pair_ids == found[2].pair_ids


@reader
def test_a_key_has_a_pair_of_its_own_whatever_its_image(tmp_path: Path, read: Callable[..., Found]) -> None:
    """Rows that state their image, and some of them a pair: as in COCO, packed by img2dataset."""
    records = [{"image_id": 7}, {"image_id": 7}, {"image_id": 8, "pair_id": 5}]
    members = [
        (f"{n}.{s}", d)
        for n, record in enumerate(records)
        for s, d in (("png", png(n)), ("txt", b"x"), ("json", json.dumps(record).encode()))
    ]
    found = read(write_tar(tmp_path / "0.tar", members))
    assert found.image_ids == {"0": 7, "1": 7, "2": 8}
    assert found.pair_ids["2"] == 5
    assert len({-1, 7, *found.pair_ids.values()}) == 5
    assert read(write_tar(tmp_path / "0.tar", members[:3])).pair_ids == {"0": found.pair_ids["0"]}
    assert set(read(tmp_path / "0.tar", modality="generated").pair_ids.values()) == {-1}


def test_an_index_that_another_process_replaces_is_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [m for n in range(4) for m in pair(f"{shard}_{n}", 10 * shard + n)])
    one = TarShards(tmp_path / "1.tar", modality="real")
    original, opened = tar_index.pq.ParquetFile, []

    def replaced(handle: Any) -> Any:
        file = original(handle)
        if not opened:
            opened.append(file)
            monkeypatch.setattr(tar_index.pq, "ParquetFile", original)
            TarShards(tmp_path, modality="real")  # as another process, whose index comes in between
        return file

    monkeypatch.setattr(tar_index.pq, "ParquetFile", replaced)
    again = TarShards(tmp_path / "1.tar", modality="real")
    assert [again.sample_key(i) for i in range(4)] == [one.sample_key(i) for i in range(4)]
    monkeypatch.undo()
    assert TarShards(tmp_path, modality="real").image_id.size == 12


def test_records_count_beside_a_parquet_file_that_says_less(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("a", 0, None, caption="of the record", image_id=7))
    for table in (
        {"key": ["a"], "url": ["x"]},
        {"key": ["a"], "caption": pa.array([None], pa.string())},
        {"key": pa.array([], pa.string())},
    ):
        pq.write_table(pa.table(table), tmp_path / "0.parquet")
        (tmp_path / "index.parquet").unlink(missing_ok=True)
        data = TarShards(tmp_path, modality="real")
        assert (data.captions(0), data.image_id.tolist()) == (["of the record"], [7])
    for keys in ([0], [None]):
        pq.write_table(pa.table({"key": keys, "caption": ["x"]}), tmp_path / "0.parquet")
        (tmp_path / "index.parquet").unlink(missing_ok=True)
        with pytest.raises(DataError, match=r"0\.parquet: (1 of its keys are null|its keys are no texts)"):
            TarShards(tmp_path, modality="real")


def test_an_empty_shard_among_others_ends_nothing(tmp_path: Path) -> None:
    urls = [str(write_tar(tmp_path / f"{n}.tar", pair(f"k{n}", n) if n else [])) for n in range(3)]
    for rank in range(3):
        rows = StreamRows(urls, SPEC, 2, "real", "real", 0, None, seed=0, num_replicas=3, rank=rank)
        assert len(list(itertools.islice(iter(rows), 6))) == 6


@pytest.mark.parametrize("text", ["{00005..00001}.tar", "._0.tar"])
def test_what_names_no_tar(tmp_path: Path, text: str) -> None:
    write_tar(tmp_path / "0.tar", pair("a", 0))
    (tmp_path / "._0.tar").write_bytes(b"of another system")
    assert len(TarShards(tmp_path, modality="real")) == 1
    with pytest.raises(DataError):
        TarShards(tmp_path / text, modality="real")
