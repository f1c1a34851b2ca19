"""Samples out of webdataset shards that are streamed: what belongs together, and what a broken shard takes away."""

from __future__ import annotations

import logging
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gmail_lightning.datasets.base import DataError, ModalityName, one_line
from gmail_lightning.datasets.ids import id_number, known_by, stable_ids
from gmail_lightning.datasets.tars.index import read_record
from gmail_lightning.datasets.tars.members import (
    beside_sample,
    decompressed,
    may_belong,
    of_no_use,
    open_tar,
    read_members,
    read_name,
)

UNREADABLE = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
)  # of a shard, or of the command that fetches it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample of a shard, before its image is decoded."""

    key: str
    image: bytes
    caption: str
    image_id: int
    pair_id: int


def read_sample(key: str, members: dict[str, bytes], modality: ModalityName, space: str) -> Sample | None:
    """Reads the members of one key.

    Args:
        key: The key.
        members: By kind: ``image``, ``txt``, ``json``.
        modality: What the stream is said to be.
        space: Name of the data set that ids and keys are of.

    Returns:
        The sample, or None where its record says that its status is neither ok nor success.

    Raises:
        ValueError: If image or caption are missing or unreadable.
        DataError: If the record says that the sample is of another modality, or not for training, or an id is none.
    """
    record = read_record(members.get("json", b"{}"))
    if record.get("status") not in (None, "ok", "success"):
        return None
    if record.get("split") not in (None, "train"):
        raise DataError(f"Key {key!r} was made for split {record['split']!r}: it is no training data.")
    if record.get("modality") not in (None, modality):
        raise DataError(f"Key {key!r} says modality {record['modality']!r}, but modality={modality!r} was given.")
    caption = one_line(members.get("txt", b"").decode("utf-8-sig") or record.get("caption") or "")
    if "image" not in members or not caption:
        raise ValueError("no caption" if "image" in members else "no image")
    try:
        image_id, pair_id = (id_number(record.get(name), space) for name in ("image_id", "pair_id"))
    except DataError as error:
        raise DataError(f"Key {key!r}: {error}") from error
    image = members["image"]
    name = f"{space}/{key}" if space else known_by(key, len(image), lambda offset, length: image[offset:][:length])
    own_id = int(stable_ids([name])[0])
    if pair_id == -1 and modality == "real":
        pair_id = own_id
    return Sample(key, image, caption, own_id if image_id == -1 else image_id, pair_id)


@dataclass
class ShardReader:
    """Reads shards one after the other, and counts by samples what the broken ones among them take away.

    How many samples a broken shard had is taken from the whole ones: as many as they hold on average. Where none was
    read before, nobody knows what is lost, and that is an error.

    Attributes:
        modality: What the stream is said to be.
        space: Name of the data set that ids and keys are of.
        any_loss: Whether all may be lost, so that a broken shard of unknown size counts as one sample.
        readable: Samples read so far.
        reasons: One line per sample that is broken or lost, and how many samples were read before it; for whoever shows
            them and takes them out.
    """

    modality: ModalityName
    space: str = ""
    any_loss: bool = False
    readable: int = 0
    reasons: list[tuple[int, str]] = field(default_factory=list)
    _whole: list[int] = field(default_factory=lambda: [0, 0])  # shards, and their samples
    _named: set[str] = field(default_factory=set)

    def read(self, url: str) -> Iterator[Sample]:
        """Yields the samples of a shard."""
        seen = 0
        try:
            for key, members in self._groups(url):
                seen += 1
                try:
                    sample = read_sample(key, members, self.modality, self.space)
                except DataError as error:
                    raise DataError(f"{url}: {error}") from error
                except ValueError as error:  # no image or caption, not UTF-8, not a JSON object
                    self.reasons.append((self.readable, f"{url} key {key!r}: {error}"))
                    continue
                if sample is not None:
                    self.readable += 1
                    yield sample
        except DataError:
            raise
        except UNREADABLE as error:
            reason = f"{url} is cut short, damaged, or cannot be read: {error}"
            if not (self._whole[0] or self.any_loss):
                raise DataError(
                    f"{reason}. No whole shard was read before it, so that it is not known how many samples are lost: "
                    "fetch it again, or take it out of urls."
                ) from error
            usual = round(self._whole[1] / self._whole[0]) if self._whole[0] else 0
            self.reasons += [(self.readable, reason)] * max(usual - seen, 1)
        else:
            self._whole = [self._whole[0] + 1, self._whole[1] + seen]

    @property
    def last_reason(self) -> str:
        """Why nothing came; empty where no one knows."""
        return f" The last reason: {self.reasons[-1][1]}." if self.reasons else ""

    def _groups(self, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields keys with their members by kind."""
        from webdataset import gopen

        with gopen(url) as file, decompressed(file) as stream, open_tar(stream, "r|") as archive:
            found: dict[str, dict[str, bytes]] = {}  # by key, of a run of members whose keys are related
            with_image: set[str] = set()  # keys of the shard
            for member in read_members(archive):
                name = read_name(member.name)
                if not name.kind or not member.isreg():
                    self._tell(url, of_no_use(member.name) if member.isreg() else "links", member.name)
                    continue
                if found and not may_belong(name.key, found):
                    yield from self._samples(url, found, with_image)
                    found = {}
                content: Any = archive.extractfile(member)
                data = content.read()
                if len(data) < member.size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                members = found.setdefault(name.key, {})
                if name.kind in members:
                    raise DataError(
                        f"{url}: key {name.key!r} has two members .{name.suffix} or two images. Make keys unique."
                    )
                members[name.kind] = data
            yield from self._samples(url, found, with_image)

    def _samples(
        self, url: str, found: dict[str, dict[str, bytes]], with_image: set[str]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        with_image |= {key for key, members in found.items() if "image" in members}
        for key, members in found.items():
            if (what := beside_sample(key, members, with_image)) is None:
                yield key, members
            else:
                self._tell(url, what, key)

    def _tell(self, url: str, kind: str, name: str) -> None:
        """Says once of each kind of members that no sample uses them."""
        if kind not in self._named:
            self._named.add(kind)
            logger.warning("%s: %s, such as %s, are of no use and are passed over.", url, kind, name)
