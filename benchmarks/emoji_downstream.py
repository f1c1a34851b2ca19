"""Trained on generated images alone, tested on real ones: through the aligned branch, against taking them as real.

    python benchmarks/emoji_downstream.py [FOLDER]

Runs ``recipes/emoji/align.yaml`` and, on top of it, ``retrieval.yaml``, ``linear_probe.yaml``, ``zeroshot.yaml`` and
``caption_clipcap.yaml`` on three seeds each: as they are, with ``--model.encoder.aligned null`` and with real images
alone; the captioner without any image, too (``text_only.yaml``). Prints a table.
``novel`` are concepts that the aligner never saw: the figure to quote. What lies in FOLDER already is not run again.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gmail_lightning.command.recipes import recipes_folder

SEEDS = (0, 1, 2)
ROWS = {
    "retrieval": ("i2t_R@1", "t2i_R@1", "i2t_R@5", "t2i_R@5"),
    "linear_probe": ("accuracy", "top5"),
    "zeroshot": ("accuracy", "mean_per_class"),
    "caption_clipcap": ("CIDEr", "ROUGE_L", "Bleu_4"),
}
REAL = "--data.init_args.generated_fraction=0"


def run(recipe: str, seed: int, folder: Path, *overrides: str) -> None:
    """One run in a process of its own, unless it came to its end before."""
    if (folder / "done").exists():
        return
    command = [
        sys.executable,
        "-m",
        "gmail_lightning",
        "fit",
        "--config",
        str(recipes_folder() / f"emoji/{recipe}.yaml"),
    ]
    command += [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (folder / "done").touch()


def mean(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"


def main(folder: Path) -> int:
    settings = {"aligned": lambda seed: (f"--model.encoder.aligned={folder}/align-{seed}",)}
    settings["as_real"] = lambda seed: ("--model.encoder.aligned=null",)
    settings["real_only"] = lambda seed: ("--model.encoder.aligned=null", REAL)
    settings["text_only"] = lambda seed: (f"--config={recipes_folder() / 'rivals/text_only.yaml'}",)
    for seed in SEEDS:
        run("align", seed, folder / f"align-{seed}")
        for recipe in ROWS:
            for name, overrides in settings.items():
                if name == "text_only" and recipe != "caption_clipcap":
                    continue
                run(recipe, seed, folder / f"{recipe}-{name}-{seed}", *overrides(seed))

    def values(recipe: str, name: str, part: str, key: str) -> list[float]:
        files = [folder / f"{recipe}-{name}-{seed}" / "results.json" for seed in SEEDS]
        return [json.loads(file.read_text())["results"][part][key] for file in files]

    print("| | generated as real | aligned | gain | real images alone | texts alone |\n|---|---|---|---|---|---|")
    lost = 0
    for part in ("novel", "paired"):
        for recipe, keys in ROWS.items():
            for key in keys:
                as_real, aligned, real = (
                    values(recipe, name, part, key) for name in ("as_real", "aligned", "real_only")
                )
                gain = [b - a for a, b in zip(as_real, aligned, strict=True)]
                lost += part == "paired" and statistics.mean(gain) <= 0
                texts = mean(values(recipe, "text_only", part, key)) if recipe == "caption_clipcap" else ""
                cells = (mean(as_real), mean(aligned), mean(gain, "+"), f"{statistics.mean(real):.3f}", texts)
                print(f"| {part}: {recipe} {key} | {' | '.join(cells)} |")
    print(f"rows of paired without a gain: {lost} (goal 0)")
    return int(lost > 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch)))
