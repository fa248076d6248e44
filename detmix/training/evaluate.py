"""Evaluate the last checkpoint of a run on several splits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2 import functional as TF

from detmix.datasets.coco.folder import CocoFolder
from detmix.training.ablation import read_curve
from detmix.training.checkpoint import load_detector, read_checkpoint
from detmix.training.files import write_json
from detmix.training.metric import COCO_FIGURES, as_metric_input, make_metric
from detmix.training.resume import find_last


def evaluate(model: nn.Module, dataset: CocoFolder) -> dict[str, float]:
    """Compute COCO's box figures of a detector on a dataset, image by image, on the CPU.

    Args:
        model: Detector of torchvision, in eval mode.
        dataset: Images and their objects, crowd boxes included.

    Returns:
        COCO's twelve figures by COCO's names, such as ``"AP"`` and ``"AP50"``.
    """
    metric = make_metric()
    with torch.inference_mode():
        for i in range(len(dataset)):
            image, target = dataset[i]
            found = model([TF.to_dtype(image, torch.float32, scale=True)])
            metric.update([as_metric_input(prediction) for prediction in found], [as_metric_input(target)])
    figures = metric.compute()
    return {name: float(figures[key]) for name, key in COCO_FIGURES.items()}


def finish_run(run_dir: Path, datasets: Mapping[str, CocoFolder], seconds: float, output: Path) -> None:
    """Evaluate the last checkpoint of a run, with its averaged weights if it has them, and write the figures.

    The file holds ``steps``, ``seconds``, ``curve`` (validation AP by step), and AP and AP50 of each split. It is
    written whole or not at all.

    Args:
        run_dir: Folder of the run, which holds ``version_<n>``.
        datasets: Datasets by split: ``val``, ``train`` and perhaps ``test``.
        seconds: Time of the training.
        output: JSON file to write.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    found = find_last(run_dir)
    if found is None:
        raise FileNotFoundError(f"run_dir must hold a run with a checkpoint, but {run_dir} holds none.")
    checkpoint = found[0]
    figures: dict[str, Any] = {"steps": read_checkpoint(checkpoint)["global_step"], "seconds": round(seconds)}
    curve = read_curve(checkpoint.parent.parent / "metrics.csv")
    figures["curve"] = " ".join(f"{step}:{value:.4f}" for step, value in curve)
    model, _ = load_detector(checkpoint)
    for split, dataset in datasets.items():
        values = evaluate(model, dataset)
        prefix = "" if split == "val" else f"{split}_"
        figures |= {f"{prefix}{name}": f"{values[name]:.4f}" for name in ("AP", "AP50")}
    write_json(figures, output)
