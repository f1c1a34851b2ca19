"""Streams of shards: who reads what, what is broken, and what is refused."""

from __future__ import annotations

import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import SPEC, Recorder, encode, trainer
from tar_fixtures import picture, sample, store_row, write_store, write_tar
from torchvision.transforms import v2

from gmail_lightning.datamodules import StreamingDataModule
from gmail_lightning.datamodules.stream_rows import MAX_BROKEN, StreamRows
from gmail_lightning.datasets import DataError, TarShards
from gmail_lightning.transforms import resize
from gmail_lightning.types import CaptionSpec, ImageSpec, InputSpec

PER_SHARD = 5


def shards(folder: Path, number: int, **record: Any) -> str:
    folder.mkdir(exist_ok=True)
    for shard in range(number):
        keys = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_tar(folder / f"{shard:03d}.tar", [m for n in keys for m in sample(f"k{n}", n, f"caption {n}", **record)])
    return f"{folder}/{{000..{number - 1:03d}}}.tar"


def module(urls: str | list[str], **arguments: Any) -> StreamingDataModule:
    defaults = {"modality": "generated", "steps_per_epoch": 3, "batch_size": 4, "shuffle": 10, "input_spec": SPEC}
    made = StreamingDataModule(urls, **{**defaults, **arguments})
    made.setup("fit")
    return made


def keys(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["sample_key"]]


def test_rows_are_those_of_the_shards(tmp_path: Path) -> None:
    batches = list(module(shards(tmp_path, 4), source="sd15").train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert batch["image"].shape == (4, 3, 6, 6)
        for row, key in enumerate(batch["sample_key"]):
            number = int(key[1:])
            pixels = (batch["image"][row] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(pixels, picture(number))
            assert batch["caption"][row] == f"caption {number}"
        assert torch.equal(batch["text"], encode(batch["caption"]))
        assert batch["text_row"].tolist() == batch["image_row"].tolist() == [0, 1, 2, 3]
        assert batch["modality"].tolist() == [1] * 4
        assert batch["pair_id"].tolist() == [-1] * 4
        assert batch["generated_row"].tolist() == batch["image_generated_row"].tolist() == [0, 1, 2, 3]
        assert batch["real_row"].tolist() == batch["image_real_row"].tolist() == []
        assert batch["paired"] is False
        assert batch["source"] == ["sd15"] * 4
        assert not batch["replaced"].any()
    table = TarShards(tmp_path, modality="generated")
    known = {table.sample_key(i): int(table.image_id[i]) for i in range(len(table))}
    assert all(batch["image_id"].tolist() == [known[key] for key in batch["sample_key"]] for batch in batches)


class Lengths(CaptionSpec):
    """Of captions and questions."""

    def encode(self, captions, questions):
        pairs = zip(captions, questions, strict=True)
        return {"caption_labels": torch.tensor([[len(caption), len(question)] for caption, question in pairs])}

    def encode_questions(self, questions):
        raise AssertionError("a stream trains")


def test_captions_become_ids(tmp_path: Path) -> None:
    made = module(shards(tmp_path, 4), input_spec=InputSpec(captions=Lengths()), num_workers=1)
    for batch in made.train_dataloader():
        assert batch["caption_labels"].tolist() == [[len(caption), 0] for caption in batch["caption"]]


def test_views_of_a_sample_share_one_draw(tmp_path: Path) -> None:
    views = {"image": ImageSpec((6, 6)), "large": ImageSpec((9, 12), "squash")}
    flip = v2.RandomHorizontalFlip()
    made = module(shards(tmp_path, 4), input_spec=InputSpec(images=views), augmentation=flip)
    flipped = set()
    for batch in made.train_dataloader():
        assert batch["image_row"].tolist() == [0, 1, 2, 3]
        for row, key in enumerate(batch["sample_key"]):
            drawn = torch.from_numpy(picture(int(key[1:]))).permute(2, 0, 1)
            either = [torch.equal(batch["image"][row], resize(one, views["image"])) for one in (drawn, drawn.flip(2))]
            which = (drawn, drawn.flip(2))[either.index(True)]
            assert torch.equal(batch["large"][row], resize(which, views["large"]))
            flipped.add(either.index(True))
    assert flipped == {0, 1}


def test_ranks_and_workers_share_a_pass_without_overlap(tmp_path: Path) -> None:
    shards(tmp_path, 8)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    for start in (0, 7):
        seen: list[set[str]] = []
        for rank in range(2):
            rows = StreamRows(urls, SPEC, 1, "generated", "g", 0, None, seed=0, num_replicas=2, rank=rank)
            rows.start = start
            for worker in range(2):
                stream = rows._samples(rank * 2 + worker, 4)
                seen.append({next(stream).key for _ in range(2 * PER_SHARD)})  # one pass
                assert len(seen[-1]) == 2 * PER_SHARD
        assert len(set().union(*seen)) == 8 * PER_SHARD


def test_workers_of_a_loader_read_different_shards(tmp_path: Path) -> None:
    made = module(shards(tmp_path, 4), num_workers=2, shuffle=0, batch_size=PER_SHARD, steps_per_epoch=4)
    assert len(set(keys(made.train_dataloader()))) == 4 * PER_SHARD


def test_epochs_have_fixed_steps_and_a_resumed_run_draws_anew(tmp_path: Path) -> None:
    urls = shards(tmp_path / "x", 4)
    held_out = write_tar(tmp_path / "held_out.tar", sample("v", 99, "held out"))
    val = {"held out": [TarShards(held_out, modality="real")]}
    one, same, other = Recorder(), Recorder(), Recorder()
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, max_epochs=2, callbacks=[saver]).fit(one, module(urls, val=val))
    trainer(tmp_path, max_epochs=2).fit(same, module(urls))
    assert len(one.seen) == 6
    assert keys(one.evaluated[-1:]) == ["v"]
    assert one.evaluated[0]["eval_set"] == "held out"
    assert keys(one.seen) == keys(same.seen)  # reproducible
    assert keys(one.seen[:3]) != keys(one.seen[3:])
    assert keys(module(urls, seed=1).train_dataloader()) != keys(one.seen[:3])
    (path,) = (tmp_path / "saved").glob("*step=4.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that the stream does not resume exactly, as we do
        trainer(tmp_path, max_epochs=2).fit(other, module(urls), ckpt_path=path)
    assert len(other.seen) == 2
    assert keys(other.seen) != keys(one.seen[3:5])


def broken_shards(folder: Path) -> list[str]:
    """Twenty good samples and five broken ones, a shard cut short among them, and one that is not there."""
    shards(folder, 4)
    members = [
        ("a.png", b"nonsense"), ("a.txt", b"x"), *sample("b", 1, " "), ("c.txt", b"no image"),
        *sample("d", 1, "x")[:2], ("d.json", b"{broken"),
    ]  # fmt: skip
    write_tar(folder / "bad.tar", members)
    cut = folder / "cut.tar"
    cut.write_bytes(write_tar(folder / "whole", sample("k0", 0, "caption 0")).read_bytes()[:600])
    return [str(path) for path in sorted(folder.glob("*.tar"))] + ["pipe:exit 3"]


def test_what_is_broken_is_left_out_and_counted(tmp_path: Path) -> None:
    urls = broken_shards(tmp_path)
    arguments: dict[str, Any] = {"steps_per_epoch": 5, "shuffle": 0, "max_replaced_fraction": 1.0}
    batches = list(module(urls, **{**arguments, "steps_per_epoch": 10}).train_dataloader())  # two passes
    assert sorted(keys(batches[:5])) == sorted(f"k{n}" for n in range(20))
    reasons = [reason for batch in batches for reason in batch["replaced_reason"]]
    stream = "\n".join(reasons)
    for part in (
        "key 'a': the image does not decode",
        "key 'b': no caption",
        "key 'c': no image",
        "key 'd'",
        "cut.tar",
    ):
        assert part in stream
    assert sum(int(batch["replaced"].sum()) for batch in batches) == len(reasons)
    with pytest.warns(UserWarning, match=r"samples of epoch 0 on this device were broken"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), module(urls, **arguments))
    with pytest.raises(DataError, match=r"samples of epoch 0 .*max_replaced_fraction=0.01: repair or leave out"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), module(urls, **{**arguments, "max_replaced_fraction": 0.01}))


def test_a_stream_with_nothing_in_it_ends(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(DataError, match=r"a.tar and the shards beside it hold no sample.*key 'a': no image"):
        next(iter(module(str(tmp_path / "a.tar")).train_dataloader()))
    write_tar(tmp_path / "a.tar", [("a.png", b"nonsense"), ("a.txt", b"x")])
    with pytest.raises(DataError, match=f"{MAX_BROKEN} images in a row do not decode, the last: key 'a'"):
        next(iter(module(str(tmp_path / "a.tar")).train_dataloader()))


def test_what_may_not_train_is_left_out_or_refused(tmp_path: Path) -> None:
    good, rejected = sample("good", 0, "x", status="ok", split="train"), sample("bad", 1, "y", status="rejected")
    urls = str(write_tar(tmp_path / "a.tar", [*good, *rejected]))
    assert set(keys(module(urls).train_dataloader())) == {"good"}
    write_tar(tmp_path / "a.tar", sample("v", 0, "x", split="val"))
    with pytest.raises(DataError, match=r"a.tar: Key 'v' was made for split 'val'"):
        next(iter(module(urls).train_dataloader()))
    write_tar(tmp_path / "a.tar", sample("v", 0, "x", modality="generated"))
    with pytest.raises(DataError, match=r"says modality 'generated', but modality='real'"):
        next(iter(module(urls, modality="real").train_dataloader()))
    store = write_store(tmp_path / "store", [store_row(0)])
    with pytest.raises(DataError, match=r"manifest says what may be trained on: use TarShards"):
        module(str(store / "train-000000.tar")).train_dataloader()


def test_shards_must_suffice(tmp_path: Path) -> None:
    urls = shards(tmp_path, 5)
    made = module(urls, num_workers=3)
    made.replicas = lambda: (2, 1)  # type: ignore[method-assign]
    with pytest.raises(
        MisconfigurationException, match=r"5 shards for 2 devices x 3 workers: .* set num_workers to at most 2"
    ):
        made.train_dataloader()
    made.num_workers = 2
    assert len(made.train_dataloader()) == 3
    made.replicas = lambda: (6, 1)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=r"use at most 5 devices"):
        made.train_dataloader()


def test_settings_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none.tar: no such tar"):
        module(str(tmp_path / "none.tar")).train_dataloader()
    with pytest.raises(ValueError, match="modality 'fake'"):
        module("a", modality="fake")
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        module("a", steps_per_epoch=0)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmail_lightning\[streaming\]'"):
        module("a")


@pytest.mark.parametrize("shuffle", [0, 1000])
def test_samples_that_are_read_ahead_count_in_their_time(tmp_path: Path, shuffle: int) -> None:
    """Of three shards of five samples one keeps two: three are lost in a pass over twelve, one where it comes first."""
    urls = shards(tmp_path, 3)
    cut = tmp_path / "001.tar"
    with tarfile.open(cut) as tar:
        third = next(member for member in tar if member.name.startswith("k7")).offset
    cut.write_bytes(cut.read_bytes()[: third + 600])
    for passes in (1, 4):
        made = module(urls, shuffle=shuffle, batch_size=4, steps_per_epoch=3 * passes + 1, max_replaced_fraction=1.0)
        batches = list(made.train_dataloader())
        told = sum(len(batch["replaced_reason"]) for batch in batches)
        assert 3 * passes - 2 <= told <= 3 * (passes + 1)
        assert sum(int(batch["replaced"].sum()) for batch in batches) <= told


def test_shards_that_are_all_cut_stop_the_training(tmp_path: Path) -> None:
    urls = shards(tmp_path, 3)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(path.read_bytes()[: len(path.read_bytes().rstrip(b"\0")) // 2])
    with pytest.raises(DataError, match=r"is cut short.* not known how many samples are lost"):
        list(module(urls, max_replaced_fraction=0.9).train_dataloader())
