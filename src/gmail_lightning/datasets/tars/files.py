"""Which tars a path names, and reading a member by its place in the tar."""

from __future__ import annotations

import glob
import itertools
import os
import re
from functools import lru_cache
from pathlib import Path

from gmail_lightning.datasets.base import DataError

OPEN_TARS = 256  # per process; the usual limit of open files is 1024


class OpenTar:
    """A descriptor of one tar as it was indexed; closed when nobody holds it any more."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != stamp:
            raise DataError(f"{path} was changed after it was indexed: build the data set anew.")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


# By process, so that a worker opens its own. Reads name their position and share none.
@lru_cache(maxsize=OPEN_TARS)
def _opened(process: int, path: str, stamp: tuple[int, int]) -> OpenTar:
    return OpenTar(path, stamp)


def read_member(path: str, stamp: tuple[int, int], offset: int, size: int) -> bytes:
    """Reads ``size`` bytes of a tar at ``offset``.

    Args:
        path: The tar.
        stamp: Its size and time of change when it was indexed.
        offset: Where the member's bytes begin.
        size: Their number.

    Raises:
        DataError: If the tar is not the one that was indexed.
    """
    tar = _opened(os.getpid(), path, stamp)  # held until the read is over, whatever is opened meanwhile
    data = os.pread(tar.descriptor, size, offset)
    if len(data) < size:
        raise OSError(f"{path} ends at byte {offset + len(data)}, within a member")
    return data


def is_remote(path: str) -> bool:
    """Whether an address is not a path: ``https:``, ``s3:``, ``pipe:`` and the like."""
    return re.match(r"[a-z0-9+]+:", path) is not None


def find_tars(path: str | Path) -> list[Path]:
    """Lists the tars that a folder, a file name or a pattern names.

    Args:
        path: A folder, one tar, or a pattern with ``{00000..00041}``, ``{a,b}``, ``*`` and ``?``.

    Raises:
        DataError: If there are none, some are missing or compressed, or they lie in several folders.
    """
    text = str(path)
    if is_remote(text):
        raise DataError(f"{text}: random access needs local tars. Fetch them, or stream with StreamingDataModule.")
    if Path(text).is_dir():
        found = sorted(
            p for p in Path(text).iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")) and p.name[0] != "."
        )
        if not found:
            raise DataError(f"{text}: no .tar in this folder.")
        lost = [p for p in Path(text).glob("*.parquet") if p.stem.isdigit() and not p.with_suffix(".tar").is_file()]
        if lost:
            raise DataError(
                f"{min(lost)}: its tar is missing ({len(lost)} such files). Fetch it again, or remove both."
            )
    else:
        names = expand_path(text)
        matches = [_matches(name) for name in names]
        found = [Path(match) for some in matches for match in some]
        missing = [name for name, some in zip(names, matches, strict=True) if not some]
        missing += [str(p) for p in found if not p.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such tar ({len(missing)} missing). A relative path starts from {Path.cwd()}."
            )
    if not found:
        raise DataError(f"{text} names no tar: a range goes from the smaller number to the larger.")
    compressed = [p for p in found if p.suffix in (".gz", ".tgz")]
    if compressed:
        raise DataError(
            f"{compressed[0]}: a compressed tar has no random access. Decompress it (gunzip; images gain nothing from "
            "it), or stream with StreamingDataModule."
        )
    if len({p.parent for p in found}) > 1:
        raise DataError(f"{text} names tars of several folders: give one TarShards per folder.")
    return found


def _matches(name: str) -> list[str]:
    """The files of a pattern; what there is by this very name is no pattern, of a folder neither."""
    if not glob.has_magic(name) or os.path.exists(name):
        return [name]
    folder, last = os.path.split(name)
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, last)))


def expand_path(text: str) -> list[str]:
    """Expands the braces of a path, but for those of a file or a folder that there is."""
    folder, last = os.path.split(text)
    if os.path.exists(text):
        return [text]
    if os.path.isdir(folder):
        return [os.path.join(folder, name) for name in expand_braces(last)]
    return expand_braces(text)


def expand_braces(text: str) -> list[str]:
    """Expands ``{00000..00041}`` (leading zeros are kept) and ``{a,b}``, leftmost first."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    first, last, names = match.groups()
    if names is not None:
        parts = names.split(",")
    else:
        width = len(first) if first.startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    rest = expand_braces(text[match.end() :])
    return [text[: match.start()] + part + end for part, end in itertools.product(parts, rest)]
