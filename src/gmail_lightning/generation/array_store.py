"""A store in the making: parts become one memory-mapped array with a row per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gmail_lightning.datasets.store_files import FEATURES, PARTS, RECORD, ROWS, TOKEN_IDS, read_record
from gmail_lightning.generation.errors import FolderError
from gmail_lightning.generation.parts import Difference, Parts, Record, first_difference
from gmail_lightning.generation.rows import images_digest
from gmail_lightning.generation.whole_files import remove_temporary, temporary, write_record, write_table


class ArrayStore:
    """What a stage makes of images, each once: ``features.npy`` or ``token_ids.npy``, with rows and record beside it.

    ``begin`` and ``finish`` are for the first process; all add to ``parts``, a column named as the file.

    Args:
        folder: All nodes must see it.
        file: ``FEATURES`` or ``TOKEN_IDS``.
        rows: ``store_columns`` of the N images.
        record: What the array depends on besides the images.
        overwrite: Replace a finished store, or parts that were made with something else.
        seconds: See ``Parts``.
        compare: Says in what two records differ.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        rows: pa.Table,
        record: Record,
        *,
        overwrite: bool = False,
        seconds: float = 60.0,
        compare: Difference = first_difference,
    ) -> None:
        self.folder, self.file, self.rows, self.overwrite = folder, file, rows, overwrite
        self.kind = {FEATURES: "feature store", TOKEN_IDS: "token store"}[file]
        made = {**record, "count": len(rows), "images": images_digest(rows)}
        self.parts = Parts(folder / PARTS, len(rows), made, seconds)
        self.record = self.parts.record
        self._compare = compare

    @property
    def column(self) -> str:
        """Name of the array's column in a part."""
        return Path(self.file).stem

    def begin(self) -> np.ndarray:
        """Makes the folder ready and returns the numbers of the rows that are missing.

        Raises:
            FolderError: If it holds a finished store, one that is being made with something else, or other files.
        """
        difference = self.parts.difference(self._compare)
        if not self.overwrite:
            self._refuse_folder(difference)
        if difference is not None or read_record(self.folder) is not None:
            self._clear()
        self.parts.open()
        remove_temporary(self.folder)
        return self.parts.missing()

    def _refuse_folder(self, difference: str | None) -> None:
        if read_record(self.folder) is not None:
            raise FolderError(
                f"{self.folder} holds a finished {self.kind}. Set overwrite: true to replace it, or choose another "
                "folder."
            )
        if difference is not None:
            raise FolderError(
                f"{self.folder} holds parts of a store that is made with something else ({difference}). Set overwrite: "
                "true to begin anew, or choose another folder."
            )
        is_begun = read_record(self.folder / PARTS) is not None
        if not is_begun and self.folder.exists() and any(self.folder.iterdir()):
            raise FolderError(f"{self.folder} holds files that are no {self.kind}: choose another folder.")

    def _clear(self) -> None:
        """Removes what makes up a store, the record first; anything else in the folder stays."""
        for name in (RECORD, self.file, ROWS):
            (self.folder / name).unlink(missing_ok=True)
        self.parts.remove()

    def finish(self) -> str:
        """Makes the store valid if no row is missing; returns what there is to tell."""
        missing = len(self.parts.missing())
        if missing:
            return (
                f"{self.folder}: {missing} of {len(self.rows)} images are missing. Run the same command again, without "
                "a limit on the batches."
            )
        array = self._merge()
        write_table(self.rows, self.folder / ROWS)
        write_record(self.folder / RECORD, {**self.record, "shape": list(array.shape)})
        self.parts.remove()
        return f"{self.folder / RECORD}: {self.column} {array.shape} in {array.dtype}, {len(self.rows)} images."

    def _merge(self) -> np.ndarray:
        """Makes one file of all parts, row by row in its place."""
        array: np.memmap[Any, Any] | None = None
        unfinished = temporary(self.folder / self.file)
        for row_id, columns in self.parts.read():
            values = columns[self.column]
            if array is None:
                shape = (len(self.rows), *values.shape[1:])
                array = np.lib.format.open_memmap(unfinished, "w+", values.dtype, shape)  # type: ignore[no-untyped-call]
            array[row_id] = values
        assert array is not None
        array.flush()
        unfinished.replace(self.folder / self.file)
        return array
