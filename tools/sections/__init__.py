"""The sections of ``tools/benchmark.py``, a module each, with its cases in ``SECTION``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Callables to time in turns, by name, and the sizes they work on in words."""

    sizes: str
    runs: Mapping[str, Callable[[], Any]]
    """detmix's first, then what it is compared with."""
    comparisons: Sequence[tuple[str, str]] = ()
    """Which run is compared with which; if empty, the first with each of the others."""
    unit: str = ""
    units: Mapping[str, int] = {}
    """How many units of work (boxes, pixels) a run does, if its time is to be told for one, too."""
    prepare: Callable[[], Any] = lambda: None
    """Called before each run, outside of the time: it restores what the runs change."""
    close: Callable[[], Any] = lambda: None
    """Called when all is timed."""


class Section(NamedTuple):
    """Functions that build cases, by name. Each takes a device, and the section's options by name."""

    cases: Mapping[str, Callable[..., Case]]
    options: tuple[str, ...] = ()
    """Which options of the command line its cases want to know."""


class MissingPackageError(Exception):
    """A case needs a package that is not installed."""
