"""Cuts CLIP's byte-pair merges down to those that the emoji captions use; run once, at development time.

Encoding a text applies, again and again, the merge of lowest rank that fits. Keeping the merges that the captions use,
in their order, gives the captions the same pieces as the whole table does; words outside fall back to smaller pieces,
so no text is unknown. The file has the form that ``open_clip.tokenizer.SimpleTokenizer(bpe_path=...)`` reads.

    python tools/build_emoji_merges.py
"""

from __future__ import annotations

import gzip
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer, get_pairs

import gmail_lightning
from gmail_lightning.datasets.emoji import TEMPLATES, EmojiDataset


def used_merges(tokenizer: SimpleTokenizer, texts: list[str]) -> list[tuple[str, str]]:
    """Merges that encoding the texts applies, by rank."""
    words = set()
    for text in texts:
        for word in tokenizer.pat.findall(tokenizer.clean_fn(text)):
            words.add("".join(tokenizer.byte_encoder[b] for b in word.encode("utf-8")))
    used: set[tuple[str, str]] = set()
    for word in words:
        pieces = (*word[:-1], word[-1] + "</w>")
        while len(pieces) > 1:
            pair = min(get_pairs(pieces), key=lambda p: tokenizer.bpe_ranks.get(p, float("inf")))
            if pair not in tokenizer.bpe_ranks:
                break
            used.add(pair)
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == pair:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = tuple(merged)
    return sorted(used, key=tokenizer.bpe_ranks.__getitem__)


if __name__ == "__main__":
    captions = []
    for locale in TEMPLATES:
        dataset = EmojiDataset(locale=locale)
        captions += [caption for i in range(len(dataset)) for caption in dataset.captions(i)]
    merges = used_merges(SimpleTokenizer(), captions)
    lines = "\n".join(["#version: cut over the emoji captions", *(" ".join(pair) for pair in merges)])
    out = Path(gmail_lightning.__file__).parent / "models/emoji_clip/merges.txt.gz"
    out.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print(f"{len(merges)} merges, vocabulary of {len(merges) + 514}, {out.stat().st_size / 1e3:.0f} kB")
