"""Image files beside the json: are they there, readable and of the size that it says? Headers only."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from detmix.datasets.coco.table import Images
from detmix.datasets.coco.defects import Defect

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright, 5 to 8 exchange height and width."""


class Header(NamedTuple):
    """What a file says of itself before its pixels."""

    height: int
    width: int
    format: str
    mode: str
    """Pillow's, but with 16 bits where Pillow would read them as 8."""


def read_header(file: Path) -> Header:
    """Read it.

    Raises:
        OSError: there is no image in it.
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
    except Exception as error:  # Pillow's plugins let through whatever a broken file makes them stumble over
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_orientation(file: Path) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none. Of some formats Pillow decodes the pixels for it."""
    try:
        with PIL.Image.open(file) as image:
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # of a broken file
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def check_files(file: Path, folder: Path, images: Images) -> Iterator[Defect]:
    """One defect that counts all missing files, then one for each file that is no image or not of the json's size."""
    missing, there = split_missing(file, folder, images)
    if missing:
        yield missing
    for n in there:
        if found := check_header(folder / images.names[n], images.sizes[n].tolist(), file):
            yield as_defect(found[0], images, [n], found[1])


def split_missing(file: Path, folder: Path, images: Images) -> tuple[Defect | None, list[int]]:
    """One defect that counts all missing files, and where the others stand in ``images``."""
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
    """What is wrong with the header of a file, as kind and message, where the json says ``size``."""
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
    """A defect of the images at these places of ``images``."""
    rows, ids = (tuple(values[places].tolist()) for values in (images.rows, images.ids))
    return Defect(kind, "images", rows, ids, message)
