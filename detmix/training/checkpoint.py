"""Read a checkpoint and the detector in it, without running code from it and without downloads."""

import inspect
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from detmix.training.backbones import TIMM, is_file_name
from detmix.training.build import build_detector

_ZERO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
"""Builders that set the eps of their batch norms to 0 with their COCO_V1 weights, which a state dict does not hold."""


def load_detector(path: str | Path) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the detector of a checkpoint: a torchvision model in eval mode on the CPU.

    The checkpoint is read with ``weights_only=True``, which runs no code from it. Files that it names are not opened.

    Args:
        path: Checkpoint of `DetectorModule`, such as ``runs/demo/version_0/checkpoints/best.ckpt``.

    Returns:
        The detector, without weighted losses, and the names of classes 1, 2, ...

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds more than tensors and plain values, or is no checkpoint of
            `DetectorModule`.

    Example:
        >>> import tempfile
        >>> from detmix.training.module import DetectorModule
        >>> options = {"min_size": 64, "max_size": 64}
        >>> module = DetectorModule(3, ["cat", "dog"], "FCOS", backbone="resnet18", fpn_channels=32, options=options)
        >>> checkpoint = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(checkpoint, f"{folder}/best.ckpt")
        ...     model, class_names = load_detector(f"{folder}/best.ckpt")
        >>> type(model).__name__, class_names
        ('FCOS', ('cat', 'dog'))
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    parts = [
        checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ("hyper_parameters", "state_dict")
    ]
    settings, saved = parts
    if not (isinstance(settings, dict) and isinstance(saved, dict) and {"detector", "num_classes"} <= settings.keys()):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"checkpoint {path} must hold the state_dict and the hyper_parameters detector and num_classes of a "
            f"DetectorModule, but it holds {found if len(found) < 20 else f'{len(found)} keys'}."
        )
    state = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    try:
        model = _rebuild(settings, state)
    except (ValueError, TypeError, RuntimeError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])  # of one line per layer
        raise ValueError(
            f"checkpoint {path} does not fit its own detector, {settings['detector']!r}: {first}"
        ) from error
    names = settings.get("class_names") or range(1, settings["num_classes"])
    return model.eval(), tuple(map(str, names))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values onto the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, but there is no {path}.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says more
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(
            f"checkpoint {path} is no checkpoint, or holds more than tensors and plain values; such a file is not "
            f"read, because it could run any code{reason and f': {reason}'}."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged or no checkpoint: {error or type(error).__name__}.") from error
    if damage := find_damage(path):
        raise ValueError(damage)
    return checkpoint


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint that was cut short or changed, or ``None``.

    torch writes checksums but does not compare them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"{path} is damaged: {error}."
    return None if member is None else f"{path} is damaged: {member} does not have its checksum."


def _rebuild(settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    known = inspect.signature(build_detector).parameters.keys() - {"name", "num_classes"}
    # All weights are in the state, so the initial weights of the training are neither downloaded nor read.
    arguments = {key: settings[key] for key in known & settings.keys()} | {"weights": None, "weights_backbone": None}
    tag, backbone = settings.get("weights_backbone"), settings.get("backbone") or ""
    if backbone.startswith(TIMM) and tag not in (None, "DEFAULT") and not is_file_name(tag):
        arguments["backbone"] = f"{backbone.partition('.')[0]}.{tag}"  # a tag also says how images are normalised
    model = build_detector(settings["detector"], settings["num_classes"], **arguments)
    # torchvision freezes the batch norms of pretrained backbones, and a frozen batch norm does not count batches.
    frozen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and f"{name}.num_batches_tracked" not in state
    ]
    for name in frozen:
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        eps = 0.0 if _has_zero_eps(settings["detector"], settings.get("weights")) else norm.eps
        model.set_submodule(name, FrozenBatchNorm2d(norm.num_features, eps))
    model.load_state_dict(state)
    return model


def _has_zero_eps(name: str, weights: str | None) -> bool:
    if name not in _ZERO_EPS or weights is None or is_file_name(weights):
        return False
    known = models.get_model_weights(name)
    return bool(known.verify(weights) == known["COCO_V1"])
