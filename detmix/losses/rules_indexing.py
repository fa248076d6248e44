"""What indexing does to the weights of a `WeightedTensor`: of what is indexed, and of the index.

An index of integers or truth values that has weights, such as labels, gives them to what it picks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from detmix.losses.rows import Rows, dims_consumed, indexed, is_mask
from detmix.losses.rules import agreed_rows, elementwise
from detmix.losses.weighted_tensor import (
    Function,
    LatentTensor,
    WeightedTensor,
    carry,
    is_count,
    is_latent,
    lost,
    rule,
    weights_of,
)

_SIMPLE = frozenset({int, bool, slice, type(None), type(Ellipsis), Tensor, WeightedTensor, LatentTensor})
_PLAIN = _SIMPLE - {WeightedTensor, LatentTensor}


@rule("__getitem__")
def _getitem(func: Function, input: Tensor, index: Any) -> Any:
    out = func(input, index)
    return carry(out, agreed_rows(func, _rows_at(func, input, index, out.ndim), input, index))


@rule("__setitem__")
def _setitem(func: Function, input: Tensor, index: Any, value: Any) -> None:
    if not isinstance(input, WeightedTensor):
        raise lost(func, input, index, value)
    if isinstance(value, Tensor) and is_latent(input) and not (is_count(value) or is_latent(value)):
        # A sum of what is written to would be a count, and so would one of its views.
        raise lost(func, input, index, value, why=f"with values of {value.dtype} that may be losses")
    entries = index if isinstance(index, tuple) else (index,)
    if isinstance(value, WeightedTensor) or any(isinstance(entry, WeightedTensor) for entry in entries):
        ndim = max(input.as_subclass(Tensor)[index].ndim, getattr(value, "ndim", 0))
        carried = _rows_at(func, input, index, ndim)
        if isinstance(value, WeightedTensor):
            carried.append(value.rows)
        agreed_rows(func, [rows.pad(ndim) for rows in carried], input, index, value)
    func(input, index, value)


def _rows_at(func: Function, x: Tensor, index: Any, ndim: int) -> list[Rows]:
    """Return the weights that the entries of ``x[index]``, of so many dimensions, have from each of ``x`` and index."""
    entries = index if isinstance(index, tuple) else (index,)
    kinds = set(map(type, entries))
    has_weights = not kinds <= _PLAIN
    if not kinds <= _SIMPLE:
        if not all(type(e) in _SIMPLE or isinstance(e, Tensor) for e in entries):
            entries = _read(func, x, index)
        has_weights = any(isinstance(entry, WeightedTensor) for entry in entries)
    rows = []
    if isinstance(x, WeightedTensor):
        own = x.rows.sliced(entries)
        rows.append(x.rows.gathered(x.shape, entries) if own is None else own)
    if has_weights:
        rows += _rows_of_index(func, x, entries, ndim)
    return rows


def _read(func: Function, x: Tensor, index: Any) -> tuple[Any, ...]:
    """Read lists, ranges and arrays as torch does, as tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    for entries in (parts, index if isinstance(index, Sequence) else ()):  # a list of sequences is read as a tuple
        try:
            read = tuple([e if type(e) in _SIMPLE or isinstance(e, Tensor) else _as_tensor(e) for e in entries])
            places = torch.arange(x.numel()).view(x.shape)
            if torch.equal(places[index], places[tuple(e.cpu() if isinstance(e, Tensor) else e for e in read)]):
                return read
        except (IndexError, TypeError, ValueError, RuntimeError):
            continue
    raise lost(func, x, index, why=f"with an index of {type(index).__name__} that it cannot read; index with a tensor")


def _as_tensor(entry: Any) -> Any:
    if any(isinstance(leaf, WeightedTensor) for leaf in tree_leaves(entry)):  # would lose its weights
        raise TypeError
    array = np.asarray(entry)
    if array.dtype == object:
        raise TypeError
    return (
        array.item()
        if isinstance(entry, np.integer)
        else torch.as_tensor(array.astype(bool if array.dtype == bool else int))
    )


def _rows_of_index(func: Function, x: Tensor, entries: tuple[Any, ...], ndim: int) -> list[Rows]:
    """Return the weights that each weighted tensor of an index gives to what it picks."""
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    masks = any(map(is_mask, tensors))
    if all(map(isinstance, entries[: len(tensors)], [Tensor] * len(tensors))):
        if not masks:  # picked rows lie along the first dimensions if the index starts with tensors, side by side
            block = max(i.ndim for i in tensors)
            return [i.rows.pad(block).append(ndim) for i in tensors if isinstance(i, WeightedTensor)]
        if len(tensors) == 1 and tensors[0].ndim:
            return [_taken(tensors[0]).append(ndim)]
    if any(is_mask(i) and not i.ndim for i in tensors):
        raise lost(func, x, entries, why="with a mask without dimensions")
    read, weights = list[Any](), list[tuple[int, Tensor]]()
    for entry in entries:
        if is_mask(entry):  # is read as one index for each of its dimensions
            if isinstance(entry, WeightedTensor):
                weights.append((len(read), _taken(entry).weights))
            read += entry.nonzero().unbind(1)
        else:
            if isinstance(entry, WeightedTensor):
                weights.append((len(read), entry.weights.expand(entry.shape)))
            read.append(entry)
    result = []
    for place, own in weights:
        # Along the dimension that this tensor indexes, put its weights, and pick each of them once.
        count = sum(map(dims_consumed, read))
        after = read[:place] if Ellipsis not in read[:place] else [*read[:place], *[0] * (x.ndim - count)]
        d, entry = sum(map(dims_consumed, after)), read[place]
        picks = torch.arange(entry.numel(), device=entry.device).view(entry.shape)
        shape = [*x.shape[:d], entry.numel(), *x.shape[d + 1 :]]
        spread = own.expand(entry.shape).reshape([entry.numel() if i == d else 1 for i in range(x.ndim)])
        result.append(Rows.of(indexed(spread, shape, (*read[:place], picks, *read[place + 1 :]))))
    return result


def _taken(mask: Tensor) -> Rows:
    """Return the weights of the true entries of a mask."""
    return mask.rows.gathered(mask.shape, (mask,))  # type: ignore[attr-defined, no-any-return]


@rule("nonzero", "argwhere")
def _nonzero(func: Function, input: Tensor, **kwargs: Any) -> Any:
    """Give the indices of what is true of labels the weights of their rows, and remember them for what they pick."""
    out = func(input, **kwargs)
    if not is_latent(input):
        return out
    if not input.ndim:
        raise lost(func, input)
    if isinstance(out, tuple):
        rows = input.rows.gathered(input.shape, out)  # type: ignore[attr-defined]
        return tuple([carry(places, rows) for places in out])
    return carry(out, input.rows.gathered(input.shape, out.unbind(1)).append(2))  # type: ignore[attr-defined]


@rule("where")
def _where(func: Function, condition: Tensor, *args: Any, **kwargs: Any) -> Any:
    return elementwise(func, condition, *args, **kwargs) if args or kwargs else _nonzero(func, condition)


@rule("masked_select")
def _masked_select(func: Function, input: Tensor, mask: Tensor) -> Any:
    shape = torch.broadcast_shapes(input.shape, mask.shape)  # type: ignore[no-untyped-call]
    places = mask.as_subclass(Tensor).expand(shape)
    parts = [x.rows.pad(len(shape)) for x in (input, mask) if isinstance(x, WeightedTensor)]
    return carry(func(input, mask), agreed_rows(func, [r.gathered(shape, (places,)) for r in parts], input, mask))


@rule("index_select")
def _index_select(func: Function, input: Tensor, dim: int, index: Tensor) -> Any:
    out, carried = func(input, dim, index), []
    if isinstance(input, WeightedTensor):
        alike = not input.ndim or input.rows.dims[dim] is None
        carried.append(input.rows if alike else Rows.of(func(input.weights, dim, index)))
    if isinstance(index, WeightedTensor):
        after = out.ndim - 1 - dim % max(out.ndim, 1)
        carried.append(index.rows.pad(out.ndim - after).append(out.ndim))
    return carry(out, agreed_rows(func, carried, input, index))


@rule("gather")
def _gather(func: Function, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    out = func(input, dim, index, sparse_grad=sparse_grad)
    weights = weights_of(input)
    for d in range(out.ndim):  # the index may be narrower
        if d != dim % out.ndim and weights.size(d) > out.size(d):
            weights = weights.narrow(d, 0, out.size(d))
    return _picked(func, out, input, weights, dim, index)


@rule("take_along_dim")
def _take_along_dim(func: Function, input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        raise lost(func, input, indices, why="without dim")
    return _picked(func, func(input, indices, dim), input, weights_of(input), dim, indices)


def _picked(func: Function, out: Tensor, x: Tensor, weights: Tensor, dim: int, index: Tensor) -> Tensor:
    """Give each picked entry the weight of the one it comes from, and that of the entry of the index."""
    carried = []
    if isinstance(x, WeightedTensor):
        if weights.ndim and weights.size(dim) > 1:
            shape = [w if n == 1 else n for w, n in zip(weights.shape, out.shape, strict=True)]
            shape[dim] = weights.size(dim)
            weights = torch.take_along_dim(weights.expand(shape), index.as_subclass(Tensor).expand(out.shape), dim)
        carried.append(Rows.of(weights))
    if isinstance(index, WeightedTensor):
        carried.append(index.rows.pad(out.ndim))
    return carry(out, agreed_rows(func, carried, x, index))


@rule("one_hot")
def _one_hot(func: Function, input: WeightedTensor, num_classes: int = -1) -> Any:
    return carry(func(input, num_classes), input.rows.append(input.ndim + 1))


@rule("max", "min")
def _extreme(func: Function, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    if isinstance(dim, Tensor) or other is not None:
        return elementwise(func, input, dim if other is None else other)
    if dim is None:
        if is_latent(input):
            return func(input)  # the number of classes, say
        raise lost(func, input)
    return _sorted(input, func(input, dim, keepdim), dim)


@rule("sort")
def _sort(func: Function, input: Tensor, dim: Any = -1, descending: bool = False, *, stable: bool = False) -> Any:
    return _sorted(input, func(input, stable=stable, dim=dim, descending=descending), dim)


@rule("topk")
def _topk(func: Function, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return _sorted(input, func(input, k, dim, largest, sorted), dim)


@rule("argsort")
def _argsort(func: Function, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return _sorted(input, torch.sort(input, stable=stable, dim=dim, descending=descending), dim)[1]


def _sorted(x: Tensor, result: Any, dim: int) -> Any:
    """Give each value along ``dim`` the weight of the entry it comes from, and where that is a label, its place too."""
    values, indices = result
    weights = weights_of(x)
    if weights.ndim and weights.size(dim) > 1:
        places = indices if indices.ndim == x.ndim else indices.unsqueeze(dim)
        weights = torch.take_along_dim(weights.expand(x.shape), places, dim)
    rows = Rows.of(weights if values.ndim == x.ndim else weights.squeeze(dim))
    return type(result)((carry(values, rows), carry(indices, rows) if is_latent(x) else indices))
