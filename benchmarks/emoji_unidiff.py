"""The terms of a joint fine-tuning, alone and together: ``recipes/emoji/unidiff.yaml``, one override each, three seeds.

    python benchmarks/emoji_unidiff.py [FOLDER] [--parallel N] [--text_tower shared]

``before`` is the CLIP and the pipeline as they were; ITC the contrastive term alone, IS the synthesis term alone, then
both, then both with each reading of the consistency. ``novel`` are concepts of the hand that is trained on, ``outside``
those of a hand that the CLIP knew before. Prints tables of mean and standard deviation, and what the aim asks: whether
a reading loses more outside than ITC, and whether one beats ITC in retrieval and IS in KID. Runs that lie in FOLDER
already are not run again.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gmail_lightning.command.recipes import recipes_folder

SEEDS = (0, 1, 2)
READINGS = ("reciprocal_kl", "feature", "image", "prediction_contrast")
OVERRIDES = {
    "ITC": f"--config={recipes_folder() / 'rivals/contrast_alone.yaml'}",
    "IS": f"--config={recipes_folder() / 'rivals/synthesis_alone.yaml'}",
    "ITC+IS": "--model.init_args.consistency.init_args.reading=none",
} | {reading: f"--model.init_args.consistency.init_args.reading={reading}" for reading in READINGS}
TABLES = {
    "Concepts that were not trained on (`novel`)": (
        "novel",
        ("i2t_R@1", "t2i_R@1", "t2i_dedup_R@1", "accuracy", "scorer_kid", "scorer_cmmd", "scorer_clip_score"),
    ),
    "What the CLIP knew before (`outside`)": (
        "outside",
        ("i2t_R@1", "t2i_R@1", "accuracy", "interpolated_accuracy", "interpolated_i2t_R@1"),
    ),
    "Half way to the weights before, and what the features have become (`novel`)": (
        "novel",
        (
            *("interpolated_i2t_R@1", "interpolated_accuracy", "image_effective_rank", "image_mean_cosine"),
            *("text_effective_rank", "text_mean_cosine", "image_drift", "text_drift"),
        ),
    ),
}  # fmt: skip


def run(variant: str, seed: int, folder: Path, further: list[str]) -> None:
    """One run in a process of its own, unless it came to its end before."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    command = [sys.executable, "-m", "gmail_lightning", "fit", "--config", str(recipes_folder() / "emoji/unidiff.yaml")]
    command += [OVERRIDES[variant], f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}", *further]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (folder / "done").touch()


def mean(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def conflicts(folder: Path) -> dict[str, float]:
    """Mean of the cosines between the gradients of two terms, over the steps that were looked at."""
    (file,) = folder.rglob("metrics.csv")
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(file.open()):
        for name, value in row.items():
            if name.startswith("train/conflict/") and value:
                found.setdefault(name.rpartition("/")[2], []).append(float(value))
    return {name: statistics.mean(values) for name, values in found.items()}


def main(folder: Path, parallel: int, text_tower: str) -> int:
    folders = {variant: [folder / f"{variant}-{seed}" for seed in SEEDS] for variant in OVERRIDES}
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [
            pool.submit(run, variant, seed, folders[variant][number], [f"--model.init_args.text_tower={text_tower}"])
            for number, seed in enumerate(SEEDS)
            for variant in OVERRIDES
        ]
        for job in jobs:
            job.result()
    contents = {v: [json.loads((path / "results.json").read_text()) for path in folders[v]] for v in OVERRIDES}
    rows = {"before": [content["before"] for content in contents["ITC"]]}
    rows |= {variant: [content["results"] for content in found] for variant, found in contents.items()}

    def values(variant: str, part: str, key: str) -> list[float]:
        return [found[part][key] for found in rows[variant] if key in found[part]]

    for title, (part, keys) in TABLES.items():
        print(f"\n{title}\n\n| | {' | '.join(keys)} |\n|{'---|' * (1 + len(keys))}")
        for variant in rows:
            cells = [mean(found) if (found := values(variant, part, key)) else "" for key in keys]
            print(f"| {variant} | {' | '.join(cells)} |")

    print("\nCosine between the gradients of two terms\n")
    print("| | contrast, synthesis | contrast, consistency | synthesis, consistency |\n|---|---|---|---|")
    names = ("contrast_synthesis", "contrast_consistency", "synthesis_consistency")
    for variant in OVERRIDES:
        found = [conflicts(path) for path in folders[variant]]
        if any(found):
            cells = [mean([one[name] for one in found], "+") if name in found[0] else "" for name in names]
            print(f"| {variant} | {' | '.join(cells)} |")

    def gain(reading: str, rival: str, part: str, key: str) -> list[float]:
        return [a - b for a, b in zip(values(reading, part, key), values(rival, part, key), strict=True)]

    print("\n| gain, seed by seed | outside accuracy over ITC | i2t_R@1 over ITC | t2i_R@1 over ITC | KID under IS |")
    print("|---|---|---|---|---|")
    held, beats = True, False
    for reading in READINGS:
        outside, i2t, t2i = (
            gain(reading, "ITC", *which)
            for which in (("outside", "accuracy"), ("novel", "i2t_R@1"), ("novel", "t2i_R@1"))
        )
        kid = [-value for value in gain(reading, "IS", "novel", "scorer_kid")]
        print(f"| {reading} | {' | '.join(mean(found, '+') for found in (outside, i2t, t2i, kid))} |")
        held = held and statistics.mean(outside) >= 0
        beats = beats or min(statistics.mean(found) for found in (i2t, t2i, kid)) > 0
    print(f"no reading loses more outside than ITC: {'held' if held else 'not held'}")
    print(f"one reading beats ITC in retrieval and IS in KID: {'held' if beats else 'not held'}")
    return int(not (held and beats))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of the runs; default: a folder that is removed")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--text_tower", choices=["separate", "shared"], default="separate", help="of the recipe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main((given.folder or Path(scratch)).resolve(), given.parallel, given.text_tower))
