"""Generation from captions to a data set: kills, workers, recipes, the audit, the card, leakage."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datasets import DataError, TarShards
from gmail_lightning.generation.images import shard_writer as shard_writer_module
from gmail_lightning.leakage import AllowedOverlap
from gmail_lightning.models import GeneratedImages
from gmail_lightning.types import Modality

SCRIPT = Path(__file__).parents[1] / "distributed" / "generation_ranks.py"
sys.path.insert(0, str(SCRIPT.parent))
import generation_ranks  # noqa: E402
from generation_ranks import Captions, StubGenerator, captions, generate  # noqa: E402


def manifest(folder: Path) -> list[dict]:
    """Rows but for the time."""
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    assert all(row.pop("created").endswith("+00:00") for row in rows)
    return rows


def members(folder: Path) -> dict[str, bytes]:
    """All members of all tars; none may be there twice."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def pixels(folder: Path) -> dict[str, np.ndarray]:
    found = {name: data for name, data in members(folder).items() if name.endswith((".png", ".webp"))}
    return {name: np.asarray(Image.open(io.BytesIO(data)), dtype=float) / 255 for name, data in found.items()}


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".tmp-" in path.name]


def assert_same_set(folder: Path, reference: Path) -> None:
    rows = manifest(folder)
    assert rows == manifest(reference)
    assert len({row["key"] for row in rows}) == len(rows)
    ours, theirs = pixels(folder), pixels(reference)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= 1e-5
    assert unfinished(folder) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set made by one worker in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    generate(folder)
    return folder


def test_the_store_holds_what_the_manifest_says(undisturbed: Path) -> None:
    rows, held = manifest(undisturbed), members(undisturbed)
    assert len(rows) == generation_ranks.IMAGES
    assert Counter(row["shard"] for row in rows) == {f"train-{i:06d}": 8 for i in range(5)} | {"train-000005": 4}
    assert rows == sorted(rows, key=lambda row: (row["shard"], row["key"]))
    number = {f"picture number {i}{' and a long list of other things' * (i % 5 == 0)}": i for i in range(44)}
    stub = StubGenerator()
    for row in rows:
        i = number[row["caption"]]
        assert (row["image_id"], row["pair_id"], row["prompt"]) == (100 + i, 101 + i, row["caption"])
        assert (row["shard"], row["truncated"]) == (f"train-{i // 8:06d}", len(row["caption"]) > 40)
        assert row["concept_set"] == ("paired" if i % 2 else "novel")
        assert (row["status"], row["reason"], row["size"], row["generator"]) == ("ok", None, "32x32", "stub")
        assert (row["clip_score"], row["clip_score_reason"]) == (None, "no scorer")
        assert held[f"{row['key']}.txt"].decode() == row["caption"]
        beside = json.loads(held[f"{row['key']}.json"])
        assert {name: value for name, value in row.items() if name in beside} | {"created": beside["created"]} == beside
        drawn = stub.draw(row["caption"], row["seed"]).permute(1, 2, 0).numpy()
        stored = np.asarray(Image.open(io.BytesIO(held[f"{row['key']}.png"])))
        assert np.abs(stored / 255 - drawn).max() <= 0.5 / 255 + 1e-6
        assert row["pixel_mean"] == pytest.approx(stored.mean() / 255, abs=1e-6)
    assert len(held) == 3 * len(rows)
    assert len({row["seed"] for row in rows}) == len(rows)


def test_the_next_stage_reads_it(undisturbed: Path) -> None:
    dataset, rows = TarShards(undisturbed), manifest(undisturbed)
    assert [dataset.sample_key(i) for i in range(len(dataset))] == [row["key"] for row in rows]
    assert [dataset.captions(i) for i in range(len(dataset))] == [[row["caption"]] for row in rows]
    assert dataset.pair_id.tolist() == [row["pair_id"] for row in rows]
    assert set(dataset.modality) == {Modality.GENERATED}
    stored = pixels(undisturbed)
    for i in (0, 17, 43):
        image = dataset[i]["image"].permute(1, 2, 0).numpy() / 255
        assert np.array_equal(image, stored[f"{rows[i]['key']}.png"])


def test_what_is_complete_is_not_made_again(undisturbed: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in undisturbed.glob("train-*")}
    stub = StubGenerator()
    _, writer = generate(undisturbed, generator=stub)
    assert stub.images == 0
    assert writer.failed == 0
    assert {p.name: p.stat().st_mtime_ns for p in undisturbed.glob("train-*")} == before


@pytest.mark.slow
@pytest.mark.xdist_group("launches")
def test_killed_in_a_shard_then_finished_by_two_ranks(tmp_path: Path, undisturbed: Path) -> None:
    outside = ("PYTEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
    folder = tmp_path / "set"
    command = [sys.executable, str(SCRIPT), str(folder), "22"]  # two shards and most of the third
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    between = json.loads(folder.with_suffix(".json").read_text())
    assert between["killed_by"] == signal.SIGKILL
    made = [name for name in between["left"] if name.endswith(".parquet") and name.startswith("train")]
    assert 1 <= len(made) <= 2
    assert sum(".tmp-" in name for name in between["left"]) == 1
    assert_same_set(folder, undisturbed)
    for name in made:  # what was complete was left alone
        assert (folder / name).stat().st_mtime_ns == between["left"][name]


class Stopping(StubGenerator):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def generate(self, captions, seeds):
        if self.images >= self.after:
            raise ConnectionError("the machine is gone")
        return super().generate(captions, seeds)


def test_interrupted_then_finished_by_other_numbers_of_workers(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(ConnectionError):
        generate(folder, generator=Stopping(12), batch_size=4)
    with pytest.raises(ConnectionError):
        generate(folder, generator=Stopping(6), worker="1/3", batch_size=5)
    assert unfinished(folder) == []  # an exception cleans up, unlike a kill
    half = len(list(folder.glob("train-*.parquet")))
    assert 0 < half < 6
    total = []
    for worker in ("1/2", "0/2"):
        assert not (folder / "manifest.parquet").exists()
        stub = StubGenerator()
        generate(folder, generator=stub, worker=worker, batch_size=7)
        total.append(stub.images)
        assert all(len(call) <= 7 for call in stub.calls)
    assert_same_set(folder, undisturbed)
    assert sum(total) == generation_ranks.IMAGES - 8 * half


def test_an_image_depends_on_its_prompt_number_and_recipe_alone(tmp_path: Path) -> None:
    texts = ["one", "two  words", "three"]
    forward, backward = Captions([[texts[0]], texts[1:]]), Captions([texts[1:], [texts[0]]], first_id=100)
    backward.image_id = forward.image_id[::-1].copy()
    sets = {}
    for name, rows in (("forward", forward), ("backward", backward)):
        generate(tmp_path / name, PromptDataModule(rows, evaluation={}, images_per_caption=3, batch_size=2))
        sets[name] = {r["key"]: (r["caption"], r["image_index"], r["seed"]) for r in manifest(tmp_path / name)}
    assert sets["forward"] == sets["backward"]
    assert Counter(caption for caption, _, _ in sets["forward"].values()) == {"one": 3, "two words": 3, "three": 3}
    ours, theirs = pixels(tmp_path / "forward"), pixels(tmp_path / "backward")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    generate(tmp_path / "other", PromptDataModule(forward, evaluation={}), StubGenerator(steps=2))
    other = {row["seed"] for row in manifest(tmp_path / "other")}
    assert not other & {seed for _, _, seed in sets["forward"].values()}  # another recipe draws other noise


def test_planted_images_are_caught_with_their_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_encode = shard_writer_module.encode_image

    def encode(image: Image.Image, image_format: shard_writer_module.ImageFormat) -> bytes:
        data = real_encode(image, image_format)
        return data[: len(data) // 2] if image.getpixel((0, 0)) == (255, 0, 255) else data

    monkeypatch.setattr(shard_writer_module, "encode_image", encode)
    texts = [f"fine {i}" for i in range(6)]
    texts += ["a black one", "a grey one", "a nan", "copy", "second copy", "unsafe", "broken"]
    texts += ["unsafe nan", "unsafe black"]  # the first reason in order is kept
    rows = Captions(texts)
    _, writer = generate(tmp_path / "set", PromptDataModule(rows, evaluation={}, batch_size=4))
    found = {row["caption"]: row for row in manifest(tmp_path / "set")}
    reasons = {caption: row["reason"] for caption, row in found.items() if row["reason"]}
    copies = sorted(["copy", "second copy"], key=lambda caption: (found[caption]["shard"], found[caption]["key"]))
    assert reasons == {
        "a black one": "black", "a grey one": "constant", "a nan": "not_finite", copies[1]: "duplicate",
        "unsafe": "safety", "broken": "undecodable", "unsafe nan": "not_finite", "unsafe black": "safety",
    }  # fmt: skip
    assert found[copies[1]]["duplicate_of"] == found[copies[0]]["key"]
    status = {caption: row["status"] for caption, row in found.items()}
    assert {c for c in texts if status[c] == "failed"} == {"a nan", "broken", "unsafe nan"}
    assert {c for c in texts if status[c] == "ok"} == {*texts[:6], copies[0]}
    held = members(tmp_path / "set")
    assert {c for c in texts if f"{found[c]['key']}.png" not in held} == {"a nan", "broken", "unsafe nan"}
    assert writer.failed == 3
    card = (tmp_path / "set/README.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    counted = {(line[0], line[1]): line[3] for line in lines if line[0] in ("ok", "rejected", "failed")}
    assert counted == {
        ("ok", ""): "7", ("failed", "not_finite"): "2", ("failed", "undecodable"): "1", ("rejected", "black"): "1",
        ("rejected", "constant"): "1", ("rejected", "safety"): "2", ("rejected", "duplicate"): "1",
    }  # fmt: skip


def test_an_exception_of_the_threads_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(image: Image.Image, image_format: shard_writer_module.ImageFormat) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr(shard_writer_module, "encode_image", encode)
    with pytest.raises(OSError, match="no space left"):
        generate(tmp_path / "set")
    assert list((tmp_path / "set").glob("train-*")) == []


# Leakage


class WithHashes(Captions):
    """Evaluation pictures that are known by their hashes."""

    hashes = np.zeros(0, dtype=np.int64)

    def perceptual_hashes(self):
        return self.hashes


@pytest.mark.parametrize("planted", ["caption", "image_id"])
def test_a_planted_validation_row_stops_before_the_first_image(tmp_path: Path, planted: str) -> None:
    training = captions(20)
    texts, first = (["Picture number 7!", "another"], 900) if planted == "caption" else (["new", "old"], 113)
    val = WithHashes(texts, first)
    val.hashes = np.array([1, 2])
    stub = StubGenerator()
    with pytest.raises(DataError) as error:
        generate(tmp_path / "set", PromptDataModule(training, evaluation={"my val": [val]}), stub)
    assert stub.images == 0
    assert not (tmp_path / "set").exists()
    assert "my val" in str(error.value)
    assert ("picture number 7" if planted == "caption" else "image_id 113") in str(error.value)
    allowed = {"my val": AllowedOverlap([planted], reason="a drill")}
    generate(tmp_path / "set", PromptDataModule(training, evaluation={"my val": [val]}, allow_overlap=allowed), stub)
    assert stub.images == 20
    assert "a drill" in (tmp_path / "set/README.md").read_text()


def test_training_images_need_their_evaluation_sets_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation \(\{\} says that there are none\)"):
        generate(tmp_path / "set", PromptDataModule(captions(3)))
    generate(tmp_path / "set", PromptDataModule(captions(3), split="val"))
    assert {row["split"] for row in manifest(tmp_path / "set")} == {"val"}
    with pytest.raises(DataError, match="holds images of split 'val', and these are of 'train'"):
        generate(tmp_path / "set", PromptDataModule(captions(3), evaluation={}))
    of_val = captions(3)
    of_val.split = "val"
    with pytest.raises(DataError, match="split 'val'"):
        generate(tmp_path / "other", PromptDataModule(of_val, evaluation={}))


def test_an_image_like_an_evaluation_image_is_rejected(tmp_path: Path) -> None:
    generate(tmp_path / "first")
    rows = manifest(tmp_path / "first")
    val = WithHashes(["far", "near"], 900)
    val.hashes = np.array([~rows[9]["perceptual_hash"], rows[4]["perceptual_hash"] ^ 1])
    generate(tmp_path / "second", PromptDataModule(captions(), evaluation={"val": [val]}))
    wrong = {row["key"]: (row["reason"], row["duplicate_of"]) for row in manifest(tmp_path / "second") if row["reason"]}
    assert wrong == {rows[4]["key"]: ("near_evaluation", "val/row-1")}
    card = (tmp_path / "second/README.md").read_text()
    assert "compared with its 2 images" in card
    assert "Near duplicates: up to 2 differing bits of perceptual hashes. Near evaluation images: up to 2" in card


# Modes


def test_another_recipe_is_refused_and_named(tmp_path: Path, undisturbed: Path) -> None:
    stub = StubGenerator(steps=4)
    with pytest.raises(MisconfigurationException, match="steps: 1 there, 4 now"):
        generate(undisturbed, generator=stub)
    with pytest.raises(MisconfigurationException, match="prompt_template"):
        generate(undisturbed, PromptDataModule(captions(), evaluation={}, prompt_template="a {caption}"), stub)
    with pytest.raises(MisconfigurationException, match="stored_name: 'png' there, 'webp' now"):
        generate(undisturbed, image_format="webp")
    with pytest.raises(MisconfigurationException, match="size: '32x32' there, '48x48' now"):
        generate(undisturbed, generator=StubGenerator(size=48))
    assert stub.images == 0


def test_later_captions_get_shards_of_their_own(tmp_path: Path) -> None:
    generate(tmp_path, PromptDataModule(captions(10), evaluation={}))
    before = manifest(tmp_path)
    stub = StubGenerator()
    generate(tmp_path, PromptDataModule(captions(20), evaluation={}), stub)
    assert stub.images == 10
    rows = manifest(tmp_path)
    assert rows[:10] == before
    assert Counter(row["shard"] for row in rows[10:]) == {"train-000002": 8, "train-000003": 2}
    generate(tmp_path, PromptDataModule(captions(5), evaluation={}), stub)  # fewer captions remove nothing
    assert (stub.images, manifest(tmp_path)) == (10, rows)


def test_extend_adds_another_recipe(tmp_path: Path) -> None:
    data = PromptDataModule(captions(10), evaluation={})
    generate(tmp_path, data)
    before = manifest(tmp_path)
    other = Stopping(5)
    other.steps = 2
    with pytest.raises(ConnectionError):
        generate(tmp_path, data, other, mode="extend")
    assert manifest(tmp_path) == before
    with pytest.raises(DataError, match="are not among the prompts of this run"):
        generate(tmp_path, data)  # the half made part is of the other recipe
    generate(tmp_path, data, StubGenerator(steps=2), mode="extend")
    rows = manifest(tmp_path)
    assert rows[:10] == before
    assert [row["steps"] for row in rows] == [1] * 10 + [2] * 10
    assert {row["prompt_id"] for row in rows[10:]} == {row["prompt_id"] for row in before}
    assert [entry["recipe"]["steps"] for entry in json.loads((tmp_path / "recipe.json").read_text())["recipes"]] == [
        1,
        2,
    ]
    generate(tmp_path, data, Stopping(0))  # complete, whichever recipe comes back
    assert manifest(tmp_path) == rows


def test_a_termination_stops_it_with_its_own_status(tmp_path: Path, undisturbed: Path) -> None:
    class Terminated(StubGenerator):
        def generate(self, captions: list[str], seeds: list[int]) -> GeneratedImages:
            if len(self.calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().generate(captions, seeds)

    stub = Terminated()
    with pytest.raises(SystemExit) as left:
        generate(tmp_path, generator=stub)
    assert left.value.code == 143
    assert len(stub.calls) == 4
    generate(tmp_path)
    assert_same_set(tmp_path, undisturbed)


def test_renumbered_captions_keep_their_images(tmp_path: Path) -> None:
    rows = captions(6)
    generate(tmp_path, PromptDataModule(rows, evaluation={}))
    before = {row["key"]: row for row in manifest(tmp_path)}
    rows = captions(6)
    rows.pair_id = rows.pair_id + 50
    stub = StubGenerator()
    with pytest.warns(UserWarning, match="6 images take another pair_id"):
        generate(tmp_path, PromptDataModule(rows, evaluation={}), stub)
    assert stub.calls == []
    after = {row["key"]: row["pair_id"] for row in manifest(tmp_path)}
    assert after == {key: row["pair_id"] + 50 for key, row in before.items()}


def test_rows_that_share_a_pair_id_are_named(tmp_path: Path) -> None:
    rows = captions(6)
    rows.pair_id[4] = rows.pair_id[1]
    with pytest.warns(UserWarning, match=rf"pair_id {rows.pair_id[1]} stands in .* and in .* \(1 such rows\)"):
        generate(tmp_path, PromptDataModule(rows, evaluation={}))


def test_a_later_audit_keeps_added_columns_as_long_as_the_images_are_the_same(tmp_path: Path) -> None:
    generate(tmp_path, PromptDataModule(captions(6), evaluation={}))
    path = tmp_path / "manifest.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("repaired_key", table["key"]), path)
    generate(tmp_path, PromptDataModule(captions(6), evaluation={}), max_distance=None)  # nothing to make
    assert pq.read_table(path)["repaired_key"].equals(table["key"])
    generate(tmp_path, PromptDataModule(captions(8), evaluation={}))
    assert "repaired_key" not in pq.read_table(path).column_names


def test_overwrite_removes_its_own_files_only(tmp_path: Path) -> None:
    data = PromptDataModule(captions(20), evaluation={})
    generate(tmp_path, data)
    for name in ("notes.txt", "train-9.tar", "other.parquet", "train-000001.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "train-000000.tar.tmp-elsewhere-1").write_text("left behind")
    few = PromptDataModule(captions(6), evaluation={})
    generate(tmp_path, few, StubGenerator(steps=3), mode="overwrite", image_format="webp", shard_size=4)
    assert [row["steps"] for row in manifest(tmp_path)] == [3] * 6
    assert {p.name for p in tmp_path.iterdir()} == {
        "notes.txt", "train-9.tar", "other.parquet", "train-000001.txt", "README.md", "recipe.json", "plan.parquet",
        "manifest.parquet", *(f"train-00000{i}.{suffix}" for i in (0, 1) for suffix in ("tar", "parquet")),
    }  # fmt: skip
    assert (tmp_path / "train-9.tar").read_text() == "mine"
    with pytest.raises(ValueError, match="Begin with one worker"):
        generate(tmp_path, few, mode="overwrite", worker="0/2")


@pytest.mark.parametrize("mode", ["incremental", "overwrite", "extend"])
def test_a_folder_of_another_program_is_refused(tmp_path: Path, mode: str) -> None:
    (tmp_path / "00000.tar").write_text("mine")
    with pytest.raises(MisconfigurationException, match=r"holds 00000.tar, but no recipe.json"):
        generate(tmp_path, mode=mode)
    assert [p.name for p in tmp_path.iterdir()] == ["00000.tar"]


def test_a_dry_run_makes_eight_images_beside_the_folder(tmp_path: Path, undisturbed: Path) -> None:
    for steps in (1, 1):  # anew each time
        stub = StubGenerator(steps=steps)
        generate(tmp_path / "set", generator=stub, dry_run=True, worker="3/4")
        assert [caption for call in stub.calls for caption, _ in call] == [
            texts[0] for texts in generation_ranks.captions(8).texts
        ]
    several = PromptDataModule(captions(), evaluation={}, images_per_caption=2)
    generate(tmp_path / "several", several, dry_run=True)
    assert Counter(row["caption"] for row in manifest(tmp_path / "several-dry-run")) == {
        texts[0]: 2 for texts in generation_ranks.captions(8).texts
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set-dry-run", "several-dry-run"]
    assert manifest(tmp_path / "set-dry-run") == [r for r in manifest(undisturbed) if r["shard"] == "train-000000"]
    assert "8 generated images" in (tmp_path / "set-dry-run/README.md").read_text()
    generate(tmp_path / "set", generator=StubGenerator(steps=2), dry_run=True)  # no recipe is refused
    assert manifest(tmp_path / "set-dry-run")[0]["steps"] == 2


def test_images_are_stored_at_the_size_of_training(tmp_path: Path) -> None:
    data = PromptDataModule(captions(3), evaluation={})
    for size, expected in ((16, (16, 16)), ((12, 20), (12, 20)), (64, (32, 32))):
        folder = tmp_path / str(size)
        generate(folder, data, size=size, image_format="webp")
        assert {image.shape[:2] for image in pixels(folder).values()} == {expected}
        assert {row["size"] for row in manifest(folder)} == {f"{expected[0]}x{expected[1]}"}
    smooth = Image.fromarray((StubGenerator().draw("x", 5).permute(1, 2, 0) * 255).round().byte().numpy())
    resized = shard_writer_module.resize_image(smooth, shard_writer_module.ImageFormat(16))
    average = np.asarray(smooth, dtype=float).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(resized) - average).mean() < 3  # antialiased: near the mean of what a pixel covers


@pytest.mark.parametrize(
    "wrong",
    [{"worker": "2/2"}, {"worker": "one"}, {"mode": "append"}, {"shard_size": 0}, {"max_distance": 9}, {"quality": 0},
     {"image_format": "gif"}, {"size": 0}, {"num_threads": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        generate(tmp_path / "set", **wrong)


def test_limited_batches_leave_no_half_shard(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from gmail_lightning.callbacks import DatasetWriter
    from gmail_lightning.tasks import ImageGenerationTask

    writer = DatasetWriter(str(tmp_path / "set"), shard_size=8, image_format="png")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[writer],
        limit_predict_batches=5, default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    predictions = trainer.predict(
        ImageGenerationTask(StubGenerator()), PromptDataModule(captions(), evaluation={}, batch_size=2)
    )
    assert predictions is None  # none are kept in memory
    names = {p.name for p in (tmp_path / "set").iterdir()}
    assert names == {"plan.parquet", "recipe.json", "train-000000.tar", "train-000000.parquet"}


@pytest.mark.parametrize("limit", [{"limit_predict_batches": 1}, {"fast_dev_run": True}])
def test_limited_batches_wait_for_no_other_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict) -> None:
    import lightning.pytorch as pl

    from gmail_lightning.callbacks import DatasetWriter, dataset_writer
    from gmail_lightning.tasks import ImageGenerationTask

    class OfTwo(DatasetWriter):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            self._own, self._total = ["train-000000", "train-000001"], 8  # the second is another device's

    def no_sleep(seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(dataset_writer.time, "sleep", no_sleep)
    data = PromptDataModule(captions(16), evaluation={}, batch_size=8)

    def run(**settings):
        writer = OfTwo(str(tmp_path / "set"), shard_size=8, image_format="png")
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            callbacks=[writer], default_root_dir=tmp_path, enable_model_summary=False, **settings,
        )  # fmt: skip
        trainer.predict(ImageGenerationTask(StubGenerator()), data)

    run(**limit)
    assert {p.name for p in (tmp_path / "set").glob("*.tar")} == {"train-000000.tar"}


def test_the_scripts_captions_are_those_of_the_tests() -> None:
    assert torch.equal(StubGenerator().draw("x", 3), StubGenerator().generate(["x"], [3]).image[0])
