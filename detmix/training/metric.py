"""Compute COCO AP over several processes."""

from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics.detection import MeanAveragePrecision


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
