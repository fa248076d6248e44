"""Tie weights to the rows of torchvision's heads, with one mixin for each kind of head.

Each mixin finds the weights of the rows in one method, and the parent computes its loss on them. Use one for a head of
your own that has the same methods: ``class MyHead(WeightedRows, Head): ...``. Its ``weighting`` says how weights count.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from detmix.losses.box_weights import eager, weigh_rows, weigh_targets
from detmix.losses.options import DEFAULT, Weighting
from detmix.losses.transformers import rebound
from detmix.losses.weighted_tensor import LatentTensor, WeightedTensor, stripped, weighted, weights_of
from detmix.targets import Target


class WeightedHead:
    """Say what all weighted heads have in common."""

    weighting = DEFAULT
    first_class: tuple[int | None, int] = (None, 0)
    """Lowest label in a target without weights, where the stock code decides, and in one with."""

    def __prepare_scriptable__(self) -> Any:
        """Raise, as TorchScript cannot hold weighted tensors. ``torch.jit.script`` asks each module for this first."""
        raise TypeError(
            f"{type(self).__name__} is weighted and cannot be converted to TorchScript. Build the model without "
            f"weight_losses, load the state_dict of this one into it and convert that: their results are the same."
        )


class WeightedRows(WeightedHead):
    """Weight a class whose ``compute_loss`` gets all predictions and the box that each row is matched to.

    torchvision's ``FCOSHead`` and ``SSD`` have this form: ``compute_loss(targets, head_outputs, anchors,
    matched_idxs)``. ``head_outputs`` is a dict of ``(B, num_rows, ...)`` with ``"cls_logits"``. ``matched_idxs`` is a
    list of B int64 ``(num_rows,)``, negative for a row without a box. The result is a dict of losses.

    Attributes:
        weighting: How weights count.
        counted_over: Dimensions of ``(B, num_rows)`` over which the stock normaliser counts matched rows.
        first_class: Lowest label in a target without weights, where the stock code decides, and in one with weights:
            0, as no class is the background.
    """

    counted_over: tuple[int, ...] = (0, 1)

    @eager
    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compute the parent's losses, the loss of each row multiplied by the weight of its box."""
        stock = partial(super().compute_loss, targets)  # type: ignore[misc]
        rest = anchors, matched_idxs, *args
        weights = weigh_targets(targets, self.weighting, head_outputs["cls_logits"].shape[-1], self.first_class)
        if weights is None:
            return stock(head_outputs, *rest, **kwargs)  # type: ignore[no-any-return]
        rows = torch.stack([weigh_rows(w, m) for w, m in zip(weights, matched_idxs, strict=True)])  # (B, num_rows)
        if self.weighting.normalizer != "count":
            rows = self.weighting.normalized(rows, torch.stack(list(matched_idxs)) >= 0, self.counted_over)
        carrying = {
            name: weighted(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2))) for name, x in head_outputs.items()
        }
        return self.weighting.pick(stock(carrying, *rest, **kwargs), lambda: stock(head_outputs, *rest, **kwargs))


class WeightedRowsByImage(WeightedRows):
    """Weight a class as `WeightedRows` does, for losses that are divided image by image.

    torchvision's ``RetinaNetHead`` divides the losses of each image by the number of its matched rows.
    """

    counted_over = (1,)


class WeightedRowsWithBackground(WeightedRows):
    """Weight a class as `WeightedRows` does, where class 0 is the background, as in torchvision's ``SSD``.

    A box of label 0 would be background, and would lose its weight. So labels count from 1 in a target with weights.
    """

    first_class = (0, 1)


class _WeightedBoxes(Tensor):
    """Boxes that pass on their weights when they are gathered. All else computed on them, such as IoU, is plain."""

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
                return weighted(out, args[0].weights[args[1]][..., None])
            return out


class _PlainBoxes(Tensor):
    """Boxes that stay plain whatever they are gathered by: features are pooled from them, and those are no loss."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Matches(LatentTensor):
    """Indices that keep their own weights when they are gathered by an index of others, those of labels."""

    @classmethod
    def of(cls, matches: Tensor, weights: Tensor) -> Tensor:
        out = matches.as_subclass(cls)
        out.rows = weighted(matches, weights).rows
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], _Matches):
            args = args[0], stripped(args[1])
        return super().__torch_function__(func, types, args, kwargs)


class WeightedAnchors(WeightedHead):
    """Weight a class that assigns boxes to anchors in one method and computes the loss of anchors in another.

    torchvision's ``RegionProposalNetwork`` has this form. ``assign_targets_to_anchors(anchors, targets)`` returns
    labels and matched boxes, gathered by index from ``target["boxes"]``. ``compute_loss(objectness, pred_bbox_deltas,
    labels, regression_targets)`` asks ``self.fg_bg_sampler`` which anchors count.

    Attributes:
        weighting: How weights count.
    """

    fg_bg_sampler: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the parent's forward outside of `torch.compile`, since labels that carry weights pass through it."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    @eager
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to boxes. The labels carry the weight of each anchor's box to `compute_loss`."""
        weights = weigh_targets(targets, self.weighting)
        assign = super().assign_targets_to_anchors  # type: ignore[misc]
        if weights is None:
            return assign(anchors, targets)  # type: ignore[no-any-return]
        # The parent gathers the matched boxes but returns no indices, so the boxes carry the weights.
        carrying = [{**t, "boxes": _WeightedBoxes.of(t["boxes"], w[1:])} for t, w in zip(targets, weights, strict=True)]
        labels, boxes = assign(anchors, carrying)
        for i, (b, w) in enumerate(zip(boxes, weights, strict=True)):
            if not isinstance(b, WeightedTensor) and len(w) > 1:
                raise NotImplementedError(
                    f"The matched boxes of targets[{i}] lost their weights: {type(self).__name__} does not gather them "
                    f"from target['boxes'] with an index."
                )
        rows = [torch.where(y > 0, weights_of(b)[:, 0], w[0]) for y, b, w in zip(labels, boxes, weights, strict=True)]
        labels = [weighted(y, w) for y, w in zip(labels, rows, strict=True)]
        return labels, [b.as_subclass(Tensor) for b in boxes]

    @eager
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of the network, that of each anchor multiplied by the weight of its box."""
        compute = super().compute_loss  # type: ignore[misc]
        if not any(isinstance(y, WeightedTensor) for y in labels):
            return compute(objectness, pred_bbox_deltas, labels, regression_targets)  # type: ignore[no-any-return]
        rows = torch.cat([weights_of(y).expand(y.shape) for y in labels])
        labels = [y.as_subclass(Tensor) for y in labels]  # the sampler needs no weights
        targets = labels
        if self.weighting.objectness == "target" and self.weighting.uses("loss_objectness"):
            soft = rows.split([len(y) for y in labels])  # type: ignore[no-untyped-call]
            targets = [torch.where(y > 0, w, y) for y, w in zip(labels, soft, strict=True)]
        sampling: AbstractContextManager[None] = nullcontext()
        if targets is not labels or self.weighting.normalizer != "count":
            # The sampler needs labels, and its draw must be known before the losses are divided by it.
            sampled = self.fg_bg_sampler(labels)
            sampling = _sampling(self, sampled)
            rows = self.weighting.normalized(rows, torch.cat([p | n for p, n in zip(*sampled, strict=True)]) > 0)
        if self.weighting.uses("loss_rpn_box_reg"):
            pred_bbox_deltas = weighted(pred_bbox_deltas, rows[:, None])
        if self.weighting.uses("loss_objectness") and targets is labels:
            objectness = weighted(objectness, rows[:, None])
        with sampling:
            return compute(objectness, pred_bbox_deltas, targets, regression_targets)  # type: ignore[no-any-return]


@contextmanager
def _sampling(head: Any, sampled: tuple[list[Tensor], list[Tensor]]) -> Iterator[None]:
    """Let a head's sampler return what it has drawn already."""
    own = vars(head)
    kept = own.get("fg_bg_sampler")
    own["fg_bg_sampler"] = lambda _: sampled
    try:
        yield
    finally:
        del own["fg_bg_sampler"]
        if kept is not None:  # otherwise it is a submodule, which torch holds elsewhere
            own["fg_bg_sampler"] = kept


class WeightedProposals(WeightedHead):
    """Weight a class whose losses gather predictions by the labels and matched indices of sampled proposals.

    torchvision's ``RoIHeads`` has this form: ``select_training_samples(proposals, targets)`` returns proposals, matched
    indices, labels and regression targets, each a list of B.

    Attributes:
        weighting: How weights count.
    """

    first_class = (None, 1)  # 0 is the background

    @eager  # its loss functions are not methods
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the parent's forward, with stock functions for the losses that use no weights."""
        run = super().forward  # type: ignore[misc]
        if self.weighting.terms is None:
            return run(*args, **kwargs)
        stock = run.__func__
        if not set(_LOSSES) <= set(stock.__code__.co_names):
            raise NotImplementedError(
                f"terms cannot be chosen for {type(self).__name__}, whose forward does not call {', '.join(_LOSSES)}."
            )
        names = {name: _picked(stock.__globals__[name], terms, self.weighting) for name, terms in _LOSSES.items()}
        return MethodType(rebound(stock, names), self)(*args, **kwargs)

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sample proposals. Their labels and matched indices carry the weight of the box they are matched to.

        The losses gather predictions by these labels and targets by these indices, and so get the weights.
        """
        # Only torchvision's predictors tell the number of classes.
        scores = getattr(getattr(self, "box_predictor", None), "cls_score", None)
        weights = weigh_targets(targets, self.weighting, getattr(scores, "out_features", None), self.first_class)
        proposals, matched_idxs, labels, deltas = super().select_training_samples(proposals, targets)  # type: ignore[misc]
        if weights is not None:
            # Background is matched to box 0 here. Only its label tells it apart.
            rows = [weigh_rows(w, m.where(y > 0, -1)) for w, m, y in zip(weights, matched_idxs, labels, strict=True)]
            positives = rows
            if self.weighting.normalizer != "count":  # of the losses of boxes, and of masks and keypoints
                sampled, sizes = torch.cat(rows), [len(y) for y in labels]
                every, some = torch.ones_like(sampled, dtype=torch.bool), torch.cat(labels) > 0
                rows = self.weighting.normalized(sampled, every).split(sizes)  # type: ignore[no-untyped-call]
                positives = self.weighting.normalized(sampled, some).split(sizes)  # type: ignore[no-untyped-call]
            labels = [weighted(y, w) for y, w in zip(labels, rows, strict=True)]
            matched_idxs = [_Matches.of(m, w) for m, w in zip(matched_idxs, positives, strict=True)]
            proposals = [boxes.as_subclass(_PlainBoxes) for boxes in proposals]
        return proposals, matched_idxs, labels, deltas


_LOSSES = {
    "fastrcnn_loss": ("loss_classifier", "loss_box_reg"),
    "maskrcnn_loss": ("loss_mask",),
    "keypointrcnn_loss": ("loss_keypoint",),
}


def _picked(function: Callable[..., Any], terms: tuple[str, ...], weighting: Weighting) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        def losses(*given: Any) -> dict[str, Tensor]:
            result = function(*given)
            return dict(zip(terms, result if isinstance(result, tuple) else (result,), strict=True))

        plain = stripped(args)
        picked = tuple(weighting.pick(losses(*args), lambda: losses(*plain)).values())
        return picked if len(picked) > 1 else picked[0]

    return call


class Seam(NamedTuple):
    """Mixin for a class of torchvision, and the losses that it computes."""

    mixin: type
    terms: tuple[str, ...]


SEAMS: dict[type[nn.Module], Seam] = {
    RetinaNetHead: Seam(WeightedRowsByImage, ("classification", "bbox_regression")),
    FCOSHead: Seam(WeightedRows, ("classification", "bbox_regression", "bbox_ctrness")),
    SSD: Seam(WeightedRowsWithBackground, ("classification", "bbox_regression")),
    RegionProposalNetwork: Seam(WeightedAnchors, ("loss_objectness", "loss_rpn_box_reg")),
    RoIHeads: Seam(WeightedProposals, tuple(term for terms in _LOSSES.values() for term in terms)),
}
MIXINS = (WeightedRows, WeightedAnchors, WeightedProposals)
