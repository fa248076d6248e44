"""Make the detectors of ``transformers`` use ``label["weights"]``.

They build a new criterion at each step, inside a function that the model holds as ``loss_function``. `rebound` runs the
same code with the names of its criteria bound to weighted subclasses. Nothing is copied or patched.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_map

from detmix.losses.box_weights import CheckedTargets, eager, weigh_targets
from detmix.losses.criteria import WeightedCriterion
from detmix.losses.options import DEFAULT, Weighting
from detmix.losses.weighted_tensor import WeightedTensor, carry

ROW_FUNCTIONS = frozenset({"box_iou", "center_to_corners_format", "generalized_box_iou"})
"""Functions that return one row for each of ``(num_rows, 4)`` boxes. Run as one operation, without dispatch inside."""


class WeightedLossFunction:
    """Run a model's loss function with its criterion weighted.

    Args:
        function: Function at module level that names a criterion with DETR's ``get_loss``, has an argument ``labels``
            and returns the losses by name as its second result.
        weighting: How weights count.

    Raises:
        ValueError: When called, if a term of the weighting is not one of its losses.
    """

    def __init__(self, function: FunctionType, weighting: Weighting = DEFAULT) -> None:
        self.function, self.weighting = function, weighting

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, with weighted losses."""
        call = _signature(self.function).bind(*args, **kwargs)
        labels = call.arguments["labels"]
        if (weights := weigh_targets(labels, self.weighting)) is not None:
            call.arguments["labels"] = CheckedTargets(labels, weights)
        results = rebound(self.function, weighted_criteria(self.function, self.weighting))(*call.args, **call.kwargs)
        for term in self.weighting.terms or ():
            if not any(f"{name}_".startswith(f"{term}_") for name in results[1]):
                raise ValueError(f"terms holds {term!r}, which is none of the losses {sorted(results[1])}.")
        return results


_signature = functools.cache(inspect.signature)


def weighted_criteria(function: Any, weighting: Weighting = DEFAULT) -> dict[str, type]:
    """Make weighted subclasses of the criteria that a function names, by name; empty if it names none."""
    if getattr(function, "__closure__", None):
        return {}
    return {
        name: weighted_criterion(criterion, weighting)  # type: ignore[arg-type]  # mypy: modules are no hashables
        for name, criterion in _named_classes(function).items()
        if issubclass(criterion, nn.Module) and hasattr(criterion, "get_loss")
    }


def _named_classes(function: Any) -> dict[str, type]:
    if not isinstance(function, FunctionType):
        return {}
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name: cls for name, cls in named.items() if isinstance(cls, type)}


@functools.cache
def weighted_criterion(criterion: type, weighting: Weighting) -> type:
    """Make a weighted subclass whose methods call `ROW_FUNCTIONS` as one operation."""
    members: dict[str, Any] = {"weighting": weighting}
    for name, method in inspect.getmembers(criterion, inspect.isfunction):
        used = ROW_FUNCTIONS.intersection(method.__code__.co_names, method.__globals__)
        if used:
            members[name] = rebound(method, {key: by_row(method.__globals__[key]) for key in used})
    return type(f"Weighted{criterion.__name__}", (WeightedCriterion, criterion), members)


def by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that computes each result row from one row of its first argument run as one operation."""

    def call(x: Tensor, *args: Any) -> Any:
        if (
            type(x) is not WeightedTensor
            or x.rows.dims[-1] is not None
            or any(isinstance(a, WeightedTensor) for a in args)
        ):
            return function(x, *args)
        with DisableTorchFunctionSubclass():
            return tree_map(lambda out: carry(out, x.rows), function(x, *args))

    return call


def rebound(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Make a function of the same code, with some names of its module bound to other objects."""
    new = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def is_transformers_detector(module: nn.Module) -> bool:
    """Tell whether a module is a model of ``transformers`` with a criterion, without importing that package."""
    own = any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__)
    if not own or getattr(module, "loss_type", None) is None:
        return False
    function: Any = module.loss_function
    return isinstance(function, WeightedLossFunction) or bool(weighted_criteria(function))


def is_weighted_function(function: Any) -> bool:
    """Tell whether a loss function uses weights: a `WeightedLossFunction`, or one that names a `WeightedCriterion`."""
    criteria = _named_classes(function).values()
    return isinstance(function, WeightedLossFunction) or any(issubclass(cls, WeightedCriterion) for cls in criteria)
