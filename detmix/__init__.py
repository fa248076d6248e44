"""Mixup for object detection: blend two images on a shared canvas and weight every object's loss."""

from detmix import functional
from detmix.losses import WeightedCriterion, match_weights, weight_losses, weighted
from detmix.mixing.dataset import MixUpDataset
from detmix.mixing.transform import MixUp

__all__ = ["MixUp", "MixUpDataset", "WeightedCriterion", "functional", "match_weights", "weight_losses", "weighted"]

__version__ = "0.1.0"
