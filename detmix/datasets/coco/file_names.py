"""File names in a json: none may lead out of the folder of images."""

from pathlib import PureWindowsPath
from typing import Any

_SUSPECT = ("..", "\\", ":", "\0/", "\0\0")


def are_plain(names: list[Any]) -> bool:
    r"""Whether all are file names, seen at a glance: True is certain, False asks for `why_unsafe` of each.

    Example:
        >>> are_plain(["1.jpg", "train/2.jpg"]), are_plain(["1.jpg", "/etc/2.jpg"])
        (True, False)
    """
    if not set(map(type, names)) <= {str}:
        return False
    joined = "\0".join(["", *names, ""])
    return joined.count("\0") == len(names) + 1 and joined.isascii() and not any(map(joined.__contains__, _SUSPECT))


def why_unsafe(name: Any) -> str | None:
    r"""What is wrong with a file name, which has to stay inside the folder it starts from on every system.

    Example:
        >>> why_unsafe("train/1.jpg")
        >>> why_unsafe("../1.jpg"), why_unsafe("C:\\1.jpg")
        ("which leads out of the image folder by '..'", 'which is not relative to the image folder')
    """
    if not isinstance(name, str) or not name:
        return "expected a file name"
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):  # half a surrogate pair has no bytes
        return "which no file can be called"
    path = PureWindowsPath(name)  # knows / and \ and drives
    if path.anchor:
        return "which is not relative to the image folder"
    if ".." in path.parts:
        return "which leads out of the image folder by '..'"
    return None
