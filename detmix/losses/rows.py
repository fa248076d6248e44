"""Keep weights as one number per row while the entries of a tensor are sliced, gathered and reshaped.

Everywhere ``weights`` has as many dimensions as its tensor, each of the tensor's size or of size 1. A loss mostly
slices and computes on small tensors. `Rows` follows that without calling torch.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


class Rows:
    """Weights of a tensor. ``dims`` names, for each dimension of the tensor, the dimension of ``base`` along it.

    Along a dimension that is None all entries weigh the same.
    """

    __slots__ = ("_gathered", "_weights", "base", "dims")

    def __init__(self, base: Tensor, dims: tuple[int | None, ...]) -> None:
        self.base, self.dims = base, dims
        self._weights: Tensor | None = None
        self._gathered: tuple[list[_Entry], Rows] | None = None

    @classmethod
    def of(cls, weights: Tensor) -> "Rows":
        """Make rows from weights. Along a dimension of size 1 all entries weigh the same."""
        rows = cls(weights, tuple([None if n == 1 else d for d, n in enumerate(weights.shape)]))
        rows._weights = weights
        return rows

    @property
    def weights(self) -> Tensor:
        """Weights with one dimension for each of the tensor's, of its size or 1."""
        if self._weights is None:
            # The dimensions in dims are in order. All others have size 1.
            self._weights = self.base.reshape([1 if d is None else self.base.size(d) for d in self.dims])
        return self._weights

    def gathered(self, shape: Sequence[int], entries: tuple[Any, ...]) -> "Rows":
        """Return the rows of ``x[entries]`` for an ``x`` of this shape.

        Remembers the last: predictions and targets are often gathered by the same index, and then share their weights.
        """
        if self._gathered is not None:
            last, rows = self._gathered
            if len(last) == len(entries) and all(map(_Entry.is_still, last, entries)):
                return rows
        rows = Rows.of(indexed(self.weights, shape, entries))
        self._gathered = list(map(_Entry, entries)), rows
        return rows

    def same(self, other: "Rows") -> bool:
        """Tell, without reading values, whether both are the same weights along the same dimensions."""
        return self is other or (self.base is other.base and self.dims == other.dims)

    def pad(self, ndim: int) -> "Rows":
        """Prepend dimensions up to ``ndim``, as broadcasting does."""
        missing = ndim - len(self.dims)
        return Rows(self.base, (None,) * missing + self.dims) if missing else self

    def append(self, ndim: int) -> "Rows":
        """Append dimensions up to ``ndim``, along which all weigh the same."""
        return Rows(self.base, self.dims + (None,) * (ndim - len(self.dims)))

    def insert(self, dim: int) -> "Rows":
        """Insert a dimension at ``dim``, 0 or more, along which all weigh the same."""
        return Rows(self.base, (*self.dims[:dim], None, *self.dims[dim:]))

    def remove(self, dims: Sequence[int]) -> "Rows | None":
        """Leave out dimensions, or None if the weights differ along one of them."""
        if not self.dims:  # torch sums a number along dimension 0, too
            return self
        if any(self.dims[d] is not None for d in dims):
            return None
        gone = {d % len(self.dims) for d in dims}
        return Rows(self.base, tuple([d for i, d in enumerate(self.dims) if i not in gone]))

    def sliced(self, entries: tuple[Any, ...]) -> "Rows | None":
        """Return the rows of ``x[entries]``, or None if an entry picks some of the weights or is no slice or number."""
        dims, d = list[int | None](), 0
        for entry in entries:
            if entry is None:
                dims.append(None)
            elif entry is Ellipsis:
                end = d + len(self.dims) - sum(e is not None and e is not Ellipsis for e in entries)
                dims += self.dims[d:end]
                d = end
            elif isinstance(entry, slice) and (self.dims[d] is None or entry == _ALL):
                dims.append(self.dims[d])
                d += 1
            elif type(entry) is int and self.dims[d] is None:
                d += 1
            else:
                return None
        dims += self.dims[d:]
        return Rows(self.base, tuple(dims))


_ALL = slice(None)


class _Entry:
    """An entry of an index as it was. NumPy and ``.data`` change a tensor's memory without its version."""

    __slots__ = ("copy", "entry", "version")

    def __init__(self, entry: Any) -> None:
        self.entry, self.copy, self.version = entry, None, 0
        if isinstance(entry, Tensor):
            self.copy, self.version = entry.detach().clone(), -1 if entry.is_inference() else entry._version

    def is_still(self, entry: Any) -> bool:
        """Tell whether this is the entry, and as it was. Where its values cannot be read, they are asserted to be."""
        if entry is not self.entry:
            return False
        if self.copy is None:
            return True
        if is_readable(entry):
            return torch.equal(self.copy, entry)
        if self.version < 0 or entry._version != self.version:
            return False
        assert_later(self.copy == entry, "An index was changed through its .data or memory, and then used again.")
        return True


def is_readable(x: Tensor) -> bool:
    """Tell whether Python may look at the values of a tensor: on a GPU it would wait for them."""
    return x.device.type == "cpu"


def assert_later(truth: Tensor, message: str) -> None:
    """Raise once the device finds that a condition does not hold everywhere. Nothing waits for it."""
    if truth.device.type != "meta":
        torch._assert_async(truth.all(), message)


def pad(weights: Tensor, ndim: int) -> Tensor:
    """Prepend dimensions of size 1 up to ``ndim``, as broadcasting does."""
    return weights if weights.ndim == ndim else weights[(None,) * (ndim - weights.ndim)]


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that all the given ones broadcast to."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def fits(weights: Tensor, shape: Sequence[int]) -> bool:
    """Tell whether ``weights`` broadcast to ``shape`` without changing it."""
    return weights.ndim <= len(shape) and all(
        w in (1, n) for w, n in zip(reversed(weights.shape), reversed(shape), strict=False)
    )


def reshaped(weights: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Return the weights of a tensor of shape ``old`` after it is reshaped to ``new``.

    Old and new dimensions fall into runs of equal product. A run along which all entries weigh the same stays so. In
    any other run, neighbours of equal weight keep sharing one, as far as whole new dimensions divide them.
    """
    if 0 in old:
        return weights.new_ones((1,) * len(new))
    weights = weights.reshape([w for w, n in zip(weights.shape, old, strict=True) if n != 1])
    old, kept = [n for n in old if n != 1], [n for n in new if n != 1]
    spread, shape, i, k = list(weights.shape), list[int](), 0, 0
    while i < len(old):
        first_i, first_k, before, after = i, k, old[i], kept[k]
        i, k = i + 1, k + 1
        while before != after:
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, k = after * kept[k], k + 1
        alike = i
        while alike > first_i and weights.size(alike - 1) == 1:
            alike -= 1
        if alike == first_i:
            shape += [1] * (k - first_k)
            continue
        block, compact = prod(old[alike:i]), k
        while compact > first_k and block % kept[compact - 1] == 0:
            compact -= 1
            block //= kept[compact]
        spread[first_i:alike] = old[first_i:alike]
        spread[alike:i] = [block, *[1] * (i - alike - 1)] if i > alike else []
        shape += kept[first_k:compact] + [1] * (k - compact)
    sizes = iter(shape)
    return weights.expand(spread).reshape([1 if n == 1 else next(sizes) for n in new])


def indexed(weights: Tensor, shape: Sequence[int], entries: tuple[Any, ...]) -> Tensor:
    """Return the weights of ``x[entries]`` for an ``x`` of this shape, expanded only where a tensor picks some of them.

    Along dimensions where all entries weigh the same, so do those of the result: whatever is picked, the first is.
    """
    consumed = [dims_consumed(entry) for entry in entries]
    spread, small, d = list(weights.shape), list[Any](), 0
    for entry, count in zip(entries, consumed, strict=True):
        if entry is Ellipsis:
            count = len(shape) - sum(consumed)
        alike = count and all(weights.size(i) == 1 for i in range(d, d + count))
        if entry is Ellipsis or not alike:
            if isinstance(entry, Tensor):
                spread[d : d + count] = shape[d : d + count]
            small.append(entry)
        elif isinstance(entry, slice):
            small.append(_ALL)
        elif not isinstance(entry, Tensor) or entry.ndim == 0:
            small.append(0)
        else:  # a mask is read as one index for each of its dimensions
            ndim = 1 if is_mask(entry) else entry.ndim
            small += [torch.zeros((1,) * ndim, dtype=torch.int64, device=weights.device)] * count
        d += count
    return weights.expand(spread)[tuple(small)]


def is_mask(entry: Any) -> bool:
    """Tell whether a tensor that indexes says of each entry whether to take it."""
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def dims_consumed(entry: Any) -> int:
    """Return the number of dimensions that an entry of an index picks from; 0 for an ellipsis, too."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return entry.ndim if is_mask(entry) else 1


def joined(parts: Sequence[Tensor], sizes: Sequence[int], dim: int) -> Tensor:
    """Return the weights of tensors joined along ``dim``, where each has the given size."""
    if all(same(parts[0], part) for part in parts) and parts[0].size(dim) == 1:
        return parts[0]
    filled = [part for part, n in zip(parts, sizes, strict=True) if n] or parts
    shape = list(broadcast(*((*part.shape[:dim], 1, *part.shape[dim + 1 :]) for part in filled)))
    return torch.cat([p.expand([*shape[:dim], n, *shape[dim + 1 :]]) for p, n in zip(parts, sizes, strict=True)], dim)


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same memory in the same layout, without reading values."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def agreed(rows: Sequence[Rows], message: Callable[[], str]) -> Rows:
    """Return the rows that all the others broadcast to. All have as many dimensions.

    Values are compared on the CPU. On another device the comparison is left to the device, as Python would wait for it.

    Raises:
        NotImplementedError: If they differ, with this message: which weight would the result have?
    """
    first = rows[0]
    if all(map(first.same, rows)):
        return first
    widest = first.weights
    for other in [r.weights for r in rows[1:]]:
        shape = broadcast(widest.shape, other.shape)
        widest, narrow = (widest, other) if widest.shape == shape else (other, widest)
        if widest.shape != shape:
            raise NotImplementedError(message())
        if same(widest, narrow):
            continue
        if not is_readable(widest):
            assert_later(widest == narrow, message())
        elif not (widest == narrow).all():
            raise NotImplementedError(message())
    return Rows.of(widest)
