"""Save checkpoints that survive a kill at any moment, and find the checkpoint to resume from."""

import csv
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from detmix.training.checkpoint import find_damage
from detmix.training.files import write_whole

NAMES = ("next.ckpt", "last.ckpt", "previous.ckpt")
"""Checkpoints to resume from, newest first: a complete one that is not renamed yet, the last, the previous one."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint under another name and rename it, so that a file of its own name is always complete.

    Lightning's own writer uses the system's temporary folder. A file is copied from there, not renamed, if it is on
    another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save ``checkpoint`` at ``path``, a local file or a URL that Lightning takes."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_whole(Path(path), lambda file: torch.save(checkpoint, file), durable=True)


class LastCheckpoint(Checkpoint):
    """Save ``checkpoints/last.ckpt`` in the run folder, and keep the one before it as ``previous.ckpt``.

    A checkpoint is saved before each validation, after each epoch and every ``every_n_steps`` steps. On SIGTERM or
    Ctrl-C the process finishes the step, saves a checkpoint and exits with status 143 or 130. A second Ctrl-C stops it
    at once.

    Args:
        every_n_steps: Optimizer steps between two checkpoints. Null saves none within an epoch.
    """

    def __init__(self, every_n_steps: int | None = 1000) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be null or at least 1, but it is {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._handlers: dict[int, Any] = {}
        self._signal = 0
        self._step = 0
        self._moment = ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Ask for the run folder, and handle signals in place of Lightning, which can stop in the middle of a step."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self._signal, self._step = 0, 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remember the step at which a resumed run starts."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after an optimizer step if it is time to, or if the run is told to stop."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        is_stopped = self._is_stopped(trainer)
        is_due = is_stopped or (self.every_n_steps and self._step % self.every_n_steps == 0)
        # At the end of an epoch a validation may follow, which a resumed run must not skip.
        if is_due and batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer, "step")
            if is_stopped:
                self._stop(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save, so that an interrupted validation loses no training."""
        if trainer.training or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer, "validation")
        self.on_validation_batch_end(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop if told to; `on_validation_start` has saved."""
        if trainer.state.fn == "fit" and self._signal and trainer.world_size == 1:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save after each epoch and its validation."""
        self._save(trainer, "epoch")
        if self._is_stopped(trainer):
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what the run has logged, and whether a validation follows."""
        loop = checkpoint["loops"]["fit_loop"]
        log: dict[str, Any] = {"rows": 0, "step": loop["epoch_loop.state_dict"]["_batches_that_stepped"], "next": None}
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                log["rows"] = len(_read_rows(Path(logger.log_dir) / "metrics.csv"))
        connector = trainer._logger_connector
        if self._moment == "step" and connector.should_update_logs:  # Lightning logs a step after this
            log["next"] = {name: float(value) for name, value in connector.metrics["log"].items()}
            log["next"]["epoch"] = trainer.current_epoch
        checkpoint["log"] = log
        if self._moment == "validation":
            # Lightning repeats a validation that was interrupted in a step, and skips one that had not begun.
            progress = loop["epoch_loop.val_loop.batch_progress"]
            for count in (progress["total"], progress["current"]):
                count["started"] = count["ready"] = count["processed"] + 1

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restore the signal handlers, because Lightning does not call teardown after an error."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save(self, trainer: L.Trainer, moment: str) -> None:
        fresh, last, previous = (self._folder / name for name in NAMES)
        self._moment = moment
        trainer.save_checkpoint(fresh, weights_only=False)
        self._moment = ""
        if trainer.is_global_zero:
            if last.exists():
                last.replace(previous)
            fresh.replace(last)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: stopping after this step and a checkpoint; Ctrl-C stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _is_stopped(self, trainer: L.Trainer) -> bool:
        """Return whether any process was told to stop."""
        return trainer.strategy.reduce_boolean_decision(self._signal > 0, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            sys.stderr.write(f"Stopped after step {trainer.global_step}; --ckpt_path last resumes there\n")
        raise SystemExit(128 + (self._signal or signal.SIGTERM))


def find_last(run_dir: Path) -> tuple[Path, list[str]] | None:
    """Find the checkpoint from which the newest run of a folder can resume.

    Args:
        run_dir: Folder of runs, each with ``version_<n>/checkpoints``.

    Returns:
        The newest complete checkpoint, and what is wrong with newer ones. ``None`` if there is no run, or if the newest
        run has saved no checkpoint.

    Raises:
        ValueError: if all checkpoints of the newest run are damaged.
    """
    versions = [path for path in run_dir.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    if not versions:
        return None
    folder = max(versions, key=lambda path: int(path.name.removeprefix("version_"))) / "checkpoints"
    paths = [folder / name for name in NAMES if (folder / name).is_file()]
    damages: list[str] = []
    for path in paths:
        damage = find_damage(path)
        if damage is None:
            return path, damages
        damages.append(damage)
    if damages:
        raise ValueError(f"no checkpoint of {folder.parent} can be read: {' '.join(damages)}")
    return None


@rank_zero_only
def keep_rows(logger: CSVLogger, count: int) -> None:
    """Keep the first rows of a run's log in the logger that continues it; Lightning's logger would delete them.

    Args:
        logger: Logger that has not logged yet.
        count: Number of rows that had been logged when the checkpoint was saved.
    """
    log = Path(logger.log_dir) / "metrics.csv"
    kept = log.with_name("metrics.kept.csv")  # in case this process is killed before the log is written again
    if log.exists():
        log.replace(kept)
    rows = _read_rows(kept)[:count]
    logger.experiment.metrics = [{key: value for key, value in row.items() if value} for row in rows]
    logger.save()
    kept.unlink(missing_ok=True)


def _read_rows(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    with log.open(newline="") as file:
        return list(csv.DictReader(file))
