"""Detectors of every kind, small enough to train in a test, and one batch for all of them."""

import copy
import functools
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign, box_convert

from detmix.losses import weight_losses
from tests.losses.tiny_transformers import build

CLASSES, SIZE, COUNTS = 4, 64, (3, 2, 0)


class Backbone(nn.Module):
    def __init__(self, out_channels=32):
        super().__init__()
        self.out_channels = out_channels
        self.fine, self.coarse = nn.Conv2d(3, 32, 8, 8), nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x).relu()
        return OrderedDict([("0", fine), ("1", self.coarse(fine).relu())])


def anchors(sizes=((16,), (32,)), ratios=(0.5, 1.0)):
    return AnchorGenerator(sizes, (ratios,) * 2)


def ssd(head=None):
    generator = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.4, 0.6])
    head = head and head(generator.num_anchors_per_location())
    return SSD(Backbone([32, 32]), generator, (SIZE, SIZE), CLASSES, head=head)


def rcnn(cls, **options):
    return cls(
        Backbone(),
        min_size=SIZE,
        max_size=SIZE,
        box_head=TwoMLPHead(32 * 3 * 3, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES),
        rpn_anchor_generator=anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=24,
        **options,
    )


DETECTORS = {
    "retinanet": lambda: RetinaNet(Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors()),
    "fcos": lambda: FCOS(
        Backbone(), CLASSES, min_size=SIZE, max_size=SIZE, anchor_generator=anchors(((8,), (16,)), (1.0,))
    ),
    "ssd": ssd,
    "ssdlite": lambda: ssd(lambda n: SSDLiteHead([32, 32], n, CLASSES, partial(nn.BatchNorm2d, momentum=0.03))),
    "fasterrcnn": lambda: rcnn(FasterRCNN),
    "maskrcnn": lambda: rcnn(
        MaskRCNN,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 4, 2),
        mask_head=MaskRCNNHeads(32, (16,), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, CLASSES),
    ),
    "keypointrcnn": lambda: rcnn(
        KeypointRCNN,
        keypoint_roi_pool=MultiScaleRoIAlign(["0", "1"], 4, 2),
        keypoint_head=KeypointRCNNHeads(32, (16,)),
        keypoint_predictor=KeypointRCNNPredictor(16, 3),
    ),
}


class FromTransformers(nn.Module):
    """A detector of transformers that is called as torchvision's are."""

    def __init__(self, name):
        super().__init__()
        self.model = build(name)

    def forward(self, images, targets=None):
        labels = None
        if targets and self.training:
            labels = [
                {
                    "class_labels": target["labels"] - 1,
                    "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / SIZE,
                    **{key: target[key] for key in ("weights",) if key in target},
                }
                for target in targets
            ]
        output = self.model(pixel_values=torch.stack(images), labels=labels)
        if labels is None:
            return [{"scores": s, "boxes": b} for s, b in zip(output.logits, output.pred_boxes, strict=True)]
        return {name: torch.as_tensor(loss) for name, loss in output.loss_dict.items()}


QUERY_DETECTORS = {
    "detr": lambda: FromTransformers("DetrForObjectDetection"),
    "rtdetr": lambda: FromTransformers("RTDetrForObjectDetection"),
}
EVERY = DETECTORS | QUERY_DETECTORS


def tiny(name):
    """A detector of its own, always of the same parameters."""
    model = copy.deepcopy(made(name))
    torch.manual_seed(1)
    return model


@functools.cache
def made(name):
    torch.manual_seed(1)
    model = EVERY[name]().train()
    for name, parameter in model.named_parameters():  # predictions that start at 0.01 leave no differences to see
        if "bbox" in name or "cls_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(weights=None, counts=COUNTS):
    rng = torch.Generator().manual_seed(3)
    images, targets = [torch.rand(3, SIZE, SIZE, generator=rng) for _ in counts], []
    for i, n in enumerate(counts):
        corner, side = torch.rand(n, 2, generator=rng) * 24, torch.rand(n, 2, generator=rng) * 16 + 16
        points = corner[:, None] + side[:, None] * torch.rand(n, 3, 2, generator=rng)
        target = {
            "boxes": torch.cat([corner, corner + side], 1),
            "labels": torch.randint(1, CLASSES, (n,), generator=rng),
            "masks": torch.randint(0, 2, (n, SIZE, SIZE), generator=rng, dtype=torch.uint8),
            "keypoints": F.pad(points, (0, 1), value=1.0),
        }
        if weights is not None and weights[i] is not None:
            target["weights"] = weights[i]
        targets.append(target)
    return images, targets


def split(weights, counts=COUNTS):
    return list(torch.as_tensor(weights, dtype=torch.float32).split(counts))


ONES, WEIGHTS = split(torch.ones(5)), split([0.3, 0.0, 1.7, 0.9, 0.4])


def losses_of(model, weights=None, **options):
    return losses_on(model, *batch(weights, **options))


def losses_on(model, images, targets):
    torch.manual_seed(5)  # of the samplers
    losses = model(images, targets)
    assert all(type(loss) is torch.Tensor for loss in losses.values())
    return losses


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        assert value is None or (got[name].dtype == value.dtype and torch.equal(got[name], value)), name


def weighted_copy(stock):
    return weight_losses(copy.deepcopy(stock))


def capture(obj, name):
    """Record the arguments of the next call of a method."""
    method, calls = getattr(obj, name), []

    def spy(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    setattr(obj, name, spy)
    return calls
