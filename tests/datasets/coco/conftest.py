import json

import numpy as np
import PIL.Image
import pytest

from tests.datasets.coco.written import FILE, PIXELS, SIZE, TRIANGLE, annotation, compressed, uncompressed


@pytest.fixture
def content():
    """Four images (30 last in the file but not by id; 40 empty), sparse category ids out of order, one crowd box."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]}
            for number in (10, 50, 40, 30)
        ],
        "categories": [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}, {"id": 7, "name": "middle"}],
        "annotations": [
            annotation(1, 30, 90),
            annotation(2, 10, 3, segmentation=compressed(PIXELS)),
            annotation(3, 30, 7, segmentation=uncompressed(PIXELS)),
            annotation(4, 10, 7, iscrowd=1, segmentation=uncompressed(PIXELS), bbox=[20, 5, 6, 4]),
            annotation(5, 50, 90, segmentation=[*TRIANGLE, [20, 15, 28, 15, 28, 19, 20, 19]]),
        ],
    }


@pytest.fixture
def write(tmp_path):
    """Write a json and its images to a folder."""

    def write(content, text=None):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "annotations" / FILE).write_text(json.dumps(content) if text is None else text)
        if isinstance(content, dict):
            for number, image in enumerate(content.get("images", [])):
                pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "images" / image["file_name"])
        return tmp_path

    return write
