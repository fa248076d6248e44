"""Time a whole training step: with mix and weighted losses, with weighted losses, and with neither."""

import copy
import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import box_convert

import detmix
from sections import Case, MissingPackageError, Section
from sections.inputs import CLASSES, Target, draw_pixels, draw_targets, in_words

SIZES = {"cpu": (2, 3, 256, 320), "cuda": (4, 3, 800, 1344)}
BOXES = 8

Forward = Callable[[nn.Module, Tensor, Sequence[Target]], Tensor]


def steps(model: nn.Module, forward: Forward, size: Sequence[int], device: torch.device) -> Case:
    """Run forward, backward and a step of SGD with three copies of a model on the same mixed images and boxes.

    ``mix + weighted`` mixes in each run; the others get mixed images. The learning rate is 0, so that the work stays
    the same in all rounds.
    """
    images = draw_pixels(*size, dtype=torch.float32, device=device)
    targets = draw_targets([(size[-2], size[-1])] * len(images), BOXES, device)
    # This mix draws nothing from torch's generator, so the samplers of all three models get the same numbers.
    mixup = detmix.MixUp(lam=0.6, pairing="reversal", seed=0)
    mixed = mixup(images, targets)
    stock, weighted = copy.deepcopy(model), detmix.weight_losses(copy.deepcopy(model))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, mix: Callable[[], Any]) -> Tensor:
        loss = forward(model, *mix())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    kinds: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
        "mix + weighted": (detmix.weight_losses(model), lambda: mixup(images, targets)),
        "weighted": (weighted, lambda: mixed),
        "stock": (stock, lambda: mixed),
    }
    runs = {}
    for name, (module, mix) in kinds.items():
        module.to(device).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
        runs[name] = functools.partial(run, module, optimizer, mix)
    comparisons = [("mix + weighted", "stock"), ("weighted", "stock"), ("mix + weighted", "weighted")]
    return Case(f"{in_words(size)}, {2 * BOXES} boxes an image", runs, comparisons)


def torchvision(
    device: torch.device, *, build: Callable[..., nn.Module], size: Sequence[int] | None = None, **options: Any
) -> Case:
    """Build a detector of torchvision with random parameters."""
    size = size or SIZES[device.type]
    sides: dict[str, int] = {"min_size": min(size[-2:]), "max_size": max(size[-2:])}  # nothing is resized
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES, **sides, **options)

    def forward(model: nn.Module, images: Tensor, targets: Sequence[Target]) -> Tensor:
        return torch.stack([*model(list(images), targets).values()]).sum()

    return steps(model, forward, size, device)


def rt_detr(device: torch.device, *, size: Sequence[int] | None = None, **options: Any) -> Case:
    """Build RT-DETR of transformers on a ResNet-50 with random parameters."""
    if None in map(find_spec, ("transformers", "scipy")):
        raise MissingPackageError("pip install 'detmix[transformers]'")
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    size = size or SIZES[device.type]
    model = RTDetrForObjectDetection(RTDetrConfig(num_labels=CLASSES, **options))
    scale = torch.tensor([size[-1], size[-2]] * 2, device=device)

    def forward(model: nn.Module, images: Tensor, targets: Sequence[Target]) -> Tensor:
        labels = [
            target | {"class_labels": target["labels"], "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / scale}
            for target in targets
        ]
        return model(pixel_values=images, labels=labels).loss

    return steps(model, forward, size, device)


SECTION = Section(
    {
        "FCOS": functools.partial(torchvision, build=detection.fcos_resnet50_fpn),
        "FasterRCNN": functools.partial(torchvision, build=detection.fasterrcnn_resnet50_fpn),
        "RTDetr": rt_detr,
    }
)
