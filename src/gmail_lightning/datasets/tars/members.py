"""The members of a tar, none passed over: where the archive ends, what belongs together, and what is of no use."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Container, Iterator, Mapping
from typing import IO, Any, NamedTuple, cast

from gmail_lightning.datasets.ids import is_image_name

TEXTS = ("txt", "json")


class Name(NamedTuple):
    """What the name of a member says.

    Attributes:
        key: The name up to its last dot, which all members of a sample share.
        kind: ``image``, ``txt`` or ``json``; empty where the member is of no use.
        suffix: What follows the last dot, in lower case.
    """

    key: str
    kind: str
    suffix: str


def read_name(name: str) -> Name:
    """Takes the name of a member apart: ``a/v1.5_007.jpg`` is the image of the sample ``a/v1.5_007``."""
    name = re.sub(r"^(\./)+", "", name)
    folder, slash, last = name.rpartition("/")
    stem, suffix = os.path.splitext(last)
    suffix = suffix[1:].lower()
    kind = "image" if is_image_name(last) else suffix if suffix in TEXTS and not last.startswith(".") else ""
    return Name(folder + slash + stem, kind, suffix)


def may_belong(key: str, found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a member of ``key`` may be of a sample with those that came before, or lie beside it.

    Args:
        key: Of the member.
        found: The members before it by key and kind.
    """
    shortest = min(found, key=len)
    if key in found or key.startswith(f"{shortest}.") or shortest.startswith(f"{key}."):
        return True
    alone = all(len(members) == 1 for members in found.values())  # a.1.png and a.2.png, or a.depth.png before a.png
    stem = _before_last_dot(key)
    return alone and stem != "" and stem == _before_last_dot(shortest)


def _before_last_dot(key: str) -> str:
    """A key up to its last dot; empty where only a folder of it has one."""
    folder, slash, last = key.rpartition("/")
    return folder + slash + last.rpartition(".")[0] if "." in last else ""


def beside_sample(key: str, members: Mapping[str, Any], with_image: Container[str]) -> str | None:
    """What a single member is called that lies beside a sample, as ``a.mask.png`` beside ``a.png``; None for others.

    Args:
        key: Of the member.
        members: All of its key.
        with_image: Keys that have an image.
    """
    beside = key
    while len(members) == 1 and "." in beside.rpartition("/")[2]:
        beside = beside.rpartition(".")[0]
        if beside in with_image:
            what = re.sub("[0-9]+", "0", key[len(beside) :])
            return f"members {what} beside a sample"
    return None


def of_no_use(name: str) -> str:
    """What members are called that no sample uses: by their suffix, or by what they are."""
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return "hidden members"
    suffix = os.path.splitext(last)[1].lower()
    return f"members {suffix}" if suffix else "members without a suffix"


def name_is_text(name: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def decompressed(file: Any) -> IO[bytes]:
    """Reads a stream that may be compressed, through all members that are joined; checksums are compared.

    Args:
        file: With a method ``read``, as of a pipe.
    """
    stream = io.BufferedReader(_Readable(file))
    head = stream.peek(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if head.startswith(b"BZh"):
        return bz2.BZ2File(stream)  # type: ignore[return-value]
    return lzma.LZMAFile(stream) if head.startswith(b"\xfd7zXZ") else stream  # type: ignore[return-value]


class _Readable(io.RawIOBase):
    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Archive(tarfile.TarFile):
    """Reads on behind an end mark, where archives are joined end to end, and says whether the last one has its own."""

    end_mark = False


class Header(tarfile.TarInfo):
    """Refuses what is neither a header nor an end mark, which ``ignore_zeros`` alone would pass over."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Header:  # noqa: D102
        try:
            header = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.end_mark = True
            raise
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error
        tarfile_.end_mark = False
        return header  # type: ignore[return-value]


def open_tar(file: IO[bytes], mode: str) -> Archive:
    """Opens a tar: mode ``r:`` of a file, ``r|`` of a stream.

    Raises:
        tarfile.ReadError: If it is none.
    """
    return Archive.open(fileobj=file, mode=mode, ignore_zeros=True, tarinfo=Header)  # type: ignore[call-overload,no-any-return]


def read_members(archive: Archive) -> Iterator[tarfile.TarInfo]:
    """Yields every member but folders, and forgets it.

    Raises:
        tarfile.ReadError: If the tar is cut short or damaged; when it has been read up to there.
    """
    for member in archive:
        cast(Any, archive).members = []  # else the list of all members grows
        if not member.isdir():
            yield member
    if not archive.end_mark:
        raise tarfile.ReadError("no end mark")
