"""Run a grid of trainings and report it: ``tools/ablate.py run configs/ablation/cards.yaml --root cards=FOLDER``.

Each run is a training in a process of its own. Stop the command at any moment, even by SIGKILL: started again, it
continues the run in progress from its last checkpoint and ends with the same figures.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from detmix.cli.parser import Parser, at_least, run_command

# detmix.training, and torch with it, is imported where it is used, so that --help and mistakes take no time.

RESULT = "result.json"
"""File of a finished run's figures, in its folder."""
PACKAGES = ("detmix", "torch", "torchvision", "timm", "lightning")
GRACE = 60.0
"""Seconds that a run has to save a checkpoint when the command stops."""


def make_parser(prog: str | None = None) -> Parser:
    """Make the parser of the command line."""
    parser = Parser(prog=prog, description="Run a grid of trainings, each paired by seed, and report it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train what is missing in the results")
    report = commands.add_parser("report", help="write a report of the results: Markdown and a picture")
    for command in (run, report):
        command.add_argument(
            "grid", type=Path, help="YAML of arms, sets and blocks, such as configs/ablation/cards.yaml"
        )
        command.add_argument("--results", type=Path, metavar="FILE", help="CSV of the results (results/GRID.csv)")
    run.add_argument(
        "--root", action="append", default=[], metavar="NAME=FOLDER", help="folder of a dataset that the grid names"
    )
    run.add_argument(
        "--weights_backbone", metavar="FILE", help="weights of the backbone, in place of those that the config names"
    )
    run.add_argument("--work", type=Path, metavar="FOLDER", help="folder of all runs (runs/ablation/GRID)")
    run.add_argument("--workers", type=at_least(1), default=1, help="runs at a time (%(default)s)")
    run.add_argument("--threads", type=at_least(1), default=1, help="threads of each run (%(default)s)")
    run.add_argument("--time_limit", type=at_least(1), metavar="SECONDS", help="stop after this time; save what runs")
    run.add_argument("--max_runs", type=at_least(1), metavar="N", help="stop after N finished runs")
    run.add_argument(
        "--keep", action="store_true", help="keep the folders of finished runs; without, only figures and curves stay"
    )
    run.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue with what is missing; --no-resume refuses results that are there",
    )
    report.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of report.md and its picture (beside FILE)"
    )
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run or report the grid that the command line names."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["_child"]:  # started by this command, for one run
        return _train(json.loads(given[1]))
    return run_command(make_parser(prog), run, given)


def run(args: argparse.Namespace) -> int:
    """Train what is missing, or write the report, and return the exit status."""
    from detmix.training.ablation import Results, read_grid

    results = args.results or Path("results", f"{args.grid.stem}.csv")
    grid = read_grid(args.grid)
    if args.command == "report":
        from detmix.training.ablation_report import write_report

        written = write_report(grid, Results(results), args.output or results.parent)
        sys.stdout.write(f"Wrote {written}\n")
        return 0
    roots = dict(_split_root(text) for text in args.root)
    if not args.resume and results.exists():
        raise ValueError(f"results {results} must not exist with --no-resume.")
    work = args.work or Path("runs/ablation", args.grid.stem)
    with _only_one(work):
        return Scheduler(grid, results, roots, work, args).run()


class Scheduler:
    """Start runs in order, a few at a time, and write a row for each that ends."""

    def __init__(self, grid: Any, results: Path, roots: dict[str, str], work: Path, args: argparse.Namespace) -> None:
        from detmix.training.ablation import Results, describe_weights, prepare_set

        if args.weights_backbone and not Path(args.weights_backbone).is_file():
            raise FileNotFoundError(f"weights_backbone must be a file, but there is no {args.weights_backbone}.")
        self.grid, self.work, self.args = grid, work, args
        self.results = Results(results)
        self.weights = describe_weights(args.weights_backbone or "of the config")
        self.left = self.results.missing(grid, self.weights)
        self.data = {name: prepare_set(grid, name, roots, work) for name in dict.fromkeys(run.set for run in self.left)}
        self.commit = _commit()
        self.running: dict[subprocess.Popen[bytes], Any] = {}

    def run(self) -> int:
        """Train until nothing is missing, a limit is reached, or the command is interrupted."""
        start, done, failed = time.monotonic(), 0, 0
        total = len(self.grid.runs())
        _say(f"{total - len(self.left)} of {total} runs are in {self.results.file}")
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            while self.left or self.running:
                limit = self.args.max_runs
                while self.left and len(self.running) < self.args.workers:
                    if limit is not None and done + len(self.running) >= limit:
                        break
                    self._start(self.left.pop(0))
                if not self.running:
                    break
                if self.args.time_limit is not None and time.monotonic() - start > self.args.time_limit:
                    _say("The time is up; the runs in progress save a checkpoint")
                    return self._stop()
                for process in [process for process in self.running if process.poll() is not None]:
                    run = self.running.pop(process)
                    if process.returncode == 0:
                        self._take(run)
                        done += 1
                    else:
                        failed += 1
                        _say(f"{_name(run)} failed; see {self.work / run.folder / 'log.txt'}")
                time.sleep(0.1)
        except KeyboardInterrupt:
            _say("Interrupted; the runs in progress save a checkpoint")
            self._stop()
            return 130
        return 1 if failed else 0

    def _start(self, run: Any) -> None:
        from detmix.training.ablation import as_arguments

        folder = self.work / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        options = {**self.data[run.set], **self.grid.options_of(run)}
        if self.args.weights_backbone:
            options["model.weights_backbone"] = str(Path(self.args.weights_backbone).absolute())
        order = {
            "folder": str(folder),
            "data": self.data[run.set],
            "test": self.grid.sets[run.set].get("test"),
            "arguments": ["--config", str(self.grid.config), *as_arguments(options), f"--seed_everything={run.seed}"],
        }
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.args.threads))
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "detmix.cli.ablate", "_child", json.dumps(order)],
                stdin=subprocess.PIPE,  # closes if this process is killed, which ends the run too
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,  # Ctrl-C reaches this process alone, which asks the runs to save
            )
        self.running[process] = run
        _say(f"{_name(run)} starts")

    def _take(self, run: Any) -> None:
        folder = self.work / run.folder
        figures = json.loads((folder / RESULT).read_text())
        versions = " ".join(f"{name}={_version(name)}" for name in PACKAGES)
        figures |= {
            "set": run.set,
            "arm": run.arm,
            "seed": run.seed,
            "config": self.grid.digest(run),
            "weights": self.weights,
            "commit": self.commit,
            "versions": f"python={platform.python_version()} {versions}",
        }
        self.results.add(run, figures)
        _say(f"{_name(run)}: AP {figures['AP']} after {figures['steps']} steps, {figures['seconds']} s")
        if not self.args.keep:
            shutil.rmtree(folder)

    def _stop(self) -> int:
        for process in self.running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        return 0


def _train(order: dict[str, Any]) -> int:
    """Train, or continue, one run and write its figures."""
    _end_with_parent()
    folder = Path(order["folder"])
    with _alone_in(folder):
        if (folder / RESULT).exists():
            return 0
        from detmix.cli.train import DetectorCLI
        from detmix.datasets.coco.folder import CocoFolder
        from detmix.training.evaluate import finish_run

        class RunCLI(DetectorCLI):
            def after_fit(self) -> None:
                """Skip the summary of the best checkpoint: the figures are those of the last one."""

        timer = folder / "seconds.json"
        before = json.loads(timer.read_text()) if timer.exists() else 0.0
        start = time.monotonic()
        options = ["--run_dir", str(folder / "run"), "--ckpt_path", "last", "--trainer.enable_progress_bar", "false"]
        try:
            RunCLI(args=["fit", *order["arguments"], *options])
        finally:
            timer.write_text(json.dumps(before + time.monotonic() - start))
        data = order["data"]
        files = {split: data[f"data.{split}_annotations"] for split in ("val", "train")} | {"test": order["test"]}
        datasets = {
            split: CocoFolder(
                data["data.root"], file, data["data.val_images"], crowd=True, masks=False, keypoints=False
            )
            for split, file in files.items()
            if file is not None
        }
        finish_run(folder / "run", datasets, json.loads(timer.read_text()), folder / RESULT)
    return 0


def _end_with_parent() -> None:
    """End this process when its standard input closes, as it does when the parent is killed."""

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would outlive the main thread
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process works in a folder: a run whose parent was killed takes a moment to end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        _lock(lock, wait=True)
        yield


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        if not _lock(lock, wait=False):
            raise ValueError(f"work {work} must not be in use, but another command runs the grid there.")
        yield


def _lock(file: IO[str], *, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _split_root(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not Path(folder).is_dir():
        raise ValueError(f"root must be NAME=FOLDER with a folder that exists, but it is {text!r}.")
    return name, folder


def _commit() -> str:
    """Return the commit that runs, with a plus where files differ from it; empty outside of a repository."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "detmix"], cwd=here.parents[1], capture_output=True)
    except OSError:
        return ""
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _name(run: Any) -> str:
    return f"{run.set}, {run.arm}, seed {run.seed}"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
