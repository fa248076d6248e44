"""One COCO json file as checked columns: a mistake in it is a defect that names file, record and value."""

import gc
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detmix.datasets.coco_masks import Masks, pack_segmentation
from detmix.datasets.defects import LISTED, Defect, Report, refuse, short, some
from detmix.datasets.file_names import are_plain, why_unsafe
from detmix.datasets.numbers import Floats, Ints, are_numbers, as_matrix

Record = dict[str, Any]

TABLES = ("images", "annotations", "categories")
_MISSING = object()


class Categories(NamedTuple):
    """The categories in the order of their ids."""

    ids: Ints
    names: tuple[str, ...]


class Images(NamedTuple):
    """The images in the order of their ids."""

    rows: Ints
    """Where each stands in the file."""
    ids: Ints
    names: list[str]
    sizes: Ints
    """Height and width, ``(images, 2)``."""


class Objects(NamedTuple):
    """The annotations by image, and those of one image in the order of the file."""

    first: Ints
    """Image i has the objects ``first[i]`` to ``first[i + 1]``."""
    boxes: npt.NDArray[np.float32]
    """XYXY inside the image, ``(objects, 4)``."""
    labels: Ints
    iscrowd: Ints
    area: npt.NDArray[np.float32]
    keypoints: npt.NDArray[np.float32] | None
    masks: Masks | None
    remark: str | None
    """Which boxes were left out and which clipped."""


class CocoFile:
    """The parsed json, column by column; it lives during construction only.

    Args:
        file: the json.
        report: is called with each defect. If it returns, as the checker's does, reading goes on: the records are
            marked in ``lost`` and left out of whatever they would spoil, so the next defects are found as well.

        content: what was read from it, if it has been.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no json of COCO's three lists, whatever ``report`` does; and as `report` raises.
    """

    def __init__(self, file: Path, report: Report = refuse, content: Record | None = None) -> None:
        self.file, self.report = file, report
        self.content = _parse(file) if content is None else content
        self.rows: dict[str, list[Record]] = {}
        self.lost: dict[str, npt.NDArray[np.bool_]] = {}
        for table in TABLES:
            records = self.content.get(table)
            if not isinstance(records, list):
                found = f"{table!r} is a {type(records).__name__}" if table in self.content else f"has no {table!r}"
                raise ValueError(f"{file} {found}, expected a list; its keys are {short(sorted(self.content))}.")
            self.rows[table] = [record if isinstance(record, dict) else {} for record in records]
            self.lost[table] = np.zeros(len(records), dtype=bool)
            for number, record in enumerate(records):
                if not isinstance(record, dict):
                    self._reject("record", table, number, f"{table}[{number}] is {short(record)}, expected a dict.")

    def categories(self) -> Categories:
        """The categories, checked."""
        rows, ids = self.by_id("categories")
        names = self._column("categories", "name")
        rows, ids = self._without_lost("categories", rows, ids)
        return Categories(ids, tuple(str(names[row]) for row in rows))

    def images(self) -> Images:
        """The images, checked but for their files."""
        rows, ids = self.by_id("images")
        names = self._names()
        sizes = np.stack([self._integers("images", key)[0] for key in ("height", "width")], 1)
        rows, ids = self._without_lost("images", rows, ids)
        for row in rows[(sizes[rows] <= 0).any(1)]:
            self._reject(
                "image size",
                "images",
                row,
                f"image {self._id('images', row)} ({names[row]}) has height, width {sizes[row].tolist()}, "
                "expected positive numbers.",
            )
        rows, ids = self._without_lost("images", rows, ids)
        return Images(rows, ids, [names[row] for row in rows], sizes[rows])

    def by_id(self, table: str) -> tuple[Ints, Ints]:
        """The rows in the order of their ids, and the sorted ids."""
        ids, read = self._integers(table, "id")
        rows = np.flatnonzero(read)
        rows = rows[np.argsort(ids[rows], kind="stable")]
        again = np.diff(ids[rows], prepend=ids[rows[:1]] - 1) == 0
        if again.any():
            repeated = np.unique(ids[rows[again]]).tolist()
            message = f"{len(repeated)} ids of {table!r} occur more than once: {some(repeated)}."
            for kind, which in self._sort_repeated(table, rows, again).items():
                self._reject(kind, table, which, message)
        return self._without_lost(table, rows, ids[rows])

    def objects(
        self, images: Images, categories: Categories, *, crowd: bool, masks: bool | None, keypoints: bool | None
    ) -> Objects:
        """The annotations of these images and categories, checked; the options are those of `CocoFolder`."""
        self.by_id("annotations")
        image = self._lookup("image_id", "images", images.ids)
        category = self._lookup("category_id", "categories", categories.ids)
        iscrowd = self._iscrowd()
        rows = np.arange(len(iscrowd))
        xywh, read = self._numbers("bbox", rows, 4, "a list of 4 finite numbers (x, y, width, height)", "box")
        kept = np.flatnonzero(((iscrowd == 0) | crowd) & read & (image >= 0))
        boxes, sound, remark = self._clip(kept, xywh[kept], image[kept], images)
        order = np.argsort(image[kept[sound]], kind="stable")
        kept, boxes = kept[sound][order], boxes[sound][order]
        return Objects(
            first=np.searchsorted(image[kept], np.arange(len(images.ids) + 1)),
            boxes=boxes,
            labels=category[kept] + 1,
            iscrowd=iscrowd[kept],
            area=self._area(kept, boxes),
            keypoints=None if keypoints is False else self._keypoints(kept, bool(keypoints)),
            masks=None if masks is False else self._masks(kept, images.sizes[image[kept]], bool(masks)),
            remark=remark,
        )

    def _column(self, table: str, key: str) -> list[Any]:
        """One value of every record."""
        try:
            return [record[key] for record in self.rows[table]]
        except KeyError:
            for number, record in enumerate(self.rows[table]):
                if key not in record and (record or not self.lost[table][number]):
                    message = f"{table}[{number}], {short(record)}, has no {key!r}."
                    self._reject("field", table, number, message)
            return [record.get(key, _MISSING) for record in self.rows[table]]

    def _integers(self, table: str, key: str) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """A column that must hold integers, and which of them do."""
        values = self._column(table, key)
        read = np.ones(len(values), dtype=bool)
        if not set(map(type, values)) <= {int} or (values and max(map(abs, values)) >= 2**63):
            for number, value in enumerate(values):
                if type(value) is int and abs(value) < 2**63:
                    continue
                if value is not _MISSING:
                    message = f"{key!r} of {table}[{number}] is {short(value)}, expected an int."
                    self._reject("type", table, number, message)
                values[number], read[number] = 0, False
        return np.array(values, dtype=np.int64), read

    def _names(self) -> list[str]:
        """The images' file names, none of which leads out of their folder."""
        names = self._column("images", "file_name")
        if not are_plain(names):
            for number, name in enumerate(names):
                if name is not _MISSING and (reason := why_unsafe(name)):
                    message = f"'file_name' of images[{number}] is {short(name)}, {reason}."
                    self._reject("file name" if isinstance(name, str) else "type", "images", number, message)
        return names

    def _lookup(self, key: str, table: str, known: Ints) -> Ints:
        """Where each annotation's ``key`` stands in the sorted ids ``known``; -1 for none.

        Records that are lost are known still, so the checker counts what hangs on them, but not as their own mistake.
        """
        values, read = self._integers("annotations", key)
        found = read & np.isin(values, known)
        if not found.all():
            listed = [record.get("id") for record in self.rows[table]]
            there = found | np.isin(values, [value for value in listed if type(value) is int and abs(value) < 2**63])
            unknown = np.flatnonzero(read & ~there)
            if len(unknown):
                self._reject(
                    f"unknown {key.removesuffix('_id')}",
                    "annotations",
                    unknown,
                    f"{key!r} of annotation {self._id('annotations', unknown[0])} is {values[unknown[0]]}, which is "
                    f"not among the {len(known)} known ids: {some(known.tolist())} "
                    f"({len(unknown) - 1} more annotations have unknown ones).",
                )
            self.lost["annotations"] |= ~found
        return np.where(found, np.searchsorted(known, values), -1)

    def _iscrowd(self) -> Ints:
        """0 or 1 for each annotation; 0 where the file says nothing."""
        values = [record.get("iscrowd") or 0 for record in self.rows["annotations"]]
        for row, value in enumerate(values):
            if value not in (0, 1):
                self._reject_value("crowd flag", "iscrowd", row, "0 or 1")
                values[row] = 0
        return np.array(values, dtype=np.int64)

    def _numbers(
        self, key: str, rows: Ints, length: int, expected: str, kind: str
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Lists of ``length`` numbers, ``(len(rows), length)``, and which of them are."""
        values = [self.rows["annotations"][row].get(key) for row in rows.tolist()]
        read = np.ones(len(rows), dtype=bool)
        if (matrix := as_matrix(values, length)) is not None:
            return matrix, read
        for n, (row, value) in enumerate(zip(rows.tolist(), values, strict=True)):
            if are_numbers(value) and len(value) == length:
                continue
            only_numbers = isinstance(value, list) and set(map(type, value)) <= {int, float} and len(value) == length
            if self.rows["annotations"][row] or not self.lost["annotations"][row]:
                self._reject_value(f"{kind} NaN" if kind == "box" and only_numbers else kind, key, row, expected)
            values[n], read[n] = [0] * length, False
        return np.array(values, dtype=np.float64).reshape(len(rows), length), read

    def _clip(
        self, rows: Ints, xywh: Floats, image: Ints, images: Images
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], str | None]:
        """The boxes as XYXY inside their images, which of them are sound, and a remark on those that are not."""
        limits = np.tile(images.sizes[image][:, ::-1], 2)  # (annotations, 4): width, height, width, height
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        boxes = np.clip(corners, 0, limits).astype(np.float32)
        sound = (boxes[:, 2:] > boxes[:, :2]).all(1)  # seen in float32, which rounds the thinnest boxes to nothing
        clipped = sound & (np.abs(corners - np.clip(corners, 0, limits)) > 1).any(1)
        changed = np.flatnonzero(clipped | ~sound)
        if not len(changed):
            return boxes, sound, None
        named = [
            f"annotation {self._id('annotations', rows[n])} of {images.names[image[n]]}: {xywh[n].tolist()} "
            f"({'clipped' if sound[n] else 'left out'})"
            for n in changed.tolist()
        ]
        flat = (corners[:, 2:].astype(np.float32) <= corners[:, :2].astype(np.float32)).any(1)
        for kind, which in (("empty box", ~sound & flat), ("box outside", ~sound & ~flat), ("box clipped", clipped)):
            if which.any():
                first = named[np.flatnonzero(which[changed])[0]]
                message = f"{which.sum()} boxes, x, y, width, height of the first: {first}."
                self._reject(kind, "annotations", rows[which], message)
        remark = (
            f"{self.file}: of {len(sound)} boxes, {(~sound).sum()} are left out (no width or height, "
            f"or wholly outside the image) and {clipped.sum()} are clipped to the image; x, y, width, height of "
            f"the first {min(len(named), LISTED)}: {'; '.join(named[:LISTED])}."
        )
        return boxes, sound, remark

    def _area(self, rows: Ints, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The area of each of these annotations; that of its box where the file says nothing."""
        area: npt.NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        given = [self.rows["annotations"][row].get("area") for row in rows.tolist()]
        for n, value in enumerate(given):
            if value is None:
                continue
            if not are_numbers([value]) or value < 0:
                self._reject_value("area", "area", rows[n], "a finite number from 0 up")
                continue
            area[n] = value
        return area

    def _keypoints(self, rows: Ints, required: bool) -> npt.NDArray[np.float32] | None:
        """Triplets x, y, v ``(len(rows), K, 3)``, or None where not every annotation has them."""
        has, complete = self._having("keypoints", rows, required)
        if has is None:
            return None
        having = rows[has]
        used = {self.rows["annotations"][row].get("category_id") for row in having.tolist()}
        named = [c.get("keypoints") for c in self.rows["categories"] if c.get("id") in used or not used]
        counts = {len(names) for names in named if isinstance(names, list) and names}
        if len(counts) > 1:
            self._reject(
                "keypoint counts",
                "categories",
                [n for n, record in enumerate(self.rows["categories"]) if record.get("id") in used or not used],
                f"categories have {sorted(counts)} keypoints, which do not fit one tensor; "
                "keypoints=False leaves them out.",
            )
            message = f"{len(having)} annotations have keypoints of categories that differ in their number."
            self._reject("unused keypoints", "annotations", having, message)
            return None
        if not counts and used:  # no category names its keypoints: what most annotations have is the number
            lists = [self.rows["annotations"][row]["keypoints"] for row in having.tolist()]
            ((length, _),) = Counter(len(points) if isinstance(points, list) else 0 for points in lists).most_common(1)
            counts = {max(length // 3, 1)}
        count = max(counts, default=0)
        expected = f"a list of {3 * count} finite numbers ({count} triplets x, y, v)"
        kind = "keypoints" if complete else "unused keypoints"
        points, _ = self._numbers("keypoints", having, 3 * count, expected, kind)
        return points.reshape(len(having), count, 3).astype(np.float32)

    def _masks(self, rows: Ints, sizes: Ints, required: bool) -> Masks | None:
        """Every segmentation, checked, or None where not every annotation has one."""
        has, complete = self._having("segmentation", rows, required)
        if has is None:
            return None
        packed = []
        for row, (height, width) in zip(rows[has].tolist(), sizes[has].tolist(), strict=True):
            segmentation = self.rows["annotations"][row]["segmentation"]
            kept = pack_segmentation(segmentation, height, width)
            if kept is None:
                kind = "run-length code" if isinstance(segmentation, dict) else "polygon"
                self._reject_value(
                    kind if complete else "unused segmentation",
                    "segmentation",
                    row,
                    f"polygons of at least 3 points x, y each or a run-length code of {height} x {width} pixels "
                    "(masks=False leaves them out)",
                )
            else:
                packed.append(kept)
        return Masks(packed)

    def _having(self, key: str, rows: Ints, required: bool) -> tuple[npt.NDArray[np.bool_] | None, bool]:
        """Which of the annotations have a ``key``, None if nothing is to be read; and whether that is in use."""
        records = self.rows["annotations"]
        has = np.array([bool(records[row].get(key)) for row in rows.tolist()], dtype=bool)
        if has.all():
            return (has if required or len(rows) else None), True
        if required:
            name = "masks" if key == "segmentation" else key
            for row in rows[~has]:
                message = f"{name}=True, but annotation {self._id('annotations', row)} has no {key!r}."
                self._reject(f"no {key}", "annotations", row, message)
            return has, True
        if self.report is refuse or not has.any():
            return None, False
        lacking = rows[~has]
        self._reject(
            f"partial {key}",
            "annotations",
            lacking,
            f"{len(lacking)} of {len(rows)} annotations have no {key!r}, so it is not used at all.",
        )
        return has, False

    def _sort_repeated(self, table: str, rows: Ints, again: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
        """The rows, sorted by id, whose id occurs ``again``, by kind of defect.

        An image or category that is described in two ways has no right one: nobody can tell which an annotation means.
        """
        records, found = self.rows[table], defaultdict(set)
        first = 0
        for n in np.flatnonzero(again).tolist():
            first = first if again[n - 1] else n - 1
            row, before = int(rows[n]), int(rows[first])
            if records[row] == records[before]:
                found["repeated record"].add(row)
            elif table == "annotations":
                found["shared id"].add(row)
            else:
                found["ambiguous id"] |= {row, before}
        return {kind: sorted(which) for kind, which in found.items()}

    def _without_lost(self, table: str, rows: Ints, ids: Ints) -> tuple[Ints, Ints]:
        there = ~self.lost[table][rows]
        return rows[there], ids[there]

    def _id(self, table: str, row: int | np.int64) -> Any:
        return self.rows[table][row].get("id")

    def _reject(self, kind: str, table: str, rows: Any, message: str) -> None:
        """Report a defect of one row or several."""
        rows = np.atleast_1d(rows).tolist()
        defect = Defect(
            kind, table, tuple(rows), tuple(self._id(table, row) for row in rows), f"{self.file}: {message}"
        )
        self.report(defect)
        if defect.loses:
            self.lost[table][rows] = True

    def _reject_value(self, kind: str, key: str, row: int | np.int64, expected: str) -> None:
        record = self.rows["annotations"][row]
        message = f"{key!r} of annotation {record.get('id')} is {short(record.get(key))}, expected {expected}."
        self._reject(kind, "annotations", row, message)


def _parse(file: Path) -> Record:
    collecting = gc.isenabled()
    gc.disable()  # it would walk over json's millions of objects again and again: a quarter of the time
    try:
        with file.open(encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not valid json: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from error
    except (ValueError, RecursionError) as error:  # other bytes than UTF-8, an int of 5,000 digits, lists in lists
        raise ValueError(f"{file} is not valid json: {error}.") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict):
        hint = " (detection results have this form)" if isinstance(content, list) else ""
        raise ValueError(f"{file} holds a {type(content).__name__}{hint}, expected COCO's dict.")
    return content
