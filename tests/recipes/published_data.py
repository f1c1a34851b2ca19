"""Tiny data in the formats in which the data sets of ``recipes/gmail`` are published.

``python tests/recipes/published_data.py FOLDER`` writes all of it below ``FOLDER/data`` and prints what it made.
Names, keys and folders are those of the published archives; pictures and captions are made up.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

THINGS = ["dog", "sofa", "red bus", "plate of pasta", "surfer", "kite", "clock tower", "bowl of fruit"]
DEEDS = ["stands near a fence", "is seen from above", "waits in the rain", "lies on a table", "fills the whole picture"]
CAPTIONS_PER_IMAGE = 5
SHARE_VALIDATION = 1000  # the first entries of ShareGPT4V are its validation set
PRODUCTS = 12  # of each group of DeepFashion, and of the product table
WITH_30 = 3  # classes of Caltech101 that have more images than the 30 for training


def jpeg(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """Blocks of colour of their own for each number."""
    blocks = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def sentence(number: int, nth: int = 0) -> str:
    """A caption of its own for each picture."""
    return f"A {THINGS[number % len(THINGS)]} with the number {number} {DEEDS[nth % len(DEEDS)]}."


def karpathy_sentences(imgid: int, number: int) -> list[dict[str, Any]]:
    return [
        {
            "tokens": sentence(number, nth).lower().strip(".").split(),
            "raw": sentence(number, nth),
            "imgid": imgid,
            "sentid": imgid * CAPTIONS_PER_IMAGE + nth,
        }
        for nth in range(CAPTIONS_PER_IMAGE)
    ]


def coco(data: Path) -> str:
    """Karpathy's file over train2014 and val2014, and val2017 with its captions: images of the year 2014, as there."""
    splits = [("train", "train2014")] * 4 + [("restval", "val2014")] * 2 + [("val", "val2014")] * 3
    splits += [("test", "val2014")] * 4
    entries = []
    for imgid, (split, folder) in enumerate(splits):
        cocoid = 100 + 7 * imgid
        name = f"COCO_{folder}_{cocoid:012d}.jpg"
        sentences = karpathy_sentences(imgid, imgid)
        ids = [one["sentid"] for one in sentences]
        entries.append(
            {"filepath": folder, "sentids": ids, "filename": name, "imgid": imgid, "split": split}
            | {"sentences": sentences, "cocoid": cocoid}
        )
        write(data / "coco" / folder / name, jpeg(imgid))
    write(data / "coco/dataset_coco.json", json.dumps({"images": entries, "dataset": "coco"}))
    images, annotations = [], []
    for entry in entries[4:8]:  # val2017 is a part of val2014
        number, name = entry["cocoid"], f"{entry['cocoid']:012d}.jpg"
        url = {"coco_url": f"http://images.cocodataset.org/val2017/{name}", "flickr_url": "", "license": 4}
        images.append({"file_name": name, "height": 40, "width": 48, "date_captured": "", "id": number, **url})
        annotations += [{"image_id": number, "id": one["sentid"], "caption": one["raw"]} for one in entry["sentences"]]
        write(data / "coco/val2017" / name, jpeg(entry["imgid"]))
    about = {"info": {"year": 2017, "version": "1.0"}, "licenses": [{"id": 4, "name": "Attribution License"}]}
    content = {**about, "images": images, "annotations": annotations}
    write(data / "coco/captions_val2017.json", json.dumps(content))
    return f"data/coco: {len(entries)} images in Karpathy's splits, {len(images)} in val2017"


def flickr30k(data: Path) -> str:
    """Karpathy's file and the token file over the same images."""
    entries, lines = [], []
    for imgid, split in enumerate(["train"] * 2 + ["val"] * 2 + ["test"] * 3):
        name = f"{1000092795 + imgid}.jpg"
        sentences = karpathy_sentences(imgid, 500 + imgid)
        ids = [one["sentid"] for one in sentences]
        entries.append({"sentids": ids, "imgid": imgid, "sentences": sentences, "split": split, "filename": name})
        lines += [f"{name}#{nth}\t{one['raw']}" for nth, one in enumerate(sentences)]
        write(data / "flickr30k/flickr30k-images" / name, jpeg(500 + imgid))
    write(data / "flickr30k/dataset_flickr30k.json", json.dumps({"images": entries, "dataset": "flickr30k"}))
    write(data / "flickr30k/results_20130124.token", "\n".join(lines) + "\n")
    return f"data/flickr30k: {len(entries)} images, Karpathy's file and the token file"


def conceptual_captions(data: Path, name: str, first: int, shards: int = 2, per_shard: int = 4) -> str:
    """Tars, Parquet and statistics of each shard as img2dataset leaves them; one download of each failed."""
    for shard in range(shards):
        rows = []
        folder = data / name
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for at in range(per_shard + 1):
                number, key = first + shard * 100 + at, f"{shard:05d}{at:04d}"
                failed = at == per_shard
                image = jpeg(number)
                row = {
                    "url": f"https://example.org/{number}.jpg", "key": key, "caption": sentence(number),
                    "status": "failed_to_download" if failed else "success",
                    "error_message": "HTTP Error 404: Not Found" if failed else None,
                    "width": None if failed else 48, "height": None if failed else 40,
                    "original_width": None if failed else 48, "original_height": None if failed else 40,
                    "exif": None if failed else "{}",
                    "sha256": None if failed else hashlib.sha256(image).hexdigest(),
                }  # fmt: skip
                rows.append(row)
                if failed:
                    continue
                for suffix, content in ((".jpg", image), (".txt", row["caption"]), (".json", json.dumps(row))):
                    member = tarfile.TarInfo(key + suffix)
                    content = content if isinstance(content, bytes) else content.encode()
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        counts = {"count": per_shard + 1, "successes": per_shard, "failed_to_download": 1, "failed_to_resize": 0}
        status = {"status_dict": {"success": per_shard, "HTTP Error 404: Not Found": 1}}
        write(folder / f"{shard:05d}_stats.json", json.dumps({**counts, "duration": 1.0, **status}, indent=4))
    return f"data/{name}: {shards} shards of {per_shard} images"


def sharegpt4v(data: Path) -> str:
    """The first 1,000 entries are of COCO's training images, the next ones of the other sources as well."""
    entries = []
    for number in range(SHARE_VALIDATION + 8):
        files = {0: f"coco/train2017/{number:012d}.jpg", 1: f"sam/images/sa_{number}.jpg"}
        files[2] = f"llava/llava_pretrain/images/00224/00224{number:04d}.jpg"
        file = files[0 if number < SHARE_VALIDATION else number % 3]
        long = f"{sentence(number)} " + " ".join(sentence(number + i, i) for i in range(1, 14))
        asked = "What do you see happening in this image?\n<image>"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": long}]
        entries.append({"id": Path(file).stem, "image": file, "conversations": turns})
        write(data / "sharegpt4v" / file, jpeg(2000 + number, (24, 20)))
    write(data / "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries))
    for number in range(6):
        write(data / f"Urban1k/image/{number + 1}.jpg", jpeg(4000 + number))
        write(data / f"Urban1k/caption/{number + 1}.txt", " ".join(sentence(4000 + number, i) for i in range(12)))
    return f"data/sharegpt4v: {len(entries)} entries; data/Urban1k: 6"


def scienceqa(data: Path) -> str:
    """Problems of which every second has an image."""
    splits = {"train": range(1, 13), "val": range(13, 17), "test": range(17, 23)}
    problems = {}
    for split, numbers in splits.items():
        for number in numbers:
            image = "image.png" if number % 2 else None
            problems[str(number)] = {
                "question": f"Which of these is number {number}?", "choices": ["a dog", "a bus", "a kite"],
                "answer": number % 3, "hint": "Look at the picture.", "image": image, "task": "closed choice",
                "grade": "grade2", "subject": "natural science", "topic": "biology", "category": "Animals",
                "skill": "Identify", "lecture": "", "solution": "", "split": split,
            }  # fmt: skip
            if image:
                picture = Image.open(io.BytesIO(jpeg(5000 + number)))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                write(data / f"scienceqa/images/{split}/{number}/{image}", buffer.getvalue())
    ids = {split: [str(number) for number in numbers] for split, numbers in splits.items()}
    ids["trainval"] = ids["train"] + ids["val"]
    write(data / "scienceqa/problems.json", json.dumps(problems))
    write(data / "scienceqa/pid_splits.json", json.dumps(ids))
    return f"data/scienceqa: {len(problems)} problems"


def imagenet(data: Path) -> str:
    """A folder for each of the 1,000 classes, in both splits, and generated images of the training split's layout."""
    for number in range(1000):
        folder = f"n{1440764 + 11 * number:08d}"
        for at, root in enumerate(("imagenet/train", "imagenet/val", "generated/imagenet/train")):
            name = f"ILSVRC2012_val_{number:08d}.JPEG" if at == 1 else f"{folder}_{number}.JPEG"
            write(data / root / folder / name, jpeg(10_000 + 3 * number + at, (16, 16)))
    return "data/imagenet and data/generated/imagenet: 1,000 folders with one image each"


CALTECH101 = """BACKGROUND_Google Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver
binocular bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier
cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly
electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano
hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver
rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign
strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang"""


def classes(data: Path) -> str:
    """The seven other sets of zero-shot classification, two images of their evaluation split or a few more."""
    import scipy.io

    for number, name in enumerate(CALTECH101.split()):
        for at in range(32 if number < WITH_30 else 1):
            path = data / f"caltech101/101_ObjectCategories/{name}/image_{at + 1:04d}.jpg"
            write(path, jpeg(20_000 + 100 * number + at, (16, 16)))
    write(data / "dtd/dtd/labels/test1.txt", "banded/banded_0002.jpg\npolka-dotted/polka-dotted_0002.jpg\n")
    write(data / "dtd/dtd/images/banded/banded_0002.jpg", jpeg(31_000))
    write(data / "dtd/dtd/images/polka-dotted/polka-dotted_0002.jpg", jpeg(31_001))
    aircraft = data / "fgvc-aircraft-2013b/data"
    write(aircraft / "variants.txt", "707-320\nF-16A/B\n")
    write(aircraft / "images_variant_test.txt", "1514522 707-320\n0747566 F-16A/B\n")
    write(aircraft / "images/1514522.jpg", jpeg(31_010))
    write(aircraft / "images/0747566.jpg", jpeg(31_011))
    write(data / "food-101/meta/test.json", json.dumps({"apple_pie": ["apple_pie/1"], "waffles": ["waffles/2"]}))
    write(data / "food-101/images/apple_pie/1.jpg", jpeg(31_020))
    write(data / "food-101/images/waffles/2.jpg", jpeg(31_021))
    pets = data / "oxford-iiit-pet"
    write(pets / "annotations/test.txt", "Abyssinian_1 1 1 1\namerican_bulldog_2 2 2 1\n")
    write(pets / "images/Abyssinian_1.jpg", jpeg(31_030))
    write(pets / "images/american_bulldog_2.jpg", jpeg(31_031))
    cars = data / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    listed = np.array([("00001.jpg", 1), ("00002.jpg", 2)], dtype=[("fname", object), ("class", object)])
    scipy.io.savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": listed})
    names = np.array(["Audi S5 Coupe 2012", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    scipy.io.savemat(cars / "devkit/cars_meta.mat", {"class_names": names})
    write(cars / "cars_test/00001.jpg", jpeg(31_040))
    write(cars / "cars_test/00002.jpg", jpeg(31_041))
    sun = data / "SUN397"
    write(sun / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    write(sun / "Testing_01.txt", "/a/abbey/sun_a.jpg\n/a/apartment_building/outdoor/sun_b.jpg\n")
    write(sun / "a/abbey/sun_a.jpg", jpeg(31_050))
    write(sun / "a/apartment_building/outdoor/sun_b.jpg", jpeg(31_051))
    return "data: caltech101, dtd, fgvc-aircraft-2013b, food-101, oxford-iiit-pet, stanford_cars, SUN397"


def deepfashion(data: Path) -> str:
    """``captions.json`` beside its images, and a product table beside its photographs, two of each product."""
    captions = {}
    for number in range(2 * PRODUCTS):
        product = number // 2
        for group, kind in (("MEN", "Denim"), ("WOMEN", "Dresses")):
            name = f"{group}-{kind}-id_{product:08d}-0{number % 2 + 1}_1_front.jpg"
            captions[name] = f"The person wears {sentence(50_000 + number)}"
            write(data / "deepfashion/images" / name, jpeg(50_000 + number + PRODUCTS * (group == "MEN")))
        write(data / f"shop/images/{number}.jpg", jpeg(52_000 + number))
    write(data / "deepfashion/captions.json", json.dumps(captions))
    rows = [f'{number // 2},{number}.jpg,"{sentence(52_000 + number)}"' for number in range(2 * PRODUCTS)]
    write(data / "shop/products.csv", "\n".join(["sku,photo,title", *rows]) + "\n")
    return f"data/deepfashion and data/shop: {PRODUCTS} products a group"


def fashion_mnist(data: Path, per_class: int = 12) -> str:
    """The four idx files."""
    for split, seed in (("train", 0), ("t10k", 1)):
        labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
        images = np.random.default_rng(seed).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            write(data / "fashion-mnist" / f"{name}.gz", gzip.compress(header + array.tobytes()))
    return f"data/fashion-mnist: {per_class} images of each class a split"


MAKERS: dict[str, Callable[[Path], str]] = {
    "coco": coco,
    "flickr30k": flickr30k,
    "cc3m": lambda data: conceptual_captions(data, "cc3m", 6000),
    "cc12m": lambda data: conceptual_captions(data, "cc12m", 7000),
    "sharegpt4v": sharegpt4v,
    "scienceqa": scienceqa,
    "imagenet": imagenet,
    "classes": classes,
    "deepfashion": deepfashion,
    "fashion_mnist": fashion_mnist,
}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    for make in MAKERS.values():
        print(make(Path(sys.argv[1]) / "data"))
