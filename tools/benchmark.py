"""Time detmix beside what it adds to or replaces: ``tools/benchmark.py losses``.

Reference and candidate of a case run in turns in one process, each first in every other round, so that whatever else
slows the machine slows both.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from benchmarks import Case, MissingPackageError, Section

# torch, and the sections that import it, are imported where they are used, so that --help and mistakes take no time.

SECTIONS = ("losses",)
"""Modules of ``benchmarks``."""

WARMUP_ROUNDS = 2


def interleave(case: Case, rounds: int, synchronize: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds that the reference and the candidate took in each round, both on the same random numbers."""
    import torch

    times: tuple[list[float], list[float]] = ([], [])
    turns = list(zip((case.reference, case.candidate), times, strict=True))
    for number in range(WARMUP_ROUNDS + rounds):
        for function, taken in turns:
            torch.manual_seed(number)
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            taken.append(time.perf_counter() - start)
        turns.reverse()
    return times[0][WARMUP_ROUNDS:], times[1][WARMUP_ROUNDS:]


def summarize(reference: list[float], candidate: list[float]) -> dict[str, float]:
    """Medians in milliseconds, their ratio, and the median of the rounds' ratios."""
    medians = [statistics.median(times) * 1e3 for times in (reference, candidate)]
    return {
        "reference_ms": medians[0],
        "candidate_ms": medians[1],
        "ratio_of_medians": medians[1] / medians[0],
        "median_ratio": statistics.median(c / r for r, c in zip(reference, candidate, strict=True)),
    }


def describe_machine(device: str) -> dict[str, str | None]:
    """The versions of what takes part, None where it is not installed, and the device's name."""
    import torch

    import detmix

    packages = ("torch", "torchvision", "transformers")
    versions = {name: importlib.metadata.version(name) if find_spec(name) else None for name in packages}
    cpuinfo = Path("/proc/cpuinfo")  # on Linux platform knows no more than the architecture
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    return {
        "detmix": detmix.__version__,
        **versions,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
    }


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit without the usage."""
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """The value of an option that counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text}")
    return int(text)


def writable(text: str) -> Path:
    """The value of an option that names a file to write; checked before rather than after minutes of measuring."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; is its folder there?")
    return path


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("section", nargs="+", choices=SECTIONS, help="what to time")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="which cases of the sections to run, by name")
    parser.add_argument("--rounds", type=positive, default=41, help="how often to time each case (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="how many threads torch may use (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the results to this file, too")
    return parser


def main() -> None:
    """Time the cases that the command line names, and print a row for each."""
    parser = make_parser()
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device")
    sections: dict[str, Section] = {n: importlib.import_module(f"benchmarks.{n}").SECTION for n in args.section}
    known = [name for section in sections.values() for name in section.cases]
    if unknown := [name for name in args.cases or () if name not in known]:
        parser.error(f"argument --cases: {unknown[0]} is not one of {', '.join(known)}")

    torch.set_num_threads(args.threads)
    machine = describe_machine(args.device)
    settings = {"threads": args.threads, "rounds": args.rounds}
    show(", ".join(f"{key} {value or 'missing'}" for key, value in (machine | settings).items()))
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    results = []
    for section_name, section in sections.items():
        heads = (f"{section.reference} ms", f"{section.candidate} ms", "ratio of medians", "median ratio")
        show(f"\n{section_name:12}" + "  ".join(heads) + "  sizes")
        for name in section.cases:
            if name not in (args.cases or known):
                continue
            torch.manual_seed(0)
            try:
                case = section.cases[name](torch.device(args.device))
            except MissingPackageError as error:
                show(f"{name:12}skipped: {error}")
                continue
            found = summarize(*interleave(case, args.rounds, synchronize))
            cells = (f"{value:{len(head)}.3f}" for head, value in zip(heads, found.values(), strict=True))
            show(f"{name:12}" + "  ".join(cells) + f"  {case.sizes}")
            results.append({"section": section_name, "case": name, "sizes": case.sizes, **found})
    if not results:
        parser.error("no case could be run")
    if args.json:
        args.json.write_text(json.dumps({**machine, **settings, "cases": results}, indent=2) + "\n")


def show(line: str) -> None:
    """Print a line at once, as the next takes a while."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
