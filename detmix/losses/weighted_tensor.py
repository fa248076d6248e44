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

from detmix.losses.rows import Rows, fits, pad

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
