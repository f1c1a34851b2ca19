"""The classes that the data sets of a stream agree on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import CocoCaptions, DataError, EmojiDataset, ImageFolder, ManifestDataset


def folder(root: Path, names: list[str], **options: object) -> ImageFolder:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(root / name / "a.png")
    return ImageFolder(root, **options)  # type: ignore[arg-type]


def test_classes_of_streams() -> None:
    noto, fluent = (EmojiDataset(hand, "novel", classes="subgroup") for hand in ("noto", "fluent"))
    german = EmojiDataset("noto", "paired", locale="de", classes="concept")
    data = MixedModalityDataModule(train=[fluent, noto], val={"novel": [noto]}, test={"german": [german]})
    assert data.classes() == data.classes("novel") == (noto.class_names, ["{}", "a drawing of {}"])
    assert data.classes("german").names == german.class_names
    assert data.classes("german").templates == ["{}", "eine Zeichnung: {}"]
    with pytest.raises(DataError, match=r"No evaluation set is called 'nove'. Known: novel, german"):
        data.classes("nove")


def test_data_sets_without_prompts_of_their_own(tmp_path: Path) -> None:
    rows = "image,caption,label\n" + "".join(f"{name}/a.png,a,{name}\n" for name in ("cat", "dog"))
    (tmp_path / "rows.csv").write_text(rows)
    manifest = ManifestDataset(tmp_path / "rows.csv", modality="real")
    pets = folder(tmp_path / "pets", ["cat", "dog"], templates=["a {}", "the {}"])
    assert MixedModalityDataModule(train=[manifest]).classes() == (["cat", "dog"], ["a photo of a {}."])
    for order in ([manifest, pets], [pets, manifest]):
        assert MixedModalityDataModule(train=order).classes() == (["cat", "dog"], ["a {}", "the {}"])


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    pets, others = folder(a, ["cat", "dog", "emu"]), folder(b, ["cat", "dog"])
    message = (
        rf"val: the classes do not match. Label 2 is 'emu' in ImageFolder {a} \(3 classes\) and missing in .*{b} \(2\)"
    )
    with pytest.raises(DataError, match=message):
        MixedModalityDataModule(val={"val": [pets, others]}).classes("val")
    renamed = folder(a, [], class_names=["cat", "wolf", "emu"])
    with pytest.raises(DataError, match=r"train: .* Label 1 is 'dog' in .* and 'wolf' in"):
        MixedModalityDataModule(train=[pets, renamed]).classes()
    other_prompts = folder(a, [], templates="imagenet")
    with pytest.raises(DataError, match=r"the prompts do not match: .* has 1, the first 'a photo of a {}.', .* has 80"):
        MixedModalityDataModule(train=[pets, other_prompts]).classes()
    captions = tmp_path / "captions.json"
    captions.write_text(
        '{"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}'
    )
    with pytest.raises(DataError, match="train: CocoCaptions has no classes"):
        MixedModalityDataModule(train=[pets, CocoCaptions(captions, tmp_path)]).classes()
    with pytest.raises(DataError, match="train: no data sets"):
        MixedModalityDataModule().classes()


def test_labels_that_are_no_class_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,caption,label\n1.png,a,cat\n2.png,a,\n3.png,a,dog\n4.png,a,\n")
    manifest = ManifestDataset(tmp_path / "rows.csv", modality="real")
    assert manifest.label.tolist() == [0, -1, 1, -1]
    message = (
        rf"train: 2 of 4 rows of ManifestDataset {tmp_path}/rows.csv have a label outside of the 2 classes, numbered "
        r"from 0; the first is row 1 \(.*2.*\), label -1. Give every row a class"
    )
    with pytest.raises(DataError, match=message):
        MixedModalityDataModule(train=[manifest]).classes()
    pets = folder(tmp_path / "pets", ["cat", "dog"])
    other = folder(tmp_path / "pets", [])
    other.label[1] = 2
    with pytest.raises(DataError, match=r"val: 1 of 2 rows of ImageFolder .* first is row 1 \(.*dog/a.png\), label 2"):
        MixedModalityDataModule(val={"val": [pets, other]}).classes("val")
