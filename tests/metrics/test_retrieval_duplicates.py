"""Recall of recurring captions, against plain loops in float64."""

import pytest
import torch
from torch import Tensor

from gmail_lightning.metrics import ImageTextRecall, deduplicated_recall, image_text_recall, retrieval_duplicates

KS = (1, 2, 5)
AXES = torch.cat([torch.eye(4), -torch.eye(4)])  # unit vectors whose products are exact, so that ties are exact


def rank(scores: list[float], hits: list[bool]) -> float:
    best = max(s for s, hit in zip(scores, hits, strict=True) if hit)
    others = [s for s, hit in zip(scores, hits, strict=True) if not hit]
    return sum(s > best for s in others) + 0.5 * sum(s == best for s in others)


def brute_force(image: Tensor, text: Tensor, owner: Tensor, ids: Tensor) -> dict[str, float]:
    image = image.double() / image.double().norm(dim=1, keepdim=True)
    text = text.double() / text.double().norm(dim=1, keepdim=True)
    scores = (image @ text.T).tolist()
    read = [{int(n) for n, o in zip(ids, owner, strict=True) if o == i} for i in range(len(image))]
    hits = [[int(n) in read[i] for n in ids] for i in range(len(image))]
    ranks = {
        "i2t": [rank(scores[i], hits[i]) for i in range(len(image))],
        "t2i": [rank([row[t] for row in scores], [row[t] for row in hits]) for t in range(len(text))],
    }
    return {f"{way}_dedup_R@{k}": sum(r < k for r in found) / len(found) for way, found in ranks.items() for k in KS}


def drawn(ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """19 images with 1 to 6 texts each in any order, 57 in all, of 12 ids, which are large as hashes are."""
    draws = torch.Generator().manual_seed(4)
    owner = torch.cat([torch.arange(19), torch.randint(19, (38,), generator=draws)])
    owner = owner[torch.randperm(57, generator=draws)]
    ids = torch.randint(-(2**62), 2**62, (12,), generator=draws)[torch.randint(12, (57,), generator=draws)]
    if ties:
        image, text = (AXES[torch.randint(8, (n,), generator=draws)] for n in (19, 57))
    else:
        image, text = (torch.randn(n, 6, generator=draws) for n in (19, 57))
    return image, text, owner, ids


@pytest.mark.parametrize("tile", [1, 100, 2**23])  # one row, several, and all in a tile
@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_plain_loop(ties: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_duplicates, "TILE", tile)
    image, text, owner, ids = drawn(ties)
    expected = brute_force(image, text, owner, ids)
    got = deduplicated_recall(image, text, owner, ids, KS)
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected)
    strict = image_text_recall(image, text, owner, KS)
    assert all(got[name] > strict[name.replace("_dedup", "")] for name in got if not name.endswith("@1"))


def test_one_text_for_all_finds_everything_and_distinct_texts_are_strict() -> None:
    for ties in (False, True):
        image, text, owner, _ = drawn(ties)
        assert all(value == 1 for value in deduplicated_recall(image, text, owner, owner * 0, KS).values())
        strict = image_text_recall(image, text, owner, KS)
        apart = deduplicated_recall(image, text, owner, torch.arange(57), KS)
        for name, value in apart.items():
            assert value.item() == pytest.approx(strict[name.replace("_dedup", "")].item(), abs=1e-7)


def test_two_images_of_one_caption_by_hand() -> None:
    # Images 0 and 1 are both captioned "a shirt", text 0 at image 1 and text 1 at image 0; image 2 is found by itself.
    image, text = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    values = image_text_recall(image, text, torch.arange(3), ks=(1,), text_ids=torch.tensor([8, 8, 3]))
    assert values["t2i_R@1"].item() == values["i2t_R@1"].item() == pytest.approx(1 / 3)
    assert values["t2i_dedup_R@1"] == values["i2t_dedup_R@1"] == 1


def test_strict_values_do_not_depend_on_ids() -> None:
    image, text, owner, ids = drawn(ties=False)
    strict, both = image_text_recall(image, text, owner, KS), image_text_recall(image, text, owner, KS, text_ids=ids)
    assert {name: both[name] for name in strict} == strict
    assert set(both) - set(strict) == set(deduplicated_recall(image, text, owner, ids, KS))


def test_products_are_in_full_precision_whatever_the_training_uses() -> None:
    draws = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 32, generator=draws) for n in (150, 300))
    rest = torch.arange(300) // 2, torch.arange(300) // 3, KS
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = deduplicated_recall(image, text, *rest)
    assert lower == deduplicated_recall(image, text, *rest)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, t, o, n: (i, t, o, n[:2]), r"text_ids: expected int64 of shape \(3,\)"),
        (lambda i, t, o, n: (i, t, o, n.float()), "text_ids: expected int64"),
        (lambda i, t, o, n: (i, t, o + 1, n), r"values in \[1, 3\]"),
        (lambda i, t, o, n: (i.index_fill(0, n[:1], torch.nan), t, o, n), "image_features: 1 rows are not"),
    ],
)
def test_bad_input_is_named(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        deduplicated_recall(*change(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3)))


def test_metric_joins_ids_over_batches() -> None:
    image, text, owner, ids = drawn(ties=False)
    metric = ImageTextRecall(KS, prefix="real_")
    for first, last in ((11, 19), (0, 0), (0, 11)):  # in another order than that of the ids, and one without rows
        own = (owner >= first) & (owner < last)
        images = torch.arange(first, last)
        metric.update(image[first:last], 100 + images, text[own], 100 + owner[own], text_ids=ids[own])
    values = metric.compute()
    for name, value in brute_force(image, text, owner, ids).items():
        assert values[f"real_{name}"].item() == pytest.approx(value)


def test_metric_asks_for_ids_of_all_texts_or_of_none() -> None:
    metric = ImageTextRecall((1,))
    metric.update(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2))
    assert not any("dedup" in name for name in metric.compute())
    with pytest.raises(ValueError, match="text_ids: expected"):
        metric.update(torch.eye(2), torch.arange(2, 4), torch.eye(2), torch.arange(2, 4), torch.arange(3))
    metric.update(torch.eye(2), torch.arange(2, 4), torch.eye(2), torch.arange(2, 4), torch.arange(2))
    with pytest.raises(ValueError, match=r"text_ids: expected int64 of shape \(4,\)"):
        metric.compute()
