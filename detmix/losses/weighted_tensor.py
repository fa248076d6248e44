"""A tensor that carries one loss weight for each of its rows and applies them where rows are summed.

Loss code written without weights runs on it unchanged. Every function of torch does one of three things to an entry: it
*computes on* it or *moves* it, and the weight goes along; or it *sums* it with entries of other weights, and each is
multiplied by its own weight first. `RULES` says which. A function without a rule raises, so no weight is lost silently.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass  # the switch that torchvision's tv_tensors use for the same purpose
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from detmix.losses.rows import Rows, fits, pad

Function = Callable[..., Any]
Rule = Callable[..., Any]

RULES: dict[Function, Rule] = {}
"""The rule of each function. Add one as ``detmix.losses.RULES[function] = detmix.losses.elementwise``, say."""


def rule(*functions: str | Function) -> Callable[[Rule], Rule]:
    """Register a rule for functions: torch's by name, wherever `Tensor`, `torch` and its ``functional`` have it."""

    def register(made: Rule) -> Rule:
        for function in functions:
            if isinstance(function, str):
                homes = [home for home in (Tensor, torch, F) if hasattr(home, function)]
                RULES.update({getattr(home, function): made for home in homes})
            else:
                RULES[function] = made
        return made

    return register


class WeightedTensor(Tensor):
    """A tensor whose entries count ``weights`` times in a sum or a mean. `weighted` makes one."""

    rows: Rows

    @property
    def weights(self) -> Tensor:
        """The weight of each entry: as many dimensions as the tensor has, each of its size or 1."""
        return self.rows.weights

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the rule of ``func``, which sees the tensors as plain ones."""
        kwargs = kwargs or {}
        with DisableTorchFunctionSubclass():
            rule = refuse if kwargs.get("out") is not None else RULES.get(func, _call_unknown)
            return rule(func, *args, **kwargs)


def weighted(x: Tensor, weights: Tensor) -> WeightedTensor:
    """View ``x`` as a tensor whose entries count ``weights`` times in a sum or a mean.

    Everything computed from the result keeps the weights until a sum applies them. A mean still divides by the number
    of entries, not by the sum of the weights.

    Args:
        x: Any tensor. An index of integers passes its weights on to what it gathers.
        weights: Floating point, of a shape that broadcasts to that of ``x``, such as ``(N, 1)`` for one weight a row.

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
    """Return the weights of ``x``, of a shape that broadcasts to its own; a single 1 if it has none."""
    return x.weights if isinstance(x, WeightedTensor) else torch.ones((1,) * x.ndim, device=x.device)


def carry(x: Tensor, weights: Rows | Tensor) -> WeightedTensor:
    """Attach weights to the fresh result of a function. They must have as many dimensions and broadcast to it.

    This switches the Python class of a plain tensor. ``as_subclass`` would make a view of it, which adds a node to the
    autograd graph and takes longer than most operations of a loss.
    """
    if type(x) is Tensor:
        x.__class__ = WeightedTensor
    elif type(x) is not WeightedTensor or "rows" in x.__dict__:  # a function may return its argument
        x = x.as_subclass(WeightedTensor)
    x.rows = weights if isinstance(weights, Rows) else Rows.of(weights)  # type: ignore[attr-defined]
    return x  # type: ignore[return-value]


def _call_unknown(func: Function, *args: Any, **kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if any(isinstance(leaf, Tensor) and leaf.dtype != torch.bool for leaf in tree_leaves(out)):
        raise lost(func, *args, **kwargs)
    return out  # a shape, a dtype, a number, a comparison


@rule("backward")
def refuse(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Raise, for functions that would count every row once, as ``backward`` before any sum."""
    raise lost(func, *args, **kwargs)


def lost(func: Function, *args: Any, **kwargs: Any) -> NotImplementedError:
    """Make the error for a call that would lose weights."""
    carriers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, WeightedTensor)]
    shapes = " and ".join(f"{tuple(x.shape)} with weights {tuple(x.weights.shape)}" for x in carriers)
    name = resolve_name(func) or getattr(func, "__name__", repr(func))
    return NotImplementedError(
        f"{name}, called on a tensor of shape {shapes}, has no rule that keeps these loss weights. Add one with "
        f"detmix.losses.RULES[{name}] = rule, where rule is elementwise, move, reduce or drop of detmix.losses."
    )
