"""The share of cut texts, over batches of any size."""

import pytest
import torch

from gmail_lightning.metrics import TruncatedTexts


def test_counts_over_batches() -> None:
    metric = TruncatedTexts()
    metric.update(torch.tensor([], dtype=torch.bool))
    assert metric.compute() == {}
    metric.update(torch.tensor([True, False, True]))
    metric.update(torch.tensor([False]))
    values = metric.compute()
    assert (values["num_truncated"].item(), values["truncated"].item()) == (2, pytest.approx(0.5))


def test_a_prefix_tells_modalities_apart() -> None:
    metric = TruncatedTexts(prefix="generated_")
    metric.update(torch.tensor([True, False, False, False]))
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {"generated_num_truncated": 1, "generated_truncated": 0.25}
