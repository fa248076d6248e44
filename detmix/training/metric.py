"""Compute COCO AP over several processes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics.detection import MeanAveragePrecision

# COCO's twelve figures by COCO's names, and torchmetrics' names for them.
COCO_FIGURES = dict(
    zip(
        ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
        [f"map{of}" for of in ("", "_50", "_75", "_small", "_medium", "_large")]
        + [f"mar{of}" for of in ("_1", "_10", "_100", "_small", "_medium", "_large")],
        strict=True,
    )
)


class GatheredAP(MeanAveragePrecision):
    """Compute torchmetrics' AP when the processes have seen different numbers of images.

    torchmetrics gathers one image of each process at a time, and stops when one process has no more. Here each process
    gets all images, those of process 0 first, in the order in which one process would see them.
    """

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for name in self._reductions:
            own = [value.cpu() if isinstance(value, Tensor) else value for value in getattr(self, name)]
            lists: list[Any] = [None] * distributed.get_world_size(process_group)
            distributed.all_gather_object(lists, own, group=process_group)
            setattr(self, name, [_to(self.device, value) for values in lists for value in values])


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def make_metric(iou_types: tuple[str, ...] = ("bbox",)) -> GatheredAP:
    """Make the metric of validations, with COCO's own thresholds and limit of detections."""
    metric = GatheredAP(
        iou_type=iou_types,  # type: ignore[arg-type]  # a tuple of its two words
        # torchmetrics rounds COCO's thresholds to float32, which misses recalls that are equal to one.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        class_metrics=True,
        backend="faster_coco_eval",
    )
    metric.warn_on_many_detections = False  # COCO's limit of 100 is intended
    return metric


def as_metric_input(fields: dict[str, Any]) -> dict[str, Tensor]:
    """Pick what the metric reads from a target or a prediction, as plain tensors."""
    keys = fields.keys() & {"boxes", "labels", "scores", "masks", "iscrowd", "area"}
    plain = {key: fields[key].as_subclass(Tensor) for key in keys}
    if "masks" in plain:  # predictions are probabilities (N, 1, H, W)
        plain["masks"] = (plain["masks"] > 0.5).flatten(0, -3)
    return plain
