"""Builds the emoji pack from npm tarballs; run once, at development time.

The pack is the result: ``concepts.parquet`` (one row per concept) and one ``<hand>.parquet`` per hand (concept, WebP).
To rebuild it, unpack these npm packages side by side into one folder, each under the name printed here, and run it:

    @iconify-json/noto@1.2.9               noto/
    @iconify-json/twemoji@1.2.5            twemoji/
    @iconify-json/fluent-emoji-flat@1.2.6  fluent-emoji-flat/
    @iconify-json/fluent-emoji@1.2.7       fluent-emoji/
    @iconify-json/emojione@1.2.3           emojione/
    emojibase-data@17.0.0                  emojibase-data/

    pip install resvg_py==0.5.0 pillow pyarrow
    python tools/build_emoji_drawings.py FOLDER
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gmail_lightning.datasets import emoji

SIZE = 64  # px, both sides
NUM_CONCEPTS = 1594  # drawn by all complete hands in the versions above
# hand -> (icon package, package whose chars.json names its icons)
HANDS = {
    "noto": ("noto", "noto"),
    "fluent_flat": ("fluent-emoji-flat", "fluent-emoji-flat"),
    "fluent": ("fluent-emoji", "fluent-emoji-flat"),
    "twemoji": ("twemoji", "twemoji"),
    "emojione": ("emojione", "noto"),  # older than the others: draws about two thirds of the concepts
}
COMPLETE = ("noto", "fluent_flat", "fluent", "twemoji")
LOCALES = ("en", "de")
PEOPLE = {"man", "woman", "men", "women", "person", "people", "boy", "girl", "child", "children"}


def normalise(sequence: str) -> str:
    """Code points in lower case, joined by ``-``, without the variation selector FE0F."""
    return "-".join(part for part in sequence.lower().split("-") if part != "fe0f")


def family_of(label: str) -> str:
    """Labels that differ in the kind of person alone are near-copies of one drawing and share a family."""
    words = ["person" if word in PEOPLE else word for word in re.findall(r"\w+", label.lower())]
    kept = [word for i, word in enumerate(words) if not (word == "person" and i and words[i - 1] == "person")]
    return " ".join(kept)


def concept_set_of(family: str) -> str:
    """``novel`` for a quarter of the families, by a hash that no order or version of anything can move."""
    digest = hashlib.sha256(family.encode()).digest()
    return "novel" if digest[0] % 4 == 0 else "paired"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def icon_names(folder: Path, package: str) -> dict[str, str]:
    return {normalise(k): v for k, v in read_json(folder / package / "chars.json").items()}


def rasterise(icons: dict[str, Any], name: str) -> bytes:
    """WebP of one icon, ``SIZE`` px square, with alpha; an icon that is not square is centred."""
    import resvg_py
    from PIL import Image

    if name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))))
    if image.size != (SIZE, SIZE):
        raise ValueError(f"{name}: rasterised to {image.size}, not {SIZE} px square.")
    buffer = io.BytesIO()
    image.convert("RGBA").save(buffer, "WEBP", quality=85, method=4)
    return buffer.getvalue()


def build(folder: Path, out: Path) -> None:
    """Writes the pack of the unpacked npm packages in ``folder`` to ``out``."""
    names = {hand: icon_names(folder, chars) for hand, (_, chars) in HANDS.items()}
    icons = {hand: read_json(folder / package / "icons.json") for hand, (package, _) in HANDS.items()}
    data = folder / "emojibase-data"
    records = {loc: {normalise(r["hexcode"]): r for r in read_json(data / loc / "data.json")} for loc in LOCALES}
    kinds = {}
    for locale in LOCALES:
        messages = read_json(data / locale / "messages.json")
        kinds[locale] = {kind: {m["order"]: m["message"] for m in messages[kind]} for kind in ("groups", "subgroups")}

    concepts = [c for c, r in records["en"].items() if "group" in r and all(c in names[hand] for hand in COMPLETE)]
    if len(concepts) != NUM_CONCEPTS:
        raise ValueError(f"{folder}: {len(concepts)} concepts, expected {NUM_CONCEPTS}: another package version?")

    rows: list[dict[str, Any]] = []
    for concept in concepts:
        english = records["en"][concept]
        family = family_of(english["label"])
        row: dict[str, Any] = {"concept": concept, "family": family, "concept_set": concept_set_of(family)}
        row["group"] = english["group"]
        for locale in LOCALES:
            record = records[locale][concept]
            row[f"label_{locale}"] = record["label"]
            row[f"tags_{locale}"] = record.get("tags", [])
            row[f"group_{locale}"] = kinds[locale]["groups"][english["group"]]
            row[f"subgroup_{locale}"] = kinds[locale]["subgroups"][english["subgroup"]]
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), out / "concepts.parquet", compression="zstd")

    for hand in HANDS:
        drawn = icons[hand]["icons"].keys() | icons[hand].get("aliases", {}).keys()
        mine = [c for c in concepts if names[hand].get(c) in drawn]
        if hand in COMPLETE and len(mine) != NUM_CONCEPTS:
            raise ValueError(f"{hand}: draws {len(mine)} concepts, expected {NUM_CONCEPTS}.")
        images = [rasterise(icons[hand], names[hand][c]) for c in mine]
        path = out / f"{hand}.parquet"
        pq.write_table(pa.table({"concept": mine, "image": images}), path, compression="none")
        print(f"{hand}: {len(mine)} concepts, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(emoji.__file__).parent)
