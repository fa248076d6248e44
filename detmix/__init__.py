"""Mixup for object detection: blend two images on a shared canvas and weight every object's loss."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detmix import functional
    from detmix.losses import WeightedCriterion, check_weighting, match_weights, weight_losses, weighted
    from detmix.mixing.dataset import MixUpDataset
    from detmix.mixing.transform import MixUp

__all__ = [
    "MixUp",
    "MixUpDataset",
    "WeightedCriterion",
    "check_weighting",
    "functional",
    "match_weights",
    "weight_losses",
    "weighted",
]

__version__ = "0.1.0"

_MODULES = {
    "MixUp": "detmix.mixing.transform",
    "MixUpDataset": "detmix.mixing.dataset",
    "WeightedCriterion": "detmix.losses",
    "check_weighting": "detmix.losses",
    "match_weights": "detmix.losses",
    "weight_losses": "detmix.losses",
    "weighted": "detmix.losses",
}


def __getattr__(name: str) -> Any:
    # torch is imported with the first name that needs it, so that --help of the commands takes no time.
    if name == "functional":
        return import_module("detmix.functional")
    if name not in _MODULES:
        raise AttributeError(f"module 'detmix' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
