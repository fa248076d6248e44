"""The sections of ``tools/benchmark.py``, a module each, with its cases in ``SECTION``."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Two callables to time, and the sizes they work on in words."""

    sizes: str
    reference: Callable[[], Any]
    candidate: Callable[[], Any]


class Section(NamedTuple):
    """What its references and its candidates are called, and functions of a device that build its cases, by name."""

    reference: str
    candidate: str
    cases: dict[str, Callable[[Any], Case]]


class MissingPackageError(Exception):
    """A case needs a package that is not installed."""
