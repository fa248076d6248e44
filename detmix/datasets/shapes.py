"""Draw a small dataset of shapes in COCO format, for demos and tests, without a download."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

_VERSION = 1  # raised when the drawing changes, so that older datasets are drawn again
_MARKER = "shapes.json"  # holds the arguments; written last
_OURS = re.compile(rf"{re.escape(_MARKER)}|images/(train|val)_\d+\.png|annotations/instances_(train|val)\.json")

CLASSES = ("circle", "square", "triangle")
KEYPOINTS = ("center", "top", "right", "bottom", "left")  # outermost points exist for any rotation, and for a circle
SKELETON = ((1, 2), (1, 3), (1, 4), (1, 5))  # COCO counts from 1
_SIZES = ((128, 128), (96, 120), (120, 96), (112, 112), (96, 128), (128, 96), (96, 96))  # height, width
_MIN_VISIBLE = 0.5  # of a shape's full area; a shape that shows less is not drawn

Array = npt.NDArray[Any]


def draw_shapes(root: str | os.PathLike[str], *, num_train: int = 320, num_val: int = 64, seed: int = 0) -> Path:
    """Draw circles, squares and triangles into ``root``, in COCO format with boxes, masks and keypoints.

    Images have sides of 96 to 128 pixels, portrait, landscape and square, with textured backgrounds. Colours and
    textures do not depend on the class. Shapes are 20 to 70 pixels wide, tilted, and can hide each other. Masks and
    boxes cover the visible part, which is at least half of the shape. One image in 20 has no object, one in 10 is
    crowded (8 to 12 objects), and one in 16 has a cluster of tiny shapes that is annotated as crowd (``iscrowd=1``).
    The five keypoints are the center of a shape and its outermost points; v is 2 if visible, 1 if hidden by another
    shape, 0 if outside the image.

    The same arguments and version of Pillow give the same bytes. A dataset that exists is used again; if it is damaged
    or has other arguments, it is drawn again. The images are drawn into a temporary folder beside ``root``, which is
    renamed when complete, so interruptions and other processes that draw the same dataset do no harm.

    Args:
        root: Dataset folder; it is made with its parents if missing.
        num_train: Number of images of ``annotations/instances_train.json``.
        num_val: Number of images of ``annotations/instances_val.json``.
        seed: Seed of the images.

    Returns:
        ``root``, for ``CocoFolder(draw_shapes(root))``.

    Raises:
        ValueError: if a number of images is below 1, or the seed is below 0.
        FileExistsError: if ``root`` holds files that were not drawn here; nothing is changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = draw_shapes(f"{folder}/shapes", num_train=2, num_val=1)
        ...     sorted(str(path.relative_to(root)) for path in root.glob("*/*"))
        ['annotations/instances_train.json', 'annotations/instances_val.json', 'images/train_00000.png', \
'images/train_00001.png', 'images/val_00000.png']
    """
    for name, number, least in (("num_train", num_train, 1), ("num_val", num_val, 1), ("seed", seed, 0)):
        if number < least:
            raise ValueError(f"{name} is {number}, expected at least {least}.")
    arguments = {"version": _VERSION, "num_train": num_train, "num_val": num_val, "seed": seed}
    final = Path(root).resolve()
    if _is_drawn(final, arguments):
        return Path(root)
    _refuse_foreign(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        for split, (name, number) in enumerate((("train", num_train), ("val", num_val))):
            _draw_split(fresh, name, number, (seed, split))
        (fresh / _MARKER).write_text(json.dumps({**arguments, "sha256": _checksum(fresh)}))
        _move(fresh, final, arguments)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(root)


def _is_drawn(root: Path, arguments: dict[str, int]) -> bool:
    try:
        marker = json.loads((root / _MARKER).read_text())
        return bool(marker == {**arguments, "sha256": _checksum(root)})
    except (OSError, ValueError):  # missing, cut short, or moved away by another process
        return False


def _checksum(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.glob("*/*")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _refuse_foreign(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"root {root} is a file, expected a folder.")
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    foreign = [name for name in found if not _OURS.fullmatch(name) and name not in ("images", "annotations")]
    if found and _MARKER not in found:
        foreign = foreign or found
    if foreign:
        raise FileExistsError(
            f"root {root} holds {len(foreign)} files or folders that draw_shapes did not make, such as {foreign[0]}; "
            "expected a new or empty folder, or one that draw_shapes made."
        )


def _move(fresh: Path, final: Path, arguments: dict[str, int]) -> None:
    """Move the complete dataset to its place; other processes may do the same."""
    outdated = fresh.with_suffix(".old")
    for attempts_left in range(4, -1, -1):
        if _is_drawn(final, arguments):
            return
        with contextlib.suppress(FileNotFoundError):  # nothing was there, or another process has just moved it
            _refuse_foreign(final)
            final.rename(outdated)
            shutil.rmtree(outdated, ignore_errors=True)
        try:
            fresh.rename(final)
            return
        except OSError:  # another process has just moved its dataset there
            if not attempts_left:
                raise


def _draw_split(root: Path, split: str, number: int, seed: tuple[int, ...]) -> None:
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(number):
        rng = np.random.default_rng([*seed, index])  # a stream per image: a longer dataset starts with the shorter
        pixels, objects = _draw_image(rng, index)
        name = f"{split}_{index:05d}.png"
        PIL.Image.fromarray(pixels).save(root / "images" / name, compress_level=4)
        height, width = pixels.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        annotations += [{"id": len(annotations) + n, "image_id": index + 1, **o} for n, o in enumerate(objects, 1)]
    categories = [
        {"id": number, "name": name, "keypoints": KEYPOINTS, "skeleton": SKELETON}
        for number, name in enumerate(CLASSES, 1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _draw_image(rng: np.random.Generator, index: int) -> tuple[Array, list[dict[str, Any]]]:
    """Draw one image, uint8 (H, W, 3), with its annotations; the index decides if it is empty or crowded."""
    height, width = _SIZES[index % len(_SIZES)]
    empty, crowded, cluster = index % 20 == 6, index % 10 == 3, index % 16 == 5
    number = 0 if empty else rng.integers(8, 13) if crowded else rng.integers(1, 6)
    largest = 40 if crowded else 70
    pixels = _texture(rng, height, width)
    owner = np.full((height, width), -1)  # the shape that is visible at a pixel
    shapes: list[_Shape] = []
    kinds = ["cluster"] * cluster + ["single"] * int(number)
    for kind in kinds:
        for _ in range(60):  # attempts to find a place where no shape is hidden too much
            shape = _draw_single(rng, height, width, largest) if kind == "single" else _draw_cluster(rng, height, width)
            seen = np.where(shape.mask, len(shapes), owner)
            counts = np.bincount(seen[seen >= 0], minlength=len(shapes) + 1)
            if all(count >= _MIN_VISIBLE * other.area for count, other in zip(counts, [*shapes, shape], strict=True)):
                owner = seen
                shapes.append(shape)
                pixels = _paint(rng, pixels, shape.mask)
                break
    noise = rng.normal(0, 4, pixels.shape[:2])[..., None]
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels, [_annotate(shape, owner == number) for number, shape in enumerate(shapes)]


class _Shape:
    """Hold one object: its mask in the image (H, W), its full area, and its keypoints (K, 2), also beyond the edge."""

    def __init__(self, label: int, mask: Array, area: float, points: Array | None) -> None:
        self.label, self.mask, self.area, self.points = label, mask, area, points


def _draw_single(rng: np.random.Generator, height: int, width: int, largest: int) -> _Shape:
    center = rng.uniform(0.1, 0.9, 2) * (width, height)
    radius = math.exp(rng.uniform(math.log(20), math.log(largest))) / 2
    return _shape(int(rng.integers(1, len(CLASSES) + 1)), center, radius, _angle(rng), height, width)


def _draw_cluster(rng: np.random.Generator, height: int, width: int) -> _Shape:
    label = int(rng.integers(1, len(CLASSES) + 1))
    center = rng.uniform(0.25, 0.75, 2) * (width, height)
    tiny = [
        _shape(label, center + rng.normal(0, 12, 2), rng.uniform(3, 5), _angle(rng), height, width)
        for _ in range(rng.integers(8, 16))
    ]
    mask = np.any([shape.mask for shape in tiny], axis=0)
    return _Shape(label, mask, max(mask.sum(), 1), None)


def _angle(rng: np.random.Generator) -> float:
    """Draw a tilt that leaves no edge level or upright, where a whole edge would be outermost."""
    return math.radians(rng.choice([-1, 1]) * rng.uniform(7, 20))


def _shape(label: int, center: Array, radius: float, angle: float, height: int, width: int) -> _Shape:
    """Make a circle of the radius, or a polygon of about its size."""
    y, x = np.mgrid[:height, :width] + 0.5  # pixel centers; coordinates have COCO's origin, the image's corner
    x, y = x - center[0], y - center[1]
    if CLASSES[label - 1] == "circle":
        mask, area = x**2 + y**2 <= radius**2, math.pi * radius**2
        rim = radius * np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
    else:
        corners = 4 if CLASSES[label - 1] == "square" else 3
        upright = math.pi / 4 if corners == 4 else -math.pi / 2  # y points down: a corner at the top
        turns = upright + angle + 2 * math.pi * np.arange(corners) / corners
        radius *= 1.15  # a polygon in the circle looks smaller than the circle
        inner = radius * math.cos(math.pi / corners)
        sides = turns + math.pi / corners  # where the sides face
        mask = np.all([x * math.cos(side) + y * math.sin(side) <= inner for side in sides], axis=0)
        area = corners * inner * radius * math.sin(math.pi / corners)
        vertices = radius * np.stack([np.cos(turns), np.sin(turns)], 1)
        outermost = [vertices[:, 1].argmin(), vertices[:, 0].argmax(), vertices[:, 1].argmax(), vertices[:, 0].argmin()]
        rim = vertices[outermost]
    rim *= 1 - 1 / radius  # one pixel inwards, onto the shape
    return _Shape(label, mask, area, center + np.concatenate([np.zeros((1, 2)), rim]))


def _annotate(shape: _Shape, visible: Array) -> dict[str, Any]:
    """Annotate the visible part of a shape, mask (H, W); coordinates are in pixels."""
    height, width = visible.shape
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    left, top = int(columns[0]), int(rows[0])
    triplets = np.zeros((len(KEYPOINTS), 3))
    for triplet, (x, y) in zip(triplets, shape.points if shape.points is not None else [], strict=False):
        if 0 <= x < width and 0 <= y < height:
            row, column = int(y), int(x)
            around = visible[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            triplet[:] = round(x, 2), round(y, 2), 2 if around.any() else 1
    return {
        "category_id": shape.label,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(visible.sum()),
        "iscrowd": int(shape.points is None),
        "segmentation": {"size": [height, width], "counts": _run_lengths(visible)},
        "keypoints": triplets.flatten().tolist(),
        "num_keypoints": int((triplets[:, 2] > 0).sum()),
    }


def _run_lengths(mask: Array) -> list[int]:
    """Return COCO's uncompressed code: lengths of the runs of 0, 1, 0, ... down the columns."""
    pixels = np.concatenate([[0], mask.flatten(order="F")])
    changes = np.flatnonzero(np.diff(pixels))
    return np.diff(changes, prepend=0, append=mask.size).tolist()  # type: ignore[no-any-return]


def _paint(rng: np.random.Generator, pixels: Array, mask: Array) -> Array:
    """Paint a mask with a texture whose mean differs from the pixels behind it."""
    behind = pixels[mask].mean(0)
    while True:
        texture = _texture(rng, *mask.shape)
        if np.abs(texture[mask].mean(0) - behind).max() > 90:
            return np.where(mask[..., None], texture, pixels)


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Mix two colours by a pattern, float (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    patterns: tuple[Callable[[], Array], ...] = (
        lambda: rng.uniform(0, 1, (height, width)),
        lambda: (along // (period / 2)) % 2,
        lambda: (along - along.min()) / np.ptp(along),
        lambda: (along // period + across // period) % 2,
    )
    share = patterns[rng.integers(len(patterns))]()[..., None]
    first = rng.uniform(20, 235, 3)
    second = np.clip(first + rng.uniform(-40, 40, 3), 0, 255)
    return share * first + (1 - share) * second
