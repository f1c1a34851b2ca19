"""The eight sets of classes, on small copies of their layouts made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmail_lightning.datasets import ClassificationDataset, DataError, classification, protocols
from gmail_lightning.transforms import prompt_class_names

CALTECH_FOLDERS = """
BACKGROUND_Google Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular
bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone
hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly
menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster
saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry
sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
"""


def picture(path: Path, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 1)).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def dtd(root: Path) -> None:
    text(root / "dtd/dtd/labels/test1.txt", "polka-dotted/p_1.jpg\nbanded/b_2.jpg\n")
    picture(root / "dtd/dtd/images/polka-dotted/p_1.jpg", 5)
    picture(root / "dtd/dtd/images/banded/b_2.jpg", 3)


def fgvc_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    text(data / "variants.txt", "707-320\nF-16A/B\n")
    text(data / "images_variant_test.txt", "0000002 F-16A/B\n0000001 707-320\n")
    picture(data / "images/0000001.jpg", 3)
    picture(data / "images/0000002.jpg", 5)


def food101(root: Path) -> None:
    text(root / "food-101/meta/test.json", json.dumps({"waffles": ["waffles/2"], "apple_pie": ["apple_pie/1"]}))
    picture(root / "food-101/images/apple_pie/1.jpg", 3)
    picture(root / "food-101/images/waffles/2.jpg", 5)


def oxford_pets(root: Path) -> None:
    text(root / "oxford-iiit-pet/annotations/test.txt", "american_bulldog_2 2 2 1\nAbyssinian_1 1 1 1\n")
    picture(root / "oxford-iiit-pet/images/Abyssinian_1.jpg", 3)
    picture(root / "oxford-iiit-pet/images/american_bulldog_2.jpg", 5)


def stanford_cars(root: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    annotations = np.array([("1.jpg", 1), ("2.jpg", 2)], dtype=[("fname", object), ("class", object)])
    scipy_io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    names = np.array(["Audi S5 Coupe 2012", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    picture(folder / "cars_test/1.jpg", 3)
    picture(folder / "cars_test/2.jpg", 5)


def sun397(root: Path) -> None:
    text(root / "SUN397/ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    text(root / "SUN397/Testing_01.txt", "/a/apartment_building/outdoor/sun_b.jpg\n/a/abbey/sun_a.jpg\n")
    picture(root / "SUN397/a/abbey/sun_a.jpg", 3)
    picture(root / "SUN397/a/abbey/sun_of_training.jpg", 4)
    picture(root / "SUN397/a/apartment_building/outdoor/sun_b.jpg", 5)


# Two images each, of the widths 3 and 5, by the order of their paths; their classes as published.
SETS = [
    (dtd, ["banded", "polka-dotted"], "1,880"),
    (fgvc_aircraft, ["707-320", "F-16A/B"], "3,333"),
    (food101, ["apple pie", "waffles"], "25,250"),
    (oxford_pets, ["Abyssinian", "american bulldog"], "3,669"),
    (stanford_cars, ["Audi S5 Coupe 2012", "Ram C/V Cargo Van Minivan 2012"], "8,041"),
    (sun397, ["abbey", "apartment building outdoor"], "19,850"),
]


@pytest.mark.parametrize(("make", "names", "count"), SETS, ids=[make.__name__ for make, _, _ in SETS])
def test_sets_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, names: list[str], count: str
) -> None:
    name = make.__name__
    make(tmp_path)
    published = protocols.CLASS_PROTOCOLS[name]
    with pytest.raises(DataError, match=f"2 classes instead of {published.classes}, 2 images instead of {count}"):
        ClassificationDataset(name, tmp_path)
    monkeypatch.setitem(protocols.CLASS_PROTOCOLS, name, published._replace(classes=2, images={"test": 2, "all": 3}))
    data = ClassificationDataset(name, tmp_path)
    assert data.class_names == names
    assert data.label.tolist() == [0, 1]
    assert [data[i]["image"].shape[2] for i in range(2)] == [3, 5]
    assert data.captions(1) == [template.replace("{}", names[1]) for template in data.templates]
    assert [data.sample_key(i) for i in range(2)] == sorted(data.sample_key(i) for i in range(2))
    assert data.split == "test"  # refused as training data
    assert data.summary is not None
    assert f"protocol {name}, split test" in data.summary
    assert "2 classes, 2 images" in data.summary
    generated = ClassificationDataset(name, tmp_path, modality="generated", subset=True, class_names=["a", "b"])
    assert generated.class_names == ["a", "b"]
    assert data.pair_id.tolist() == data.image_id.tolist() == generated.image_id.tolist()  # the same files
    assert generated.pair_id.tolist() == [-1, -1]
    apart = ClassificationDataset(name, tmp_path, space="mine")
    assert len({*apart.image_id.tolist(), *data.image_id.tolist()}) == 4
    assert generated.summary is not None
    assert f"are published), not protocol {name}" in generated.summary
    if name == "sun397":
        (tmp_path / "SUN397" / "a" / "abbey").rename(tmp_path / "elsewhere")
        (tmp_path / "SUN397" / "a" / "abbey").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "SUN397" / "a" / "._sun_a.jpg").touch()
        assert ClassificationDataset(name, tmp_path, split="all").label.tolist() == [0, 0, 1]


@pytest.mark.slow
def test_caltech101(tmp_path: Path) -> None:
    folders = CALTECH_FOLDERS.split()
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    for i, name in enumerate(folders):
        (folder / name).mkdir(parents=True)
        for k in range(31 + i % 2):
            (folder / name / f"image_{k:04d}.jpg").write_text(name)
    (folder / "BACKGROUND_Google" / "tmp").touch()
    (folder / ".ipynb_checkpoints").mkdir()
    every, train, test = (
        ClassificationDataset("caltech101", tmp_path, split, subset=True) for split in ("all", "train", "test")
    )
    assert len(every) == 102 * 31 + 51
    assert every.summary is not None
    assert every.summary.endswith("; left out: 1 hidden, 1 without a suffix.")
    assert np.bincount(train.label).tolist() == [30] * 102
    assert np.bincount(test.label).tolist() == [1, 2] * 51
    ids = [set(data.image_id.tolist()) for data in (every, train, test)]
    assert ids[1] | ids[2] == ids[0]
    assert not ids[1] & ids[2]
    for row in (0, len(test) - 1):
        assert test.sample_key(row).split("/")[2] == folders[test.label[row]]
    different = {"BACKGROUND_Google", "Faces", "Faces_easy", "car_side", "sea_horse"}  # checked by eye below
    for own, published in zip(folders, test.class_names, strict=True):
        word = own.lower().split("_")[0].rstrip("s")
        assert word in published or own in different, (own, published)
    assert test.class_names[:3] == ["background", "off-center face", "centered face"]
    assert test.class_names[folders.index("car_side")] == "side of a car"
    with pytest.raises(DataError, match="caltech101: 3,213 images instead of 9,144"):
        ClassificationDataset("caltech101", tmp_path, "all")


@pytest.mark.slow
def test_imagenet(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"imagenet/val/n{i:08d}").mkdir(parents=True)
        (tmp_path / f"imagenet/val/n{i:08d}/ILSVRC2012_val_{i:08d}.JPEG").touch()
    data = ClassificationDataset("imagenet", tmp_path, subset=True)
    assert data.label.tolist() == list(range(1000))
    assert (data.class_names[0], data.class_names[999]) == ("tench", "toilet paper")
    assert len(data.captions(1)) == 80
    with pytest.raises(DataError, match="imagenet: not the protocol imagenet: 1,000 images instead of 50,000"):
        ClassificationDataset("imagenet", tmp_path)
    (tmp_path / "imagenet/val/n00000000/ILSVRC2012_val_00000000.JPEG").unlink()
    (tmp_path / "imagenet/val/n00000000").rmdir()
    with pytest.raises(DataError, match="999 class folders instead of 1000"):
        ClassificationDataset("imagenet", tmp_path, subset=True)
    for other in ("tench", "n0000000", "n00000000_tench"):
        folder = tmp_path / "imagenet/val" / other
        folder.mkdir()
        (folder / "a.JPEG").touch()
        with pytest.raises(DataError, match=f"imagenet: 1 class folders are not where .*: {other}. .*n01440764"):
            ClassificationDataset("imagenet", tmp_path, subset=True)
        names = [f"class {i}" for i in range(1000)]
        assert ClassificationDataset("imagenet", tmp_path, subset=True, class_names=names).class_names == names
        (folder / "a.JPEG").unlink()
        folder.rmdir()


@pytest.mark.parametrize("absent", CALTECH_FOLDERS.split())
def test_caltech_folders_that_are_not_in_the_order_of_the_names_are_refused(absent: str) -> None:
    folders = CALTECH_FOLDERS.split()
    assert classification.published_names("caltech101", folders) == prompt_class_names("caltech101")
    for other in ("AAA", "mouse", "zebra"):  # 102 folders again, before, amid and behind
        changed = sorted({*folders, other} - {absent})
        with pytest.raises(DataError, match=r"caltech101: .* are not where .*: .*101_ObjectCategories"):
            classification.published_names("caltech101", changed)


def test_published_names_do_not_depend_on_order_or_spelling() -> None:
    names = prompt_class_names("oxford_pets")
    titled = [name.title() for name in sorted(names, key=str.lower)]
    assert classification.published_names("oxford_pets", titled) == sorted(names, key=str.lower)
    for name in ("dtd", "fgvc_aircraft", "food101", "stanford_cars", "sun397"):
        spelled = ["/".join(one.upper().split()) for one in reversed(prompt_class_names(name))]
        assert classification.published_names(name, spelled) == prompt_class_names(name)[::-1]


def test_bad_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Unknown set 'cifar10'. Known: caltech101, dtd"):
        ClassificationDataset("cifar10", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Unknown split 'val' of food101. Known: train, test"):
        ClassificationDataset("food101", tmp_path, "val")
    for name in protocols.CLASS_PROTOCOLS:
        if name != "stanford_cars":
            with pytest.raises(DataError, match=f"{tmp_path}/.*: not {name} as torchvision reads it"):
                ClassificationDataset(name, tmp_path)  # type: ignore[arg-type]
    dtd(tmp_path)
    text(tmp_path / "dtd/dtd/labels/test1.txt", "banded/b_2.jpg\nspotty/s.jpg\n")
    with pytest.raises(DataError, match="dtd: 1 classes have no published name: spotty"):
        ClassificationDataset("dtd", tmp_path, subset=True)
    text(tmp_path / "dtd/dtd/labels/test1.txt", "")
    with pytest.raises(DataError, match="split 'test' has no images"):
        ClassificationDataset("dtd", tmp_path)
    sun397(tmp_path)
    (tmp_path / "SUN397/a/abbey/sun_a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 images of the list are missing, the first is .*sun_a.jpg"):
        ClassificationDataset("sun397", tmp_path)
    monkeypatch.setattr(classification, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="install scipy"):
        ClassificationDataset("stanford_cars", tmp_path)
