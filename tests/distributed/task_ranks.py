"""Aligns for three steps, validates, writes features, computes metrics, on some processes; rank 0 saves what came out.

python task_ranks.py DEVICES FOLDER
"""

import gzip
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from gmail_lightning.callbacks import FeatureWriter, LastCheckpoint
from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.leakage import check
from gmail_lightning.metrics import (
    CaptionStatistics,
    CocoCaptionScore,
    ImageTextRecall,
    ModalityGap,
    MultipleChoice,
    ZeroShotAccuracy,
)
from gmail_lightning.metrics.captioning import meteor
from gmail_lightning.models import (
    ClipCap,
    DiffusersGenerator,
    LoRA,
    ModalityEncoder,
    OpenCLIPEncoder,
    ReciprocalConsistency,
)
from gmail_lightning.tasks import AlignmentTask, CaptioningTask, EmbeddingTask, UniDiffTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}


#: Without dropout, which ranks draw apart from one another.
GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


class Counting(AlignmentTask):
    """Counts the collectives of each evaluation step, and notes the rows that came."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen = [*getattr(self, "seen", []), *batch["sample_key"]]
        calls, originals = [], {}
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier"):
            originals[name] = getattr(dist, name)
            setattr(dist, name, lambda *a, _name=name, **k: calls.append(_name))
        try:
            super().validation_step(batch, batch_idx, dataloader_idx)
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)
        self.collectives = getattr(self, "collectives", 0) + len(calls)


class Few(EmojiDataset):
    """The first drawings of a hand."""

    def __init__(self, hand: str, size: int) -> None:
        super().__init__(hand, "novel")
        for name in ("_rows", "image_id", "pair_id", "modality", "label"):
            setattr(self, name, getattr(self, name)[:size])


class OneCaption(EmojiDataset):
    """One caption of each drawing, so that none is drawn by its place in the batch."""

    def captions(self, index: int) -> list[str]:
        captions = super().captions(index)
        return [captions[index % len(captions)]]


class FewCaptions(EmojiDataset):
    """The same caption for two drawings of three, so that every rank holds it."""

    def captions(self, index: int) -> list[str]:
        return ["a drawing" if index % 3 else super().captions(index)[0]]


class Noting(CaptioningTask):
    """Notes every row that is evaluated: its id, its name, its caption.

    Untrained features make one caption of all images, so each gets some words of its own.
    """

    def build_metrics(self, eval_set):
        built = super().build_metrics(eval_set)
        for metric in built.values():
            if isinstance(metric, CocoCaptionScore):
                metric.tokenizer = "python"  # saves seconds of Java
        return built

    def write(self, batch):
        own = [row % 4 for row in batch["row_id"].tolist()]
        references = [captions[0].split() for captions in batch["references"]]
        rows = zip(super().write(batch), references, own, strict=True)
        return [" ".join([text, *words[:number]]) for text, words, number in rows]

    def update_metrics(self, metrics, batch):
        super().update_metrics(metrics, batch)
        rows = zip(batch["row_id"].tolist(), batch["sample_key"], self.results["few"].captions, strict=True)
        self.noted = [*getattr(self, "noted", []), *rows]


def describe(devices: int, folder: Path, accumulate: int = 1) -> dict[str, object]:
    """Trains a captioner for two steps on both modalities and validates it on 13 and 6 images.

    The 16 captions of a step, of unequal length, come in ``accumulate`` micro-batches.
    """
    pl.seed_everything(1)
    captioner = ClipCap(16, language_model=GPT2, tokenizer="emoji", prefix_length=4)
    before = captioner.clip_project.model[0].weight.detach().clone()
    rate = partial(torch.optim.SGD, lr=0.3)  # linear: Adam's first steps would magnify the noise of small gradients
    task = Noting(
        OpenCLIPEncoder(config=TINY, merges="emoji"), captioner, num_beams=2, max_new_tokens=6, optimizer=rate
    )
    sets = [OneCaption(hand, "novel") for hand in ("noto", "fluent_flat")]
    alike = {"few": AllowedOverlap(["caption", "image_id", "pixels"], "the same drawings")}
    data = MixedModalityDataModule(
        sets, {"few": [Few("noto", 13), Few("fluent_flat", 6)]}, mode="mixture", generated_fraction=0.5,
        batch_size=16 // devices // accumulate, eval_batch_size=4, allow_overlap=alike,
    )  # fmt: skip
    pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=2, max_epochs=-1,
        accumulate_grad_batches=accumulate, val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    ).fit(task, data)  # fmt: skip
    weights = {name: p.detach() for name, p in captioner.named_parameters()}
    assert (weights["clip_project.model.0.weight"] - before).abs().max() > 1e-3
    return {"noted": task.noted, "results": task.results["few"].values, "weights": weights}


class DrawnByRow(UniDiffTask):
    """Draws noise and dropped prompts by the picture and not by the rank; notes the gradients of every step."""

    def compute_losses(self, batch):
        ids = batch["image_id"]
        self.objective.draw = lambda clean, draws: self.objective.noise_of_rows(clean, ids.tolist())
        self.generator.encode_pixels = lambda pixels, draws: DiffusersGenerator.encode_pixels(self.generator, pixels)
        dropped = "gmail_lightning.tasks.unidiff.task.drop_prompts"
        with mock.patch(dropped, lambda text, empty, *_: torch.where((ids % 2 == 0).view(-1, 1, 1), empty, text)):
            return super().compute_losses(batch)

    def on_after_backward(self):
        super().on_after_backward()
        self.steps = [*getattr(self, "steps", []), {name: p.grad.clone() for name, p in self.named_parameters()
                                                    if p.requires_grad}]  # fmt: skip


def unidiff(devices: int, folder: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Gradients of two joint steps on 8 pictures, by reading; a parameter that plain DDP missed would be an error."""
    found = {}
    for reading in ("none", "feature", "reciprocal_kl", "image", "prediction_contrast"):
        pl.seed_everything(2)
        task = DrawnByRow(
            OpenCLIPEncoder(pretrained="emoji_scorer"), DiffusersGenerator("emoji"), ReciprocalConsistency(reading),
            ema_decay=None, optimizer=partial(torch.optim.SGD, lr=1e-3),
        )  # fmt: skip
        kind = FewCaptions if reading == "none" else OneCaption
        sets = [kind(hand, "paired") for hand in ("noto", "fluent_flat")]
        data = MixedModalityDataModule(sets, mode="mixture", generated_fraction=0.5, batch_size=8 // devices)
        pl.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder / reading,
        ).fit(task, data)  # fmt: skip
        found[reading] = task.steps
    return found


def embed(devices: int, folder: Path, datasets: list[EmojiDataset]) -> None:
    """Cut short by the number of batches, then ended by a run that finds the parts of all processes."""
    pl.seed_everything(0)
    task = EmbeddingTask(OpenCLIPEncoder(config=TINY, merges="emoji"))
    for limit in (3, 1.0):
        pl.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", limit_predict_batches=limit,
            logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[FeatureWriter(str(folder / f"features-{devices}"), dtype="float32", seconds=0.0)],
        ).predict(task, MixedModalityDataModule(predict=datasets, batch_size=50))  # fmt: skip


def metric_values(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Recall and accuracy of these of 11 images, three texts each; ``alone`` has rows on the first rank only."""
    generator = torch.Generator().manual_seed(2)
    image, noise = torch.randn(11, 8, generator=generator), torch.randn(33, 8, generator=generator)
    owner = torch.arange(11).repeat_interleave(3)
    text = image[owner] + 1.5 * noise
    recall, accuracy, alone = ImageTextRecall(ks=(1, 3)), ZeroShotAccuracy(8), ImageTextRecall(ks=(1,))
    for batch in rows.split(2):
        mine = torch.isin(owner, batch)
        recall.update(image[batch], batch, text[mine], owner[mine])
        accuracy.update(image[batch], batch % 7)
        batch = batch[batch == 0]
        mine = torch.isin(owner, batch)
        alone.update(image[batch], batch, text[mine], owner[mine])
    computed = {**recall.compute(), **accuracy.compute(), **{f"alone_{k}": v for k, v in alone.compute().items()}}
    accuracy.reset()
    return {**computed, "per_class": accuracy.per_class()}


def caption_values(rows: torch.Tensor, folder: Path) -> dict[str, object]:
    """Caption metrics of these of 11 images; the last one is on every rank. Only rank 0 can run Java."""
    nouns = ["man", "horse", "red bus", "dog", "tree", "guy", "person", "cat", "green hill", "pony", "house"]
    table = folder / "paraphrases.gz"
    table.write_bytes(gzip.compress(b"1\nman\nguy\n1\nhorse\npony\n1\nred bus\ngreen hill\n"))
    load_table, path = meteor.load_table, os.environ["PATH"]
    meteor.load_table = lambda source: meteor._read_table(table)  # the jar's own takes ten seconds
    if dist.is_initialized() and dist.get_rank() > 0:
        os.environ["PATH"] = str(folder)
    try:
        metric, alone, conflict = (CocoCaptionScore(("bleu", "meteor", "rouge", "cider")) for _ in range(3))
        statistics, choices = CaptionStatistics(), MultipleChoice()
        for batch in [*rows.split(2), torch.tensor([10])]:
            predictions = [f"a {nouns[i]} by\u2028the {nouns[i - 1]} {'.' * i}" for i in batch.tolist()]
            references = [[f"the {nouns[i - 5]} and a {nouns[i]}", f"some {nouns[i - 1]} " * 3] for i in batch.tolist()]
            metric.update(predictions, references, batch)
            statistics.update([nouns[i // 2] for i in batch.tolist()], batch)
            choices.update(["ABC"[i % 3] for i in batch.tolist()], ["AB"[i % 2] for i in batch.tolist()], batch)
            first = [k for k, i in enumerate(batch.tolist()) if i in (0, 2, 4)]
            if first:  # no other rank has an update
                alone.update([predictions[k] for k in first], [references[k] for k in first], batch[first])
        conflict.update([f"a {nouns[int(rows[0])]}"], [["a cat"]], torch.tensor([7]))
        values = {"all": metric.compute(), "alone": alone.compute(), "reasons": metric.reasons | alone.reasons}
        values["per_image"] = {name: scores.tolist() for name, scores in metric.per_image.items()}
        values |= {name: float(value) for each in (statistics, choices) for name, value in each.compute().items()}
        values["image_ids"], values["tokenizer"] = metric.image_ids.tolist(), metric.tokenizer_used
        try:
            conflict.compute()
        except ValueError as error:
            values["conflict"] = str(error)
        return values
    finally:
        os.environ["PATH"], meteor.load_table = path, load_table


def first_rank_values(rank: int) -> dict[str, object]:
    """Metrics that the first rank alone updates; then one whose features are wider on every further rank."""
    generator = torch.Generator().manual_seed(3)
    features, ids = torch.randn(12, 8, generator=generator), torch.arange(6)
    gap, recall, scores = ModalityGap(ks=(1,)), ImageTextRecall(ks=(1,)), CocoCaptionScore(["bleu"], tokenizer="python")
    metrics = {"gap": gap, "recall": recall, "scores": scores, "statistics": CaptionStatistics()}
    metrics |= {"choices": MultipleChoice(), "no ids": CaptionStatistics()}
    if rank == 0:
        gap.update(features, torch.arange(12) // 6, ids.repeat(2))
        recall.update(features[:6], ids, features[6:], ids)
        scores.update(["a cat", "a dog"], [["the cat"], ["two dogs", "a dog"]], ids[:2])
        metrics["statistics"].update(["a cat", "a cat"], ids[:2])
        metrics["choices"].update(["A", "no idea"], ["A", "B"], ids[:2])
        metrics["no ids"].update(["a cat", "a dog", "a dog"])
    values = {name: {k: float(v) for k, v in metric.compute().items()} for name, metric in metrics.items()}
    values["nobody"] = [metric().compute() for metric in (CocoCaptionScore, CaptionStatistics, MultipleChoice)]
    wider = ImageTextRecall(ks=(1,))
    wider.update(torch.eye(1, 3 + rank), ids[:1] + rank, torch.eye(1, 3 + rank), ids[:1] + rank)
    try:
        wider.compute()
    except ValueError as error:
        values["wider"] = str(error)
    return values


def shared_faults(trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    """What every rank is told of errors of the first one: of any kind, in our helper and where it is used."""

    class Local(Exception):  # cannot be pickled
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")

    def fail(error: Exception) -> None:
        raise error

    def leak(*args: object) -> None:
        raise KeyError("train" if trainer.is_global_zero else "a rank that should not have looked")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    last = LastCheckpoint()
    works = {
        "plain": lambda: on_first_rank(lambda: fail(ZeroDivisionError("by zero")), trainer),
        "of the group": lambda: on_first_rank(lambda: fail(ValueError("a value"))),
        "local": lambda: on_first_rank(lambda: fail(Local(1, 2)), trainer),
        "result": lambda: on_first_rank(lambda: lambda: 0, trainer),
        "leakage": lambda: check.check_on_one_process(trainer, [EmojiDataset("noto", "novel")], {}, {}),
        "disk": lambda: last._save(trainer),
    }
    told = {}
    with (
        mock.patch.object(check, "check_leakage", leak),
        mock.patch.object(trainer.strategy.checkpoint_io, "save_checkpoint", full),
    ):
        for name, work in works.items():
            try:
                work()
            except Exception as error:
                told[name] = f"{type(error).__name__}: {error}"
    told["fine"] = on_first_rank(lambda: f"of rank {trainer.global_rank}", trainer)
    last._save(trainer)
    told["files"] = ", ".join(sorted(path.name for path in (folder / "checkpoints").iterdir()))
    return told


def main(devices: int, folder: Path) -> None:
    pl.seed_everything(0)
    task = Counting(
        ModalityEncoder(OpenCLIPEncoder(config=TINY, merges="emoji"), branch=LoRA(targets=("q", "v", "fc1"))),
        generated_text_weight=0.5,
    )
    sets = {name: [EmojiDataset(hand, name) for hand in ("noto", "fluent_flat")] for name in ("paired", "novel")}
    alike = {"novel": AllowedOverlap(["caption", "pixels"], "families share words, and some drawings are alike")}
    data = MixedModalityDataModule(
        sets["paired"], {"novel": sets["novel"]}, batch_size=32 // devices, eval_batch_size=50, allow_overlap=alike
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=3, max_epochs=-1,
        val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, data)
    faults = shared_faults(trainer, folder)
    embed(devices, folder, sets["novel"])
    metrics = metric_values(torch.arange(11)[trainer.global_rank :: devices])
    torch.save(task.seen, folder / f"seen-{devices}-{trainer.global_rank}.pt")
    captions = caption_values(torch.arange(11)[trainer.global_rank :: devices], folder)
    captions["first rank"] = first_rank_values(trainer.global_rank)
    captions["faults"] = faults
    captions["task"] = describe(devices, folder)
    captions["unidiff"] = unidiff(devices, folder)
    if devices > 1:
        captions["accumulated"] = describe(devices, folder, accumulate=2)["weights"]
    torch.save(captions, folder / f"captions-{devices}-{trainer.global_rank}.pt")
    if trainer.is_global_zero:
        weights = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}
        out = {
            "weights": weights,
            "results": task.results["novel"].values,
            "collectives": task.collectives,
            "metrics": metrics,
        }
        torch.save(out, folder / f"{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as in loss_ranks.py
