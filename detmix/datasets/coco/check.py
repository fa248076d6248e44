"""Find every defect of a dataset in COCO format by the rules of `CocoFolder`, and decode every image."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image

from detmix.datasets.coco.defects import Defect, some
from detmix.datasets.coco.folder import find_files
from detmix.datasets.coco.images import as_defect, check_header, read_header, read_orientation, read_rgb, split_missing
from detmix.datasets.coco.objects import read_objects
from detmix.datasets.coco.table import CocoTable, Images

MODES = {"1": "grey", "L": "grey", "LA": "grey", "CMYK": "CMYK", "I": "16 bits", "F": "16 bits"}
"""The kind of defect of images that are converted to RGB of 8 bits, by Pillow's mode."""


class Check(NamedTuple):
    """Hold what is wrong with one annotations file and its images."""

    table: CocoTable
    images_folder: Path
    defects: list[Defect]
    options: dict[str, bool | None]
    """The arguments ``masks`` and ``keypoints`` of `check_folder`."""

    @property
    def annotations_file(self) -> Path:
        """Return the json file."""
        return self.table.file

    @property
    def errors(self) -> list[Defect]:
        """Return the defects that training refuses, or that it loses annotations to."""
        return [defect for defect in self.defects if defect.severity == "error"]

    @property
    def lost(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which records a clean copy is without, by section: annotations are lost with their image."""
        records, lost = self.table.records, self.table.lost
        there = {
            record["id"] for record, gone in zip(records["images"], lost["images"].tolist(), strict=True) if not gone
        }
        annotations = [
            gone or record["image_id"] not in there
            for record, gone in zip(records["annotations"], lost["annotations"].tolist(), strict=True)
        ]
        return {**lost, "annotations": np.array(annotations, dtype=bool)}


def check_folder(
    root: str | os.PathLike[str],
    annotations: str | os.PathLike[str] = "annotations/instances_train.json",
    images: str | os.PathLike[str] = "images",
    *,
    masks: bool | None = None,
    keypoints: bool | None = None,
    workers: int = 1,
) -> Check:
    """Find every defect of a folder in COCO format; `CocoFolder` stops at the first.

    The json is read once, and every image is decoded. Crowd boxes are checked too.

    Args:
        root: Dataset folder.
        annotations: The json file, relative to ``root``.
        images: Image folder, from which the json's file names start, relative to ``root``.
        masks: True requires a mask of every annotation, False ignores masks; see `CocoFolder`.
        keypoints: True requires keypoints of every annotation, False ignores keypoints.
        workers: Threads that decode images.

    Raises:
        FileNotFoundError: if the folder or the json is missing.
        ValueError: if the file is no json, or lacks one of COCO's three lists.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from detmix.datasets.shapes import draw_shapes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = draw_shapes(f"{folder}/shapes", num_train=2, num_val=1)
        ...     file = Path(root, "annotations/instances_train.json")
        ...     content = json.loads(file.read_text())
        ...     content["annotations"][0]["bbox"][2] = 0
        ...     _ = file.write_text(json.dumps(content))
        ...     check = check_folder(root)
        >>> [(defect.kind, defect.ids, defect.severity) for defect in check.defects]
        [('empty box', (1,), 'error')]
        >>> int(check.lost["annotations"].sum())
        1
    """
    file, folder = find_files(Path(root), annotations, images)
    defects: list[Defect] = []
    options = {"masks": masks, "keypoints": keypoints}
    table = CocoTable(file, defects.append)
    listed = check_records(table, options)
    found = list(_check_images(file, folder, listed, workers))
    for defect in found:
        table.mark_lost(defect)
    return Check(table, folder, defects + found, options)


def check_records(table: CocoTable, options: dict[str, bool | None]) -> Images:
    """Report all defects of the json, without its image files, and return its images."""
    categories, images = table.categories(), table.images()
    read_objects(table, images, categories, crowd=True, masks=options["masks"], keypoints=options["keypoints"])
    return images


def _check_images(file: Path, folder: Path, images: Images, workers: int) -> Iterator[Defect]:
    first = {name: n for n, name in reversed(list(enumerate(images.names)))}
    again = [n for n, name in enumerate(images.names) if first[name] != n]
    if again:
        names = list(Counter(images.names[n] for n in again))
        yield as_defect("repeated file", images, again, f"{file}: listed again: {some(names)}.")
    missing, there = split_missing(file, folder, images)
    if missing:
        yield missing
    PIL.Image.init()  # registers all formats, before the threads do it at the same time

    def check(n: int) -> list[tuple[str, str]]:
        return list(_check_image(folder / images.names[n], folder.resolve(), images.sizes[n].tolist(), file))

    with ThreadPoolExecutor(workers) as pool:  # decoders work without Python's lock
        for n, wrong in zip(there, pool.map(check, there), strict=True):
            for kind, message in wrong:
                yield as_defect(kind, images, [n], message)


def _check_image(path: Path, folder: Path, size: list[int], file: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a file, as kinds and messages."""
    if not path.resolve().is_relative_to(folder):
        yield "link", f"{path} leads to {path.resolve()}."
    wrong = check_header(path, size, file)
    if wrong:
        yield wrong
        if wrong[0] == "no image":
            return
    try:
        read_rgb(path)
    except OSError as error:
        yield "undecodable", f"{error}."
        return
    header = read_header(path)
    if kind := "16 bits" if ";16" in header.mode else MODES.get(header.mode):
        yield kind, f"{path} is of mode {header.mode}."
    suffix = PIL.Image.registered_extensions().get(path.suffix.lower(), header.format)
    if suffix != header.format and {suffix, header.format} != {"JPEG", "MPO"}:  # MPO is JPEG with a second image
        yield "mislabelled", f"{path} is {header.format}, not {suffix}."
    if not wrong and (orientation := read_orientation(path)) != 1:
        yield "orientation", f"{path} has EXIF orientation {orientation}; it is of the json's size as it is stored."
