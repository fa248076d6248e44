"""Use Albumentations: pipelines that keep weights with their boxes, and `MixUp` as one of their transforms."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer release

from detmix.albumentations.mixup import MixUp
from detmix.albumentations.pipeline import AlbumentationsTransform

__all__ = ["AlbumentationsTransform", "MixUp"]
