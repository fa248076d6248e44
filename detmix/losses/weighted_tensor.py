"""A tensor that carries the loss weights of its rows and applies them where rows are summed.

Loss code written without weights runs on it unchanged. Three things can happen to an entry, and each function is known
to do one of them: it is *computed on* or *moved*, and its weight goes along; or it is *summed* with entries of another
weight, and is multiplied by its own just before. A function that is not known raises, so that no loss counts 1 in
silence: :data:`RULES` says what is known, and takes more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass  # the switch that torchvision's tv_tensors use for the same purpose
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from detmix.losses.rows import Rows, agreed, fits, pad

Function = Callable[..., Any]
Rule = Callable[..., Any]

RULES: dict[Function, Rule] = {}
"""What each function does to weights: ``RULES[function] = rule``, where ``rule(function, *args, **kwargs)`` calls it.

The rules a new entry will want are :func:`elementwise`, :func:`move`, :func:`reduce` and :func:`drop`.
"""


class WeightedTensor(Tensor):
    """A tensor whose entries count ``weights`` times in a sum or a mean; made by :func:`weighted`."""

    rows: Rows

    @property
    def weights(self) -> Tensor:
        """What each entry counts: as many dimensions as the tensor, each of its size or 1."""
        return self.rows.weights

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` by its rule, on tensors that it sees as plain ones."""
        kwargs = kwargs or {}
        with DisableTorchFunctionSubclass():
            rule = refuse if kwargs.get("out") is not None else RULES.get(func, _unknown)
            return rule(func, *args, **kwargs)


def weighted(x: Tensor, weights: Tensor) -> WeightedTensor:
    """View ``x`` as a tensor whose entries count ``weights`` times in a sum or a mean.

    What is computed from the result keeps the weights, until they are applied at the sum. A mean still divides by
    the number of entries, not by the sum of the weights.

    Args:
        x: Any tensor. Integers carry weights too: what is gathered with a weighted index has the index's weights.
        weights: Floating point, of a shape that broadcasts to that of ``x``: ``(N, 1)`` for one weight a row.

    Raises:
        ValueError: If the weights do not broadcast to the shape of ``x``.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rows = weighted(scores, torch.tensor([[0.5], [1.0]]))
        >>> (2 * rows).sum()  # 2 * (0.5 * (1 + 2) + 1.0 * (3 + 4))
        tensor(17.)
    """
    if not fits(weights, x.shape):
        raise ValueError(f"weights of shape {tuple(weights.shape)} do not broadcast to the tensor's {tuple(x.shape)}.")
    return carry(x.as_subclass(WeightedTensor), pad(weights, x.ndim))


def weights_of(x: Tensor) -> Tensor:
    """The weights ``x`` carries, of a shape that broadcasts to its own; a single 1 for a tensor that carries none."""
    return x.weights if isinstance(x, WeightedTensor) else torch.ones((1,) * x.ndim, device=x.device)


def carry(x: Tensor, weights: Rows | Tensor) -> WeightedTensor:
    """Have a function's fresh result carry weights, which have its number of dimensions and fit.

    Python's class of a plain tensor is switched: ``as_subclass`` would make a view of it, another node for autograd to
    visit, and take longer than most of what a loss computes on its rows.
    """
    if type(x) is Tensor:
        x.__class__ = WeightedTensor
    elif type(x) is not WeightedTensor or "rows" in x.__dict__:  # a function may return its argument
        x = x.as_subclass(WeightedTensor)
    x.rows = weights if isinstance(weights, Rows) else Rows.of(weights)  # type: ignore[attr-defined]
    return x  # type: ignore[return-value]


# ---- rules -----------------------------------------------------------------------------------------------------------


def elementwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Rule for functions whose entries each come from one entry of every operand, broadcast as usual."""
    out = func(*args, **kwargs)
    if out.dtype == torch.bool:
        return out
    carried = [x.rows.pad(out.ndim) for x in (*args, *kwargs.values()) if type(x) is WeightedTensor]
    return carry(out, agreed_rows(func, carried))


def move(func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Rule for functions that move the entries of their first argument: the weights are moved by the same function.

    The weights are spread to the shape of the argument first, which costs no memory, but may in the function.
    """
    out = func(x, *args, **kwargs)
    return carry(out, func(x.weights.expand(x.shape), *args, **kwargs)) if isinstance(x, WeightedTensor) else out


def reduce(func: Function, x: Tensor, *args: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Rule for sums and means: entries of one weight stay weighted, entries of several are multiplied and then summed.

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
    """``func(x * weights)`` for a sum or mean of all entries, without writing ``x * weights`` or its gradient.

    That product alone costs a dense head a tenth of its loss's time. Where all weights are 1, the value must be
    ``func(x)`` to the bit, which a sum of the sums of rows is not.
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


def drop(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Rule for functions whose result is no loss and of no row: indices, masks, targets that never carry weights."""
    return func(*args, **kwargs)


def _unknown(func: Function, *args: Any, **kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if any(isinstance(leaf, Tensor) and leaf.dtype != torch.bool for leaf in tree_leaves(out)):
        raise lost(func, *args, **kwargs)
    return out  # a shape, a dtype, a number, a comparison


def refuse(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Rule for functions that would count every weight 1, as ``backward`` before any sum."""
    raise lost(func, *args, **kwargs)


def lost(func: Function, *args: Any, **kwargs: Any) -> NotImplementedError:
    """The error for a call that would lose weights."""
    carriers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, WeightedTensor)]
    shapes = " and ".join(f"{tuple(x.shape)} with weights {tuple(x.weights.shape)}" for x in carriers)
    name = resolve_name(func) or getattr(func, "__name__", repr(func))
    return NotImplementedError(
        f"{name}, called on a tensor of shape {shapes}, has no rule that keeps these loss weights. Add one with "
        f"detmix.losses.weighted_tensor.RULES[{name}] = rule, where rule is elementwise, move, reduce or drop."
    )


def agreed_rows(func: Function, candidates: list[Rows]) -> Rows:
    """The weights of the operands of one call, which must be the same, and must be some."""
    if not candidates:  # only something nested in an argument carries weights
        raise lost(func)
    if (rows := agreed(candidates)) is None:  # rows meet only themselves: else, whose weight would the result have?
        raise NotImplementedError(f"{resolve_name(func)} was called on tensors of different loss weights.")
    return rows


def scaled(x: Tensor, weights: Tensor) -> Tensor:
    """``x * weights`` in the dtype of ``x``: under autocast it is the narrower, and the sum to follow runs in it."""
    return (x * weights).to(x.dtype)


def _dims(dim: Any) -> tuple[int, ...]:
    """The dimensions of ``sum(1)``, ``sum(0, 1)``, ``sum((0, 1))`` or ``sum(dim=...)``; none for all of them."""
    if dim is None or isinstance(dim, int):
        return () if dim is None else (dim,)
    return tuple(d for part in dim for d in _dims(part))
