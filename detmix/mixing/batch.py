"""Mix samples: pure functions of (first, second, lam), and of a batch and a plan.

Mixup for object detection as in the Bag of Freebies [arXiv:1902.04103, sec. 3.1]: the images are not resized but laid
on one canvas, both at its top left, so every box keeps its pixel coordinates, and every box is kept with a weight.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from detmix.mixing.blend import blend_batch, blend_each, blend_images
from detmix.mixing.memory import canvas_size
from detmix.mixing.merge import merge_batch, merge_targets, unmixed_target
from detmix.mixing.placement import place
from detmix.mixing.plan import Mix, Placement
from detmix.targets import BOX_KEYS, Batch, Sample, Target, annotated, check_batch, check_target, size_of


def mixup(
    first: Sample,
    second: Sample,
    lam: float,
    *,
    placement: Placement | None = None,
    shares: tuple[float, float] | None = None,
    min_weight: float = 0.0,
    fill: float | Sequence[float] = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> Sample:
    """Mix two samples: `blend_images` of the images and `merge_targets` of the targets.

    Args:
        first: ``(image, target)``.
        second: ``(image, target)``.
        lam: The share of ``first``, in [0, 1].
        placement: Where the second lies on the first's canvas, scaled; see `detmix.mixing.placement.place`. Both lie at the
            top left of a canvas that holds them if ``None``.
        shares: See `merge_targets`.
        min_weight: See `merge_targets`.
        fill: See `blend_images`.
        box_keys: See `merge_targets`.

    Returns:
        The mixed ``(image, target)``; the inputs are left alone.

    Raises:
        ValueError: as its parts, and where a target does not fit its image.

    Example:
        >>> import torch
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
        >>> image, mixed = mixup((torch.ones(3, 4, 4), target), (torch.zeros(3, 2, 6), target), 0.75)
        >>> image.shape, mixed["weights"]
        (torch.Size([3, 4, 6]), tensor([0.7500, 0.2500]))
    """
    first, second = ((image, annotated(image, target)) for image, target in (first, second))
    for name, (image, target) in (("the first sample", first), ("the second sample", second)):
        check_target(target, where=name, image=image)
    second = _placed(first[0], second, placement, fill, box_keys)
    size = canvas_size(first[0], second[0])
    merged = merge_targets(first[1], second[1], lam, size, shares=shares, min_weight=min_weight, box_keys=box_keys)
    return blend_images(first[0], second[0], lam, fill=fill), merged | {"placement": placement}


def mixup_batch(
    images: Tensor | Sequence[Tensor],
    targets: Sequence[Target],
    plan: Sequence[Mix],
    *,
    pool: Batch | None = None,
    min_weight: float = 0.0,
    fill: float | Sequence[float] = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
    inplace: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor | list[Tensor], list[Target]]:
    """Mix a batch by a plan: the same plan on the same batch gives the same mix, bit for bit.

    Args:
        images: A batch ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)`` of any sizes.
        targets: B targets; see `merge_targets`.
        plan: For each sample what is done to it; ``[Mix.of(target) for target in mixed]`` is the plan that mixed
            targets record.
        pool: ``(images, targets)`` that the partners come from, if they do not come from the batch.
        min_weight: See `merge_targets`.
        fill: See `blend_images`.
        box_keys: See `merge_targets`.
        inplace: Write the mix into ``images``, a batch tensor. The targets are new all the same.
        out: Where to write the mix, ``(B, C, H, W)``: memory of the caller's, apart from that of the images. Mixes of a
            sequence must be of its size, then.

    Returns:
        Images, a tensor for a tensor and a list for a sequence, ``out`` if given, and new targets, each with what
        `merge_targets` writes and ``partner`` and ``placement``. Tensors of one key may lie in one storage, of at most
        256 KiB, which is stored as a whole with any of them: `torch.save` a ``clone()`` where that is too much.

    Raises:
        ValueError: if anything does not go together; ``images`` is untouched then, ``inplace`` or not.
        TypeError: if ``inplace`` is asked for and the images are no batch tensor, or ``out`` is none.

    Example:
        >>> import torch
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
        >>> plan = [Mix(1, 0.75, (0.75, 0.25)), Mix()]
        >>> images, targets = mixup_batch(torch.ones(2, 3, 4, 4), [target, target], plan)
        >>> [target["weights"].tolist() for target in targets]
        [[0.75, 0.25], [1.0]]
    """
    if inplace and not isinstance(images, Tensor):
        raise TypeError(f"inplace needs one batch tensor, but images is a {type(images).__name__}.")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a batch tensor, but it is a {type(out).__name__}.")
    if out is not None and len(out) != len(images):
        raise ValueError(
            f"out must hold {len(images)} images, as many as are mixed, but its shape is {tuple(out.shape)}."
        )
    # A batch tensor that is blended as a whole stands for each of its images: they need not be taken apart.
    is_whole = isinstance(images, Tensor) and not any(mix.placement for mix in plan)
    samples = _checked(images, targets, "target", is_whole)
    if len(plan) != len(images):
        raise ValueError(f"plan must say what is done to each of {len(images)} images, but has {len(plan)} entries.")
    others = samples if pool is None else _checked(*pool, "target of the pool,", is_whole)
    for i, mix in enumerate(plan):
        if not -1 <= mix.partner < len(others):
            raise ValueError(f"partner {i} must be -1 or below the {len(others)} there are, but it is {mix.partner}.")
    seconds = [
        None if mix.partner < 0 else _placed(image, others[mix.partner], mix.placement, fill, box_keys)
        for (image, _), mix in zip(samples, plan, strict=True)
    ]
    everyone, sides = [target for _, target in samples], []
    for i, (mix, second) in enumerate(zip(plan, seconds, strict=True)):
        if second is None:
            sides.append([i])
        elif pool is None and mix.placement is None:
            sides.append([i, mix.partner])
        else:
            sides.append([i, len(everyone)])
            everyone.append(second[1])
    if isinstance(images, Tensor):
        canvases = [size_of(images)] * len(images)
    else:
        canvases = [
            canvas_size(image, image if second is None else second[0])
            for (image, _), second in zip(samples, seconds, strict=True)
        ]
    lams = [1.0 if mix.partner < 0 else mix.lam for mix in plan]
    shares = [(1.0, 0.0) if mix.partner < 0 else mix.shares for mix in plan]
    merged = merge_batch(everyone, sides, lams, shares, canvases, min_weight=min_weight, box_keys=box_keys)
    for target, mix in zip(merged, plan, strict=True):
        target["placement"], target["partner"] = mix.placement, mix.partner
    if isinstance(images, Tensor):
        partners, pool_images = [mix.partner for mix in plan], None if pool is None else pool[0]
        if not is_whole:
            partners = [-1 if second is None else i for i, second in enumerate(seconds)]
            pool_images = [
                image if second is None else second[0] for image, second in zip(images, seconds, strict=True)
            ]
        memory: dict[str, Any] = {"inplace": inplace, "out": out}
        return blend_batch(images, partners, lams, pool=pool_images, fill=fill, **memory), merged
    others_images = [None if second is None else second[0] for second in seconds]
    outs = None if out is None else list(out)
    blends = blend_each(images, others_images, lams, fill=fill, outs=outs)
    return blends if out is None else out, merged


def unmixed(sample: Sample, *, min_weight: float = 0.0, box_keys: Collection[str] = BOX_KEYS) -> Sample:
    """A copy of a sample with the keys a mixed one has: its weights or 1, source 0, lam 1.

    Args:
        sample: ``(image, target)``.
        min_weight: See `merge_targets`.
        box_keys: See `merge_targets`.

    Example:
        >>> import torch
        >>> _, target = unmixed((torch.zeros(3, 4, 4), {"boxes": torch.zeros(1, 4)}))
        >>> target["weights"], target["source"], target["lam"]
        (tensor([1.]), tensor([0]), 1.0)
    """
    image, target = sample
    copy = unmixed_target(target, size_of(image), min_weight=min_weight, box_keys=box_keys)
    return image.clone(), copy | {"placement": None}


def _checked(images: Tensor | Sequence[Tensor], targets: Sequence[Target], where: str, is_whole: bool) -> list[Sample]:
    singles = [images] * len(images) if isinstance(images, Tensor) and is_whole else list(images)
    if len(singles) == len(targets):
        targets = [annotated(image, target) for image, target in zip(singles, targets, strict=True)]
    check_batch(images, targets, where=where)
    return list(zip(singles, targets, strict=True))


def _placed(
    image: Tensor,
    second: Sample,
    placement: Placement | None,
    fill: float | Sequence[float],
    box_keys: Collection[str],
) -> Sample:
    if placement is None:
        return second
    return place(*second, size_of(image), placement, fill=fill, box_keys=box_keys)
