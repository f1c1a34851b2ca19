"""Ids of rows that share a key, against components by brute force."""

import pytest
import torch

from gmail_lightning.losses.joined_ids import joined_ids


def components(*keys: torch.Tensor) -> list[int]:
    """The least row that each row is chained to."""
    rows = range(len(keys[0]))
    least = list(rows)
    for _ in rows:
        for one in rows:
            for other in rows:
                if any(key[one] == key[other] for key in keys):
                    least[one] = least[other] = min(least[one], least[other])
    return least


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_share_a_key_get_one_id(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    image, text = (torch.randint(0, 12, (14,), generator=draws) * 2**40 - 7 for _ in range(2))
    assert joined_ids(image, text).tolist() == components(image, text)
    assert joined_ids(image).tolist() == components(image)


def test_a_chain_comes_together() -> None:
    image = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    text = torch.tensor([9, 8, 8, 7, 7, 6, 5])
    assert joined_ids(image, text).tolist() == [0, 0, 0, 0, 0, 0, 6]
