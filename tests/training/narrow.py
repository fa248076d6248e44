"""Stand-in for torchvision's ResNet-18, of a few narrow layers, so that a training takes little time."""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn
from torchvision.models import _api

from detmix.cli.train import DetectorCLI

WIDTH = 8
FEW = '"box_batch_size_per_image":16,"rpn_post_nms_top_n_train":50,"rpn_post_nms_top_n_test":50'
"""Options of R-CNNs, as json, of which most of their time depends."""


def stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def narrow_resnet(*, weights: None = None, **_: bool) -> nn.Sequential:
    """What detectors on a pyramid take of a ResNet: four stages, at strides of 4 to 32, each twice as wide."""
    stages = {f"layer{i}": stage(WIDTH * 2**i // 2, WIDTH * 2**i, 2) for i in (2, 3, 4)}
    body = nn.Sequential(OrderedDict(stem=stage(3, WIDTH, 2), layer1=stage(WIDTH, WIDTH * 2, 2), **stages))
    body.inplanes = WIDTH * 16
    return body


narrow_resnet.__module__ = "torchvision.models.resnet"  # by which torchvision lists its models


@contextmanager
def narrow() -> Iterator[None]:
    """Build the stand-in wherever a ResNet-18 is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_api.BUILTIN_MODELS, "resnet18", narrow_resnet)
        yield


if __name__ == "__main__":
    with narrow():
        sys.argv[0] = "train.py"
        DetectorCLI()
