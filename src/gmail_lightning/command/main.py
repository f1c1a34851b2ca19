"""The command ``gmail-lightning``: Lightning's verbs, and export, doctor and recipes beside them."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Args:
        args: Arguments; those of the process by default.
    """
    given, args = args, list(sys.argv[1:] if args is None else args)
    if os.getcwd() not in sys.path:  # a class of one's own there has an import path, and shadows nothing
        sys.path.append(os.getcwd())
    verb = args[0] if args else ""
    if verb == "--version":
        from gmail_lightning import __version__

        print(f"gmail-lightning {__version__}")
        return 0
    if verb == "doctor":
        from gmail_lightning.command.doctor import report

        print(report())
        return 0
    if verb == "recipes":
        from gmail_lightning.command.recipes import recipes

        return recipes(args[1:])
    if verb == "export":
        return _export(args[1:])
    if verb == "repair":
        return _repair(args[1:])
    return _fit_or_evaluate(given)


def _fit_or_evaluate(args: Sequence[str] | None) -> int:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from gmail_lightning.callbacks import CollapseError
    from gmail_lightning.command.lightning_cli import GmailCLI
    from gmail_lightning.datasets import DataError

    try:
        return GmailCLI.run(args)
    except DataError as error:
        return _fail(3, "Data problem", error)
    except MisconfigurationException as error:
        return _fail(2, "Bad configuration", error)
    except CollapseError as error:
        return _fail(1, "Stopped", error)
    except SIGTERMException:  # whose own status would be that of success
        return 128 + int(signal.SIGTERM)


def _fail(status: int, kind: str, error: Exception) -> int:
    # What failed in a worker process comes with its traceback, of which the last line is the message.
    text = re.sub(r"\ACaught \w+ in DataLoader worker .*\n(?:[\w.]+Error): ", "", str(error), flags=re.DOTALL).strip()
    print(f"{kind}: {text}", file=sys.stderr)
    return status


def _export(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gmail-lightning export", description="Merges a checkpoint into a plain model.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--to", choices=["open_clip", "hf_clip", "diffusers"], default="open_clip")
    parser.add_argument("--branch", choices=["generated", "real"], default="generated", help="of the image tower")
    parser.add_argument("--out", type=Path, help="new folder; default: the checkpoint's name beside it")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    given = parser.parse_args(args)
    if not given.checkpoint.exists():
        fault = f"{given.checkpoint}: no such checkpoint; a relative path starts from {Path.cwd()}. Give one of a run, "
        return _fail(2, "Not exported", FileNotFoundError(f"{fault}runs/NAME/TIME/checkpoints/last.ckpt."))
    out = given.out or given.checkpoint.with_name(f"{given.checkpoint.stem}-{given.to}")
    from gmail_lightning.export import export_checkpoint

    try:
        export_checkpoint(given.checkpoint, out, to=given.to, branch=given.branch, dtype=given.dtype)
    except (ValueError, OSError, RuntimeError, ImportError, UnpicklingError) as error:
        return _fail(2, "Not exported", error)
    print(f"Wrote {out}")
    return 0


def _repair(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gmail-lightning repair", description="Re-pairs captions and generated images.")
    parser.add_argument("folder", type=Path, help="data set that image generation wrote; its manifest gets two columns")
    parser.add_argument("--encoder", required=True, help="emoji_scorer, a folder, or a tag of --model_name")
    parser.add_argument("--model_name", help="name of an architecture in open_clip")
    parser.add_argument("--num_candidates", type=int, default=15, help="images looked at for each caption")
    given = parser.parse_args(args)
    from gmail_lightning.datasets import DataError
    from gmail_lightning.generation.images.repair import repair_store
    from gmail_lightning.models import OpenCLIPEncoder

    try:
        encoder = OpenCLIPEncoder(given.model_name, given.encoder).eval()
        pairs, changed = repair_store(given.folder, encoder, num_candidates=given.num_candidates)
    except DataError as error:
        return _fail(3, "Data problem", error)
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(2, "Not repaired", error)
    print(f"{given.folder}: {pairs} rows, {changed} with another image than their own. Read: TarShards(repaired=True)")
    return 0
