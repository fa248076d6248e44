"""Build backbones of torchvision and timm under a feature pyramid."""

import difflib
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork

TIMM = "timm/"
_FILES = (".pt", ".pth", ".ckpt", ".safetensors")
_log = logging.getLogger(__name__)


class TimmPyramid(nn.Module):
    """Run a model of timm with ``features_only`` under torchvision's feature pyramid.

    Args:
        body: Model that returns one map ``(B, C_i, H_i, W_i)`` for each stage.
        stages: Stages that the pyramid uses.
        out_channels: Channels of each map of the pyramid.
        extra: Block of further levels.
    """

    def __init__(self, body: Any, stages: Sequence[int], out_channels: int, extra: Any) -> None:
        super().__init__()
        self.body, self.stages, self.out_channels = body, list(stages), out_channels
        channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork([channels[stage] for stage in stages], out_channels, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the pyramid by name, the finest first."""
        maps = self.body(x)
        named: dict[str, Tensor] = self.fpn(OrderedDict((str(i), maps[stage]) for i, stage in enumerate(self.stages)))
        return named


def build_pyramid(
    backbone: str,
    strides: Sequence[int],
    out_channels: int,
    extra: Any,
    *,
    weights: str | None = None,
    trainable_layers: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a backbone under a feature pyramid.

    Args:
        backbone: A ResNet of torchvision such as ``"resnet18"``, or ``"timm/NAME"`` for a model of timm.
        strides: Strides of the maps that the pyramid uses, such as ``(4, 8, 16, 32)`` pixels.
        out_channels: Channels of each map of the pyramid.
        extra: Block of further levels.
        weights: Name of torchvision weights, a tag of timm (``"DEFAULT"`` for its first), or a file of a state dict.
        trainable_layers: Stages that are trained, counted from the last one. The others are frozen. ``None`` trains
            all.

    Returns:
        The pyramid, and the options that a detector needs for it: ``image_mean`` and ``image_std`` of timm's models.

    Raises:
        ValueError: If the name is unknown, the model has no map of a stride, or a file does not fit.
        FileNotFoundError: If ``weights`` is a file name and there is no such file.
        ImportError: If timm is not installed.

    Example:
        >>> pyramid, options = build_pyramid("timm/tf_efficientnet_lite0", (8, 16, 32), 32, None)
        >>> [tuple(x.shape) for x in pyramid(torch.rand(1, 3, 64, 64)).values()]
        [(1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
        >>> options
        {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5]}
    """
    if backbone.startswith(TIMM):
        return _on_timm(backbone.removeprefix(TIMM), strides, out_channels, extra, weights, trainable_layers)
    known = [
        name for name in models.list_models(module=models) if name.startswith(("resnet", "resnext", "wide_resnet"))
    ]
    if backbone not in known:
        raise ValueError(f"backbone must be timm/NAME or one of {', '.join(known)}, but it is {backbone!r}.")
    from_file = weights is not None and is_file_name(weights)
    body = models.get_model(backbone, weights=None if from_file else weights)
    if from_file:
        body.load_state_dict(fit_state(body.state_dict(), read_state_dict(str(weights)), backbone, str(weights)))
    stages = [int(math.log2(stride)) - 1 for stride in strides]  # 4, 8, 16, 32: layer1 to layer4
    if trainable_layers is not None:
        parts = ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"]
        trained = " ".join(parts[_first_trained(trainable_layers, len(parts)) :]).split()
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)
    in_channels = [body.inplanes // 2 ** (4 - stage) for stage in stages]
    layers = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(body, layers, in_channels, out_channels, extra_blocks=extra), {}


def _on_timm(
    name: str, strides: Sequence[int], out_channels: int, extra: Any, weights: str | None, trainable: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import timm  # takes a second
    except ImportError as error:
        raise ImportError(f"backbone {TIMM}{name} needs timm; pip install 'detmix[train]' brings it.") from error
    model = name.partition(".")[0]
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models())
        hint = f"; did you mean {', '.join(TIMM + other for other in close)}?" if close else "."
        raise ValueError(f"backbone must be {TIMM} and a model of timm, but {name!r} is none{hint}")
    options: dict[str, Any] = {}
    if weights is not None and is_file_name(weights):
        with torch.device("meta"):
            own = timm.create_model(name).state_dict()
        state = fit_state(own, read_state_dict(weights), f"{TIMM}{name}", weights)
        options = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    elif weights is not None:
        name = name if weights == "DEFAULT" else f"{model}.{weights}"
        options = {"pretrained": True}
    try:
        body = timm.create_model(name, features_only=True, **options)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"backbone {TIMM}{name} cannot be built with features_only: {error}") from error
    features: Any = body.feature_info
    found = features.reduction()
    if missing := [stride for stride in strides if stride not in found]:
        raise ValueError(
            f"backbone {TIMM}{name} must have maps of strides {', '.join(map(str, strides))}, but {missing[0]} is not "
            f"among its strides {', '.join(map(str, found))}."
        )
    if trainable is not None:
        _freeze_stages(body, trainable, name)
    stages = [len(found) - 1 - found[::-1].index(stride) for stride in strides]
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    mean, std = (list(getattr(config, key)) for key in ("mean", "std"))
    return TimmPyramid(body, stages, out_channels, extra), {"image_mean": mean, "image_std": std}


def _freeze_stages(body: Any, trainable: int, name: str) -> None:
    """Freeze all parameters up to the end of the last stage that is not trained."""
    modules = {f".{key}.".replace("_", "."): place for place, (key, _) in enumerate(body.named_modules())}
    ends = []
    for module in body.feature_info.module_name():
        stage = f".{module}.".replace("_", ".")  # timm writes stages.0 as stages_0 where it flattens a model
        inside = [place for key, place in modules.items() if key.startswith((stage, f".model{stage}"))]
        if not inside:
            raise ValueError(f"trainable_layers does not fit {TIMM}{name}: its stage {module} is no module of it.")
        ends.append(max(inside))
    first = _first_trained(trainable, 5) - (5 - len(ends))
    last_frozen = ends[first - 1] if first > 0 else -1
    for key, parameter in body.named_parameters():
        if modules[f".{key.rpartition('.')[0]}.".replace("_", ".")] <= last_frozen:
            parameter.requires_grad_(False)


def _first_trained(trainable_layers: int, count: int) -> int:
    if not 0 <= trainable_layers <= count:
        raise ValueError(f"trainable_layers must lie in 0..{count}, but it is {trainable_layers}.")
    return count - trainable_layers


def is_file_name(weights: str) -> bool:
    """Tell whether ``weights`` names a file, and not weights of a library."""
    return weights.endswith(_FILES)


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read the state dict of a file: a plain one, a checkpoint of a training, or safetensors.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"weights must be the name of torchvision or timm weights or a file, but there is no {path}."
        )
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return dict(load_file(path))
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "model.")
    return state


def fit_state(own: dict[str, Tensor], state: dict[str, Tensor], model: str, file: str) -> dict[str, Tensor]:
    """Give the tensors of a file the names of a model. Where names differ, order and shapes must agree.

    Raises:
        ValueError: If they do not. The message names what each side has.

    Example:
        >>> fit_state({"conv.weight": torch.zeros(2, 3)}, {"_conv.weight": torch.ones(2, 3)}, "a model", "a.pth")
        {'conv.weight': tensor([[1., 1., 1.],
                [1., 1., 1.]])}
    """
    if own.keys() == state.keys():
        state = {name: state[name] for name in own}
    shapes, given = ([(name, tuple(value.shape)) for name, value in side.items()] for side in (own, state))
    wrong = [
        (place, mine, theirs)
        for place, (mine, theirs) in enumerate(zip_longest(shapes, given, fillvalue=("nothing", None)))
        if mine[1] != theirs[1] or (theirs[0] in own and theirs[0] != mine[0])  # a name that both know must stay
    ]
    if not wrong:
        if own.keys() != state.keys():
            told = file, model, len(given)
            _log.warning("The tensors of %s have other names than those of %s. All %d fit in order and shape.", *told)
        return dict(zip(own, state.values(), strict=True))
    place, mine, theirs = wrong[0]
    raise ValueError(
        f"weights {file} must fit {model}, but tensor {place} is {_spell(theirs)} in the file and {_spell(mine)} in "
        f"the model; the file has {len(given)} tensors and the model {len(shapes)}."
    )


def _spell(tensor: tuple[str, tuple[int, ...] | None]) -> str:
    name, shape = tensor
    return name if shape is None else f"{name} {shape}"
