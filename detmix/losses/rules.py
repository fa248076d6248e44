"""What each function of torch does to the weights of a `WeightedTensor`.

A rule is called in place of the function, as ``rule(function, *args, **kwargs)``, and calls it. `elementwise`, `move`,
`reduce` and `drop` fit most functions; the others know the arguments of theirs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # loads torch.ops.torchvision
from torch import Tensor
from torch.overrides import resolve_name

from detmix.losses.rows import Rows, agreed, joined, pad, reshaped
from detmix.losses.weighted_tensor import Function, WeightedTensor, carry, lost, rule, weights_of


@rule(
    *("add", "sub", "rsub", "mul", "div", "true_divide", "pow", "neg", "abs", "square", "sqrt", "rsqrt"),
    *("reciprocal", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__rpow__", "__neg__", "__abs__", "exp", "expm1", "log", "log1p", "log2", "atan"),
    *("arctan", "tanh", "sigmoid", "logsigmoid", "softplus", "relu", "clamp", "clip", "clamp_min", "clamp_max"),
    *("minimum", "maximum", "sign", "floor", "ceil", "round", "lerp", "nan_to_num"),
)
def elementwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Keep the weights of the operands: each entry of the result comes from one entry of every operand, broadcast."""
    out = func(*args, **kwargs)
    if out.dtype == torch.bool:
        return out
    carried = [x.rows.pad(out.ndim) for x in (*args, *kwargs.values()) if type(x) is WeightedTensor]
    return carry(out, agreed_rows(func, carried))


@rule("diag", "diagonal", "index_select", "masked_select", "flip", "roll")
def move(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Move the weights with the same function, for functions that move the entries of their first argument.

    The weights are expanded to the shape of the argument first. That takes memory only if the function copies them.
    """
    out = func(x, *args, **kwargs)
    return carry(out, func(x.weights.expand(x.shape), *args, **kwargs)) if isinstance(x, WeightedTensor) else out


@rule("sum", "mean")
def reduce(func: Function, x: Tensor, *args: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Apply the weights where entries of different weights are summed or averaged; keep them where all weigh the same.

    So ``losses.sum(1)`` of weights ``(N, 1)`` carries weights ``(N,)``. This also keeps a ratio of two such sums right.
    """
    if args and isinstance(args[-1], bool):
        *args, keepdim = args  # type: ignore[assignment]
    dims = _dims(args if args else dim)
    kwargs |= {"dim": dims, "keepdim": keepdim} if dims else {}
    if not isinstance(x, WeightedTensor) or not (x.is_floating_point() or x.is_complex()):
        return func(x, **kwargs)  # a sum of integers counts; it is no loss
    if dims and (rows := x.rows.remove(dims)) is not None:
        return carry(func(x, **kwargs), x.rows if keepdim else rows)
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
    *("detach", "argmax", "argmin", "argsort", "nonzero", "isnan", "isinf", "isfinite"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__"),
    *("size", "dim", "numel", "__len__", "is_floating_point"),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    torch.ops.torchvision.roi_align,
)
def drop(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Drop the weights: the result is no loss and of no row, such as indices, masks and targets."""
    return func(*args, **kwargs)


def agreed_rows(func: Function, candidates: list[Rows]) -> Rows:
    """Return the weights of the operands of one call. They must agree, and at least one operand must have some."""
    if not candidates:  # weights are nested somewhere in an argument
        raise lost(func)
    if (rows := agreed(candidates)) is None:  # otherwise, which weight would the result have?
        raise NotImplementedError(f"{resolve_name(func)} was called on tensors of different loss weights.")
    return rows


def scaled(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``x * weights`` in the dtype of ``x``: under autocast that is the narrower one, and the sum runs in it."""
    return (x * weights).to(x.dtype)


def _dims(dim: Any) -> tuple[int, ...]:
    """Return the dimensions of ``sum(1)``, ``sum(0, 1)``, ``sum((0, 1))`` or ``sum(dim=...)``; ``()`` means all."""
    if dim is None or isinstance(dim, int):
        return () if dim is None else (dim,)
    return tuple(d for part in dim for d in _dims(part))


@rule(
    *("to", "type_as", "float", "double", "half", "bfloat16", "long", "int", "cpu", "cuda", "clone", "contiguous"),
    *("expand", "expand_as", "zeros_like", "ones_like", "full_like", "empty_like"),
)
def _like_first(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = func(x, *args, **kwargs)
    if not isinstance(x, WeightedTensor) or out.dtype == torch.bool:
        return out
    return carry(out, x.rows.pad(out.ndim) if out.device == x.device else pad(x.weights, out.ndim).to(out.device))


@rule("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze")
def _reshape(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = func(x, *args, **kwargs)
    return carry(out, reshaped(x.weights, x.shape, out.shape)) if isinstance(x, WeightedTensor) else out


@rule("repeat")
def _repeat(func: Function, x: WeightedTensor, *sizes: Any) -> Any:
    return carry(func(x, *sizes), func(x.weights.expand(x.shape), *sizes))


@rule("transpose", "permute", "movedim", "swapaxes", "t", "unsqueeze")
def _permute(func: Function, x: WeightedTensor, *args: Any, **kwargs: Any) -> Any:
    return carry(func(x, *args, **kwargs), func(x.weights, *args, **kwargs))


@rule("unbind")
def _unbind(func: Function, x: WeightedTensor, dim: int = 0) -> Any:
    outs, rows = func(x, dim), x.rows.remove((dim,))
    return tuple(map(carry, outs, x.weights.unbind(dim) if rows is None else [rows] * len(outs)))


@rule("split", "chunk")
def _split(func: Function, x: WeightedTensor, sizes: Any, dim: int = 0) -> Any:
    outs = func(x, sizes, dim)
    if x.rows.dims[dim] is None:
        return tuple([carry(out, x.rows) for out in outs])
    return tuple(carry(out, part) for out, part in zip(outs, func(x.weights, sizes, dim), strict=True))


@rule("cat", "concat")
def _cat(func: Function, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    dim %= max(x.ndim for x in tensors)
    return carry(func(tensors, dim), joined([weights_of(x) for x in tensors], [x.size(dim) for x in tensors], dim))


@rule("stack")
def _stack(func: Function, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    dim %= tensors[0].ndim + 1
    out, rows = func(tensors, dim), [x.rows for x in tensors if type(x) is WeightedTensor]
    if len(rows) == len(tensors) and all(map(rows[0].same, rows)):
        return carry(out, rows[0].insert(dim))
    return carry(out, joined([weights_of(x).unsqueeze(dim) for x in tensors], [1] * len(tensors), dim))


def _indexed(x: WeightedTensor, entries: tuple[Any, ...]) -> Rows:
    rows = x.rows.sliced(entries)
    return x.rows.gathered(x.shape, entries) if rows is None else rows


@rule("__getitem__")
def _getitem(func: Function, x: Tensor, index: Any) -> Any:
    out = func(x, index)
    entries = index if isinstance(index, tuple) else (index,)
    carried = [_indexed(x, entries)] if type(x) is WeightedTensor else []
    if WeightedTensor in map(type, entries):
        # Rows gathered by an object's index get its weight. They lie along the first dimensions if the index starts
        # with tensors, side by side.
        indices = [entry for entry in entries if isinstance(entry, Tensor)]
        if any(i is not e or i.dtype in (torch.bool, torch.uint8) for i, e in zip(indices, entries, strict=False)):
            raise lost(func, x, index)
        ndim = max(i.ndim for i in indices)
        rows = [i.rows.pad(ndim) for i in indices if isinstance(i, WeightedTensor)]
        carried += [r.append(out.ndim) for r in rows]
    return carry(out, agreed_rows(func, carried))


@rule("__setitem__")
def _setitem(func: Function, x: Tensor, index: Any, value: Any) -> None:
    if not isinstance(x, WeightedTensor):
        raise lost(func, x, index, value)
    if isinstance(value, WeightedTensor):
        entries = index if isinstance(index, tuple) else (index,)
        agreed_rows(func, [_indexed(x, entries), value.rows])
    func(x, index, value)


@rule("where")
def _where(func: Function, condition: Tensor, *args: Any, **kwargs: Any) -> Any:
    return elementwise(func, condition, *args, **kwargs) if args or kwargs else func(condition)


@rule("max", "min")
def _extreme(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(operand, Tensor) for operand in (*args, *kwargs.values())):
        return elementwise(func, x, *args, **kwargs)
    if not args and "dim" not in kwargs:
        raise lost(func, x)
    return _sort(func, x, *args, **kwargs)


@rule("sort")
def _sort(func: Function, x: Tensor, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """Give each value along ``dim`` the weight of the entry it comes from."""
    result = func(x, dim, *args, **kwargs)
    values, indices = result
    weights = weights_of(x)
    if weights.size(dim) > 1:
        places = indices if indices.ndim == x.ndim else indices.unsqueeze(dim)
        weights = torch.take_along_dim(weights.expand(x.shape), places, dim)
    return type(result)((carry(values, weights if values.ndim == x.ndim else weights.squeeze(dim)), indices))


@rule("topk")
def _topk(func: Function, x: WeightedTensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    return _sort(lambda x, dim: func(x, k, dim, *args, **kwargs), x, dim)


@rule("interpolate", "grid_sample")
def _resample(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keep the weights of maps ``(N, C, ...)`` that are sampled one by one, at points without weights."""
    points = any(isinstance(arg, WeightedTensor) for arg in (*args, *kwargs.values()))
    if points or any(weights_of(x).size(d) > 1 for d in range(2, x.ndim)):
        raise lost(func, x, *args, **kwargs)
    return carry(func(x, *args, **kwargs), weights_of(x))


@rule("softmax", "log_softmax")
def _along(func: Function, x: WeightedTensor, dim: int, *args: Any, **kwargs: Any) -> Any:
    if x.rows.dims[dim] is not None:  # the result would mix entries of different weights
        raise lost(func, x)
    return carry(func(x, dim, *args, **kwargs), x.rows)


@rule("l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "kl_div")
def _loss(func: Function, *args: Any, reduction: str = "mean", **kwargs: Any) -> Any:
    loss = elementwise(func, *args, reduction="none", **kwargs)
    # A dense gradient, as the stock loss has: its kernel rounds differently on an expanded one.
    if reduction == "none":
        return loss
    if reduction == "batchmean":
        return scaled(loss, loss.weights).sum() / loss.size(0)
    return getattr(Tensor, reduction)(scaled(loss, loss.weights))


@rule("binary_cross_entropy", "binary_cross_entropy_with_logits")
def _binary_cross_entropy(
    func: Function, x: Tensor, y: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", **kwargs: Any
) -> Any:
    if reduction == "none":
        return elementwise(func, x, y, weight=weight, reduction="none", **kwargs)
    # As the function's own factor, weights keep the order in which it divides its gradient by the mean's count.
    weights = agreed_rows(func, [part.rows for part in (x, y, weight) if isinstance(part, WeightedTensor)]).weights
    return func(x, y, weights if weight is None else weights * weight, reduction=reduction, **kwargs)


@rule("cross_entropy")
def _cross_entropy(
    func: Function, x: Tensor, y: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", **kwargs: Any
) -> Any:
    classes = 1 if x.ndim > 1 else 0
    carried = [x.rows] if isinstance(x, WeightedTensor) else []
    if isinstance(y, WeightedTensor):
        carried.append(y.rows if y.ndim == x.ndim else y.rows.insert(classes))
    rows = agreed_rows(func, carried)
    smooth = kwargs.pop("label_smoothing", 0.0)
    own = rows.remove((classes,))
    if own is None or (reduction != "none" and (smooth or y.is_floating_point())):
        raise lost(func, x, y)
    if reduction == "none":
        loss = func(x, y, weight, reduction="none", label_smoothing=smooth, **kwargs)
        return carry(loss, own)
    # Scaling the log-probabilities keeps nll_loss's own summation order and so its bits; scaling its output would not.
    x = x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x
    return F.nll_loss(scaled(F.log_softmax(x, classes), rows.weights), y, weight, reduction=reduction, **kwargs)
