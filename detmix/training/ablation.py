"""Plan the runs of an ablation: a grid of arms, sets and seeds from one YAML, and the CSV of its results."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from detmix.training.files import write_json, write_whole

FIELDS = (
    *("set", "arm", "seed", "steps", "AP", "AP50", "train_AP", "train_AP50", "test_AP", "test_AP50"),
    *("curve", "seconds", "config", "weights", "commit", "versions"),
)
"""Columns of the CSV. ``curve`` holds ``step:AP`` pairs of the validation, separated by spaces."""
_KEYS = {
    "grid": {"config", "options", "clean_share", "baseline", "arms", "sets", "blocks"},
    "set": {"root", "train", "val", "test", "images", "keep", "relabel", "leave_out", "shapes", "options"},
    "block": {"arms", "sets", "seeds"},
}


@dataclass(frozen=True)
class Run:
    """One training: an arm on a set with a seed."""

    set: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run lies below the folder of all runs."""
        return Path(_slug(self.set), _slug(self.arm), f"seed_{self.seed}")


@dataclass(frozen=True)
class Grid:
    """Arms (options by name), sets and blocks of runs, as one YAML describes them.

    Attributes:
        file: The YAML.
        config: Config of the training that all runs share.
        options: Options of the training for all runs.
        baseline: Arm that the others are compared with.
        arms: Options of the training by arm.
        sets: Datasets by name; see `prepare_set`.
        blocks: Lists of arms, sets and seeds, in the order in which they run.
        clean_share: Share of the epochs, at the end, that trains on unmixed images.
    """

    file: Path
    config: Path
    baseline: str
    arms: dict[str, dict[str, Any]]
    sets: dict[str, dict[str, Any]]
    blocks: list[dict[str, list[Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    clean_share: float = 0.0

    def runs(self) -> list[Run]:
        """List all runs in order, each once. Within a block the seeds come first: every prefix compares all arms."""
        found = [
            Run(name, arm, seed)
            for block in self.blocks
            for seed in block["seeds"]
            for name in block["sets"]
            for arm in block["arms"]
        ]
        return list(dict.fromkeys(found))

    def options_of(self, run: Run) -> dict[str, Any]:
        """Merge the options of a run: those of the grid, then of its set, then of its arm."""
        options = {**self.options, **self.sets[run.set].get("options", {}), **self.arms[run.arm]}
        mixup = options.get("data.mixup")
        if self.clean_share and mixup is not None:
            epochs = options.get("trainer.max_epochs")
            if epochs is None:
                raise ValueError(
                    f"clean_share of {self.file} needs trainer.max_epochs among the options of {run.set!r}."
                )
            stop = round((1 - self.clean_share) * epochs)
            options["data.mixup"] = {**mixup, "init_args": {"stop": stop, **mixup.get("init_args", {})}}
        return options

    def digest(self, run: Run) -> str:
        """Return a checksum of all that determines a run but the code and the images."""
        parts = [self.config.read_text(), self.options_of(run), self.sets[run.set], run.seed]
        for key in ("keep", "relabel", "leave_out"):
            if name := self.sets[run.set].get(key):
                parts.append((self.file.parent / name).read_text())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_grid(file: str | Path) -> Grid:
    """Read a grid.

    Raises:
        FileNotFoundError: If the file, or one that it names, is missing.
        ValueError: If a key is unknown or missing, or a name is not defined. The message names it.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"grid must be a file, but there is no {file}.")
    content = yaml.safe_load(file.read_text())
    _check_keys(content, _KEYS["grid"], _KEYS["grid"] - {"options", "clean_share"}, str(file))
    for name, given in content["sets"].items():
        _check_keys(given, _KEYS["set"], set(), f"set {name!r} of {file}")
    for i, block in enumerate(content["blocks"]):
        _check_keys(block, _KEYS["block"], _KEYS["block"], f"block {i} of {file}")
        for key, known in (("arms", content["arms"]), ("sets", content["sets"])):
            if unknown := [name for name in block[key] if name not in known]:
                raise ValueError(
                    f"{key} of block {i} of {file} must be of {', '.join(known)}, but hold {unknown[0]!r}."
                )
    if content["baseline"] not in content["arms"]:
        raise ValueError(
            f"baseline of {file} must be one of {', '.join(content['arms'])}, but it is {content['baseline']!r}."
        )
    config = file.parent / content.pop("config")
    if not config.is_file():
        raise FileNotFoundError(f"config of {file} must be a file, but there is no {config}.")
    arms = {name: options or {} for name, options in content.pop("arms").items()}
    return Grid(file=file, config=config, arms=arms, **content)


def describe_weights(weights: str | None) -> str:
    """Name what a backbone starts from: a file by its name and the start of its SHA-256."""
    if weights is None or not Path(weights).is_file():
        return str(weights)
    return f"{Path(weights).name}:{hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]}"


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Spell options as the command line takes them.

    Example:
        >>> as_arguments({"data.mixup": None, "model.options": {"min_size": 160}})
        ['--data.mixup=null', '--model.options={"min_size": 160}']
    """
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


class Results:
    """Rows of finished runs in a CSV, which is written whole or not at all.

    Args:
        file: The CSV. It may not exist yet.

    Raises:
        ValueError: If the file has other columns.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.rows: dict[Run, dict[str, str]] = {}
        if self.file.exists():
            with self.file.open(newline="") as handle:
                reader = csv.DictReader(handle)
                if tuple(reader.fieldnames or ()) != FIELDS:
                    raise ValueError(
                        f"{self.file} must have the columns {', '.join(FIELDS)}, but has {reader.fieldnames}."
                    )
                for row in reader:
                    self.rows[Run(row["set"], row["arm"], int(row["seed"]))] = row

    def missing(self, grid: Grid, weights: str | None = None) -> list[Run]:
        """List the runs of a grid without a row, in order.

        Args:
            grid: What is to run.
            weights: What the backbone starts from, as rows record it; ``None`` accepts any.

        Raises:
            ValueError: If a row is of another configuration of its run, or started from other weights.
        """
        left = []
        for run in grid.runs():
            if run not in self.rows:
                left.append(run)
            elif self.rows[run]["config"] != grid.digest(run):
                raise ValueError(
                    f"{self.file} has a row of {run.set}, {run.arm}, seed {run.seed} with config "
                    f"{self.rows[run]['config']}, but {grid.file} now means {grid.digest(run)}: move the file away, or "
                    f"delete the rows that are to run anew."
                )
            elif weights is not None and self.rows[run]["weights"] != weights:
                raise ValueError(
                    f"{self.file} has rows that start from {self.rows[run]['weights']}, but these are {weights}."
                )
        return left

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Add the row of a run and write the file, the rows in order of set, arm and seed."""
        self.rows[run] = {key: str(figures.get(key, "")) for key in FIELDS}
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[key] for key in sorted(self.rows, key=lambda run: (run.set, run.arm, run.seed)))
        write_whole(self.file, lambda file: file.write(text.getvalue().encode()))


def prepare_set(grid: Grid, name: str, roots: Mapping[str, str], work: Path) -> dict[str, Any]:
    """Write the annotations of a set and return the options of the data.

    A set names its ``root`` (one of ``roots``) and its json files (``train``, ``val``, ``test``), or draws ``shapes``.
    Files of lists beside the grid change its training annotations: ``keep`` (file names of images, one a line),
    ``relabel`` (lines of annotation id and category id) and ``leave_out`` (annotation ids).

    Raises:
        ValueError: If the root is unknown, or a list names what the json does not have.
    """
    given = grid.sets[name]
    if "shapes" in given:
        from detmix.datasets.shapes import draw_shapes

        root = Path(draw_shapes(work / "sets" / _slug(name), **given["shapes"])).absolute()
    elif given.get("root") in roots:
        root = Path(roots[given["root"]]).absolute()
    else:
        known = ", ".join(roots) or "none"
        raise ValueError(f"root of set {name!r} must be given as --root {given.get('root')}=FOLDER; given: {known}.")
    options = {"data.root": str(root)}
    images = given.get("images", "images")
    for split in ("train", "val"):
        options[f"data.{split}_annotations"] = given.get(split, f"annotations/instances_{split}.json")
        options[f"data.{split}_images"] = images
    if {"keep", "relabel", "leave_out"} & given.keys():
        source = root / options["data.train_annotations"]
        content = _change(json.loads(source.read_text()), grid.file.parent, given)
        changed = (work / "sets" / f"{_slug(name)}.json").absolute()
        write_json(content, changed)
        options["data.train_annotations"] = str(changed)
    return options


def _change(content: dict[str, Any], folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    def lines(key: str) -> Iterator[list[str]]:
        for line in (folder / given[key]).read_text().splitlines():
            if words := line.partition("#")[0].split():
                yield words

    ids = {annotation["id"]: annotation for annotation in content["annotations"]}
    if "keep" in given:
        names = {words[0] for words in lines("keep")}
        kept = [image for image in content["images"] if image["file_name"] in names]
        _check_found(names, {image["file_name"] for image in kept}, "keep", given)
        there = {image["id"] for image in kept}
        content["images"] = kept
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in there]
    if "relabel" in given:
        pairs = {int(annotation): int(category) for annotation, category in lines("relabel")}
        _check_found(set(pairs), set(ids), "relabel", given)
        _check_found(set(pairs.values()), {category["id"] for category in content["categories"]}, "relabel", given)
        content["annotations"] = [
            {**a, "category_id": pairs.get(a["id"], a["category_id"])} for a in content["annotations"]
        ]
    if "leave_out" in given:
        gone = {int(words[0]) for words in lines("leave_out")}
        _check_found(gone, set(ids), "leave_out", given)
        content["annotations"] = [a for a in content["annotations"] if a["id"] not in gone]
    return content


def _check_found(named: set[Any], there: set[Any], key: str, given: Mapping[str, Any]) -> None:
    if missing := sorted(named - there):
        raise ValueError(f"{key} of {given[key]} must name what the json has, but {missing[0]!r} is not in it.")


def _check_keys(content: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping, but it is a {type(content).__name__}.")
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{where} must have keys of {', '.join(sorted(known))}, but has {unknown[0]!r}.")
    if missing := sorted(needed - set(content)):
        raise ValueError(f"{where} must have {', '.join(sorted(needed))}, but {missing[0]!r} is missing.")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def read_curve(log: Path) -> Sequence[tuple[int, float]]:
    """Read the validation AP over steps from the ``metrics.csv`` of a run."""
    with log.open(newline="") as file:
        return [(int(row["step"]), float(row["val/AP"])) for row in csv.DictReader(file) if row.get("val/AP")]
