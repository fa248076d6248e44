"""Write a clean copy of a checked dataset: what training would refuse or lose is cured or left out."""

import copy
import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from detmix.datasets.coco.check import Check, check_records
from detmix.datasets.coco.defects import KINDS, Defect
from detmix.datasets.coco.table import SECTIONS, CocoTable, Record

LIST = "removed.json"
"""The file in the copy that lists every record that was removed or changed, as it was before."""


class _Context(NamedTuple):
    images: dict[int, Record]
    new_ids: Iterator[int]


def _clip(annotation: Record, context: _Context) -> None:
    image = context.images[annotation["image_id"]]
    x, y, width, height = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
    annotation["bbox"] = [left, top, right - left, bottom - top]


def _renumber(annotation: Record, context: _Context) -> None:
    annotation["id"] = next(context.new_ids)


def _delete(key: str) -> Callable[[Record, _Context], None]:
    return lambda record, _: record.pop(key, None)


CURES: dict[str, Callable[[Record, _Context], None]] = {
    "shared id": _renumber,
    "area": _delete("area"),
    "box clipped": _clip,
    "keypoint counts": _delete("keypoints"),
    "unused keypoints": _delete("keypoints"),
    "unused segmentation": _delete("segmentation"),
    "turned": lambda record, _: None,  # its file is changed
}
"""For each kind of defect with a cure, a function that changes a record of the json in place."""


def write_clean(checks: Sequence[Check], root: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write a copy of ``root`` without defects: the checked annotations and their images.

    Images and annotations with errors are left out, except those with a cure (`detmix.datasets.coco.defects.KINDS`).
    The annotations of an image or category that is left out are left out too. Image files are hard links where the
    system allows, else copies: do not change them in place. ``removed.json`` lists every record that was removed or
    changed, as it was before.

    Args:
        checks: Results of `check_folder`, each of another annotations file of ``root``.
        root: Folder that was checked; it is not changed.
        out: Folder to write, new or empty and outside ``root``.

    Returns:
        The path of the list, ``out/removed.json``.

    Raises:
        FileExistsError: if ``out`` is a file or a folder that is not empty.
        ValueError: if ``out`` is inside ``root``, or two annotations files would have the same name.

    Example:
        >>> import tempfile
        >>> from detmix.datasets.coco.check import check_folder
        >>> from detmix.datasets.shapes import draw_shapes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = draw_shapes(f"{folder}/shapes", num_train=2, num_val=1)
        ...     removed = write_clean([check_folder(root)], root, f"{folder}/clean")
        ...     removed.read_text(), check_folder(f"{folder}/clean").defects
        ('{"annotations/instances_train.json": []}', [])
    """
    root, out = Path(root), Path(out)
    refuse_target(root, out)
    files = [_inside(check.annotations_file, root, "annotations") for check in checks]
    if len(set(files)) < len(files):
        names = ", ".join(map(str, sorted(files)))
        raise ValueError(f"annotations files must have different names in the copy, but they are {names}.")
    contents, lists = {}, {}
    for file, check in zip(files, checks, strict=True):
        contents[file], lists[file.as_posix()] = clean_content(check)
        _write_images(check, contents[file]["images"], out / _inside(check.images_folder, root, "."))
    for file, content in contents.items():  # after the images, so an interrupted copy cannot be trained on
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(json.dumps(content), encoding="utf-8")
    (out / LIST).write_text(json.dumps(lists), encoding="utf-8")
    return out / LIST


def refuse_target(root: Path, out: Path) -> None:
    """Raise the errors of `write_clean` if ``out`` is not a folder that it can write."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already, expected a new or an empty folder.")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} is inside {root}, expected a folder outside of it.")


def clean_content(check: Check) -> tuple[Record, list[Record]]:
    """Return the json without its defects, and a list of what was removed or changed, and why."""
    table, lost, defects, done = check.table, check.lost, check.defects, []
    for _ in range(9):  # removing one may show others: masks are used once all annotations left have them
        content, changes = _pass(table, lost, defects)
        done += changes
        if not changes:
            return content, done
        found: list[Defect] = []
        table = CocoTable(check.annotations_file, found.append, content)
        check_records(table, check.options)
        lost, defects = table.lost, found
    raise AssertionError(f"{[defect.message for defect in defects]} has no cure")  # a bug of ours


def _pass(
    table: CocoTable, lost: dict[str, npt.NDArray[np.bool_]], defects: Iterable[Defect]
) -> tuple[Record, list[Record]]:
    """Remove and cure the records of known defects once."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for defect in defects:
        for row in defect.rows:
            found[defect.section, row].append(defect.kind)
    ids = [record["id"] for record in table.records["annotations"] if type(record.get("id")) is int]
    sound = [record for record, gone in zip(table.records["images"], lost["images"].tolist(), strict=True) if not gone]
    context = _Context({record["id"]: record for record in sound}, itertools.count(max(ids, default=0) + 1))
    content, changes = dict(table.content), []
    for section in SECTIONS:
        kept = []
        for row, (record, gone) in enumerate(zip(table.content[section], lost[section].tolist(), strict=True)):
            why = found.get((section, row), [])
            cures = [kind for kind in why if KINDS[kind].cure]
            if not gone and not cures:
                kept.append(record)
                continue
            what = "removed"
            if not gone:
                cured = copy.deepcopy(record)
                for kind in cures:
                    CURES[kind](cured, context)
                kept.append(cured)
                what, why = "; ".join(KINDS[kind].cure for kind in cures), cures
            number = record.get("id") if isinstance(record, dict) else None
            why = why or ["of an image or category that was removed"]
            changes.append({"table": section, "id": number, "what": what, "why": why, "record": record})
        content[section] = kept
    return content, changes


def _inside(path: Path, root: Path, other: str) -> Path:
    """Return a path below ``root`` relative to it, and any other path by its name."""
    if path.is_relative_to(root) and ".." not in (relative := path.relative_to(root)).parts:
        return relative
    return Path(other, path.name or "images")


def _write_images(check: Check, images: Iterable[Record], folder: Path) -> None:
    records = check.table.records["images"]
    turned = {records[row]["file_name"] for defect in check.defects if defect.kind == "turned" for row in defect.rows}
    for name in dict.fromkeys(image["file_name"] for image in images):
        target, source = folder / name, (check.images_folder / name).resolve()
        if target.exists():  # listed by another annotations file as well
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in turned:
            _turn(source, target)
            continue
        try:
            os.link(source, target)
        except OSError:  # another disk, or a system that has no hard links
            shutil.copyfile(source, target)


def _turn(source: Path, target: Path) -> None:
    """Store an image turned as its EXIF orientation says."""
    with PIL.Image.open(source) as image:
        format = "JPEG" if image.format == "MPO" else image.format
        upright = PIL.ImageOps.exif_transpose(image)
        options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
        upright.save(target, format, icc_profile=image.info.get("icc_profile"), **options)
