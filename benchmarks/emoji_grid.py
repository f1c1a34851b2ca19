"""Draws the README's grid, real beside generated for the same captions: ``python benchmarks/emoji_grid.py OUT.png``.

Not hand-picked: every 130th concept, the real drawing above, below it the images of its first two captions.
"""

import sys
import textwrap

from matplotlib.figure import Figure

from gmail_lightning.datasets import EmojiDataset

EVERY = 130


def main(out: str) -> None:
    real, generated = EmojiDataset("noto"), EmojiDataset("generated")
    rows = {(int(generated.image_id[i]), generated.captions(i)[0]): i for i in range(len(generated))}
    concepts = range(0, len(real), EVERY)
    figure = Figure(figsize=(len(concepts), 4.2), layout="constrained")
    axes = figure.subplots(3, len(concepts))
    for column, concept in enumerate(concepts):
        captions = real.captions(concept)
        axes[0, column].imshow(real.image(concept).permute(1, 2, 0))
        axes[0, column].set_title(textwrap.fill(captions[0], 14), fontsize=7)
        for line in (1, 2):
            row = rows.get((concept, captions[line - 1]))  # None where the audit left the image out
            if row is not None:
                axes[line, column].imshow(generated.image(row).permute(1, 2, 0))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for line, label in enumerate(("real (Noto)", "generated of the label", "generated of\n“a drawing of” the label")):
        axes[line, 0].set_ylabel(label, fontsize=7)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
