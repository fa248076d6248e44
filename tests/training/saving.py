"""Checkpoints as Lightning writes them, of detectors that were not trained."""

import lightning as L
import torch

from detmix.training.module import DetectorModule

CLASSES = ("circle", "square", "triangle")
SMALL = {"min_size": 64, "max_size": 96}


def save_checkpoint(path, detector="FasterRCNN", class_names=CLASSES, **settings):
    """Save what a run saves; return the module, in eval mode."""
    if not settings:
        settings = {"backbone": "resnet18", "fpn_channels": 32, "options": SMALL}
    torch.manual_seed(0)
    module = DetectorModule(len(class_names) + 1, class_names, detector, **settings)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return module.eval()
