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
