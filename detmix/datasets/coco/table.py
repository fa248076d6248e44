"""Read one COCO json as checked columns; each mistake is a defect that names file, record and value."""

import gc
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detmix.datasets.coco.defects import Defect, Report, refuse, short, some
from detmix.datasets.coco.values import Floats, Ints, are_numbers, are_plain, as_matrix, why_unsafe

Record = dict[str, Any]

SECTIONS = ("images", "annotations", "categories")
_MISSING = object()


class Categories(NamedTuple):
    """Hold the categories in the order of their ids."""

    rows: Ints
    """Where each stands in the file."""
    ids: Ints
    names: tuple[str, ...]


class Images(NamedTuple):
    """Hold the images in the order of their ids."""

    rows: Ints
    """Where each stands in the file."""
    ids: Ints
    names: list[str]
    sizes: Ints
    """Height and width, ``(images, 2)``."""


class CocoTable:
    """Read a json column by column; it is only kept while a dataset is constructed or checked.

    Args:
        file: The json file.
        report: Called with each defect. If it returns, as the checker's does, the records are marked in ``lost`` and
            ignored from then on, so that the next defects are found too.
        content: Content of the file, if it was read before.

    Attributes:
        records: The records of each section, which is one of `SECTIONS`.
        lost: Which records of each section have a defect without a cure.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is no json with COCO's three lists; and what ``report`` raises.
    """

    def __init__(self, file: Path, report: Report = refuse, content: Record | None = None) -> None:
        self.file, self.report = file, report
        self.content = _parse(file) if content is None else content
        self.records: dict[str, list[Record]] = {}
        self.lost: dict[str, npt.NDArray[np.bool_]] = {}
        for section in SECTIONS:
            records = self.content.get(section)
            if not isinstance(records, list):
                found = (
                    f"{section!r} is a {type(records).__name__}" if section in self.content else f"has no {section!r}"
                )
                raise ValueError(f"{file} {found}, expected a list; its keys are {short(sorted(self.content))}.")
            self.records[section] = [record if isinstance(record, dict) else {} for record in records]
            self.lost[section] = np.zeros(len(records), dtype=bool)
            for number, record in enumerate(records):
                if not isinstance(record, dict):
                    self.reject("record", section, number, f"{section}[{number}] is {short(record)}, expected a dict.")

    def categories(self) -> Categories:
        """Return the categories, checked."""
        rows, ids = self.by_id("categories")
        names = self._column("categories", "name")
        rows, ids = self._without_lost("categories", rows, ids)
        return Categories(rows, ids, tuple(str(names[row]) for row in rows))

    def images(self) -> Images:
        """Return the images, checked without their files."""
        rows, ids = self.by_id("images")
        names = self._names()
        sizes = np.stack([self._integers("images", key)[0] for key in ("height", "width")], 1)
        rows, ids = self._without_lost("images", rows, ids)
        for row in rows[(sizes[rows] <= 0).any(1)]:
            self.reject(
                "image size",
                "images",
                row,
                f"image {self.id_of('images', row)} ({names[row]}) has height, width {sizes[row].tolist()}, "
                "expected positive numbers.",
            )
        rows, ids = self._without_lost("images", rows, ids)
        return Images(rows, ids, [names[row] for row in rows], sizes[rows])

    def by_id(self, section: str) -> tuple[Ints, Ints]:
        """Return the rows of a section in the order of their ids, and the sorted ids."""
        ids, read = self._integers(section, "id")
        rows = np.flatnonzero(read)
        rows = rows[np.argsort(ids[rows], kind="stable")]
        again = np.diff(ids[rows], prepend=ids[rows[:1]] - 1) == 0
        if again.any():
            repeated = np.unique(ids[rows[again]]).tolist()
            message = f"{len(repeated)} ids of {section!r} occur more than once: {some(repeated)}."
            for kind, which in self._sort_repeated(section, rows, again).items():
                self.reject(kind, section, which, message)
        return self._without_lost(section, rows, ids[rows])

    def _column(self, section: str, key: str) -> list[Any]:
        """Return one value of every record."""
        try:
            return [record[key] for record in self.records[section]]
        except KeyError:
            for number, record in enumerate(self.records[section]):
                if key not in record and (record or not self.lost[section][number]):
                    message = f"{section}[{number}], {short(record)}, has no {key!r}."
                    self.reject("field", section, number, message)
            return [record.get(key, _MISSING) for record in self.records[section]]

    def _integers(self, section: str, key: str) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return a column that must hold integers, and which records do."""
        values = self._column(section, key)
        read = np.ones(len(values), dtype=bool)
        if not set(map(type, values)) <= {int} or (values and max(map(abs, values)) >= 2**63):
            for number, value in enumerate(values):
                if type(value) is int and abs(value) < 2**63:
                    continue
                if value is not _MISSING:
                    message = f"{key!r} of {section}[{number}] is {short(value)}, expected an int."
                    self.reject("type", section, number, message)
                values[number], read[number] = 0, False
        return np.array(values, dtype=np.int64), read

    def _names(self) -> list[str]:
        """Return the images' file names; a name that leads out of the folder is a defect."""
        names = self._column("images", "file_name")
        if not are_plain(names):
            for number, name in enumerate(names):
                if name is not _MISSING and (reason := why_unsafe(name)):
                    message = f"'file_name' of images[{number}] is {short(name)}, {reason}."
                    self.reject("file name" if isinstance(name, str) else "type", "images", number, message)
        return names

    def lookup(self, key: str, section: str, known: Ints) -> Ints:
        """Return the position of each annotation's ``key`` in the sorted ids ``known``; -1 if it is not there.

        The annotations of a lost record are lost with it, but this is not reported as a mistake of their own.
        """
        values, read = self._integers("annotations", key)
        found = read & np.isin(values, known)
        if not found.all():
            listed = [record.get("id") for record in self.records[section]]
            there = found | np.isin(values, [value for value in listed if type(value) is int and abs(value) < 2**63])
            unknown = np.flatnonzero(read & ~there)
            if len(unknown):
                self.reject(
                    f"unknown {key.removesuffix('_id')}",
                    "annotations",
                    unknown,
                    f"{key!r} of annotation {self.id_of('annotations', unknown[0])} is {values[unknown[0]]}, which is "
                    f"not among the {len(known)} known ids: {some(known.tolist())} "
                    f"({len(unknown) - 1} more annotations have unknown ones).",
                )
            self.lost["annotations"] |= ~found
        return np.where(found, np.searchsorted(known, values), -1)

    def numbers(
        self, key: str, rows: Ints, length: int, expected: str, kind: str, infinite: str
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return lists of ``length`` numbers, ``(len(rows), length)``, and which rows have such a list.

        Other values are defects of ``kind``, or of the kind ``infinite`` if only NaN or huge numbers are wrong.
        """
        values = [self.records["annotations"][row].get(key) for row in rows.tolist()]
        read = np.ones(len(rows), dtype=bool)
        if (matrix := as_matrix(values, length)) is not None:
            return matrix, read
        for n, (row, value) in enumerate(zip(rows.tolist(), values, strict=True)):
            if are_numbers(value) and len(value) == length:
                continue
            only_numbers = isinstance(value, list) and set(map(type, value)) <= {int, float} and len(value) == length
            if self.records["annotations"][row] or not self.lost["annotations"][row]:
                self.reject_value(infinite if only_numbers else kind, key, row, expected)
            values[n], read[n] = [0] * length, False
        return np.array(values, dtype=np.float64).reshape(len(rows), length), read

    def _sort_repeated(self, section: str, rows: Ints, again: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
        """Return rows whose id occurs ``again`` by kind of defect; ``rows`` are sorted by id.

        If two images or categories with one id differ, both are wrong: nobody knows which an annotation means.
        """
        records, found = self.records[section], defaultdict(set)
        first = 0
        for n in np.flatnonzero(again).tolist():
            first = first if again[n - 1] else n - 1
            row, before = int(rows[n]), int(rows[first])
            if records[row] == records[before]:
                found["repeated record"].add(row)
            elif section == "annotations":
                found["shared id"].add(row)
            else:
                found["ambiguous id"] |= {row, before}
        return {kind: sorted(which) for kind, which in found.items()}

    def _without_lost(self, section: str, rows: Ints, ids: Ints) -> tuple[Ints, Ints]:
        there = ~self.lost[section][rows]
        return rows[there], ids[there]

    def id_of(self, section: str, row: int | np.int64) -> Any:
        """Return the id of a record, of any type; None if it has no id."""
        return self.records[section][row].get("id")

    def reject(self, kind: str, section: str, rows: Any, message: str) -> None:
        """Report a defect of one row or of several."""
        rows = np.atleast_1d(rows).tolist()
        defect = Defect(
            kind, section, tuple(rows), tuple(self.id_of(section, row) for row in rows), f"{self.file}: {message}"
        )
        self.report(defect)
        self.mark_lost(defect)

    def mark_lost(self, defect: Defect) -> None:
        """Mark the records of a defect as lost if a cleaned copy is without them."""
        if defect.loses:
            self.lost[defect.section][list(defect.rows)] = True

    def reject_value(self, kind: str, key: str, row: int | np.int64, expected: str) -> None:
        """Report that an annotation's ``key`` is not what is expected."""
        record = self.records["annotations"][row]
        message = f"{key!r} of annotation {record.get('id')} is {short(record.get(key))}, expected {expected}."
        self.reject(kind, "annotations", row, message)


def _parse(file: Path) -> Record:
    collecting = gc.isenabled()
    gc.disable()  # collections would walk over json's millions of objects: a quarter of the time
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text)
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
    for section in SECTIONS:
        if text.count(f'"{section}"') > 1 and _top_keys(text).count(section) > 1:
            raise ValueError(f"{file} has {section!r} more than once, but json keeps only the last.")
    return content


def _top_keys(text: str) -> list[str]:
    """Return the keys of the outermost dict with their repetitions; it parses the json again."""
    keys: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        keys[:] = [key for key, _ in pairs]  # the outermost ends last

    json.loads(text, object_pairs_hook=keep)
    return keys
