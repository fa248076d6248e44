"""Weighting: make a detector's loss heed ``target["weights"]``."""

from detmix.losses import rules as rules  # fills the table of rules
from detmix.losses.box_weights import match_weights
from detmix.losses.criteria import WeightedCriterion
from detmix.losses.detectors import weight_losses
from detmix.losses.weighted_tensor import WeightedTensor, weighted

__all__ = ["WeightedCriterion", "WeightedTensor", "match_weights", "weight_losses", "weighted"]
