"""Check image files by their headers, and read their pixels."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from detmix.datasets.coco.defects import Defect
from detmix.datasets.coco.table import Images
from detmix.mixing.blend_cpu import copy_pixels

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces their removal; Pillow reads the same files
    decode_jpeg = None

ORIENTATION = 0x0112
"""EXIF's tag of the orientation; 1 is upright, 5 to 8 exchange height and width."""


class Header(NamedTuple):
    """Hold what the header of an image file says."""

    height: int
    width: int
    format: str
    mode: str
    """Pillow's mode; also for files of 16 bits that Pillow reads as 8 bits."""


def read_header(file: Path) -> Header:
    """Read the header of an image file.

    Raises:
        OSError: if the file holds no image.
    """
    try:
        with PIL.Image.open(file) as image:
            packing = image.tile[0][3] if image.tile else None  # such as RGB;16B
            packing = packing[0] if isinstance(packing, tuple) and packing else packing
            deep = isinstance(packing, str) and packing.endswith((";16B", ";16L", ";16N"))
            mode = packing if deep and isinstance(packing, str) else image.mode
            return Header(image.height, image.width, image.format or "", mode)
    except OSError:
        raise
    except Exception as error:  # Pillow's plugins raise other errors on broken files
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_orientation(file: Path) -> int:
    """Return EXIF's orientation, 1 to 8; 1 if there is none. For some formats Pillow decodes the pixels."""
    try:
        with PIL.Image.open(file) as image:
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # a broken file can raise any
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def find_defective_files(file: Path, folder: Path, images: Images) -> Iterator[Defect]:
    """Yield one defect of all missing files, then one of each file that is no image or has another size."""
    missing, there = split_missing(file, folder, images)
    if missing:
        yield missing
    for n in there:
        if found := check_header(folder / images.names[n], images.sizes[n].tolist(), file):
            yield as_defect(found[0], images, [n], found[1])


def split_missing(file: Path, folder: Path, images: Images) -> tuple[Defect | None, list[int]]:
    """Return one defect of all missing files, and the positions in ``images`` of the other files."""
    there = [_is_file(folder / name) for name in images.names]
    gone = [n for n, found in enumerate(there) if not found]
    if not gone:
        return None, list(range(len(there)))
    message = (
        f"{folder / images.names[gone[0]]} is missing, which {file} lists; "
        f"{len(gone) - 1} more of its {len(there)} images are missing too."
    )
    return as_defect("missing file", images, gone, message), [n for n, found in enumerate(there) if found]


def check_header(path: Path, size: list[int], file: Path) -> tuple[str, str] | None:
    """Return what is wrong with the header of a file, as kind and message, or None; the json says ``size``."""
    try:
        header = read_header(path)
    except OSError as error:
        return "no image", f"{path}, listed in {file}, is no readable image: {error}"
    height, width = header.height, header.width
    if [height, width] == size:
        return None
    message = f"{path} is {height} high and {width} wide, but {file} says {size[0]} and {size[1]}"
    if [width, height] == size and (orientation := read_orientation(path)) >= 5:
        return "turned", f"{message}, its size after EXIF orientation {orientation}, which training ignores."
    return "file size", f"{message}."


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def as_defect(kind: str, images: Images, places: list[int], message: str) -> Defect:
    """Make a defect of the images at some places of ``images``."""
    rows, ids = (tuple(values[places].tolist()) for values in (images.rows, images.ids))
    return Defect(kind, "images", rows, ids, message)


JPEG = b"\xff\xd8\xff"
"""The first bytes of a JPEG file."""


def read_rgb(path: Path) -> Tensor:
    """Read the pixels of a file, uint8 ``(3, H, W)``, RGB.

    torchvision's JPEG decoder returns the same pixels as Pillow in half the time.

    Raises:
        OSError: if the file is missing or cannot be decoded. The message names it.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if decode_jpeg is not None and data[:3].tobytes() == JPEG:
            # If the file is damaged or libjpeg is missing, Pillow reads the file, or its error says more.
            with contextlib.suppress(RuntimeError):
                return _as_planes(decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB))
        with PIL.Image.open(io.BytesIO(data.tobytes())) as picture:
            return _as_planes(torch.from_numpy(np.array(_as_rgb(picture))).permute(2, 0, 1))
    except Exception as error:  # Pillow's plugins raise other errors on broken files
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # its message is the address of the bytes
        raise OSError(f"{path} cannot be decoded: {'no known image format' if unknown else error}") from error


def _as_planes(pixels: Tensor) -> Tensor:
    planes = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    copy_pixels(pixels, planes)
    return planes


def _as_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255 (mode I or, in newer versions, I;16)
        levels = np.asarray(picture).astype(np.float64) / 257
        picture = PIL.Image.fromarray(levels.round().astype(np.uint8))
    elif "transparency" in picture.info:  # Pillow warns if a palette loses its transparency in one step
        picture = picture.convert("RGBA")
    return picture.convert("RGB")
