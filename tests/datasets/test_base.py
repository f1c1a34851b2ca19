"""What all data sets share."""

from __future__ import annotations

import hashlib

from gmail_lightning.datasets.base import one_line
from gmail_lightning.datasets.ids import stable_ids


def test_stable_ids_are_pinned() -> None:
    names = ["a", "b/ü.png", ""]
    expected = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") // 2 for n in names]
    assert stable_ids(names).tolist() == expected
    assert min(expected) >= 0


def test_one_line() -> None:
    assert one_line(" a\r\nb\u2028c\t d ") == "a b c d"
