"""Aligns for three steps, validates, writes features, computes metrics, on some processes; rank 0 saves what came out.

python task_ranks.py DEVICES FOLDER
"""

import gzip
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from gmail_lightning.callbacks import FeatureWriter
from gmail_lightning.datamodules import AllowedOverlap, MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.metrics import CocoCaptionScore, ImageTextRecall, ZeroShotAccuracy, meteor
from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.tasks import AlignmentTask, EmbeddingTask

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 1, "layers": 1},
}


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
        for batch in [*rows.split(2), torch.tensor([10])]:
            predictions = [f"a {nouns[i]} by\u2028the {nouns[i - 1]} {'.' * i}" for i in batch.tolist()]
            references = [[f"the {nouns[i - 5]} and a {nouns[i]}", f"some {nouns[i - 1]} " * 3] for i in batch.tolist()]
            metric.update(predictions, references, batch)
            first = [k for k, i in enumerate(batch.tolist()) if i in (0, 2, 4)]
            if first:  # no other rank has an update
                alone.update([predictions[k] for k in first], [references[k] for k in first], batch[first])
        conflict.update([f"a {nouns[int(rows[0])]}"], [["a cat"]], torch.tensor([7]))
        values = {"all": metric.compute(), "alone": alone.compute(), "reasons": metric.reasons | alone.reasons}
        values["per_image"] = {name: scores.tolist() for name, scores in metric.per_image.items()}
        values["image_ids"], values["tokenizer"] = metric.image_ids.tolist(), metric.tokenizer_used
        try:
            conflict.compute()
        except ValueError as error:
            values["conflict"] = str(error)
        return values
    finally:
        os.environ["PATH"], meteor.load_table = path, load_table


def main(devices: int, folder: Path) -> None:
    pl.seed_everything(0)
    task = Counting(OpenCLIPEncoder(config=TINY, merges="emoji"), targets=("q", "v", "fc1"), generated_text_weight=0.5)
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
    embed(devices, folder, sets["novel"])
    metrics = metric_values(torch.arange(11)[trainer.global_rank :: devices])
    torch.save(task.seen, folder / f"seen-{devices}-{trainer.global_rank}.pt")
    captions = caption_values(torch.arange(11)[trainer.global_rank :: devices], folder)
    torch.save(captions, folder / f"captions-{devices}-{trainer.global_rank}.pt")
    if trainer.is_global_zero:
        weights = {name: p.detach() for name, p in task.named_parameters() if p.requires_grad}
        out = {
            "weights": weights,
            "results": task.results["novel"],
            "collectives": task.collectives,
            "metrics": metrics,
        }
        torch.save(out, folder / f"{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
