"""One COCO json file as checked columns: a mistake in it is an error that names file, record and value."""

import gc
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

LISTED = 10  # how many offenders a message lists
_LIMIT = 1e30  # numbers beyond have no float32, in which boxes and areas are kept
_FARTHEST = 1e5  # pixels: pycocotools walks along polygon edges, so a stray 1e12 would eat the memory

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Record = dict[str, Any]


class CocoFile:
    """The parsed json, column by column; it lives during construction only."""

    def __init__(self, file: Path) -> None:
        self.file = file
        collecting = gc.isenabled()
        gc.disable()  # it would walk over json's millions of objects again and again: a quarter of the time
        try:
            with file.open(encoding="utf-8-sig") as stream:
                content = json.load(stream)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file} is not valid json: {error.msg} in line {error.lineno}, column {error.colno}."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not valid json: {error}.") from error
        finally:
            if collecting:
                gc.enable()
        if not isinstance(content, dict):
            hint = " (detection results have this form)" if isinstance(content, list) else ""
            raise ValueError(f"{file} holds a {type(content).__name__}{hint}, expected COCO's dict.")
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                found = f"{key!r} is a {type(content[key]).__name__}" if key in content else f"has no {key!r}"
                raise ValueError(f"{file} {found}, expected a list; its keys are {sorted(content)}.")
            for number, record in enumerate(content[key]):
                if not isinstance(record, dict):
                    raise ValueError(f"{file}: {key}[{number}] is {_short(record)}, expected a dict.")
        self.rows: dict[str, list[Record]] = content

    def column(self, kind: str, key: str) -> list[Any]:
        """One value of every record of a kind: ``images``, ``annotations`` or ``categories``."""
        try:
            return [record[key] for record in self.rows[kind]]
        except KeyError:
            number = next(n for n, record in enumerate(self.rows[kind]) if key not in record)
            record = self.rows[kind][number]
            raise ValueError(f"{self.file}: {kind}[{number}], {_short(record)}, has no {key!r}.") from None

    def integers(self, kind: str, key: str) -> Ints:
        """A column that must hold integers."""
        values = self.column(kind, key)
        if not set(map(type, values)) <= {int} or (values and max(map(abs, values)) >= 2**63):
            number = next(n for n, value in enumerate(values) if type(value) is not int or abs(value) >= 2**63)
            raise ValueError(f"{self.file}: {key!r} of {kind}[{number}] is {_short(values[number])}, expected an int.")
        return np.array(values, dtype=np.int64)

    def by_id(self, kind: str) -> tuple[Ints, Ints]:
        """The rows in the order of their ids, and the sorted ids."""
        ids = self.integers(kind, "id")
        rows = np.argsort(ids)
        again = np.unique(ids[rows][1:][np.diff(ids[rows]) == 0])
        if len(again):
            raise ValueError(f"{self.file}: {len(again)} ids of {kind!r} occur more than once: {_some(again)}.")
        return rows, ids[rows]

    def lookup(self, key: str, known: Ints) -> Ints:
        """Where each annotation's ``key`` stands in the sorted ids ``known``."""
        values = self.integers("annotations", key)
        unknown = np.flatnonzero(~np.isin(values, known))
        if len(unknown):
            raise ValueError(
                f"{self.file}: {key!r} of annotation {self.rows['annotations'][unknown[0]]['id']} is "
                f"{values[unknown[0]]}, which is not among the {len(known)} known ids: {_some(known)} "
                f"({len(unknown) - 1} more annotations have unknown ones)."
            )
        return np.searchsorted(known, values)

    def iscrowd(self) -> Ints:
        """0 or 1 for each annotation; 0 where the file says nothing."""
        values = [record.get("iscrowd") or 0 for record in self.rows["annotations"]]
        for row, value in enumerate(values):
            if value not in (0, 1):
                self._reject("iscrowd", row, "0 or 1")
        return np.array(values, dtype=np.int64)

    def numbers(self, key: str, rows: Ints, length: int, expected: str) -> Floats:
        """Lists of ``length`` numbers, ``(len(rows), length)``."""
        values = [self.rows["annotations"][row].get(key) for row in rows]
        for row, value in zip(rows, values, strict=True):
            if not _are_numbers(value) or len(value) != length:
                self._reject(key, row, expected)
        return np.array(values, dtype=np.float64).reshape(len(rows), length)

    def area(self, rows: Ints, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The area of each of these annotations; that of its box where the file says nothing."""
        area: npt.NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        for n, row in enumerate(rows):
            value = self.rows["annotations"][row].get("area")
            if value is None:
                continue
            if not _are_numbers([value]) or value < 0:
                self._reject("area", row, "a finite number from 0 up")
            area[n] = value
        return area

    def keypoints(self, rows: Ints, required: bool) -> npt.NDArray[np.float32] | None:
        """Triplets x, y, v ``(len(rows), K, 3)``, or None where not every annotation has them."""
        if not self._all_have("keypoints", rows, required):
            return None
        used = {self.rows["annotations"][row]["category_id"] for row in rows}
        named = [c.get("keypoints") for c in self.rows["categories"] if c["id"] in used or not used]
        counts = {len(names) for names in named if isinstance(names, list) and names}
        if len(counts) > 1:
            raise ValueError(
                f"{self.file}: categories have {sorted(counts)} keypoints, which do not fit one tensor; "
                "keypoints=False leaves them out."
            )
        if not counts and used:  # no category names its keypoints: the first annotation sets the number
            points = self.rows["annotations"][rows[0]]["keypoints"]
            counts = {max(len(points) // 3, 1) if isinstance(points, list) else 1}
        count = max(counts, default=0)
        expected = f"a list of {3 * count} finite numbers ({count} triplets x, y, v)"
        return self.numbers("keypoints", rows, 3 * count, expected).reshape(len(rows), count, 3).astype(np.float32)

    def masks(self, rows: Ints, sizes: Ints, required: bool) -> "Masks | None":
        """Every segmentation, checked, or None where not every annotation has one."""
        if not self._all_have("segmentation", rows, required):
            return None
        packed = []
        for row, (height, width) in zip(rows, sizes.tolist(), strict=True):
            segmentation = self.rows["annotations"][row]["segmentation"]
            if isinstance(segmentation, dict):
                segmentation = _checked_rle(segmentation, height, width)
            elif not isinstance(segmentation, list) or not all(map(_is_polygon, segmentation)):
                segmentation = None
            if segmentation is None:
                self._reject(
                    "segmentation",
                    row,
                    f"polygons of at least 3 points x, y each or a run-length code of {height} x {width} pixels "
                    "(masks=False leaves them out)",
                )
            packed.append(pickle.dumps(segmentation, protocol=5))
        return Masks(packed)

    def _all_have(self, key: str, rows: Ints, required: bool) -> bool:
        for row in rows:
            record = self.rows["annotations"][row]
            if not record.get(key):
                if not required:
                    return False
                name = "masks" if key == "segmentation" else key
                raise ValueError(f"{self.file}: {name}=True, but annotation {record['id']} has no {key!r}.")
        return required or len(rows) > 0

    def _reject(self, key: str, row: int | np.int64, expected: str) -> None:
        record = self.rows["annotations"][row]
        raise ValueError(
            f"{self.file}: {key!r} of annotation {record['id']} is {_short(record.get(key))}, expected {expected}."
        )


class Masks:
    """Segmentations of all objects, one pickle each in one block of bytes.

    As lists of Python numbers they would take about five times the memory, and every worker process that only reads
    them would copy them page by page, because reading counts references.
    """

    def __init__(self, packed: Sequence[bytes]) -> None:
        self.block = b"".join(packed)
        self.ends = np.cumsum([0, *map(len, packed)])

    def draw(self, objects: slice, height: int, width: int) -> npt.NDArray[np.uint8]:
        """The masks of these objects, ``(N, height, width)``."""
        masks = np.zeros((objects.stop - objects.start, height, width), dtype=np.uint8)
        for mask, row in zip(masks, range(objects.start, objects.stop), strict=True):
            segmentation = pickle.loads(self.block[self.ends[row] : self.ends[row + 1]])
            if isinstance(segmentation, list):
                segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            runs = _runs(segmentation["counts"])
            assert runs is not None  # checked at construction
            mask[:] = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        return masks


def _are_numbers(value: object, limit: float = _LIMIT) -> TypeGuard[list[float]]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return False
    return -limit < min(value, default=0) and max(value, default=0) < limit and not math.isnan(sum(value))


def _is_polygon(value: object) -> bool:
    return _are_numbers(value, _FARTHEST) and len(value) >= 6 and len(value) % 2 == 0


def _checked_rle(rle: Record, height: int, width: int) -> Record | None:
    """The run-length code, compressed, if its runs cover the image exactly, else None."""
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        return None
    if isinstance(counts, list):
        sound = set(map(type, counts)) <= {int} and min(counts, default=-1) >= 0 and sum(counts) == height * width
        return coco_mask.frPyObjects(rle, height, width) if sound else None
    runs = _runs(counts) if isinstance(counts, str) else None
    return (
        {"size": [height, width], "counts": counts}
        if runs is not None and runs.min() >= 0 and runs.sum() == height * width
        else None
    )


def _runs(counts: str | bytes) -> Ints | None:
    """The run lengths of a compressed code, or None if it is none.

    ``pycocotools.mask.decode`` leaves the pixels of a code that ends early uninitialised, so we have to see the runs. A
    character holds 5 bits of a number, lowest first, and a sixth that says that more follow; from the fourth number
    on it is the difference to the last but one.
    """
    code = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        return None
    ends = np.flatnonzero((code & 32) == 0) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > 7:
        return None
    shift = 5 * (np.arange(len(code)) - np.repeat(ends - lengths, lengths))
    runs = np.add.reduceat((code & 31) << shift, ends - lengths)
    runs -= np.where(code[ends - 1] & 16, 1 << 5 * lengths, 0)  # the highest bit is the sign
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _some(values: npt.NDArray[np.int64]) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED].tolist())) + more
