"""A batch, beside copies of it and the other ways to mix it; and its targets alone."""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from detmix import functional
from sections import Case, Section
from sections.inputs import CLASSES, Target, blend_plainly, copying, draw_pixels, draw_targets, in_words

SIZES = {"cpu": (8, 3, 640, 640), "cuda": (16, 3, 800, 1333)}
LIST_SIZES = {"cpu": (8, 3, 400, 667), "cuda": (16, 3, 800, 1333)}
BOXES = 8
LAM = 0.4  # where there is one for all; detmix gives each sample its own


def one_tensor(
    device: torch.device,
    *,
    dtype: torch.dtype,
    inplace: bool = False,
    size: Sequence[int] | None = None,
    batches: int = 1,
) -> Case:
    """A batch ``(B, C, H, W)``, B even, each image with the next.

    ``copy`` reads and writes every value once; ``copy of as many bytes`` moves what a mix does that reads each image
    twice, as itself and as a partner: half as much again. Every run takes the next of so many batches, and more than
    a cache holds are as a training loop has them. What is mixed in place is restored before each run, as it would
    come nearer to one colour with every round.
    """
    size = size or SIZES[device.type]
    count = size[0]
    # Each batch with the half more that the longer copy reads, so that no run has read what another is to read.
    memory = draw_pixels(batches, count + count // 2, *size[1:], dtype=dtype, device=device)
    untouched, out = memory[0].clone(), torch.ones_like(memory[0])
    other = memory[0, :count].roll(1, 0)
    following = itertools.cycle(memory)
    plan = plan_rotation(count)
    labels = torch.randint(CLASSES, (count,), device=device)
    mixup = v2.MixUp(num_classes=CLASSES)
    functions: dict[str, Callable[[Tensor], object]] = {
        "detmix": lambda batch: functional.blend_batch(batch, plan, inplace=inplace),
        "copy": out[:count].copy_,
        "copy of as many bytes": out.copy_,
    }
    if dtype.is_floating_point:
        functions["fresh lerp"] = lambda batch: torch.lerp(other, batch, LAM)
        functions["v2.MixUp"] = lambda batch: mixup(batch, labels)
    else:
        functions["via float"] = lambda batch: torch.lerp(other.float(), batch.float(), LAM).round_().to(dtype)

    def run(function: Callable[[Tensor], object], entries: int) -> object:
        return function(next(following)[:entries])

    entries = {"copy of as many bytes": len(out)}
    runs = {name: functools.partial(run, function, entries.get(name, count)) for name, function in functions.items()}
    sizes = in_words(size) if batches == 1 else f"{batches} batches of {in_words(size)} in turn"
    if inplace:
        return Case(f"{sizes}, in place", runs, prepare=lambda: memory[0].copy_(untouched))
    return Case(sizes, runs)


def images_of_many_sizes(device: torch.device, *, dtype: torch.dtype, size: Sequence[int] | None = None) -> Case:
    """A list of images, none larger than size says, each with the next on a canvas for both; and their targets.

    The copy moves as many bytes as reading both images of each canvas, and writing it.
    """
    count, channels, height, width = size or LIST_SIZES[device.type]
    sizes = [(height - i % 3 * (height // 16), width - i % 5 * (width // 16)) for i in range(count)]
    images = [draw_pixels(channels, *sides, dtype=dtype, device=device) for sides in sizes]
    targets, plan = draw_targets(sizes, BOXES, device), plan_rotation(count)
    pairs = [(image, images[mix.partner], mix.lam) for image, mix in zip(images, plan, strict=True)]
    canvases = [functional.canvas_size(first, second) for first, second, _ in pairs]
    moved = 2 * sum(image.numel() for image in images) + channels * sum(h * w for h, w in canvases)
    runs = {
        "detmix": lambda: functional.mixup_batch(images, targets, plan),
        "copy of as many bytes": copying(moved // 2, dtype, device),
        "plain float32": lambda: [blend_plainly(*pair) for pair in pairs],
    }
    return Case(f"{count} images up to {in_words((channels, height, width))}, {BOXES} boxes each", runs)


def targets_alone(device: torch.device, *, count: int = 8) -> Case:
    """Boxes, labels and areas joined, with images of one pixel, beside no more than that and what DEIM does."""
    images = torch.rand(count, 3, 1, 1, device=device)
    targets, plan = draw_targets([(1, 1)] * count, BOXES, device), plan_rotation(count)
    shifted = [targets[mix.partner] for mix in plan]
    runs = {
        "detmix": lambda: functional.mixup_batch(images, targets, plan),
        "deepcopy": lambda: join_deep_copies(targets, shifted, LAM),
        "torch.cat": lambda: [join(first, second) for first, second in zip(targets, shifted, strict=True)],
    }
    return Case(f"{count} images of 1 pixel, {BOXES} boxes each", runs)


def plan_rotation(count: int) -> list[functional.Mix]:
    """Each with the next, shares from 0.1 to 0.9."""
    lams = torch.linspace(0.1, 0.9, count).tolist()
    return [functional.Mix((i + 1) % count, lam, (lam, 1 - lam)) for i, lam in enumerate(lams)]


def join(first: Target, second: Target) -> Target:
    """Each tensor of two targets in one."""
    return {key: torch.cat([first[key], second[key]]) for key in ("boxes", "labels", "area")}


def join_deep_copies(targets: list[Target], shifted: list[Target], lam: float) -> list[Target]:
    """As the collate function of DEIM: a deep copy of all, whose tensors are then replaced."""
    joined = copy.deepcopy(targets)
    for own, first, second in zip(joined, targets, shifted, strict=True):
        own.update(join(first, second))
        shares = [lam] * len(first["labels"]) + [1 - lam] * len(second["labels"])
        own["mixup"] = torch.tensor(shares, device=first["boxes"].device)
    return joined


SECTION = Section(
    {
        "float32 inplace": functools.partial(one_tensor, dtype=torch.float32, inplace=True),
        "float32": functools.partial(one_tensor, dtype=torch.float32),
        "uint8 inplace": functools.partial(one_tensor, dtype=torch.uint8, inplace=True),
        "uint8": functools.partial(one_tensor, dtype=torch.uint8),
        "uint8 from memory": functools.partial(one_tensor, dtype=torch.uint8, batches=64),
        "float16": functools.partial(one_tensor, dtype=torch.float16),
        "list float32": functools.partial(images_of_many_sizes, dtype=torch.float32),
        "list uint8": functools.partial(images_of_many_sizes, dtype=torch.uint8),
        "targets": targets_alone,
    }
)
