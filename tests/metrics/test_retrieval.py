"""Recall against a plain loop over sorted candidates."""

from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmail_lightning.metrics import ImageTextRecall, image_text_recall, retrieval


def brute_force(image: Tensor, text: Tensor, owner: Tensor) -> tuple[list[float], list[float]]:
    """Ranks of the best positives by a loop in float64; siblings do not count, ties count half."""
    image = image.double() / image.double().norm(dim=1, keepdim=True)
    text = text.double() / text.double().norm(dim=1, keepdim=True)
    scores = (image @ text.T).tolist()
    i2t = []
    for i, row in enumerate(scores):
        best = max(s for s, o in zip(row, owner.tolist(), strict=True) if o == i)
        others = [s for s, o in zip(row, owner.tolist(), strict=True) if o != i]
        i2t.append(sum(s > best for s in others) + 0.5 * sum(s == best for s in others))
    t2i = []
    for t, o in enumerate(owner.tolist()):
        column = [row[t] for row in scores]
        others = column[:o] + column[o + 1 :]
        t2i.append(sum(s > column[o] for s in others) + 0.5 * sum(s == column[o] for s in others))
    return i2t, t2i


def summary(name: str, ranks: list[float], ks: tuple[int, ...]) -> dict[str, float]:
    recall = {f"{name}_R@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in ks}
    return {**recall, f"{name}_median_rank": median(ranks) + 1}


def scattered() -> tuple[Tensor, Tensor, Tensor]:
    """19 images, 43 texts of them in any order, positive and negative scores."""
    torch.manual_seed(0)
    image, owner = torch.randn(19, 5), torch.cat([torch.arange(19), torch.randint(19, (24,))])
    owner = owner[torch.randperm(len(owner))]
    return image, 0.8 * image[owner] + torch.randn(len(owner), 5) - 0.5, owner


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (4, 100), (100, 4), (512, 1024)], ids=str)
def test_equals_a_plain_loop_also_on_negative_scores(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CPU_TILE", tile)
    image, text, owner = scattered()
    i2t, t2i = brute_force(image, text, owner)
    expected = {**summary("i2t", i2t, (1, 3)), **summary("t2i", t2i, (1, 3))}
    got = image_text_recall(image, text, owner, ks=(1, 3))
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected)
    assert 0 < expected["t2i_R@1"] < expected["t2i_R@3"] < 1
    assert expected["i2t_median_rank"] != expected["t2i_median_rank"]
    assert (image @ text.T)[owner, range(len(owner))].min() < 0  # some positives have negative cosines
    cosine = torch.nn.functional.cosine_similarity(image[owner], text)
    negative = image_text_recall(image[owner[cosine < 0]][:3], text[cosine < 0][:3], torch.arange(3))
    assert negative["i2t_R@5"] == negative["t2i_R@5"] == 1


@pytest.mark.parametrize("tile", [(2, 3), (512, 1024)], ids=str)
def test_equals_a_plain_loop_on_ties(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CPU_TILE", tile)
    generator = torch.Generator().manual_seed(3)
    axes = torch.cat([torch.eye(3), -torch.eye(3)])  # unit vectors whose products are exact
    image, owner = axes[torch.randint(6, (11,), generator=generator)], torch.arange(33) % 11
    text = axes[torch.randint(6, (33,), generator=generator)]
    i2t, t2i = brute_force(image, text, owner)
    assert all(any(rank % 1 == 0.5 for rank in ranks) for ranks in (i2t, t2i))
    expected = {**summary("i2t", i2t, (1, 2, 5)), **summary("t2i", t2i, (1, 2, 5))}
    got = image_text_recall(image, text, owner, ks=(1, 2, 5))
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected)


def test_equals_the_numbers_of_clip_benchmark() -> None:
    """Its way, written anew: a score matrix of texts by images, top-k as one-hot, a hit where a positive is in it."""
    torch.manual_seed(0)
    owner = torch.arange(60).repeat_interleave(5)
    image = torch.nn.functional.normalize(torch.randn(60, 16), dim=1)
    text = torch.nn.functional.normalize(image[owner] + torch.randn(300, 16), dim=1)
    scores, positive = text @ image.T, owner[:, None] == torch.arange(60)
    assert all(table.sort(dim=1).values.diff().min() > 1e-9 for table in (scores, scores.T))  # no tie
    got = image_text_recall(image, text, owner)
    for name, table, pairs in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
        for k in (1, 5, 10):
            one_hot = torch.nn.functional.one_hot(table.topk(k, dim=1).indices, table.shape[1])  # (Q, k, C)
            hit = (one_hot * pairs[:, None]).sum(dim=(1, 2)) > 0
            assert got[f"{name}_R@{k}"].item() == pytest.approx(hit.float().mean().item(), abs=1e-7)
            assert 0 < hit.float().mean() < 1


def test_a_tie_counts_half_a_rank() -> None:
    # Exact in floating point: axis-aligned unit vectors. Texts 0 and 1 coincide, so each image ties once: rank 0.5.
    image = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    text, owner = image.clone(), torch.arange(3)
    got = image_text_recall(image, text, owner, ks=(1,))
    assert brute_force(image, text, owner) == ([0.5, 0.5, 0], [0.5, 0.5, 0])
    assert (got["i2t_R@1"].item(), got["t2i_R@1"].item()) == (1.0, 1.0)
    assert (got["i2t_median_rank"].item(), got["t2i_median_rank"].item()) == (1.5, 1.5)


def test_constant_features_do_not_score() -> None:
    got = image_text_recall(torch.ones(100, 4), torch.ones(100, 4), torch.arange(100), ks=(1, 10))
    assert got == {"i2t_R@1": 0, "i2t_R@10": 0, "t2i_R@1": 0, "t2i_R@10": 0} | dict.fromkeys(
        ("i2t_median_rank", "t2i_median_rank"), 50.5
    )


class LargestNew(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CPU_TILE", (8, 16))
    largest = []
    for texts in (400, 4000):
        owner = torch.arange(texts) % 20
        image, text = torch.randn(20, 4), torch.randn(texts, 4)
        with LargestNew() as mode:
            image_text_recall(image, text, owner)
        largest.append(mode.elements)
    assert largest[0] == largest[1] == 2 * 8 * 16  # a tile of scores and one of comparisons


def test_half_precision_and_memory_mapped_features_are_read_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CPU_TILE", (4, 8))
    image, text, owner = scattered()
    stored = []
    for name, features in (("image", image), ("text", text)):
        np.save(tmp_path / f"{name}.npy", features.half().numpy())
        stored.append(torch.from_numpy(np.load(tmp_path / f"{name}.npy", mmap_mode="r+")))
    assert stored[0].dtype == torch.float16
    assert image_text_recall(*stored, owner) == image_text_recall(image.half().float(), text.half().float(), owner)


def test_products_are_in_full_precision_whatever_the_training_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    used, above = [], retrieval._above
    monkeypatch.setattr(retrieval, "_above", lambda *a: used.append(torch.get_float32_matmul_precision()) or above(*a))
    torch.set_float32_matmul_precision("medium")
    try:
        image_text_recall(*scattered())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(used) == {"highest"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, t, o: (i, t, o.clamp(max=1)), "1 of 3 images have no text"),
        (lambda i, t, o: (i, t, o + 1), r"values in \[1, 3\]"),
        (
            lambda i, t, o: (i.index_fill(0, torch.tensor([1]), torch.nan), t, o),
            "image_features: 1 rows are not",
        ),
        (lambda i, t, o: (i, t.index_fill(0, torch.tensor([0, 2]), -torch.inf), o), "text_features: 2 rows are not"),
        (lambda i, t, o: (i, t, o[:2]), "one per text"),
        (lambda i, t, o: (i[:0], t, o), "N > 0"),
        (lambda i, t, o: (i[:, :2], t, o), "one width"),
    ],
)
def test_bad_input_is_named(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        image_text_recall(*change(torch.eye(3), torch.eye(3), torch.arange(3)))


def test_metric_joins_by_id_in_any_order() -> None:
    torch.manual_seed(0)
    image, text, owner = torch.randn(10, 4), torch.randn(30, 4), torch.arange(10).repeat(3)
    metric, order = ImageTextRecall(prefix="real_"), torch.randperm(10)
    for rows in (*order.split(4), order[:0]):
        mine = torch.isin(owner, rows)
        metric.update(image[rows], 100 + rows, text[mine], 100 + owner[mine])
    expected = {**image_text_recall(image, text, owner), "num_images": 10, "num_texts": 30}
    assert {f"real_{k}": v for k, v in expected.items()} == metric.compute()
    metric.update(image[:1], torch.tensor([100]), text[:1], torch.tensor([100]))
    with pytest.raises(ValueError, match="100 came more than once"):
        metric.compute()


def test_metric_without_any_row_has_no_values() -> None:
    metric = ImageTextRecall()
    metric.update(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 4), torch.zeros(0).long())
    assert metric.compute() == {}


def test_metric_refuses_what_does_not_belong_together() -> None:
    ids, features = torch.arange(3), torch.eye(3)
    for rows, match in (
        ((features, ids, features[:2], ids[:2]), "1 of 3 images have no text"),
        ((features[:2], ids[:2], features, ids), "image_id 2, which never came"),
        ((features, ids, features[:0], ids[:0]), "3 images and 0 texts"),
        ((features[:0], ids[:0], features, ids), "0 images and 3 texts"),
    ):
        metric = ImageTextRecall()
        metric.update(*rows)
        with pytest.raises(ValueError, match=match):
            metric.compute()
    with pytest.raises(ValueError, match=r"image: expected features \(N, D\) and ids \(N,\)"):
        ImageTextRecall().update(features, ids[:2], features, ids)


@pytest.mark.parametrize("width", [16, 512, 768])
def test_a_collapsed_encoder_does_not_score(width: int) -> None:
    """Equal features give cosines that two kernels round differently: still ties."""
    for seed in range(5):
        torch.manual_seed(seed)
        features = torch.randn(1, width).repeat(50, 1)
        got = image_text_recall(features, features.clone(), torch.arange(50), ks=(1, 10))
        assert all(value == 0 for name, value in got.items() if "R@" in name)
        assert got["i2t_median_rank"] == got["t2i_median_rank"] == 25.5
