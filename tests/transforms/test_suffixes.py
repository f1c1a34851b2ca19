"""Which files count as images."""

from __future__ import annotations

from PIL import Image

from gmail_lightning.transforms.image import SUFFIXES

NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # which Pillow recognises and does not decode
PROGRAMS = {"EPS"}
OPENED_AS_ANOTHER = {"MPO"}  # as JPEG


def test_all_that_pillow_reads_is_an_image() -> None:
    Image.init()
    read = set(Image.OPEN) - NO_IMAGES - PROGRAMS | OPENED_AS_ANOTHER
    assert {name for name, kind in Image.registered_extensions().items() if kind in read} == SUFFIXES
