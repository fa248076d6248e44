"""A batch that is mixed by a plan."""

from detmix.mixing.batch import mixup_batch
from detmix.mixing.plan import Mix, Placement

PLAN = [
    Mix(2, 0.1, (0.1, 0.9)),
    Mix(),
    Mix(0, 1 / 3, (1.0, 0.0), Placement(1.25, 0.1, 0.7)),
    Mix(1, 2**-24, (2**-24, 1 - 2**-24)),
]


def mixed(sample, plan=PLAN):
    """Images and targets of samples 0, 1, ... as a plan mixes them; sample i has image id 10 * i."""
    images, targets = zip(*(sample(2, (50, 40 + i), seed=i) for i in range(len(plan))), strict=True)
    targets = [target | {"image_id": 10 * i} for i, target in enumerate(targets)]
    return mixup_batch(list(images), targets, plan)
