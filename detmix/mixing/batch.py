"""Mix samples by a plan: a pair, or a whole batch.

Mixup for object detection as in the Bag of Freebies [arXiv:1902.04103, sec. 3.1]. The images are not resized: both lie
at the top left of one canvas. So every box keeps its pixel coordinates, and every box is kept, with a weight.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from detmix.mixing.blend import blend_by_plan, blend_pairs
from detmix.mixing.memory import canvas_size
from detmix.mixing.merge import merge_by_plan
from detmix.mixing.placement import place
from detmix.mixing.plan import Mix, Placement, check_lam, check_plan
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
    """Mix two samples: blend the images as `blend_images` and merge the targets as `merge_targets`.

    Args:
        first: ``(image, target)``.
        second: ``(image, target)``.
        lam: Share of ``first``, in [0, 1].
        placement: Where the second lies on the first's canvas, scaled; see `detmix.mixing.placement.place`. ``None``
            puts both at the top left of a canvas that holds them.
        shares: See `merge_targets`.
        min_weight: See `merge_targets`.
        fill: See `blend_images`.
        box_keys: See `merge_targets`.

    Returns:
        The mixed ``(image, target)``. The inputs do not change.

    Raises:
        ValueError: If a target does not fit its image, or as `blend_images` and `merge_targets`.

    Example:
        >>> import torch
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
        >>> image, mixed = mixup((torch.ones(3, 4, 4), target), (torch.zeros(3, 2, 6), target), 0.75)
        >>> image.shape, mixed["weights"]
        (torch.Size([3, 4, 6]), tensor([0.7500, 0.2500]))
    """
    (image, target), (other, other_target) = ((image, annotated(image, target)) for image, target in (first, second))
    check_target(target, where="the first sample", image=image)
    check_target(other_target, where="the second sample", image=other)
    check_lam(lam)
    plan = [Mix(0, lam, (lam, 1 - lam) if shares is None else shares, placement)]
    options: dict[str, Any] = {"min_weight": min_weight, "fill": fill, "box_keys": box_keys}
    (mixed,), (merged,) = mix_by_plan([image], [target], plan, pool=([other], [other_target]), **options)
    del merged["partner"]  # there is no batch that it could be an index of
    return mixed, merged


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
    """Mix a batch by a plan. The same plan on the same batch gives the same mix, bit for bit.

    Args:
        images: Batch ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)`` of any sizes.
        targets: B targets; see `merge_targets`.
        plan: B mixes. ``[Mix.of(target) for target in mixed]`` is the plan that mixed targets record.
        pool: ``(images, targets)`` that the partners come from, if not from the batch.
        min_weight: See `merge_targets`.
        fill: See `blend_images`.
        box_keys: See `merge_targets`.
        inplace: Write the mix into ``images``, a batch tensor. The targets are new all the same.
        out: Tensor ``(B, C, H, W)`` to write the mix into. It must not share memory with the images. Mixes of a
            sequence must all have its size.

    Returns:
        Images, a tensor for a tensor and a list for a sequence, ``out`` if given; and new targets, each with what
        `merge_targets` writes and ``partner`` and ``placement``. Tensors of one key may share one storage of at most
        256 KiB. `torch.save` stores all of it with any of them; save a ``clone()`` where that is too much.

    Raises:
        ValueError: If something does not fit. ``images`` is unchanged then, ``inplace`` or not.
        TypeError: If ``inplace`` is set and the images are not a batch tensor, or ``out`` is not one.

    Example:
        >>> import torch
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
        >>> plan = [Mix(1, 0.75, (0.75, 0.25)), Mix()]
        >>> images, targets = mixup_batch(torch.ones(2, 3, 4, 4), [target, target], plan)
        >>> [target["weights"].tolist() for target in targets]
        [[0.75, 0.25], [1.0]]
    """
    check_memory(images, inplace, out)
    targets = check_samples(images, targets)
    pool = None if pool is None else (pool[0], check_samples(*pool, where="target of the pool,"))
    check_plan(plan, len(images), len(images if pool is None else pool[0]))
    options: dict[str, Any] = {"min_weight": min_weight, "fill": fill, "box_keys": box_keys}
    return mix_by_plan(images, targets, plan, pool=pool, inplace=inplace, out=out, **options)


def unmixed(sample: Sample, *, min_weight: float = 0.0, box_keys: Collection[str] = BOX_KEYS) -> Sample:
    """Copy a sample and add the keys of a mixed one: its weights or 1, source 0, lam 1.

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
    options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
    (copy,) = merge_by_plan([target], [Mix()], [size_of(image)], **options)
    return image.clone(), copy | {"placement": None}


def check_samples(
    images: Tensor | Sequence[Tensor], targets: Sequence[Target], *, where: str = "target"
) -> Sequence[Target]:
    """Check a batch with `check_batch` and return its targets, those without annotations with empty boxes."""
    if len(images) == len(targets):
        singles = [images] * len(images) if isinstance(images, Tensor) else images  # a batch has the size of its images
        targets = [annotated(image, target) for image, target in zip(singles, targets, strict=True)]
    check_batch(images, targets, where=where)
    return targets


def check_memory(images: Tensor | Sequence[Tensor], inplace: bool, out: Tensor | None) -> None:
    """Check that a mix can be written where the caller wants it.

    Raises:
        ValueError: If ``out`` does not hold as many images.
        TypeError: If ``inplace`` is set and the images are not a batch tensor, or ``out`` is not one.
    """
    if inplace and not isinstance(images, Tensor):
        raise TypeError(f"inplace needs one batch tensor, but images is a {type(images).__name__}.")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a batch tensor, but it is a {type(out).__name__}.")
    if out is not None and len(out) != len(images):
        raise ValueError(
            f"out must hold {len(images)} images, as many as are mixed, but its shape is {tuple(out.shape)}."
        )


def mix_by_plan(
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
    """Mix a batch as `mixup_batch` does, all of it checked already."""
    drawn = plan
    if any(mix.placement for mix in plan):
        plan, pool = _place_partners(images, targets, plan, pool, fill, box_keys)
    others, other_targets = (images, None) if pool is None else pool
    seconds: list[Tensor | None] = []
    if isinstance(images, Tensor):
        canvases = [size_of(images)] * len(images)
    else:
        seconds = [None if mix.partner < 0 else others[mix.partner] for mix in plan]
        canvases = [canvas_size(a, a if b is None else b) for a, b in zip(images, seconds, strict=True)]
    merged = merge_by_plan(targets, plan, canvases, pool=other_targets, min_weight=min_weight, box_keys=box_keys)
    for target, mix in zip(merged, drawn, strict=True):
        target["placement"], target["partner"] = mix.placement, mix.partner
    if isinstance(images, Tensor):
        given = None if pool is None else others
        return blend_by_plan(images, plan, pool=given, fill=fill, inplace=inplace, out=out), merged
    blends = blend_pairs(images, seconds, plan, fill=fill, outs=None if out is None else list(out))
    return blends if out is None else out, merged


def _place_partners(
    images: Tensor | Sequence[Tensor],
    targets: Sequence[Target],
    plan: Sequence[Mix],
    pool: Batch | None,
    fill: float | Sequence[float],
    box_keys: Collection[str],
) -> tuple[list[Mix], Batch]:
    """Lay each partner on its canvas. Return a pool of them, one for each sample, and the plan for that pool."""
    others, other_targets = (images, targets) if pool is None else pool
    own_plan, placed = [], []
    for i, (image, mix) in enumerate(zip(images, plan, strict=True)):
        partner = image, targets[i]  # of an unmixed sample, only to fill its place
        if mix.partner >= 0:
            partner = others[mix.partner], other_targets[mix.partner]
            if mix.placement is not None:
                partner = place(*partner, size_of(image), mix.placement, fill=fill, box_keys=box_keys)
        own_plan.append(mix if mix.partner < 0 else mix._replace(partner=i))
        placed.append(partner)
    return own_plan, ([image for image, _ in placed], [target for _, target in placed])
