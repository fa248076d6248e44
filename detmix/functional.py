"""Mix samples: pure functions of (first, second, lam), and of a batch and a plan."""

from detmix.mixing.batch import mix_labels, mixup, mixup_batch, unmixed
from detmix.mixing.batch import Mix, Sample, Target
from detmix.mixing.blend import blend_batch, blend_images, canvas_size
from detmix.mixing.join import BOX_KEYS
from detmix.mixing.placement import Placement
from detmix.targets import box_fields, merge_targets

__all__ = [
    "BOX_KEYS",
    "Mix",
    "Placement",
    "Sample",
    "Target",
    "blend_batch",
    "blend_images",
    "box_fields",
    "canvas_size",
    "merge_targets",
    "mix_labels",
    "mixup",
    "mixup_batch",
    "unmixed",
]
