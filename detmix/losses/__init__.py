"""Weighting: make a detector's loss heed ``target["weights"]``."""

from detmix.losses import _rules as _rules  # fills the table of rules
from detmix.losses.detectors import match_weights, weight_losses
from detmix.losses.weighted_tensor import WeightedTensor, weighted

__all__ = ["WeightedTensor", "match_weights", "weight_losses", "weighted"]
