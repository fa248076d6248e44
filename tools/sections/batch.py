"""Time mixing a batch, beside copies and other ways to mix; and mixing targets alone."""

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
LAM = 0.4  # for functions with one share for all samples; detmix has one for each


def one_tensor(
    device: torch.device,
    *,
    dtype: torch.dtype,
    inplace: bool = False,
    size: Sequence[int] | None = None,
    batches: int = 1,
) -> Case:
    """Mix a batch ``(B, C, H, W)``, B even, each image with the next.

    ``copy`` reads and writes every value once. A mix reads each image twice, as itself and as a partner, so ``copy of
    as many bytes`` copies half as much again. Each run takes the next of ``batches``. If they are larger than the
    cache, images come from memory as in a training loop. A batch that is mixed in place is restored before each run,
    because repeated mixes would make it uniform.
    """
    size = size or SIZES[device.type]
    count = size[0]
    # Each batch has the extra half that the longer copy reads, so that no run reads what another run has read.
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
    """Mix a list of images of at most the given size, each with the next on a shared canvas, with their targets.

    The copy moves as many bytes as reading both images of each canvas and writing the canvas.
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
    """Mix targets with images of one pixel, beside plain concatenation and what DEIM does."""
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
    """Plan to mix each image with the next, with shares from 0.1 to 0.9."""
    lams = torch.linspace(0.1, 0.9, count).tolist()
    return [functional.Mix((i + 1) % count, lam, (lam, 1 - lam)) for i, lam in enumerate(lams)]


def join(first: Target, second: Target) -> Target:
    """Concatenate the tensors of two targets."""
    return {key: torch.cat([first[key], second[key]]) for key in ("boxes", "labels", "area")}


def join_deep_copies(targets: list[Target], shifted: list[Target], lam: float) -> list[Target]:
    """Copy all targets deeply and then replace their tensors, as the collate function of DEIM does."""
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
