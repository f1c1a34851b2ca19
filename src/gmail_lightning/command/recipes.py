"""``gmail-lightning recipes``: the recipes that ship with the package, to be listed and copied."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gmail_lightning


def recipes_folder() -> Path:
    """Folder of the recipes: inside the installed package, or beside ``src`` in a source tree."""
    here = Path(gmail_lightning.__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"


def recipes(args: list[str]) -> int:
    """``gmail-lightning recipes list|copy``; returns the exit status."""
    parser = argparse.ArgumentParser("gmail-lightning recipes", description="The recipes that ship with the package.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="every recipe with its first line")
    copy = verbs.add_parser("copy", help="copy one recipe to edit it")
    copy.add_argument("name", help="as listed, for instance emoji/align.yaml")
    copy.add_argument("target", type=Path, nargs="?", help="file or folder; default: its file name, here")
    given = parser.parse_args(args)
    folder = recipes_folder()
    known = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.yaml"))}
    if given.verb == "list":
        for name, path in known.items():
            print(f"{name:<34} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    name = given.name if given.name.endswith(".yaml") else f"{given.name}.yaml"
    if name not in known:
        print(f"No recipe {given.name!r}. Known: {', '.join(known)}.", file=sys.stderr)
        return 2
    target = given.target or Path(Path(name).name)
    target = target / Path(name).name if target.is_dir() else target
    if target.exists():
        print(f"{target} exists; it is not overwritten.", file=sys.stderr)
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(known[name].read_text())
    print(f"Wrote {target}")
    return 0
