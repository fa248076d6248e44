"""Weighting: make the loss of a detector use ``target["weights"]``."""

import detmix.losses.doors  # noqa: F401  # puts its checks into torch
from detmix.losses import rules_indexing, rules_losses  # noqa: F401  # they register their rules
from detmix.losses.box_weights import match_weights
from detmix.losses.checking import WeightingReport, check_weighting
from detmix.losses.criteria import WeightedCriterion
from detmix.losses.detectors import weight_losses
from detmix.losses.rules import drop, elementwise, move, reduce
from detmix.losses.weighted_tensor import RULES, WeightedTensor, weighted

__all__ = [
    "RULES",
    "WeightedCriterion",
    "WeightedTensor",
    "WeightingReport",
    "check_weighting",
    "drop",
    "elementwise",
    "match_weights",
    "move",
    "reduce",
    "weight_losses",
    "weighted",
]
