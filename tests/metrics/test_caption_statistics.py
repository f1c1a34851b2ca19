import pytest
import torch

from gmail_lightning.metrics import CaptionStatistics


def test_share_of_different_captions_and_their_length() -> None:
    metric = CaptionStatistics("generated_")
    assert metric.compute() == {}
    metric.update(["a cat", "A  cat", ""])
    metric.update(["a dog on grass"])
    metric.update([])
    values = metric.compute()
    torch.testing.assert_close(
        values["generated_unique_captions"], torch.tensor(3 / 4)
    )  # "a cat", "", "a dog on grass"
    torch.testing.assert_close(values["generated_mean_length"], torch.tensor((2 + 2 + 0 + 4) / 4))


def test_an_image_that_comes_twice_counts_once() -> None:
    metric = CaptionStatistics()
    metric.update(["a cat", "a dog on grass", "A  cat"], ids=torch.tensor([7, 3, 5]))
    metric.update(["a dog on grass", "a cat"], ids=torch.tensor([3, 7]))
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "unique_captions": pytest.approx(2 / 3),
        "mean_length": pytest.approx((2 + 4 + 2) / 3),
    }
    metric.update(["another cat"], ids=torch.tensor([7]))
    with pytest.raises(ValueError, match="id 7 came twice with different values"):
        metric.compute()
    with pytest.raises(ValueError, match="3 ids for 1 captions"):
        metric.update(["a cat"], ids=torch.arange(3))
