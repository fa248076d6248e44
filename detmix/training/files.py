"""Write files whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Write a file under another name and rename it, so that a file of its own name is always complete.

    An error or a kill leaves the file that was there before.

    Args:
        path: The file; its folder is made if it is missing.
        write: Called with the open binary file.
        durable: Wait for the disk, so that the file also survives a power failure.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "deep/a.txt"), lambda file: file.write(b"text"))
        ...     Path(folder, "deep/a.txt").read_text()
        'text'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(content: Any, path: Path, *, indent: int | None = None) -> None:
    """Write a json file, whole or not at all.

    Args:
        content: What ``json.dumps`` takes.
        path: The file; its folder is made if it is missing.
        indent: Spaces a level; one line if ``None``.
    """
    text = json.dumps(content, indent=indent) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
