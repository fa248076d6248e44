"""Give the outputs of a criterion the weights of their queries, and guard those that have no query.

A criterion reads a mapping of outputs. Each prediction ``(B, num_queries, ...)`` gets one weight for each query. Loss
code that reads any other floating point output would lose the weights without a word, so such an output raises when it
is read.
"""

import copy
import dataclasses
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_leaves

from detmix.losses.rows import Rows
from detmix.losses.weighted_tensor import WeightedTensor, carry, is_count, name_of

PREDICTIONS = ("pred_logits", "logits", "pred_boxes", "pred_corners", "pred_masks", "teacher_logits")
"""Outputs that tell the number of queries: DETR's names and later ones."""

CONSTANTS = frozenset({"ref_points", "teacher_corners", "up", "reg_scale", "anchors", "label_maps"})
"""Outputs that known criteria read as constants. The first two have one entry per query, but no loss of their own."""


class UnweightedOutput(WeightedTensor):
    """An output without weights. It tells its shape, dtype and device, and raises where its values are used.

    It is a `WeightedTensor` so that torch asks this class first where both are in one call.
    """

    place: tuple[str, int, int | None, bool]
    """Where it is in the outputs, the size of a prediction, and whether it belongs to this call of the criterion."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a question, or name the output and what was called on it."""
        with DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                out = func(*args, **(kwargs or {}))
                return out.as_subclass(Tensor) if isinstance(out, Tensor) else out
            found = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
            raise NotImplementedError(f"{name_of(func)} was called on {_describe(found)}")


# What is detached is a constant, as in any rule of WeightedTensor.
_QUESTIONS = frozenset(
    getattr(home, name)
    for home in (Tensor, torch)
    for name in (
        *("size", "dim", "numel", "stride", "__len__", "is_floating_point", "is_complex", "get_device", "detach"),
        *("is_contiguous", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        *("zeros_like", "ones_like", "empty_like", "full_like"),
    )
    if hasattr(home, name)
) | {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_leaf")
}


def count_queries(outputs: Any, batch: int, constants: Collection[str]) -> int | None:
    """Return the number of queries of the predictions ``(batch, num_queries, ...)``; ``None`` if there are none.

    Raises:
        TypeError: If the outputs are neither a mapping, a dataclass nor a named tuple.
        ValueError: If no output has a known name, and the others tell different numbers.
    """
    fields = _fields(outputs)
    if fields is None:
        raise TypeError(
            f"outputs must be a mapping, a dataclass or a named tuple of predictions by name, but are a "
            f"{type(outputs).__name__}."
        )
    for name in PREDICTIONS:
        if isinstance(x := fields.get(name), Tensor) and x.ndim > 1 and x.shape[0] == batch:
            return x.shape[1]
    told = {
        name: tuple(x.shape)
        for name, x in fields.items()
        if name not in constants and isinstance(x, Tensor) and not is_count(x) and x.ndim > 1 and x.shape[0] == batch
    }
    counts = {shape[1] for shape in told.values()}
    if len(counts) > 1:
        raise ValueError(
            f"outputs must tell one number of queries in their shapes ({batch}, num_queries, ...), but they are "
            f"{told}, and none has a known name such as {', '.join(PREDICTIONS[:3])}. "
            f"{_how_to_declare('the names of those that are no predictions')}"
        )
    return counts.pop() if counts else None


def weigh_outputs(
    outputs: Any, batch: int, queries: int | None, rows: Rows | None, constants: Collection[str]
) -> dict[str, Any]:
    """Return what replaces outputs by name: predictions with ``rows``, and `UnweightedOutput` for other ones.

    A nested mapping without predictions of a known name is part of a prediction. A list, and a mapping with such
    predictions, belong to other calls of the criterion.

    Args:
        outputs: Mapping, dataclass or named tuple.
        batch: Number of images.
        queries: Number of queries.
        rows: Weights ``(batch, queries)``.
        constants: Names of outputs that stay as they are.
    """
    with DisableTorchFunctionSubclass():
        return _Weigher((batch, queries), rows, constants).changed(_fields(outputs) or {}, "outputs", True)


class _Weigher(NamedTuple):
    """Replace outputs. Functions that call each other would be a cycle, and keep the memory of each step."""

    size: tuple[int, int | None]
    rows: Rows | None
    constants: Collection[str]

    def replaced(self, value: Any, path: str, is_own: bool) -> Any:
        if isinstance(value, Tensor):
            if is_count(value):
                return value
            if is_own and self.rows is not None and value.shape[:2] == self.size:
                return carry(value.as_subclass(WeightedTensor), self.rows.append(value.ndim))
            return _guard(value, path, self.size, is_own)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            new = [self.replaced(part, f"{path}[{i}]", False) for i, part in enumerate(value)]
            return value if all(a is b for a, b in zip(value, new, strict=True)) else type(value)(new)
        if (fields := _fields(value)) is None:
            return value
        is_own = is_own and not any(isinstance(fields.get(name), Tensor) for name in PREDICTIONS)
        return replace_fields(value, self.changed(fields, path, is_own))

    def changed(self, fields: Mapping[str, Any], path: str, is_own: bool) -> dict[str, Any]:
        made = {
            name: self.replaced(value, f"{path}[{name!r}]", is_own)
            for name, value in fields.items()
            if name not in self.constants
        }
        return {name: value for name, value in made.items() if value is not fields[name]}


def replace_fields(outputs: Any, changed: Mapping[str, Any]) -> Any:
    """Copy a mapping, dataclass or named tuple with some values replaced, as the type that it has where that can be."""
    if not changed and type(outputs) is not dict:
        return outputs
    if not isinstance(outputs, Mapping):
        is_tuple = isinstance(outputs, tuple)
        return outputs._replace(**changed) if is_tuple else dataclasses.replace(outputs, **changed)
    if type(outputs) is dict or not isinstance(outputs, MutableMapping):
        return {**outputs, **changed}
    new = copy.copy(outputs)
    for name, value in changed.items():
        new[name] = value
    return new


def values_of(outputs: Any) -> tuple[Any, ...]:
    """Return the outputs themselves, to tell whether they are the same as before."""
    fields = _fields(outputs)
    return () if fields is None else (*fields.values(),)


def _fields(outputs: Any) -> Mapping[str, Any] | None:
    if isinstance(outputs, Mapping):
        return outputs
    if isinstance(outputs, tuple) and hasattr(outputs, "_asdict"):
        return outputs._asdict()  # type: ignore[no-any-return]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return None


def _guard(value: Tensor, path: str, size: tuple[int, int | None], is_own: bool) -> Tensor:
    guard = value.as_subclass(UnweightedOutput)
    guard.place = (path, *size, is_own)
    return guard


def _describe(output: UnweightedOutput) -> str:
    path, batch, queries, is_own = output.place
    told = f"{path} of shape {tuple(output.shape)}, which carries no weights: "
    if not is_own:
        return f"{told}it belongs to another call of get_loss. {_how_to_declare('its name, if it is no prediction')}"
    size = f"({batch}, {'num_queries' if queries is None else queries}, ...)"
    return f"{told}a prediction is {size}, one row for each query. {_how_to_declare('its name, if it is none')}"


def _how_to_declare(what: str) -> str:
    return f"Add {what}, to the class attribute constants of your WeightedCriterion."
