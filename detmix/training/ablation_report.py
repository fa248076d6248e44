"""Report an ablation: tables of means and paired differences with 95 % intervals, and a picture of curves."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

from detmix.training.ablation import Grid, Results, Run
from detmix.training.files import write_whole

LEVEL = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean with its 95 % interval; NaN bounds for fewer than two values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval by Student's t.

    Example:
        >>> print(t_interval([0.1, 0.2, 0.3]))
        0.200 [-0.048, 0.448]
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    error = float(stats.sem(values))
    if error == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(LEVEL, len(values) - 1, mean, error)
    return Interval(mean, float(low), float(high))


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its percentile bootstrap interval.

    Example:
        >>> bootstrap_interval([0.2, 0.2, 0.2])
        Interval(mean=0.2, low=0.2, high=0.2)
    """
    mean = round(float(np.mean(values)), 12)
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, round(float(low), 12), round(float(high), 12))


def verdict(interval: Interval) -> str:
    """Say what a difference shows: an interval that holds zero shows none.

    Example:
        >>> verdict(Interval(0.02, -0.01, 0.05)), verdict(Interval(0.02, 0.01, 0.03))
        ('none shown', 'higher')
    """
    if np.isnan(interval.low):
        return "one seed: none shown"
    if interval.low <= 0 <= interval.high:
        return "none shown"
    return "higher" if interval.low > 0 else "lower"


def write_report(grid: Grid, results: Results, output: Path) -> Path:
    """Write ``GRID.md`` and ``GRID.png`` from the rows of a grid's results.

    Args:
        grid: What was to run.
        results: What has run. Rows of other configurations are an error.
        output: Folder to write into.

    Returns:
        The Markdown file.

    Raises:
        ValueError: If no run has ended, or a row is of another configuration.
    """
    missing = results.missing(grid)
    planned = grid.runs()
    rows = {run: results.rows[run] for run in planned if run in results.rows}
    if not rows:
        raise ValueError(f"{results.file} has no row of {grid.file} yet.")
    name = grid.file.stem
    picture = output / f"{name}.png"
    parts = [
        f"# Ablation: {name}",
        f"{len(rows)} of {len(planned)} runs have ended. Figures are those of the last checkpoint, not of the best. "
        f"Arms of one seed start from the same weights and see the same images and augmentations in the same order. "
        f"Brackets hold 95 % intervals over seeds.",
    ]
    for dataset in dict.fromkeys(run.set for run in planned):
        parts += _describe_set(grid, dataset, {run: row for run, row in rows.items() if run.set == dataset})
    parts += _describe_missing(missing)
    parts.append(f"![AP over steps, and AP against training AP]({picture.name})")
    used = sorted({row["versions"] for row in rows.values()} | {f"commit {row['commit']}" for row in rows.values()})
    parts.append("Runs were made with " + "; ".join(used) + ".")
    output.mkdir(parents=True, exist_ok=True)
    _draw(grid, rows, picture)
    page = output / f"{name}.md"
    text = "\n\n".join(parts) + "\n"
    write_whole(page, lambda file: file.write(text.encode()))
    return page


def _describe_set(grid: Grid, dataset: str, rows: Mapping[Run, Mapping[str, str]]) -> list[str]:
    planned = [run for run in grid.runs() if run.set == dataset]
    parts = [f"## {dataset}"]
    if not rows:
        return [*parts, "No run has ended yet: nothing is measured here."]
    by_arm: defaultdict[str, dict[int, Mapping[str, str]]] = defaultdict(dict)
    for run, row in rows.items():
        by_arm[run.arm][run.seed] = row
    arms = dict.fromkeys(run.arm for run in planned)
    has_test = any(row["test_AP"] for row in rows.values())
    columns = ["AP", "AP50", "train_AP", *(["test_AP"] if has_test else [])]
    table = [["arm", "seeds", *columns]]
    for arm in arms:
        seeds = {run.seed for run in planned if run.arm == arm}
        found = by_arm.get(arm, {})
        cells = [
            str(t_interval([float(row[column]) for row in found.values() if row[column]])) if found else "not measured"
            for column in columns
        ]
        table.append([arm, f"{len(found)} of {len(seeds)}", *cells])
    parts.append(_as_table(table))
    base = by_arm.get(grid.baseline, {})
    figure = "test_AP" if has_test else "AP"
    differences = [["arm", "pairs", f"{figure} less {grid.baseline}", "bootstrap", "difference"]]
    for arm in arms:
        pairs = sorted(base.keys() & by_arm.get(arm, {}).keys())
        if arm == grid.baseline or not pairs:
            continue
        values = [float(by_arm[arm][seed][figure]) - float(base[seed][figure]) for seed in pairs]
        t, bootstrap = t_interval(values), bootstrap_interval(values)
        differences.append([arm, str(len(pairs)), str(t), str(bootstrap), verdict(t)])
    if len(differences) > 1:
        parts += ["Paired by seed:", _as_table(differences)]
    return parts


def _describe_missing(missing: Sequence[Run]) -> list[str]:
    if not missing:
        return ["## Missing", "Nothing: all runs have ended."]
    counts: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for run in missing:
        counts[run.set, run.arm].append(run.seed)
    lines = [f"* {dataset}, {arm}: seeds {', '.join(map(str, seeds))}" for (dataset, arm), seeds in counts.items()]
    return ["## Missing", "Not measured yet:", "\n".join(lines)]


def _as_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _draw(grid: Grid, rows: Mapping[Run, Mapping[str, str]], path: Path) -> None:
    sets = list(dict.fromkeys(run.set for run in rows))
    figure = Figure(figsize=(12, 4.2 * len(sets)), layout="constrained")
    axes: Any = figure.subplots(len(sets), 2, squeeze=False)
    colors = {arm: colormaps["tab20"](i % 20) for i, arm in enumerate(grid.arms)}
    for (curves, scatter), dataset in zip(axes, sets, strict=True):
        for arm in dict.fromkeys(run.arm for run in rows if run.set == dataset):
            found = [row for run, row in rows.items() if (run.set, run.arm) == (dataset, arm)]
            steps, values = _stack([row["curve"] for row in found])
            if len(steps):
                mean = values.mean(0)
                curves.plot(steps, mean, color=colors[arm], label=arm)
                if len(found) > 1:
                    half = stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * stats.sem(values, axis=0)
                    curves.fill_between(steps, mean - half, mean + half, color=colors[arm], alpha=0.15, linewidth=0)
            points = [(float(row["train_AP"]), float(row["AP"])) for row in found if row["train_AP"]]
            scatter.plot(*zip(*points, strict=True), "o", color=colors[arm], label=arm)
        curves.set(title=f"{dataset}: AP over steps", xlabel="step", ylabel="validation AP")
        scatter.set(title=f"{dataset}: AP against training AP", xlabel="training AP", ylabel="validation AP")
        for one in (curves, scatter):
            one.grid(alpha=0.3)
        curves.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _stack(curves: Iterable[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the steps that all curves share, and the values at them, ``(curves, steps)``."""
    found = []
    for curve in curves:
        points = [point.split(":") for point in curve.split()]
        found.append({int(step): float(value) for step, value in points})
    shared = sorted(set.intersection(*map(set, found))) if found else []
    return np.array(shared), np.array([[curve[step] for step in shared] for curve in found])
