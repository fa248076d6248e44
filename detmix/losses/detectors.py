"""Make torchvision's detectors heed ``target["weights"]``.

A row (an anchor, a proposal) matched to box *k* has its whole loss multiplied by ``weights[k]``; a row matched to no
box weighs 1; every normaliser stays torchvision's. So each loss is affine in the weights, equals torchvision's bit for
bit at weights of 1, and a box of weight 0 makes its rows neither positive nor negative. The weights are those of mixed
samples [arXiv:1902.04103, sec. 3.1], or any other confidence in a box.

Each class here ties weights to rows at one method of its parent, then has the parent compute its loss on them.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from detmix.losses.loss_functions import WeightedLossFunction, is_transformers_detector
from detmix.losses.matching import Target, all_box_weights, eager, row_weights
from detmix.losses.weighted_tensor import RULES, WeightedTensor, drop, weighted, weights_of

Model = TypeVar("Model", bound=nn.Module)

# Mask R-CNN crops the masks it is to predict with boxes numbered by the object they are matched to. The numbers carry
# the object's weight; the crops are targets, and need none.
RULES[torch.ops.torchvision.roi_align] = drop


def weight_losses(model: Model) -> Model:
    """Make a detector heed ``target["weights"]``, in place.

    Works on torchvision's RetinaNet, FCOS, SSD, SSDlite, Faster R-CNN, Mask R-CNN and Keypoint R-CNN, whatever their
    backbone, and on detectors of ``transformers`` whose criterion has DETR's ``get_loss``, where the weights go into
    each of the ``labels``. Only the class of the heads, or the loss function, changes: parameters, ``state_dict`` and
    results in eval mode stay the same, and the model can be pickled and copied. The loss code runs outside of
    ``torch.compile``. A second call changes nothing.

    In training, ``target["weights"]`` is floating point of shape ``(num_boxes,)``, finite, not negative and on the
    device of the boxes; a target without it weighs every box 1.

    Args:
        model: A detector, or any module that holds one.

    Returns:
        The same model.

    Raises:
        TypeError: If no module of the model is a known head, or one is a subclass of a known head.

    Example:
        >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
        >>> model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        >>> weight_losses(model) is model
        True
    """
    heads = [module for module in model.modules() if isinstance(module, tuple(_WEIGHTED))]
    detectors: list[Any] = [module for module in model.modules() if is_transformers_detector(module)]
    if not heads and not detectors:
        known = ", ".join(cls.__name__ for cls in _WEIGHTED)
        raise TypeError(
            f"{type(model).__name__} holds none of the heads whose losses can be weighted: {known}; nor a model of "
            f"transformers whose loss function builds a criterion with get_loss."
        )
    heads = [head for head in heads if not isinstance(head, tuple(_WEIGHTED.values()))]
    for head in heads:
        if type(head) not in _WEIGHTED:
            weighted_cls = next(new.__name__ for old, new in _WEIGHTED.items() if isinstance(head, old))
            raise TypeError(
                f"{type(head).__name__} in {type(model).__name__} is a subclass of a known head, and may compute other "
                f"losses. If its losses are its parent's, let it inherit from detmix.losses.detectors.{weighted_cls}."
            )
    for head in heads:
        head.__class__ = _WEIGHTED[type(head)]
    for detector in detectors:
        if not isinstance(detector.loss_function, WeightedLossFunction):
            detector.loss_function = WeightedLossFunction(detector.loss_function)
    return model


class _WeightedRows:
    """Goes before a class whose ``compute_loss`` gets all predictions and the box each row is matched to."""

    @eager
    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        """The parent's losses, with each row multiplied by the weight of its box."""
        weights = all_box_weights(targets, num_classes=head_outputs["cls_logits"].shape[-1])
        if weights is not None:
            rows = torch.stack([row_weights(w, m) for w, m in zip(weights, matched_idxs, strict=True)])  # (B, R)
            head_outputs = {name: weighted(output, rows[..., None]) for name, output in head_outputs.items()}
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)  # type: ignore[misc, no-any-return]


class WeightedRetinaNetHead(_WeightedRows, RetinaNetHead):  # type: ignore[misc]
    """torchvision's head of RetinaNet, with weighted losses."""


class WeightedFCOSHead(_WeightedRows, FCOSHead):  # type: ignore[misc]
    """torchvision's head of FCOS, with weighted losses."""


class WeightedSSD(_WeightedRows, SSD):  # type: ignore[misc]
    """torchvision's SSD and SSDlite, with weighted losses. Negatives are mined by their stock losses."""


class _WeightedBoxes(Tensor):
    """Boxes whose weights are gathered with them; whatever else is computed on them, as their matching, is plain."""

    weights: Tensor

    @classmethod
    def of(cls, boxes: Tensor, weights: Tensor) -> Tensor:
        out = boxes.as_subclass(cls)
        out.weights = weights
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
                return weighted(out, args[0].weights.index_select(0, args[1])[:, None])
            return out


class WeightedRPN(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network, with weighted losses. Anchors are sampled as ever."""

    # The labels that carry weights pass through it; its head is compiled all the same.
    forward = torch.compiler.disable(RegionProposalNetwork.forward, recursive=False)  # type: ignore[no-untyped-call]

    @eager
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to boxes; the labels carry the weight of each anchor's box to :meth:`compute_loss`."""
        weights = all_box_weights(targets)
        if weights is None:
            return super().assign_targets_to_anchors(anchors, targets)  # type: ignore[no-any-return]
        # The parent gathers the matched boxes but tells no indices, so the weights ride on the boxes it gathers.
        riding = [{**t, "boxes": _WeightedBoxes.of(t["boxes"], w)} for t, w in zip(targets, weights, strict=True)]
        labels, boxes = super().assign_targets_to_anchors(anchors, riding)
        assert all(isinstance(b, WeightedTensor) or len(w) == 0 for b, w in zip(boxes, weights, strict=True))
        rows = [torch.where(y > 0, weights_of(b)[:, 0], 1.0) for y, b in zip(labels, boxes, strict=True)]
        labels = [weighted(y, w) for y, w in zip(labels, rows, strict=True)]
        return labels, [b.as_subclass(Tensor) for b in boxes]

    @eager
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses of the network, each anchor's multiplied by the weight of its box."""
        if any(isinstance(y, WeightedTensor) for y in labels):
            rows = torch.cat([weights_of(y).expand(y.shape) for y in labels])[:, None]
            objectness, pred_bbox_deltas = weighted(objectness, rows), weighted(pred_bbox_deltas, rows)
            labels = [y.as_subclass(Tensor) for y in labels]  # the sampler needs no weights
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)  # type: ignore[no-any-return]


class WeightedRoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's box, mask and keypoint heads, with weighted losses. Proposals are sampled as ever."""

    forward = eager(RoIHeads.forward)  # its loss functions are no methods

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sample proposals; their labels and matched indices carry the weight of the box they are matched to.

        The losses gather predictions by these labels, and targets by these indices, and so get the weights.
        """
        scores = getattr(self.box_predictor, "cls_score", None)  # of torchvision's predictors; others keep their secret
        weights = all_box_weights(targets, num_classes=getattr(scores, "out_features", None))
        proposals, matched_idxs, labels, deltas = super().select_training_samples(proposals, targets)
        if weights is not None:
            # Background is matched to box 0 here, and only its label tells.
            rows = [row_weights(w, m.where(y > 0, -1)) for w, m, y in zip(weights, matched_idxs, labels, strict=True)]
            matched_idxs = [weighted(m, w) for m, w in zip(matched_idxs, rows, strict=True)]
            labels = [weighted(y, w) for y, w in zip(labels, rows, strict=True)]
        return proposals, matched_idxs, labels, deltas


_WEIGHTED: dict[type[nn.Module], type[nn.Module]] = {
    RetinaNetHead: WeightedRetinaNetHead,
    FCOSHead: WeightedFCOSHead,
    SSD: WeightedSSD,
    RegionProposalNetwork: WeightedRPN,
    RoIHeads: WeightedRoIHeads,
}
