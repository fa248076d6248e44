"""Report on a run: pictures of samples, curves and predictions, and lines of progress."""

import csv
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from detmix.targets import Target
from detmix.training.files import write_whole
from detmix.training.records import write_record
from detmix.visualize import draw_grid, draw_sample

GROUND_TRUTH, PREDICTION = "#40ff40", "#ff40c0"


class Pictures(L.Callback):
    """Write PNG files into the run folder's ``pictures/``.

    ``train.png`` shows the first training batch, and ``mixed.png`` the first mixed batch. Boxes are coloured by the
    image they came from and labelled with class and weight. ``mixed.json`` records how the whole mixed batch was mixed,
    for ``tools/preview.py --replay``. ``curves.png`` shows the loss terms and APs so far. ``predictions.png`` shows
    pairs of validation images: ground truth (green) on the left, predictions (pink) on the right.

    Args:
        num_images: Largest number of images in a grid.
        min_score: Minimum score of predictions that are drawn.
    """

    def __init__(self, num_images: int = 12, min_score: float = 0.3) -> None:
        self.num_images = num_images
        self.min_score = min_score
        self._validated: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Ask for the run folder here, where all processes do, because they agree on it together."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "pictures"

    @rank_zero_only
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Draw the first training batch and the first mixed batch."""
        images, targets = batch
        is_mixed = any(target.get("lam", 1) < 1 for target in targets)
        if images and not (path := self._folder / ("mixed.png" if is_mixed else "train.png")).exists():
            if is_mixed:
                write_record(targets, path.with_suffix(".json"))
            write_samples(images[: self.num_images], targets, pl_module.class_names, path)

    @rank_zero_only
    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Draw validation images until there are ``num_images``."""
        for image, target, prediction in zip(*batch, outputs, strict=True):
            if len(self._validated) < self.num_images:
                self._validated.append(self._draw(image, target, prediction, pl_module.class_names))

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the predictions and the curves so far."""
        if self._validated and not trainer.sanity_checking:
            _write(self._validated, self._folder / "predictions.png", columns=3)
            self.draw_curves(trainer)
        self._validated = []

    def draw_curves(self, trainer: L.Trainer) -> None:
        """Draw every loss term and AP that the CSV logger has written."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                if (log := Path(logger.log_dir) / "metrics.csv").exists():
                    draw_curves(log, self._folder / "curves.png")

    def _draw(self, image: Tensor, target: Target, prediction: Target, class_names: list[str]) -> Tensor:
        keep = prediction["scores"] >= self.min_score
        found = {key: prediction[key][keep] for key in ("boxes", "labels", "scores")}
        pair = [
            draw_sample(image, boxes, class_names, size=360, colors=[color])
            for boxes, color in ((target, GROUND_TRUTH), (found, PREDICTION))
        ]
        return draw_grid(pair, columns=2)


class ProgressLines(ProgressBar):
    """Print a line of progress after each epoch and at least once a minute, for logs and pipes.

    Args:
        seconds: Time between two lines within an epoch.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._is_enabled = True
        self._start = self._last = 0.0

    def disable(self) -> None:
        """Print no lines; Lightning calls this in all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Print lines again."""
        self._is_enabled = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the time of the epoch."""
        self._start = self._last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print a line if the last one is too old."""
        if time.monotonic() - self._last >= self.seconds:
            self._print(trainer, f", batch {batch_idx + 1} of {trainer.num_training_batches}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print a line with the last loss and the AP."""
        self._print(trainer, "")

    def _print(self, trainer: L.Trainer, where: str) -> None:
        self._last = time.monotonic()
        if self._is_enabled:
            figures = [f"{name} {float(value):.3f}" for name, value in trainer.progress_bar_metrics.items()]
            epochs = "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"
            took = f"{self._last - self._start:.0f} s"
            sys.stdout.write(f"Epoch {trainer.current_epoch + 1}{epochs}{where}: {', '.join([*figures, took])}\n")
            sys.stdout.flush()


def write_samples(images: Sequence[Tensor], targets: Sequence[Target], class_names: Sequence[str], path: Path) -> None:
    """Draw samples side by side into one PNG.

    Args:
        images: Images ``(3, H_i, W_i)``.
        targets: As many targets or more.
        class_names: Names of classes 1, 2, ...
        path: PNG file to write.
    """
    _write([draw_sample(image, target, class_names) for image, target in zip(images, targets, strict=False)], path)


def draw_curves(log: Path, path: Path) -> None:
    """Draw ``train/...`` losses and ``val/...`` APs of a CSV log over the steps into one PNG.

    Args:
        log: ``metrics.csv`` of Lightning's CSVLogger.
        path: PNG file to write.
    """
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = list(rows[0]) if rows else []
    many = sum("AP/" in key for key in keys) > 20  # classes: a legend of COCO's 80 would hide the curves
    for axes, prefix, shown, title in ((left, "train/", "", "Training loss"), (right, "val/", "AP", "Validation AP")):
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for key in keys:
            if not key.startswith(prefix) or shown not in key:
                continue
            is_class = "AP/" in key
            points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            axes.plot(
                *zip(*points, strict=True),
                label="_" if is_class and many else key.removeprefix(prefix),
                marker="." if len(points) < 30 else "",
                linewidth=0.8 if is_class else 1.5,
                linestyle=":" if is_class else "-",
            )
        axes.set(title=title, xlabel="optimizer step", ylim=(0, 1) if prefix == "val/" else (0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    write_whole(path, partial(figure.savefig, dpi=100, format="png"))


def _write(pictures: Sequence[Tensor], path: Path, columns: int = 4) -> None:
    write_whole(path, partial(TF.to_pil_image(draw_grid(pictures, columns)).save, format="PNG"))
