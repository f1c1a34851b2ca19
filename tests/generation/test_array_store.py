"""Stores of arrays: token ids from parts to a reader, and what an earlier release had begun."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gmail_lightning.datasets import DataError, EmojiDataset
from gmail_lightning.datasets.store_files import FEATURES, TOKEN_IDS
from gmail_lightning.datasets.token_store import TokenStore
from gmail_lightning.generation.array_store import ArrayStore
from gmail_lightning.generation.errors import FolderError
from gmail_lightning.generation.rows import store_columns
from gmail_lightning.generation.token_ids import stored_token_ids, token_record

NOVEL = EmojiDataset("noto", "novel")
TOKENIZER = {"class": "VQ", "weights": (0.25, "emoji")}


def rows(count: int = 40) -> pa.Table:
    return store_columns([(NOVEL, row) for row in range(count)])


def tokens(folder: Path, vocabulary: int = 512, length: int = 6, **settings) -> ArrayStore:
    record = token_record(TOKENIZER, length, vocabulary)
    return ArrayStore(folder, TOKEN_IDS, rows(), record, seconds=0.0, **settings)


def write(store: ArrayStore, row_id: np.ndarray, ids: np.ndarray) -> None:
    keys = [store.rows["key"][row].as_py() for row in row_id.tolist()]
    store.parts.add(row_id, {store.column: stored_token_ids(ids[row_id], store.record, keys)})
    store.parts.flush()


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_token_ids_come_back_after_an_interruption(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, vocabulary, (40, 6))
    ids[0, 0], ids[39, 5] = 0, vocabulary - 1
    store = tokens(tmp_path / "store", vocabulary)
    assert store.begin().tolist() == list(range(40))
    for rank in range(2):
        write(store, np.arange(rank, 30, 2), ids)
    assert "10 of 40 images are missing" in store.finish()
    with pytest.raises(DataError, match="no finished token store"):
        TokenStore(tmp_path / "store")
    again = tokens(tmp_path / "store", vocabulary)
    missing = again.begin()
    assert missing.tolist() == list(range(30, 40))
    for rank in range(3):
        write(again, missing[rank::3], ids)
    again.finish()
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"token_ids.npy", "rows.parquet", "store.json"}
    assert np.load(tmp_path / "store" / "token_ids.npy").dtype == dtype

    read = pickle.loads(pickle.dumps(TokenStore(tmp_path / "store")))  # as a worker gets it
    assert (len(read), read.length, read.vocabulary, read.tokenizer) == (
        40,
        6,
        vocabulary,
        {"class": "VQ", "weights": [0.25, "emoji"]},
    )
    assert read.modality.tolist() == NOVEL.modality[:40].tolist()
    found = read.find(NOVEL.file_ids()[[39, 3, 200, 0]])
    assert found.tolist() == [39, 3, -1, 0]
    assert np.array_equal(read.token_ids(found[found >= 0]), ids[[39, 3, 0]])
    assert read.token_ids(np.arange(2)).dtype == np.int64


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    record = token_record(TOKENIZER, 2, 10)
    for wrong in ([[1, 2], [3, 10]], [[1, 2], [-1, 3]]):
        with pytest.raises(DataError, match=r"token ids of 'b' run from .* the vocabulary has 10"):
            stored_token_ids(np.array(wrong), record, ["a", "b"])
    for wrong in (np.zeros((2, 3), int), np.zeros((1, 2), int), np.zeros((2, 2))):
        with pytest.raises(DataError, match=r"shape \(2, 2\) are to be stored"):
            stored_token_ids(wrong, record, ["a", "b"])


def test_another_tokenizer_and_other_folders_are_refused(tmp_path: Path) -> None:
    ids = np.zeros((40, 6), dtype=int)
    store = tokens(tmp_path)
    store.begin()
    write(store, np.arange(4), ids)
    with pytest.raises(FolderError, match=r"vocabulary: 512 there, 600 now.*overwrite: true"):
        tokens(tmp_path, 600).begin()
    assert tokens(tmp_path, 600, overwrite=True).begin().tolist() == list(range(40))
    store = tokens(tmp_path, 600)
    store.begin()
    write(store, np.arange(40), ids)
    store.finish()
    with pytest.raises(FolderError, match="holds a finished token store"):
        tokens(tmp_path, 600).begin()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FolderError, match="files that are no token store"):
        tokens(tmp_path / "other").begin()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    store = tokens(tmp_path)
    store.begin()
    write(store, np.arange(40), np.zeros((40, 6), dtype=int))
    store.finish()
    for wrong in (np.zeros((40, 5), np.uint16), np.zeros((40, 6)), np.zeros(40, np.uint16)):
        np.save(tmp_path / "token_ids.npy", wrong)
        with pytest.raises(DataError, match=r"but store.json says 6 ids of an image"):
            TokenStore(tmp_path)
    np.save(tmp_path / "token_ids.npy", np.zeros((39, 6), np.uint16))
    with pytest.raises(DataError, match=r"40 keys and 39 rows of token ids, but store.json says 40"):
        TokenStore(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({"count": 40, "layer": None}))
    with pytest.raises(DataError, match="names no tokenizer"):
        TokenStore(tmp_path)


def test_parts_of_the_first_edition_go_on(tmp_path: Path) -> None:
    """Its parts were ``<first row>-<digest>.npz`` with ``row_id`` and ``features``, its record ``parts/store.json``."""
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float16)
    record = {"layer": None, "dtype": "float16"}
    store = ArrayStore(tmp_path, FEATURES, rows(), record)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "store.json").write_text(json.dumps(store.record, indent=1) + "\n")
    np.savez(tmp_path / "parts" / "0000000005-0123456789ab.npz", row_id=np.arange(5, 30), features=values[5:30])
    missing = store.begin()
    assert missing.tolist() == [*range(5), *range(30, 40)]
    store.parts.add(missing, {store.column: values[missing]})
    store.parts.flush()
    assert "features (40, 3) in float16, 40 images" in store.finish()
    assert np.array_equal(np.load(tmp_path / "features.npy"), values)
    assert json.loads((tmp_path / "store.json").read_text()) == {**store.record, "shape": [40, 3]}
