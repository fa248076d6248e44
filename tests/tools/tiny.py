"""The sections' cases at sizes that take no time."""

from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.ops import MultiScaleRoIAlign
from transformers import RTDetrResNetConfig

from tests.losses.tiny import Backbone, anchors
from tests.losses.tiny_transformers import DECODER, FFN, HEADS, LEVELS, PYRAMID, resnet


def fcos(weights, weights_backbone, **options):
    return FCOS(Backbone(), anchor_generator=anchors(((8,), (16,)), (1.0,)), **options)


def faster_rcnn(weights, weights_backbone, **options):
    pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
    return FasterRCNN(Backbone(), rpn_anchor_generator=anchors(), box_roi_pool=pool, **options)


RT_DETR = {"backbone_config": resnet(RTDetrResNetConfig, LEVELS), "d_model": 16} | HEADS | FFN | PYRAMID | DECODER
del RT_DETR["num_labels"]

PAIR = {"sizes": ((12, 20), (16, 10))}
BATCH = {"size": (4, 3, 6, 10)}
LIST = {"size": (5, 3, 48, 64)}
FOLDER = {"count": 6, "size": (48, 64), "batch_size": 3}
STEP = {"size": (2, 3, 64, 64)}
LOSS = {"size": (64, 96)}
SIDES = {"sides": (4, 8, 16)}

SIZES = {
    "mix": {
        "uint8 CHW": PAIR,
        "uint8 HWC": PAIR,
        "float32 CHW": PAIR,
        "float16 CHW": PAIR,
        "same size": {"sizes": ((12, 20), (12, 20))},
    },
    "batch": {
        "float32 inplace": BATCH,
        "float32": BATCH,
        "uint8 inplace": BATCH,
        "uint8": BATCH,
        "uint8 from memory": BATCH | {"batches": 3},
        "float16": BATCH,
        "list float32": LIST,
        "list uint8": LIST,
        "targets": {"count": 3},
    },
    "loader": dict.fromkeys(("0 workers", "2 workers", "0 workers Pillow", "2 workers Pillow"), FOLDER),
    "losses": {
        "RetinaNet": LOSS,
        "FCOS": LOSS,
        "FasterRCNN": LOSS,
        "RTDetr": {"decoder_layers": 2, "num_queries": 20, "num_denoising": 40},
    },
    "step": {
        "FCOS": STEP | {"build": fcos},
        "FasterRCNN": STEP | {"build": faster_rcnn},
        "RTDetr": STEP | RT_DETR,
    },
    "growth": {"boxes": {"numbers": (1, 2, 30)}, "pixels uint8": SIDES, "pixels float32": SIDES},
}
