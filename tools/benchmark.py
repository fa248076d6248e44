"""Time detmix beside what it replaces or adds to: ``tools/benchmark.py mix batch loader losses step growth``.

The runs of a case take turns in one process, in another order in each round, so that other load on the machine slows
all of them. Compare the ratios; the times depend on the machine and its load.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sections import Case, MissingPackageError, Section

from detmix.cli.parser import Parser, at_least, writable_file

try:
    import resource
except ImportError:  # Windows
    resource = None

# torch, and the sections that import it, are imported where they are used, so that --help and mistakes take no time.

SECTIONS = ("mix", "batch", "loader", "losses", "step", "growth")
"""The modules in ``sections``."""

WARMUP_ROUNDS = 2
TURN_SECONDS = 0.002

ROW = "  {:22}{:>12}  {:22}{:>12}{:>18}{:>14}{:>20}  {}"


class Turn(NamedTuple):
    """Hold what a call of a run took in one round."""

    seconds: float
    page_faults: float
    """First accesses to new memory, which can cost more than the arithmetic. They are few if the allocator reuses freed
    memory, which depends on all that was allocated before."""


def interleave(case: Case, rounds: int, synchronize: Callable[[], None]) -> dict[str, list[Turn]]:
    """Return what a call of each run took in each round, with the same random numbers for all runs.

    Every two rounds have a new order and its reverse, so no run is early more often than another. A run that takes less
    than ``TURN_SECONDS`` is repeated for that time, because the first call finds the caches as the run before left
    them.
    """
    import torch

    turns: dict[str, list[Turn]] = {name: [] for name in case.runs}
    calls = dict.fromkeys(case.runs, 1)
    for number in range(WARMUP_ROUNDS + rounds):
        order = random.Random(number // 2).sample(list(case.runs), len(case.runs))
        for name in reversed(order) if number % 2 else order:
            run = case.runs[name]
            case.prepare()
            torch.manual_seed(number)
            synchronize()
            faults, start = count_page_faults(), time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronize()
            seconds, faults = time.perf_counter() - start, count_page_faults() - faults
            turns[name].append(Turn(seconds / calls[name], faults / calls[name]))
            if number < WARMUP_ROUNDS:
                calls[name] = max(1, round(TURN_SECONDS / turns[name][-1].seconds))
    return {name: taken[WARMUP_ROUNDS:] for name, taken in turns.items()}


def count_page_faults() -> int:
    """Return the page faults of this process so far that read no disk; 0 if the system does not count them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def summarize(case: Case, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Return the medians, and for each comparison their ratio and the median of the ratios of all rounds."""
    times = {name: [turn.seconds for turn in taken] for name, taken in turns.items()}
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    runs = {
        name: {"median_ms": median * 1e3, "page_faults": statistics.median(turn.page_faults for turn in turns[name])}
        for name, median in medians.items()
    }
    for name, count in case.units.items():
        runs[name][f"ns_per_{case.unit}"] = medians[name] * 1e9 / count
    first, *others = case.runs
    return {
        "runs": runs,
        "comparisons": [
            {
                "run": run,
                "beside": other,
                "ratio_of_medians": medians[run] / medians[other],
                "median_ratio": statistics.median(a / b for a, b in zip(times[run], times[other], strict=True)),
            }
            for run, other in case.comparisons or [(first, other) for other in others]
        ],
    }


def measure(case: Case, rounds: int, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Time a case, print a row for each comparison, and return the summary."""
    found = summarize(case, interleave(case, rounds, synchronize))
    for comparison in found["comparisons"]:
        names = comparison["run"], comparison["beside"]
        one, other = (found["runs"][name] for name in names)
        ratios = (f"{comparison[key]:.3f}" for key in ("ratio_of_medians", "median_ratio"))
        cells = names[0], f"{one['median_ms']:.3f}", names[1], f"{other['median_ms']:.3f}", *ratios
        faults = f"{one['page_faults']:,.0f} and {other['page_faults']:,.0f}"
        key = f"ns_per_{case.unit}"
        each = f"{one[key]:,.2f} and {other[key]:,.2f} ns per {case.unit}" if key in one else ""
        show(ROW.format(*cells, faults, each).rstrip())
    return found


def describe_machine(device: str) -> dict[str, str | None]:
    """Return the date, the versions of packages (None if not installed) and the name of the device."""
    import cv2
    import torch

    import detmix

    packages = ["torch", "torchvision", "numpy", "pillow", *["transformers"] * bool(find_spec("transformers"))]
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform only knows the architecture
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "detmix": detmix.__version__,
        "transformers": None,
        **{name: importlib.metadata.version(name) for name in packages},
        "opencv": cv2.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
    }


def coco_root(text: str) -> Path:
    """Return the path of a folder in COCO format: a type for ``add_argument``."""
    from detmix.datasets.coco.folder import CocoFolder

    try:
        CocoFolder(text, masks=False, keypoints=False)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("section", nargs="+", choices=SECTIONS, help="sections to run")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="names of the cases to run (default: all)")
    parser.add_argument(
        "--rounds", type=at_least(1), default=41, help="timed rounds of each case (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=1, help="threads of torch and of OpenCV (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to run on (default: %(default)s)"
    )
    parser.add_argument(
        "--root", type=coco_root, metavar="FOLDER", help="folder in COCO format, for loader (default: a drawn one)"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the results to this json file")
    return parser


def main() -> None:
    """Time the cases that the command line names, and print rows for each case."""
    parser = make_parser()
    args = parser.parse_args()
    import cv2
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device")
    sections: dict[str, Section] = {n: importlib.import_module(f"sections.{n}").SECTION for n in args.section}
    known = [name for section in sections.values() for name in section.cases]
    if unknown := [name for name in args.cases or () if name not in known]:
        parser.error(f"argument --cases: {unknown[0]} is not one of {', '.join(known)}")
    if args.root and not any("root" in section.options for section in sections.values()):
        parser.error(f"argument --root: {', '.join(sections)} reads no images")

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    machine = describe_machine(args.device)
    settings = {"threads": args.threads, "rounds": args.rounds}
    show(", ".join(f"{key} {value or 'missing'}" for key, value in (machine | settings).items()))
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    results = []
    for section_name, section in sections.items():
        show(
            "\n"
            + ROW.format(
                section_name, "ms", "beside", "ms", "ratio of medians", "median ratio", "page faults", ""
            ).strip()
        )
        options = {name: getattr(args, name) for name in section.options}
        for name in section.cases:
            if name not in (args.cases or known):
                continue
            torch.manual_seed(0)
            try:
                case = section.cases[name](torch.device(args.device), **options)
            except MissingPackageError as error:
                show(f"{name}: skipped: {error}")
                continue
            show(f"{name}: {case.sizes}")
            with contextlib.closing(case):
                found = measure(case, args.rounds, synchronize)
            results.append({"section": section_name, "case": name, "sizes": case.sizes, **found})
            del case  # before the next is built, because both may not fit into memory
    if not results:
        parser.error("no case could be run")
    if args.json:
        args.json.write_text(json.dumps({**machine, **settings, "cases": results}, indent=2) + "\n")


def show(line: str) -> None:
    """Print a line at once, because the next takes a while."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
