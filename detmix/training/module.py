"""The Lightning module: a torchvision detector with weighted losses, SGD or AdamW, and COCO AP."""

import fnmatch
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import lr_scheduler

from detmix.losses import weight_losses
from detmix.targets import Target
from detmix.training.build import build_detector
from detmix.training.metric import COCO_FIGURES, as_metric_input, make_metric
from detmix.training.records import write_record


class NonFiniteLossError(RuntimeError):
    """Raised when the loss of a batch is NaN or infinite; the message names the images."""


class DetectorModule(L.LightningModule):
    """Train and validate a detector of torchvision.

    Args:
        num_classes: Number of classes with the background. The command line takes it from the data.
        class_names: Names of classes 1, 2, ... The command line takes them from the data.
        detector: Builder of torchvision such as ``fcos_resnet50_fpn``. With ``backbone``, one of the classes FCOS,
            RetinaNet, FasterRCNN, MaskRCNN and KeypointRCNN.
        weights: Initial weights of the whole detector: a name of torchvision weights, or the file of a state dict.
        weights_backbone: Initial weights of the backbone: a name of torchvision weights, a tag of timm (``DEFAULT`` for
            its first one), or the file of a state dict.
        backbone: ResNet of torchvision such as ``resnet18``, or ``timm/NAME`` for a model of timm.
        fpn_channels: Channels of the feature pyramid on ``backbone`` and of the heads.
        trainable_layers: Stages of ``backbone`` that are trained, 0 to 5, counted from the last one. Null trains all.
        options: More arguments of torchvision's builder or class, such as ``min_size``.
        weighted: Whether the losses use ``target["weights"]``. If false, mixed images train torchvision's own losses.
        optimizer: SGD with momentum 0.9, or AdamW.
        lr: Highest learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps in which the learning rate rises from 0.001 of its value to the whole.
        schedule: How the learning rate falls after the warm-up: ``cosine`` to 0, or ``multistep``, by a factor of 10 at
            each of ``milestones``.
        milestones: Shares of the whole training, 0 to 1, or optimizer steps, above 1.
        decay_vectors: Whether weight decay also applies to parameters of one dimension: biases and scales of norms.
        freeze: Patterns of names of parameters that are not trained, such as ``backbone.body.layer1.*``.
        freeze_batch_norm: Keep the statistics, scales and biases of batch norms as they were loaded.
        on_nonfinite: What to do with a batch whose loss is NaN or infinite. ``stop`` ends the run. ``skip`` leaves the
            batch out, and the number of skipped batches is printed at the end. Both record how the batch was mixed in
            the run folder's ``nonfinite/``, for ``tools/preview.py --replay``.

    Raises:
        ValueError: if an argument is out of range, if a pattern of ``freeze`` fits no parameter, or if
            `build_detector` raises it.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        detector: str = "fcos_resnet50_fpn",
        weights: str | None = None,
        weights_backbone: str | None = None,
        backbone: str | None = None,
        fpn_channels: int = 256,
        trainable_layers: int | None = None,
        options: dict[str, Any] | None = None,
        weighted: bool = True,
        optimizer: Literal["SGD", "AdamW"] = "SGD",
        lr: float = 0.02,
        weight_decay: float = 1e-4,
        warmup_steps: int = 500,
        schedule: Literal["cosine", "multistep"] = "cosine",
        milestones: tuple[float, ...] = (0.67, 0.89),
        decay_vectors: bool = True,
        freeze: Sequence[str] = (),
        freeze_batch_norm: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be positive, but it is {lr}.")
        for name, number in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if number < 0:
                raise ValueError(f"{name} must not be negative, but it is {number}.")
        self.save_hyperparameters()
        self.class_names = list(class_names or map(str, range(1, num_classes)))
        self.model = build_detector(
            detector,
            num_classes,
            weights=weights,
            weights_backbone=weights_backbone,
            backbone=backbone,
            fpn_channels=fpn_channels,
            trainable_layers=trainable_layers,
            options=options,
        )
        self._freeze(freeze)
        if freeze_batch_norm:
            for norm in self._batch_norms():
                norm.requires_grad_(False).eval()  # Lightning leaves modes as they are when it starts
        if weighted:
            weight_losses(self.model)
        self.skipped = 0
        self._is_step_skipped = True
        self._statistics: list[Tensor] = []
        iou_types = ("bbox", "segm") if "maskrcnn" in detector.lower() else ("bbox",)
        self.metric = make_metric(iou_types)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """Return the sum of torchvision's loss terms, and log each term."""
        images, targets = batch
        losses: dict[str, Tensor] = self.model(images, targets) if images else {}  # none could be read
        loss = torch.stack([*losses.values()]).sum() if losses else self._nothing()
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(images) or 1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images) or 1)
        if self._everywhere(bool(torch.isfinite(loss.detach()))):
            self._is_step_skipped = False
            return loss
        message = self._describe(losses, targets)
        if self.hparams["on_nonfinite"] == "stop":
            raise NonFiniteLossError(f"{message} To go on without such batches, use --model.on_nonfinite skip.")
        return self._skip(message)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the statistics of batch norms, in case the batch is skipped after the forward pass has changed them."""
        if self.hparams["on_nonfinite"] == "skip":
            self._statistics = [buffer.clone() for buffer in self.model.buffers()]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Prevent the step, with its momentum and decay, if all batches since the last step were skipped."""
        if self._is_step_skipped:
            optimizer.zero_grad(set_to_none=True)
        self._is_step_skipped = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the number of skipped batches."""
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the number of skipped batches."""
        self.skipped = checkpoint.get("skipped", 0)

    def train(self, mode: bool = True) -> "DetectorModule":
        """Switch to training, but keep frozen batch norms in evaluation."""
        super().train(mode)
        if self.hparams["freeze_batch_norm"]:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def on_fit_start(self) -> None:
        """Ask for the run folder here, where all processes do, because they agree on it together."""
        self._folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def _everywhere(self, decision: bool) -> bool:
        return self._trainer is None or self.trainer.strategy.reduce_boolean_decision(decision)

    def _describe(self, losses: dict[str, Tensor], targets: list[Target]) -> str:
        """Record the batch of this process, and describe its loss and its images."""
        name = f"step_{self.trainer.global_step}_rank_{self.global_rank}.json"
        write_record(targets, path := self._folder / "nonfinite" / name)
        terms = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in losses.items())
        ids = [target.get("image_id") for target in targets]
        return f"The loss is not finite at step {self.trainer.global_step}, images {ids}: {terms}; see {path}."

    def _skip(self, message: str) -> Tensor:
        nothing = self._nothing()
        if not torch.isfinite(nothing.detach()):
            raise NonFiniteLossError(f"{message} Skipping does not help: the parameters of the model are not finite.")
        rank_zero_warn(f"{message} The batch is skipped.")
        self.skipped += 1
        for buffer, value in zip(self.model.buffers(), self._statistics, strict=True):
            buffer.copy_(value)
        return nothing

    def _nothing(self) -> Tensor:
        """Return a loss of 0 that depends on all parameters: other processes wait for the gradient of each."""
        return torch.stack([(parameter * 0).sum() for parameter in self.model.parameters()]).sum()

    def _freeze(self, patterns: Sequence[str]) -> None:
        named = dict(self.model.named_parameters())
        for pattern in patterns:
            names = fnmatch.filter(named, pattern)
            if not names:
                raise ValueError(
                    f"freeze must hold patterns of parameter names, but {pattern!r} fits none of the {len(named)}, "
                    f"such as {', '.join(list(named)[:3])}."
                )
            for name in names:
                named[name].requires_grad_(False)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Any:
        """Predict, and add predictions and targets to the COCO evaluation."""
        images, targets = batch
        predictions: list[dict[str, Tensor]] = self.model(images) if images else []
        self.metric.update([as_metric_input(p) for p in predictions], [as_metric_input(t) for t in targets])
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Log COCO's twelve figures and the AP of each class."""
        figures = self.metric.compute()  # gathers from all processes, so that all log the same
        self.metric.reset()
        log = partial(self.log, sync_dist=True, reduce_fx="max")
        for prefix in ("segm_", "bbox_") if "segm_map" in figures else ("",):
            kind = "segm_" if prefix == "segm_" else ""
            for name, key in COCO_FIGURES.items():
                log(f"val/{kind}{name}", figures[prefix + key].float(), prog_bar=name == "AP")
            per_class = dict(
                zip(figures["classes"].reshape(-1).tolist(), figures[f"{prefix}map_per_class"].reshape(-1), strict=True)
            )
            for label, name in enumerate(self.class_names, start=1):
                log(f"val/{kind}AP/{name}", per_class.get(label, torch.tensor(-1.0)).float())

    def configure_optimizers(self) -> Any:
        """Return the optimizer of all parameters that are trained, and its schedule by steps."""
        hp = self.hparams
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parameters: list[Any] = trained
        if not hp["decay_vectors"]:
            vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
            parameters = [{"params": [p for p in trained if p.ndim >= 2]}, vectors]
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "SGD":
            optimizer = torch.optim.SGD(parameters, hp["lr"], momentum=0.9, weight_decay=hp["weight_decay"])
        else:
            optimizer = torch.optim.AdamW(parameters, hp["lr"], weight_decay=hp["weight_decay"])
        share = partial(
            lr_share,
            total=int(self.trainer.estimated_stepping_batches),
            warmup=hp["warmup_steps"],
            milestones=hp["milestones"] if hp["schedule"] == "multistep" else None,
        )
        # A function of the step alone: a run that is resumed with more epochs follows the longer schedule.
        schedule = lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_share(step: int, *, total: int, warmup: int, milestones: Sequence[float] | None) -> float:
    """Return the share of the highest learning rate at a step: a linear rise from 0.001, then a cosine or falls by 10.

    Args:
        step: Optimizer step, from 0.
        total: Steps of the whole training.
        warmup: Steps of the rise; at most half of the training is used.
        milestones: Where the rate falls by a factor of 10: shares of the training, 0 to 1, or steps, above 1. ``None``
            for a cosine to 0 [arXiv:1608.03983].

    Example:
        >>> [round(lr_share(step, total=110, warmup=10, milestones=None), 3) for step in (0, 10, 60, 110)]
        [0.001, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return 0.001 + 0.999 * step / warmup
    if milestones is not None:
        steps = [round(milestone * total) if milestone <= 1 else milestone for milestone in milestones]
        return float(0.1 ** sum(step >= milestone for milestone in steps))
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))
