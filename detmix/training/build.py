"""Build torchvision's detectors by name."""

import difflib
import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detmix.training.backbones import build_pyramid, is_file_name, read_state_dict

_log = logging.getLogger(__name__)
_LISTED = 8  # names in a message; a new head has four

# Architectures that take any feature pyramid, with the strides and the extra levels that torchvision's own
# builders use, so that the default anchors fit.
_ONE_STAGE = ((8, 16, 32), lambda channels: LastLevelP6P7(channels, channels))
_TWO_STAGE = ((4, 8, 16, 32), lambda channels: LastLevelMaxPool())
_ON_PYRAMIDS: dict[str, tuple[Any, tuple[tuple[int, ...], Callable[[int], nn.Module]]]] = {
    "FCOS": (detection.FCOS, _ONE_STAGE),
    "RetinaNet": (detection.RetinaNet, _ONE_STAGE),
    "FasterRCNN": (detection.FasterRCNN, _TWO_STAGE),
    "MaskRCNN": (detection.MaskRCNN, _TWO_STAGE),
    "KeypointRCNN": (detection.KeypointRCNN, _TWO_STAGE),
}


def list_detectors() -> list[str]:
    """Return the names that `build_detector` takes: torchvision's builders, and classes that take a backbone.

    Example:
        >>> "fcos_resnet50_fpn" in list_detectors(), "FCOS" in list_detectors()
        (True, True)
    """
    return [*models.list_models(module=detection), *_ON_PYRAMIDS]


def build_detector(
    name: str,
    num_classes: int,
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    backbone: str | None = None,
    fpn_channels: int = 256,
    trainable_layers: int | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a detector of torchvision, without weighted losses.

    Args:
        name: Builder of torchvision such as ``"fasterrcnn_resnet50_fpn"``. With ``backbone``, one of the classes
            ``FCOS``, ``RetinaNet``, ``FasterRCNN``, ``MaskRCNN`` and ``KeypointRCNN``.
        num_classes: Number of classes with the background, class 0.
        weights: Initial weights of the whole detector: a name of torchvision weights such as ``"DEFAULT"``, or the file
            of a state dict. Parameters of other shapes, as of a head for other classes, stay randomly initialised and
            are logged.
        weights_backbone: Initial weights of the backbone: a name of torchvision weights, a tag of timm (``"DEFAULT"``
            for its first one), or the file of a state dict. A file whose tensors have other names but fit in order and
            shape is loaded, and the log says so.
        backbone: ResNet of torchvision such as ``"resnet18"``, or ``"timm/NAME"`` for a model of timm that has
            ``features_only``. It is used with a feature pyramid. A detector normalises images as timm's model does.
        fpn_channels: Channels of the feature pyramid and of the heads; a multiple of 32.
        trainable_layers: Stages of ``backbone`` that are trained, 0 to 5, counted from the last one. The others are
            frozen. ``None`` trains all.
        options: More keyword arguments of the builder or class, such as ``min_size``.

    Raises:
        ValueError: if the name or an option is unknown, the name does not fit ``backbone``, or a file does not fit.
        FileNotFoundError: if weights are a file name and there is no such file.
        ImportError: if a model of timm is named and timm is not installed.

    Example:
        >>> model = build_detector("FCOS", 4, backbone="resnet18", fpn_channels=32, options={"min_size": 64})
        >>> model.head.classification_head.num_classes
        4
    """
    if name not in list_detectors():
        raise ValueError(f"detector must be one of {', '.join(list_detectors())}, but it is {name!r}.")
    if (name in _ON_PYRAMIDS) != (backbone is not None):
        raise ValueError(
            f"backbone must be given with {', '.join(_ON_PYRAMIDS)} and with no other detector, "
            f"but detector is {name!r} and backbone is {backbone!r}."
        )
    if backbone is None and trainable_layers is not None:
        raise ValueError(
            f"trainable_layers must be given with backbone; {name} takes trainable_backbone_layers among its options."
        )
    if "num_classes" in (options or {}):
        raise ValueError("options must not hold num_classes, because it is an argument of its own.")
    build = (
        partial(models.get_model, name, weights_backbone=weights_backbone)
        if backbone is None
        else partial(_on_pyramid, name, backbone, weights_backbone, fpn_channels, trainable_layers)
    )
    if weights is None:
        return _build(build, name, num_classes, options)
    if is_file_name(weights):
        return _load_what_fits(_build(build, name, num_classes, options), read_state_dict(weights))
    model = _build(partial(models.get_model, name, weights_backbone=None), name, num_classes, options)
    trained: nn.Module = models.get_model(name, weights=weights, **(options or {}))
    model.backbone = trained.backbone  # with frozen batch norms, which a model built without weights lacks
    return _load_what_fits(model, trained.state_dict())


def _build(build: Callable[..., nn.Module], name: str, num_classes: int, options: dict[str, Any] | None) -> nn.Module:
    if not options:
        return build(num_classes=num_classes)
    try:
        model = build(num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(f"options {options} do not fit {name}: {error}.") from error
    # torchvision passes keyword arguments on, and its resizing ignores those that it does not know.
    takers: list[Any] = [*type(model).__mro__, GeneralizedRCNNTransform]
    if name not in _ON_PYRAMIDS:
        takers.append(models.get_model_builder(name))
    known = {key for taker in takers for key in inspect.signature(taker).parameters}
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"options must be arguments of {type(model).__name__}, but {key!r} is none{hint}")
    return model


def _on_pyramid(
    name: str,
    backbone: str,
    weights: str | None,
    channels: int,
    trainable_layers: int | None,
    *,
    num_classes: int,
    **options: Any,
) -> nn.Module:
    build, (strides, extra) = _ON_PYRAMIDS[name]
    given: dict[str, Any] = {"weights": weights, "trainable_layers": trainable_layers}
    pyramid, needed = build_pyramid(backbone, strides, channels, extra(channels), **given)
    model: nn.Module = build(pyramid, num_classes, **{**needed, **options})
    return model


def _load_what_fits(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    own = model.state_dict()
    fits = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fits, strict=False)
    names = [name for name, _ in model.named_parameters()]
    if left := [name for name in names if name not in fits]:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        _log.warning(
            "%d of %d parameters stay as initialised, because weights has none of their name and shape: %s%s",
            len(left),
            len(names),
            ", ".join(left[:_LISTED]),
            more,
        )
    return model
