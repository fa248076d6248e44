"""Read and check the objects of a COCO json by image: boxes, labels, areas, keypoints and masks."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detmix.datasets.coco.defects import LISTED, refuse
from detmix.datasets.coco.masks import Masks, pack_segmentation
from detmix.datasets.coco.table import Categories, CocoTable, Images
from detmix.datasets.coco.values import Floats, Ints, are_numbers

THINNEST = 0.01
"""Smallest side of a box in pixels. float32 can lose a thinner box in a resize, and torchvision refuses it then."""

Bools = npt.NDArray[np.bool_]


class Objects(NamedTuple):
    """Hold the annotations by image; those of one image are in the order of the file."""

    first: Ints
    """Image i has the objects from ``first[i]`` to before ``first[i + 1]``."""
    boxes: npt.NDArray[np.float32]
    """XYXY inside the image, ``(objects, 4)``."""
    labels: Ints
    iscrowd: Ints
    area: npt.NDArray[np.float32]
    keypoints: npt.NDArray[np.float32] | None
    masks: Masks | None
    remark: str | None
    """A message on the boxes that were left out or clipped."""


def read_objects(
    table: CocoTable,
    images: Images,
    categories: Categories,
    *,
    crowd: bool,
    masks: bool | None,
    keypoints: bool | None,
) -> Objects:
    """Read and check the annotations of images and categories; the options are those of `CocoFolder`."""
    table.by_id("annotations")
    image = table.lookup("image_id", "images", images.ids)
    category = table.lookup("category_id", "categories", categories.ids)
    iscrowd = _read_iscrowd(table)
    rows = np.arange(len(iscrowd))
    xywh, read = table.numbers("bbox", rows, 4, "a list of 4 finite numbers (x, y, width, height)", "box", "box NaN")
    kept = np.flatnonzero(((iscrowd == 0) | crowd) & read & (image >= 0))
    boxes, sound, remark = _clip(table, kept, xywh[kept], image[kept], images)
    order = np.argsort(image[kept[sound]], kind="stable")
    kept, boxes = kept[sound][order], boxes[sound][order]
    return Objects(
        first=np.searchsorted(image[kept], np.arange(len(images.ids) + 1)),
        boxes=boxes,
        labels=category[kept] + 1,
        iscrowd=iscrowd[kept],
        area=_read_area(table, kept, boxes),
        keypoints=None if keypoints is False else _read_keypoints(table, kept, category, categories, bool(keypoints)),
        masks=None if masks is False else _read_masks(table, kept, images.sizes[image[kept]], bool(masks)),
        remark=remark,
    )


def _read_iscrowd(table: CocoTable) -> Ints:
    """Return 0 or 1 for each annotation; 0 if the file does not say."""
    values = [record.get("iscrowd") or 0 for record in table.records["annotations"]]
    for row, value in enumerate(values):
        if value not in (0, 1):
            table.reject_value("crowd flag", "iscrowd", row, "0 or 1")
            values[row] = 0
    return np.array(values, dtype=np.int64)


def _clip(
    table: CocoTable, rows: Ints, xywh: Floats, image: Ints, images: Images
) -> tuple[npt.NDArray[np.float32], Bools, str | None]:
    """Return the boxes as XYXY inside their images, which of them are kept, and a message on what changed."""
    limits = np.tile(images.sizes[image][:, ::-1], 2)  # (annotations, 4): width, height, width, height
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    inside = np.clip(corners, 0, limits)
    sound = (inside[:, 2:] - inside[:, :2] >= THINNEST).all(1)
    clipped = sound & (np.abs(corners - inside) > 1).any(1)
    changed = np.flatnonzero(clipped | ~sound)
    if not len(changed):
        return inside.astype(np.float32), sound, None
    named = [
        f"annotation {table.id_of('annotations', rows[n])} of {images.names[image[n]]}: {xywh[n].tolist()} "
        f"({'clipped' if sound[n] else 'left out'})"
        for n in changed.tolist()
    ]
    empty = ~sound & (corners[:, 2:] - corners[:, :2] < THINNEST).any(1)
    for kind, which in (("empty box", empty), ("box outside", ~sound & ~empty), ("box clipped", clipped)):
        if which.any():
            first = named[np.flatnonzero(which[changed])[0]]
            message = f"x, y, width, height of the first: {first}."
            table.reject(kind, "annotations", rows[which], message)
    remark = (
        f"{table.file}: of {len(sound)} boxes, {(~sound).sum()} are left out (no width or height, "
        f"or wholly outside the image) and {clipped.sum()} are clipped to the image; x, y, width, height of "
        f"the first {min(len(named), LISTED)}: {'; '.join(named[:LISTED])}."
    )
    return inside.astype(np.float32), sound, remark


def _read_area(table: CocoTable, rows: Ints, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the area of each annotation; the area of its box if the file does not say."""
    area: npt.NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    given = [table.records["annotations"][row].get("area") for row in rows.tolist()]
    for n, value in enumerate(given):
        if value is None:
            continue
        if not are_numbers([value]) or value < 0:
            table.reject_value("area", "area", rows[n], "a finite number from 0 up")
            continue
        area[n] = value
    return area


def _read_keypoints(
    table: CocoTable, rows: Ints, category: Ints, categories: Categories, required: bool
) -> npt.NDArray[np.float32] | None:
    """Return triplets x, y, v ``(len(rows), K, 3)``, or None if not every annotation has them."""
    has, complete = _having(table, "keypoints", rows, required)
    if has is None:
        return None
    rows = rows[has]
    used = np.unique(category[rows])
    used = categories.rows[used[used >= 0] if len(rows) else slice(None)]
    named = [table.records["categories"][row].get("keypoints") for row in used.tolist()]
    counts = {len(names) for names in named if isinstance(names, list) and names}
    if len(counts) > 1:
        differ = f"categories have {sorted(counts)} keypoints, which do not fit one tensor"
        table.reject("keypoint counts", "categories", used, f"{differ}; keypoints=False leaves them out.")
        table.reject("unused keypoints", "annotations", rows, f"{differ}.")
        return None
    lists = [table.records["annotations"][row]["keypoints"] for row in rows.tolist()]
    if not counts and lists:  # no category names its keypoints: take the number that most annotations have
        ((length, _),) = Counter(len(points) if isinstance(points, list) else 0 for points in lists).most_common(1)
        counts = {max(length // 3, 1)}
    count = max(counts, default=0)
    expected = f"a list of {3 * count} finite numbers ({count} triplets x, y, v)"
    kind = "keypoints" if complete else "unused keypoints"
    points, _ = table.numbers("keypoints", rows, 3 * count, expected, kind, kind)
    return points.reshape(len(rows), count, 3).astype(np.float32)


def _read_masks(table: CocoTable, rows: Ints, sizes: Ints, required: bool) -> Masks | None:
    """Return every segmentation, checked, or None if not every annotation has one."""
    has, complete = _having(table, "segmentation", rows, required)
    if has is None:
        return None
    packed = []
    for row, (height, width) in zip(rows[has].tolist(), sizes[has].tolist(), strict=True):
        segmentation = table.records["annotations"][row]["segmentation"]
        kept = pack_segmentation(segmentation, height, width)
        if kept is None:
            kind = "run-length code" if isinstance(segmentation, dict) else "polygon"
            table.reject_value(
                kind if complete else "unused segmentation",
                "segmentation",
                row,
                f"polygons of at least 3 points x, y each or a run-length code of {height} x {width} pixels "
                "(masks=False leaves them out)",
            )
        else:
            packed.append(kept)
    return Masks(packed)


def _having(table: CocoTable, key: str, rows: Ints, required: bool) -> tuple[Bools | None, bool]:
    """Return which annotations have a ``key``, None if it is not to be read; and whether training uses it."""
    records = table.records["annotations"]
    has = np.array([bool(records[row].get(key)) for row in rows.tolist()], dtype=bool)
    lacking = rows[~has]
    if not len(lacking):
        return (has if required or len(rows) else None), True
    if required:
        name = "masks" if key == "segmentation" else key
        for row in lacking.tolist():
            message = f"{name}=True, but annotation {table.id_of('annotations', row)} has no {key!r}."
            table.reject(f"no {key}", "annotations", row, message)
        return has, True
    if table.report is refuse or not has.any():
        return None, False
    message = f"{len(lacking)} of {len(rows)} annotations have no {key!r}, so it is not used at all."
    table.reject(f"partial {key}", "annotations", lacking, message)
    return has, False
