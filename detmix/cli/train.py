"""The commands fit and validate: Lightning's command line with the detector, the data and a run folder."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import distributed

from detmix.cli.config_parser import ConfigParser
from detmix.training.callbacks import Pictures, ProgressLines
from detmix.training.checkpoint import read_checkpoint
from detmix.training.data import DetectionData, as_seed
from detmix.training.module import DetectorModule, NonFiniteLossError
from detmix.training.resume import AtomicCheckpointIO, LastCheckpoint, find_last, keep_rows

NOISE = (
    ".*treespec, LeafSpec.* is deprecated",  # Lightning's own use of torch
    "Experiment logs directory .* exists and is not empty",  # two loggers share the run folder on purpose
    "Checkpoint directory .* exists and is not empty",  # a resumed run's is not
    "The dirpath has changed from",  # a checkpoint of one run can start another
    r"\s*Dump of a value that does not round-trip",  # tuples are lists in the saved config
    r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen batch norms
    "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler resumes where it stopped
)
"""Patterns of warnings that a user can do nothing about."""


DESCRIPTIONS: dict[str, Any] = {
    "description": "Train or validate a detector.",
    "fit": {"description": "Train a detector. Any option can also be set in a config: --config configs/demo.yaml."},
    "validate": {"description": "Compute the COCO AP of a checkpoint, which --ckpt_path names."},
}


class DetectorCLI(LightningCLI):
    """Run ``fit`` or ``validate``; every argument of module, data, trainer and callbacks is an option."""

    def __init__(self, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                for message in NOISE:
                    warnings.filterwarnings("ignore", message)
                super().__init__(
                    DetectorModule,
                    DetectionData,
                    seed_everything_default=0,
                    auto_configure_optimizers=False,
                    save_config_callback=ConfigCallback,
                    save_config_kwargs={"overwrite": True},
                    parser_class=ConfigParser,
                    **kwargs,
                )
        except (NonFiniteLossError, OSError) as error:  # of an error in a worker, the last line is the message
            sys.exit(f"error: {str(error).strip().splitlines()[-1]}")
        if distributed.is_initialized():  # its threads would sometimes abort the process when it ends
            distributed.destroy_process_group()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands that are used here."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add options of checkpoints and pictures, and take the classes and the seed from the data."""
        for name in ("num_classes", "class_names"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.add_argument(
            "--run_dir",
            default=None,
            type=str | None,
            help="Folder in which each run gets a folder version_<n> (runs/<config> if null).",
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=as_seed)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/AP",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_classes(self) -> None:
        """Build everything and read both splits; a mistake in the options or the data exits with one line."""
        try:
            path = self._find_checkpoint()
            super().instantiate_classes()
            self.datamodule.setup("fit")
            if self.subcommand == "fit":
                self.datamodule.check_batch_size()
        except (ValueError, OSError, MisconfigurationException) as error:
            self.parser.error(str(error))
        if self.subcommand:
            self.config_init[self.subcommand]["ckpt_path"] = path
            self.config_init[self.subcommand]["weights_only"] = True

    def _find_checkpoint(self) -> str | None:
        """Return the checkpoint that ``ckpt_path`` means; note the folder and the log of a run that is resumed."""
        path: str | None = self._get(self.config, "ckpt_path")
        self._version: str | None = None
        if path == "last":
            found = find_last(self._run_dir())
            if found is None:
                sys.stderr.write(f"No checkpoint in the newest run of {self._run_dir()}: starting from scratch\n")
                return None
            path = str(found[0])
            sys.stderr.write("".join(f"{damage}\n" for damage in found[1]) + f"Resuming from {path}\n")
            self._log = read_checkpoint(found[0])["log"]
            self._version = found[0].parent.parent.name if self.subcommand == "fit" else None
        elif path not in (None, "best", "hpc") and "://" not in path:
            read_checkpoint(Path(path))
        return path

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Log to TensorBoard and CSV in the run folder, unless loggers are configured."""
        config = self._get(self.config_init, "trainer")
        if config["logger"] is None or config["logger"] is True:
            kwargs["logger"] = self._loggers()
        plugins = config["plugins"] or []
        config["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        config["use_distributed_sampler"] = False  # the data module distributes the images
        progress = RichProgressBar() if sys.stdout.isatty() else ProgressLines()
        bar = [] if config["enable_progress_bar"] is False else [progress]
        config["callbacks"] = [*bar, LearningRateMonitor("step"), *(config["callbacks"] or [])]
        return super().instantiate_trainer(**kwargs)

    def _run_dir(self) -> Path:
        config = Path(str((self._get(self.config, "config") or ["default"])[-1]))
        # The config.yaml that a run saved starts another run beside it.
        default = config.parent.parent if config.name == "config.yaml" else Path("runs", config.stem)
        return Path(self._get(self.config, "run_dir") or default)

    def _loggers(self) -> list[Any]:
        if self._version is None:
            board = TensorBoardLogger(self._run_dir(), name="")
            return [board, CSVLogger(board.save_dir, name="", version=board.version)]
        rows, step, row = self._log["rows"], self._log["step"], self._log["next"]
        board = TensorBoardLogger(self._run_dir(), name="", version=self._version, purge_step=step + 1)
        log = CSVLogger(board.save_dir, name="", version=self._version)
        keep_rows(log, rows)
        for logger in (board, log):
            if row:
                logger.log_metrics(row, step)
        return [board, log]

    def after_fit(self) -> None:
        """Print the COCO AP of the best checkpoint, what was skipped, and the run folder."""
        if self._get(self.config, "trainer")["fast_dev_run"]:
            return
        monitored = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = next((c.best_model_path for c in monitored if c.best_model_path), None)  # none without a validation
        self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True)
        log_dir = self.trainer.log_dir  # asked for by all processes, because they agree on it together
        if skipped := self.datamodule.skipped:
            ids = ", ".join(f"{image_id} of {split}" for split, image_id in sorted(skipped))
            one, many = "1 image was skipped, because it", f"{len(skipped)} images were skipped, because they"
            sys.stdout.write(f"{one if len(skipped) == 1 else many} could not be read: {ids}\n")
        if self.trainer.is_global_zero:
            if self.model.skipped:
                sys.stdout.write(f"{self.model.skipped} batches were skipped, because their loss was not finite\n")
            sys.stdout.write(f"Run folder: {log_dir}\n")


class ConfigCallback(SaveConfigCallback):
    """Save the whole config in the run folder, and as YAML in every checkpoint."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save it under the key ``config``."""
        checkpoint["config"] = self.parser.dump(self.config, skip_none=False)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train or validate as the command line says; a mistake exits with one line."""
    DetectorCLI(args=arguments, parser_kwargs={} if prog is None else {"prog": prog})
    return 0


if __name__ == "__main__":
    sys.exit(main())
