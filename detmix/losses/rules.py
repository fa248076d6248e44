"""What each function of torch does to the weights of a `WeightedTensor`.

A rule is called in place of the function, as ``rule(function, *args, **kwargs)``, and calls it. `elementwise`, `move`,
`reduce` and `drop` fit most functions; the others know the arguments of theirs. `detmix.losses.rules_indexing` and
`detmix.losses.rules_losses` have those of indices and of loss functions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401  # loads torch.ops.torchvision
from torch import Tensor

from detmix.losses.rows import Rows, agreed, joined, pad, reshaped
from detmix.losses.weighted_tensor import (
    Function,
    LatentTensor,
    WeightedTensor,
    carry,
    is_count,
    is_latent,
    lost,
    name_of,
    rule,
    shapes_of,
    weights_of,
)


@rule(
    *("add", "sub", "rsub", "mul", "div", "true_divide", "pow", "neg", "abs", "square", "sqrt", "rsqrt"),
    *("reciprocal", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__", "exp", "expm1", "log", "log1p", "log2", "atan"),
    *("arctan", "tanh", "sigmoid", "logsigmoid", "softplus", "relu", "clamp", "clip", "clamp_min", "clamp_max"),
    *("minimum", "maximum", "sign", "floor", "ceil", "round", "lerp", "nan_to_num"),
    *("floor_divide", "__floordiv__", "__rfloordiv__", "remainder", "fmod", "__mod__", "__rmod__", "masked_fill"),
)
def elementwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Keep the weights of the operands: each entry of the result comes from one entry of every operand, broadcast."""
    out = func(*args, **kwargs)
    if out.dtype == torch.bool:
        return _say(func, out, *args, **kwargs)
    carried = [x.rows.pad(out.ndim) for x in (*args, *kwargs.values()) if isinstance(x, WeightedTensor)]
    return carry(out, agreed_rows(func, carried, args, kwargs))


def _say(func: Function, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    carried = [x.rows.pad(out.ndim) for x in (*args, *kwargs.values()) if is_latent(x)]
    return carry(out, agreed_rows(func, carried, args, kwargs)) if carried else out


@rule(
    *("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal", "isclose"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__and__", "__or__", "__xor__", "__rand__", "__ror__", "__rxor__", "__invert__"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
    *("logical_and", "logical_or", "logical_xor", "logical_not"),
)
def compare(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Keep the weights of integers and truth values, such as labels. What is said of predictions is plain."""
    return _say(func, func(*args, **kwargs), *args, **kwargs)


@rule("isin")
def _isin(func: Function, elements: Any, test_elements: Any, **kwargs: Any) -> Any:
    return _say(func, func(elements, test_elements, **kwargs), elements)


@rule("diagonal", "diag")
def move(func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Move the weights with the same function, for functions that move the entries of their first argument.

    The number of each entry's weight is moved too, to see along which dimensions all still weigh the same. Reading that
    waits for a GPU.
    """
    out = func(input, *args, **kwargs)
    if not isinstance(input, WeightedTensor):
        raise lost(func, input, *args, **kwargs)
    weights = input.weights
    numbers = torch.arange(weights.numel(), device=weights.device).reshape(weights.shape).expand(input.shape)
    weights, numbers = (func(part, *args, **kwargs) for part in (weights.expand(input.shape), numbers))
    for d in range(out.ndim):
        if out.size(d) > 1 and out.numel() and (numbers == numbers.narrow(d, 0, 1)).all():
            weights = weights.narrow(d, 0, 1)
    return carry(out, weights)


@rule("sum", "mean", "nansum", "nanmean")
def reduce(func: Function, input: Tensor, *args: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Apply the weights where entries of different weights are summed or averaged; keep them where all weigh the same.

    So ``losses.sum(1)`` of weights ``(N, 1)`` carries weights ``(N,)``. This also keeps a ratio of two such sums right.
    """
    x = input
    if args and isinstance(args[-1], bool):
        *args, keepdim = args  # type: ignore[assignment]
    dims = _dims(args if args else dim)
    kwargs |= {"dim": dims, "keepdim": keepdim} if dims else {}
    if not isinstance(x, WeightedTensor):
        return func(x, **kwargs)
    if dims and (rows := x.rows.remove(dims)) is not None:
        return carry(func(x, **kwargs), x.rows if keepdim else rows)
    if is_latent(x):
        return func(x, **kwargs)  # a sum of integers counts; it is no loss
    if kwargs or func not in _TOTALS or x.numel() < _LARGE:
        return func(scaled(x, x.weights), **kwargs)
    return _WeightedSum.apply(x.as_subclass(Tensor), x.weights, func)


_LARGE = 2**18  # entries; to write the product of fewer takes less time than not to
_TOTALS = (torch.sum, torch.mean, Tensor.sum, Tensor.mean)


class _WeightedSum(torch.autograd.Function):
    """Compute ``func(x * weights)``, a sum or mean of all entries, without storing ``x * weights`` or its gradient.

    Storing that product takes 4 to 7 % of the loss of a dense head. Where all weights are 1, the value must equal
    ``func(x)`` exactly, and a sum of the sums of rows does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, func: Function) -> Tensor:
        dims = [d for d in range(x.ndim) if weights.size(d) == 1 and x.size(d) != 1]
        rows = x.sum(dims, keepdim=True, dtype=torch.promote_types(x.dtype, weights.dtype)) if dims else x
        ctx.shape, ctx.count = x.shape, 1 if func in (Tensor.sum, torch.sum) else x.numel()
        ctx.save_for_backward(weights, rows if ctx.needs_input_grad[1] else None)
        total = ((rows * weights).sum() / ctx.count).to(x.dtype)
        unit = (weights == 1).all()
        if x.device.type != "cpu":
            return torch.where(unit, func(x), total)  # an `if` would wait for the GPU
        return func(x) if unit else total  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weights, rows = ctx.saved_tensors
        grad = (grad / ctx.count).expand((1,) * weights.ndim)  # without dimensions it would not count in the dtype
        return (grad * weights).to(grad.dtype).expand(ctx.shape), None if rows is None else grad * rows, None


# What is detached is a constant: a target, such as an IoU, or a factor. What it is combined with has the weights.
# Mask R-CNN crops the masks it is to predict with boxes numbered by weighted indices: the crops are targets.
@rule(
    *("isnan", "isinf", "isfinite", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("size", "dim", "numel", "__len__", "is_floating_point", "count_nonzero", "bincount", "equal", "tolist", "item"),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.ops.torchvision.roi_align,
)
def drop(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Drop the weights: the result is no loss and of no row, such as sizes, counts and targets."""
    return func(*args, **kwargs)


@rule("any", "all", "argmax", "argmin")
def _tell(func: Function, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Keep the weights of labels and masks where each row of them is summed up; of predictions the result is plain."""
    if dim is None:
        return func(input, **kwargs)
    out = func(input, dim, keepdim, **kwargs)
    rows = input.rows.remove(_dims(dim)) if is_latent(input) else None  # type: ignore[attr-defined]
    return out if rows is None else carry(out, input.rows if keepdim else rows)  # type: ignore[attr-defined]


@rule("amax", "amin", "logsumexp")
def _within(func: Function, input: WeightedTensor, dim: Any = None, keepdim: bool = False) -> Any:
    """Keep the weights of rows, one number of each of which is computed."""
    dims = _dims(dim)
    if not dims or (rows := input.rows.remove(dims)) is None:
        raise lost(func, input, why=f"with dim {dim}")
    return carry(func(input, dims, keepdim), input.rows if keepdim else rows)


def agreed_rows(func: Function, candidates: list[Rows], *operands: Any) -> Rows:
    """Return the weights of the operands of one call. They must agree, and at least one operand must have some."""
    if not candidates:  # weights are nested somewhere in an argument
        raise lost(func, *operands)
    if len(candidates) == 1:
        return candidates[0]
    return agreed(
        candidates,
        lambda: (
            f"{name_of(func)} was called on tensors of different loss weights, of shape {shapes_of(operands)}. Weigh "
            "them alike, or detach() one that is a constant, such as a target."
        ),
    )


def scaled(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``x * weights`` in the dtype of ``x``: under autocast that is the narrower one, and the sum runs in it."""
    return (x * weights).to(x.dtype)


def _dims(dim: Any) -> tuple[int, ...]:
    """Return the dimensions of ``sum(1)``, ``sum(0, 1)``, ``sum((0, 1))`` or ``sum(dim=...)``; ``()`` means all."""
    if dim is None or isinstance(dim, int):
        return () if dim is None else (dim,)
    return tuple(d for part in dim for d in _dims(part))


@rule(
    *("to", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool", "cpu", "cuda", "clone"),
    *("contiguous", "expand", "expand_as", "zeros_like", "ones_like", "full_like", "empty_like", "detach"),
)
def _like_first(func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    out, x = func(input, *args, **kwargs), input
    if not isinstance(x, WeightedTensor) or (out.dtype == torch.bool and not is_latent(x)):
        return out
    if func is Tensor.detach or func is torch.detach:
        return carry(out, x.rows) if is_latent(x) else out
    out = carry(out, x.rows.pad(out.ndim) if out.device == x.device else pad(x.weights, out.ndim).to(out.device))
    if is_count(out):
        out.__class__ = LatentTensor
    return out


@rule("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze")
def _reshape(func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = func(input, *args, **kwargs)
    if not isinstance(input, WeightedTensor):
        return out
    if out.numel() != input.numel():  # view(dtype) may cut an entry into several
        raise lost(func, input, *args, **kwargs)
    return carry(out, reshaped(input.weights, input.shape, out.shape))


@rule("repeat")
def _repeat(func: Function, input: WeightedTensor, *sizes: Any, repeats: Any = ()) -> Any:
    counts = _dims(sizes or repeats)
    weights = pad(input.weights, len(counts))
    own = [1 if n == 1 else count for n, count in zip(weights.shape, counts, strict=True)]
    return carry(func(input, counts), weights.repeat(own))


@rule("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "unsqueeze", "flip")
def _permute(func: Function, input: WeightedTensor, *args: Any, **kwargs: Any) -> Any:
    """Move the weights as the dimensions are moved. One along which all weigh the same has size 1, and stays so."""
    return carry(func(input, *args, **kwargs), func(input.weights, *args, **kwargs))


@rule("roll")
def _roll(func: Function, input: WeightedTensor, shifts: Any, dim: Any = None, **kwargs: Any) -> Any:
    dims = _dims(kwargs.get("dims", dim))
    weights = input.weights if dims or input.weights.numel() == 1 else input.weights.expand(input.shape)
    return carry(func(input, shifts, dims), func(weights, shifts, dims))


@rule("narrow")
def _narrow(func: Function, input: WeightedTensor, dim: int, start: Any, length: int) -> Any:
    out = func(input, dim, start, length)
    return carry(out, input.rows if input.rows.dims[dim] is None else func(input.weights, dim, start, length))


@rule("select")
def _select(func: Function, input: WeightedTensor, dim: int, index: int) -> Any:
    rows = input.rows.remove((dim,))
    return carry(func(input, dim, index), func(input.weights, dim, index) if rows is None else rows)


@rule("unbind")
def _unbind(func: Function, input: WeightedTensor, dim: int = 0) -> Any:
    outs, rows = func(input, dim), input.rows.remove((dim,))
    return tuple(map(carry, outs, input.weights.unbind(dim) if rows is None else [rows] * len(outs)))


@rule("split", "chunk")
def _split(func: Function, input: WeightedTensor, sizes: Any, dim: int = 0) -> Any:
    outs = func(input, sizes, dim)
    if input.rows.dims[dim] is None:
        return tuple([carry(out, input.rows) for out in outs])
    return tuple(carry(out, part) for out, part in zip(outs, func(input.weights, sizes, dim), strict=True))


@rule("cat", "concat", "concatenate")
def _cat(func: Function, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    out = func(tensors, dim)
    parts = [x for x in tensors if x.ndim == out.ndim]  # torch skips tensors of shape (0,) between others
    dim %= out.ndim
    return carry(out, joined([weights_of(x) for x in parts], [x.size(dim) for x in parts], dim))


@rule("stack")
def _stack(func: Function, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    out = func(tensors, dim)
    dim, rows = dim % out.ndim, [x.rows for x in tensors if isinstance(x, WeightedTensor)]
    if len(rows) == len(tensors) and all(map(rows[0].same, rows)):
        return carry(out, rows[0].insert(dim))
    return carry(out, joined([weights_of(x).unsqueeze(dim) for x in tensors], [1] * len(tensors), dim))


@rule("interpolate", "grid_sample")
def _resample(func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keep the weights of maps ``(N, C, ...)`` that are sampled one by one, at points without weights."""
    points = any(isinstance(arg, WeightedTensor) for arg in (*args, *kwargs.values()))
    if points or any(weights_of(input).size(d) > 1 for d in range(2, input.ndim)):
        raise lost(func, input, *args, **kwargs)
    return carry(func(input, *args, **kwargs), weights_of(input))


@rule("softmax", "log_softmax")
def _along(func: Function, input: WeightedTensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if dim is None or input.rows.dims[dim] is not None:  # the result would mix entries of different weights
        raise lost(func, input, why=f"with dim {dim}")
    return carry(func(input, dim, *args, **kwargs), input.rows)


@rule("__deepcopy__")
def _deepcopy(func: Function, input: WeightedTensor, *args: Any) -> Any:
    out = carry(func(input.as_subclass(Tensor), *args), input.rows)
    out.__class__ = type(input)
    return out
