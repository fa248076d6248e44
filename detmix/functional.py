"""Mix samples: pure functions of (first, second, lam), and of a batch and a plan."""

from detmix.mixing.batch import mixup, mixup_batch, unmixed
from detmix.mixing.blend import blend_batch, blend_images
from detmix.mixing.labels import mix_labels
from detmix.mixing.memory import canvas_size
from detmix.mixing.merge import merge_targets
from detmix.mixing.plan import Mix, Placement
from detmix.targets import BOX_KEYS, Sample, Target, box_fields

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
