"""What data modules that train have in common: the seed, the augmentation, and how much may be broken."""

from __future__ import annotations

import os
from fractions import Fraction

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from gmail_lightning.datasets.base import DataError

TOLD = 5  # broken images of an epoch that are warned of, one by one


def seed_or_default(seed: int | None) -> int:
    """Returns the seed that was given, else that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def as_module(augmentation: nn.Module | list[nn.Module] | None) -> nn.Module | None:
    """Returns one augmentation, of several in a row as a ``torch.nn.Sequential``."""
    return nn.Sequential(*augmentation) if isinstance(augmentation, list) else augmentation


def refuse_no_share(max_replaced_fraction: float) -> None:
    """Raises a ValueError for what is no share between 0 and 1."""
    if not 0 <= max_replaced_fraction <= 1:
        raise ValueError(f"max_replaced_fraction is {max_replaced_fraction}, but it is a share between 0 and 1.")


def is_above(count: int, share: float, total: int) -> bool:
    """Whether a count is more than a share of the total, exactly: 29 of 100 are not more than 0.29."""
    return count > Fraction(str(share)) * total


def tell_broken(summary: str, fix: str, *, before: int, count: int, total: int, max_replaced_fraction: float) -> None:
    """Warns of the first broken images of an epoch, and stops the training where they are too many.

    Args:
        summary: How many there are, and why the last is one.
        fix: What to do about it.
        before: Number of broken ones that were told of before.
        count: Number of them now.
        total: Number of images that are read in an epoch.
        max_replaced_fraction: Share of ``total`` that may be broken.

    Raises:
        DataError: If more are.
    """
    if is_above(count, max_replaced_fraction, total):
        raise DataError(
            f"{summary}. That is more than max_replaced_fraction={max_replaced_fraction}: {fix}, or raise the fraction."
        )
    if before < TOLD:
        rank_zero_warn(summary)
