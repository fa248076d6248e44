"""Time weighted losses beside torchvision's and transformers' own, with the gradients at the outputs of the heads."""

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_convert

import detmix
from sections import Case, MissingPackageError, Section
from sections.inputs import CLASSES, Target, draw_boxes, draw_targets

BOXES = 16  # an image of COCO has 7.3 boxes, and a mixed image has the boxes of two
# As many images as a device has by default: 2 in torchvision's training script, 8 in transformers' Trainer.


def stock_and_weighted(
    sizes: str, model: nn.Module, loss: Callable[[Any, Any], Tensor], outputs: list[Tensor], targets: list[Target]
) -> Case:
    """Time the loss of a model without weights, and of its weighted copy with random weights."""

    def run(model: nn.Module, targets: list[Target]) -> Tensor:
        total = loss(model, targets)
        torch.autograd.grad(total, outputs)
        return total

    weighted_model = detmix.weight_losses(copy.deepcopy(model))
    weighted_targets = [target | {"weights": torch.rand(BOXES, device=outputs[0].device)} for target in targets]
    return Case(
        f"{sizes}, {BOXES} boxes an image",
        {
            "weighted": functools.partial(run, weighted_model, weighted_targets),
            "stock": functools.partial(run, model, targets),
        },
    )


def dense(device: torch.device, *, name: str, size: tuple[int, int], count: int = 2) -> Case:
    """Time the loss of a one-stage detector of torchvision, with anchors that are already matched."""
    backbone = random_backbone(range(3, 8), count, size, device)
    sides = {"min_size": min(size), "max_size": max(size)}
    model = getattr(detection, name)(backbone, CLASSES, **sides).to(device)
    targets = draw_targets([size] * count, BOXES, device)
    with mock.patch.object(model.head, "compute_loss", return_value={}) as compute_loss:
        model(list(torch.rand(count, 3, *size, device=device)), targets)
    _, outputs, anchors, matched = compute_loss.call_args.args
    outputs = {key: output.detach().requires_grad_() for key, output in outputs.items()}
    _, rows, classes = outputs["cls_logits"].shape
    return stock_and_weighted(
        f"{count} x {rows:,} anchors x {classes} classes",
        model.head,
        lambda head, targets: sum(head.compute_loss(targets, outputs, anchors, matched).values()),
        list(outputs.values()),
        targets,
    )


def faster_rcnn(device: torch.device, *, size: tuple[int, int], count: int = 2) -> Case:
    """Time matching, sampling and loss of both stages of Faster R-CNN, with given proposals and outputs of heads."""
    sampled = 512  # torchvision's default
    backbone = random_backbone(range(2, 7), count, size, device)
    logits = torch.randn(count * sampled, CLASSES, device=device, requires_grad=True)
    box_deltas = torch.randn(count * sampled, CLASSES * 4, device=device, requires_grad=True)
    model = detection.FasterRCNN(backbone, box_head=giving(None), box_predictor=giving((logits, box_deltas))).to(device)
    model.roi_heads.box_roi_pool = giving(None)
    features = backbone(None)
    levels, sizes = list(features.values()), [size] * count
    anchors = model.rpn.anchor_generator(ImageList(torch.empty(count, 3, *size, device=device), sizes), levels)
    first_stage = concat_box_prediction_layers(*model.rpn.head(levels))
    objectness, deltas = (output.detach().requires_grad_() for output in first_stage)
    proposals = [draw_boxes(2000, size, device) for _ in range(count)]

    def loss(model: detection.FasterRCNN, targets: list[Target]) -> Tensor:
        labels, boxes = model.rpn.assign_targets_to_anchors(anchors, targets)
        rpn_losses = model.rpn.compute_loss(objectness, deltas, labels, model.rpn.box_coder.encode(boxes, anchors))
        _, roi_losses = model.roi_heads(features, proposals, sizes, targets)
        return sum([*rpn_losses, *roi_losses.values()])

    return stock_and_weighted(
        f"{count} x {len(anchors[0]):,} anchors, {count} x {sampled} proposals x {CLASSES} classes",
        model,
        loss,
        [objectness, deltas, logits, box_deltas],
        draw_targets([size] * count, BOXES, device),
    )


def rt_detr(device: torch.device, *, count: int = 8, **options: int) -> Case:
    """Time matching and loss of transformers' RT-DETR, with given outputs of decoder and encoder."""
    if None in map(find_spec, ("transformers", "scipy")):
        raise MissingPackageError("pip install 'detmix[transformers]'")
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    config = RTDetrConfig(num_labels=80, **options)
    with torch.device("meta"):  # its parameters are not used
        model = RTDetrForObjectDetection(config)
    groups = config.num_denoising // BOXES
    noised = groups * 2 * BOXES
    positives = torch.arange(noised, device=device).view(groups, 2, BOXES)[:, 0].flatten()  # negatives follow them
    denoising = {
        "dn_positive_idx": [positives] * count,
        "dn_num_group": groups,
        "dn_num_split": [noised, config.num_queries],
    }

    def draw_outputs(*shape: int) -> list[Tensor]:
        logits = torch.randn(*shape, config.num_labels, device=device) - 4
        boxes = torch.rand(*shape, 4, device=device) * 0.4 + 0.1
        return [logits.requires_grad_(), boxes.requires_grad_()]

    decoded = draw_outputs(count, config.decoder_layers, noised + config.num_queries)
    encoded = draw_outputs(count, config.num_queries)

    def loss(model: RTDetrForObjectDetection, labels: list[Target]) -> Tensor:
        logits, boxes = (output[:, -1] for output in decoded)
        given = (logits, labels, device, boxes, config, *decoded, *encoded)
        return model.loss_function(*given, denoising_meta_values=denoising)[0]

    labels = [
        {
            "class_labels": torch.randint(0, config.num_labels, (BOXES,), device=device),
            "boxes": box_convert(draw_boxes(BOXES, (1, 1), device), "xyxy", "cxcywh"),
        }
        for _ in range(count)
    ]
    queries = f"{count} x ({config.num_queries} + {noised} denoising) queries x {config.num_labels} classes"
    sizes = f"{queries}, {config.decoder_layers} layers + encoder"
    return stock_and_weighted(sizes, model, loss, [*decoded, *encoded], labels)


def random_backbone(levels: range, count: int, size: tuple[int, int], device: torch.device) -> nn.Module:
    """Return a module that outputs noise with the sizes of a feature pyramid."""
    channels = 32  # the fewest that the group norms of FCOS can have
    backbone = giving(
        {
            str(level): torch.rand(count, channels, *(-(-side // 2**level) for side in size), device=device)
            for level in levels
        }
    )
    backbone.out_channels = channels
    return backbone


def giving(output: Any) -> nn.Module:
    """Return a module with a constant output, in place of layers that are not timed."""
    module = nn.Identity()
    module.forward = lambda *_: output
    return module


SECTION = Section(
    {
        "RetinaNet": functools.partial(dense, name="RetinaNet", size=(640, 640)),
        "FCOS": functools.partial(dense, name="FCOS", size=(800, 1344)),
        "FasterRCNN": functools.partial(faster_rcnn, size=(800, 1344)),
        "RTDetr": rt_detr,
    },
)
