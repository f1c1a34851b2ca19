"""What the callbacks that write resumably have in common: to begin, to stop when told, and to end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.generation.errors import FolderError
from gmail_lightning.generation.parts import Parts

T = TypeVar("T")


def begin(work: Callable[[], T], trainer: Trainer) -> T:
    """What the first process finds and makes ready, in all of them; they have written nothing yet.

    Raises:
        MisconfigurationException: If it refuses the folder.
    """
    try:
        return on_first_rank(work, trainer)
    except FolderError as error:
        raise MisconfigurationException(str(error)) from error


def stop_if_told(trainer: Trainer) -> None:
    """Ends the run on SIGTERM: Lightning's predict loop does not ask, and would go on."""
    if cast(Any, trainer).received_sigterm:
        raise SIGTERMException(128 + signal.SIGTERM)


def end(parts: Parts, finish: Callable[[], T], trainer: Trainer) -> T:
    """Writes what is kept, waits for all processes, and returns in all what the first then makes of the parts."""
    parts.flush()
    trainer.strategy.barrier("all parts are written")
    return on_first_rank(finish, trainer)
