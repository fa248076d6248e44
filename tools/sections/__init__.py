"""The sections of ``tools/benchmark.py``: one module each, with its cases in ``SECTION``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Hold functions to time in turns, by name, and the sizes they work on, in words."""

    sizes: str
    runs: Mapping[str, Callable[[], Any]]
    """First detmix's function, then those it is compared with."""
    comparisons: Sequence[tuple[str, str]] = ()
    """Pairs of runs to compare; if empty, the first run is compared with each other run."""
    unit: str = ""
    units: Mapping[str, int] = {}
    """Units of work (boxes, pixels) of a run, if the time per unit is printed too."""
    prepare: Callable[[], Any] = lambda: None
    """Called before each run and not timed: it restores what the runs change."""
    close: Callable[[], Any] = lambda: None
    """Called after the last run."""


class Section(NamedTuple):
    """Hold functions that build cases, by name. Each takes a device, and the options of the section by name."""

    cases: Mapping[str, Callable[..., Case]]
    options: tuple[str, ...] = ()
    """Options of the command line that the cases take."""


class MissingPackageError(Exception):
    """Raised when a case needs a package that is not installed."""
