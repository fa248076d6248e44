"""List what can be wrong with a dataset in COCO format, and what training does about it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Kind(NamedTuple):
    """Describe one kind of defect."""

    text: str
    """What is wrong."""
    training: Literal["refuses", "leaves out", "copes"]
    """What `CocoFolder` does: it raises, or leaves the annotation out and warns, or reads it anyway."""
    cure: str = ""
    """What a clean copy does to the record. Without a cure, an error is left out and a warning is kept."""


KINDS = {
    # records of the json
    "record": Kind("not a dict", "refuses"),
    "field": Kind("a field is missing", "refuses"),
    "type": Kind("a field of another type", "refuses"),
    "repeated record": Kind("a record that is repeated", "refuses"),
    "ambiguous id": Kind("an id of several records that differ", "refuses"),
    "shared id": Kind("an id of another annotation", "refuses", "given a new id"),
    # images of the json
    "image size": Kind("height or width not positive", "refuses"),
    "file name": Kind("a file name that leaves the image folder", "refuses"),
    "repeated file": Kind("a file listed under several ids", "copes"),
    # annotations
    "unknown image": Kind("image_id that no image has", "refuses"),
    "unknown category": Kind("category_id that no category has", "refuses"),
    "crowd flag": Kind("iscrowd neither 0 nor 1", "refuses"),
    "area": Kind("area not a finite number from 0 up", "refuses", "area deleted"),
    "box": Kind("box not 4 numbers", "refuses"),
    "box NaN": Kind("box with NaN, infinite or huge numbers", "refuses"),
    "empty box": Kind("box of zero or negative width or height", "leaves out"),
    "box outside": Kind("box wholly outside its image", "leaves out"),
    "box clipped": Kind("box over the edge of its image by more than a pixel", "copes", "box clipped"),
    "polygon": Kind("polygon with an odd count, too few or non-finite numbers", "refuses"),
    "run-length code": Kind("run-length code that is broken or of another size", "refuses"),
    "keypoints": Kind("keypoints of the wrong length or not numbers", "refuses"),
    "keypoint counts": Kind("categories with different numbers of keypoints", "refuses", "keypoints deleted"),
    "no segmentation": Kind("no mask, although masks are required", "refuses"),
    "no keypoints": Kind("no keypoints, although keypoints are required", "refuses"),
    "partial segmentation": Kind("no mask, so no masks are used at all", "copes"),
    "partial keypoints": Kind("no keypoints, so no keypoints are used at all", "copes"),
    "unused segmentation": Kind("a broken mask, not used", "copes", "mask deleted"),
    "unused keypoints": Kind("broken keypoints, not used", "copes", "keypoints deleted"),
    # image files
    "missing file": Kind("the file is missing", "refuses"),
    "no image": Kind("no readable image", "refuses"),
    "undecodable": Kind("truncated or damaged, cannot be decoded", "refuses"),
    "file size": Kind("height and width that differ from the json's", "refuses"),
    "turned": Kind(
        "the json's height and width are those after EXIF orientation", "refuses", "turned and stored again"
    ),
    "orientation": Kind("EXIF orientation, which is ignored: boxes must be in stored pixels", "copes"),
    "mislabelled": Kind("of another format than its suffix says; the content counts", "copes"),
    "grey": Kind("grey, read as RGB", "copes"),
    "CMYK": Kind("CMYK, read as RGB", "copes"),
    "16 bits": Kind("more than 8 bits per channel, read as 8 bits", "copes"),
    "link": Kind("a symbolic link to a file outside the image folder", "copes"),
}
"""Every kind of defect, by its name."""


class Defect(NamedTuple):
    """Hold one mistake of one record, or of several records."""

    kind: str
    """A key of `KINDS`."""
    section: str
    """``images``, ``annotations`` or ``categories``."""
    rows: tuple[int, ...]
    """Positions of the records in their section, from 0."""
    ids: tuple[Any, ...]
    """Ids of the records; None for a record without an id."""
    message: str
    """The file, the record, its value and what is expected."""

    @property
    def loses(self) -> bool:
        """Return whether a clean copy leaves the records out."""
        return self.severity == "error" and not KINDS[self.kind].cure

    @property
    def severity(self) -> Literal["error", "warning"]:
        """Return ``"error"`` for what training refuses or leaves out, else ``"warning"``."""
        return "warning" if KINDS[self.kind].training == "copes" else "error"


Report = Callable[[Defect], None]
"""A function that is called with each defect; it raises to stop, or returns to go on."""


def refuse(defect: Defect) -> None:
    """Raise an error for a defect that training refuses.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for any other defect that training refuses.
    """
    if KINDS[defect.kind].training == "refuses":
        raise (FileNotFoundError if defect.kind == "missing file" else ValueError)(defect.message)


def short(value: object) -> str:
    """Return the ``repr``, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def some(values: list[Any]) -> str:
    """Return the first values in words, and how many more there are."""
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED])) + more


LISTED = 10  # values that a message lists
