"""Zero-shot accuracy against plain loops, and scikit-learn where nothing ties."""

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

from gmail_lightning.metrics import ZeroShotAccuracy


def rows(count: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    label = torch.randint(classes - 1, (count,)) ** 2 % (classes - 1)  # uneven, and the last class has no image
    return torch.randn(count, classes) + 1.5 * torch.nn.functional.one_hot(label, classes) - 5, label


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_equals_scikit_learn_in_batches() -> None:
    logits, label = rows()
    metric = ZeroShotAccuracy(7, prefix="zero_shot_")
    for part in torch.arange(200).split(33):
        metric.update(logits[part], label[part])
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(
        {
            "zero_shot_accuracy": accuracy_score(label, logits.argmax(1)),
            "zero_shot_mean_per_class": balanced_accuracy_score(label, logits.argmax(1)),
            "zero_shot_top5": top_k_accuracy_score(label, logits, k=5, labels=range(7)),
        }
    )
    expected = [(logits.argmax(1)[label == c] == c).float().mean() for c in range(7)]
    torch.testing.assert_close(metric.per_class(), torch.stack(expected), equal_nan=True)
    assert metric.per_class().isnan().tolist() == [c not in label.tolist() for c in range(7)]
    metric.reset()
    torch.testing.assert_close(metric.per_class(), torch.stack(expected), equal_nan=True)  # the last set's
    metric.update(logits[label == 1], label[label == 1])
    assert metric.per_class().isnan().tolist() == [c != 1 for c in range(7)]


@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_that_says_the_same_of_every_class_scores_at_chance(classes: int, dtype: torch.dtype) -> None:
    label = torch.arange(3 * classes) % classes
    logits = torch.full((len(label), classes), 31.7, dtype=dtype)
    metric = ZeroShotAccuracy(classes)
    metric.update(logits, label)
    values = metric.compute()
    assert values["accuracy"].item() == values["mean_per_class"].item() == pytest.approx(1 / classes)
    assert ("top5" in values) == (classes > 5)
    if classes > 5:
        assert values["top5"].item() == pytest.approx(5 / classes)


def test_classes_of_one_name_tie_although_their_logits_are_rounded_apart() -> None:
    logits = torch.tensor([[30.0, 30.0 - 1e-5, 10.0]])  # 1e-5 in 30 is how far two kernels round one cosine apart
    metric = ZeroShotAccuracy(3)
    metric.update(logits.repeat(2, 1), torch.tensor([0, 1]))
    assert metric.compute()["accuracy"] == 0.5
    metric.reset()
    metric.update(torch.tensor([[30.0, 29.99, 10.0]]).repeat(2, 1), torch.tensor([0, 1]))
    assert metric.per_class().tolist()[:2] == [1, 0]


@pytest.mark.parametrize(
    ("logits", "label", "match"),
    [
        (torch.tensor([[1.0, torch.nan]]), [0], "logits of 1 images are not finite"),
        (torch.tensor([[1.0, torch.inf]]), [1], "logits of 1 images are not finite"),
        (torch.zeros(2, 2), [0, 2], r"Labels in \[0, 2\], but there are 2 classes"),
        (torch.zeros(2, 2), [0, -1], r"Labels in \[-1, 0\]"),
        (torch.zeros(2, 3), [0, 1], r"Expected logits \(B, 2\)"),
        (torch.zeros(2, 2), [0], r"Expected logits \(B, 2\)"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, label: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ZeroShotAccuracy(2).update(logits, torch.tensor(label))


def test_without_images_there_are_no_values() -> None:
    metric = ZeroShotAccuracy(2)
    with pytest.raises(ValueError, match="No image was classified yet"):
        metric.per_class()
    metric.update(torch.eye(2), torch.tensor([0, 1]))
    assert metric.per_class().tolist() == [1, 1]
    metric.reset()
    metric.update(torch.zeros(0, 2), torch.zeros(0).long())
    assert metric.compute() == {}
    assert metric.per_class().isnan().all()
    with pytest.raises(ValueError, match="num_classes=1"):
        ZeroShotAccuracy(1)
