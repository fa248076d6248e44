"""Make detectors use ``target["weights"]``: the one function most users need, `weight_losses`.

The whole loss of a row (an anchor, a proposal, a query) matched to box *k* is multiplied by ``weights[k]``. A row
without a box weighs 1. Normalisers do not change. So each loss is affine in the weights and, with all weights 1, equals
the stock loss exactly. A box of weight 0 is ignored: its rows count neither as object nor as background. The weights
come from mixed samples [arXiv:1902.04103, sec. 3.1], or are any other confidence in a box.

`detmix.losses.heads` has the mixins for torchvision's heads, `detmix.losses.transformers` the loss functions.
"""

import functools
from collections.abc import Collection
from typing import Any, TypeVar

from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork

from detmix.losses.heads import MIXINS, SEAMS, WeightedAnchors
from detmix.losses.options import Weighting
from detmix.losses.transformers import WeightedLossFunction, is_transformers_detector
from detmix.losses.watch import watch_heads

Model = TypeVar("Model", bound=nn.Module)


def weight_losses(
    model: Model,
    *,
    terms: Collection[str] | None = None,
    normalizer: str = "count",
    per_image: bool = False,
    objectness: str = "loss",
) -> Model:
    """Make a detector's loss use ``target["weights"]``, in place.

    Works on torchvision's RetinaNet, FCOS, SSD, SSDlite, Faster R-CNN, Mask R-CNN and Keypoint R-CNN with any backbone,
    on subclasses of their heads, and on detectors of ``transformers`` whose criterion has DETR's ``get_loss``. There
    the weights go into each of the ``labels``. Only the class of the heads, or the loss function, changes. Parameters,
    ``state_dict`` and results in eval mode stay the same, and the model can be pickled and copied. The loss runs
    outside of ``torch.compile``. Call it again to change the options, and after a head was replaced: a step with
    weights raises until then.

    In training, ``target["weights"]`` is a floating point tensor ``(num_boxes,)``, finite, not negative, on the device
    of the boxes. A target without it weighs every box 1.

    Args:
        model: Detector, or a module that contains one.
        terms: Names of the losses that use weights; ``None`` means all. `detmix.losses.options.Weighting` explains
            this and the other options.
        normalizer: Divisor of a loss, ``"count"`` or ``"weights"``.
        per_image: Use the mean weight of an image's boxes for the whole image.
        objectness: Whether weights scale the RPN's objectness ``"loss"`` or are its ``"target"``.

    Returns:
        The same model.

    Raises:
        TypeError: If no module of the model is a known head.
        ValueError: If an option has an unknown value, or names a loss or head that the model does not have.

    Example:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        >>> weight_losses(model) is model
        True
    """
    weighting = Weighting(terms, normalizer, per_image, objectness)
    heads: list[Any] = [module for module in model.modules() if isinstance(module, (*SEAMS, *MIXINS))]
    detectors: list[Any] = [module for module in model.modules() if is_transformers_detector(module)]
    if not heads and not detectors:
        raise TypeError(
            f"{type(model).__name__} holds none of the heads whose losses can be weighted: "
            f"{', '.join(cls.__name__ for cls in SEAMS)} or a subclass of one; nor a model of transformers whose loss "
            f"function builds a criterion with get_loss."
        )
    _check(weighting, model, heads, detectors)
    for head in heads:
        if not isinstance(head, MIXINS):
            mixin = next(seam.mixin for cls, seam in SEAMS.items() if isinstance(head, cls))
            head.__class__ = weighted_class(mixin, type(head))  # type: ignore[arg-type]  # mypy: no hashable
        head.weighting = weighting
    for detector in detectors:
        function = detector.loss_function
        stock = function.function if isinstance(function, WeightedLossFunction) else function
        if not isinstance(function, WeightedLossFunction) or function.weighting != weighting:
            detector.loss_function = WeightedLossFunction(stock, weighting)
    watch_heads(model)
    return model


def _check(weighting: Weighting, model: nn.Module, heads: list[Any], detectors: list[Any]) -> None:
    name = type(model).__name__
    networks = [head for head in heads if isinstance(head, WeightedAnchors | RegionProposalNetwork)]
    if weighting.objectness != "loss" and not networks:
        raise ValueError(f"objectness is {weighting.objectness!r}, but {name} has no RegionProposalNetwork.")
    stock: list[Any] = [next(cls for cls in type(head).__mro__ if not issubclass(cls, MIXINS)) for head in heads]
    if detectors or not all(cls in SEAMS for cls in stock):
        return  # their losses are known only when they are computed
    known = {term for cls in stock for term in SEAMS[cls].terms}
    if unknown := sorted(set(weighting.terms or ()) - known):
        raise ValueError(f"terms holds {unknown}, but the losses of {name} are {sorted(known)}.")


@functools.cache
def weighted_class(mixin: type, cls: type) -> type:
    """Make a subclass of both whose instances can be pickled although no module holds the class."""
    return type(f"Weighted{cls.__name__}", (mixin, cls), {"__reduce_ex__": _reduce, "__doc__": cls.__doc__})


def _reduce(self: Any, protocol: Any) -> Any:
    mixin, cls = type(self).__bases__
    _, _, *rest = super(type(self), self).__reduce_ex__(protocol)
    return _new, (mixin, cls), *rest


def _new(mixin: type, cls: type) -> Any:
    made: Any = weighted_class(mixin, cls)
    return made.__new__(made)
