"""A tensor that carries one loss weight for each of its rows and applies them where rows are summed.

Loss code written without weights runs on it unchanged. Every function of torch does one of three things to an entry: it
*computes on* it or *moves* it, and the weight goes along; or it *sums* it with entries of other weights, and each is
multiplied by its own weight first. `RULES` says which. A function without a rule raises, so no weight is lost silently.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass  # the switch that torchvision's tv_tensors use for the same purpose
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

from detmix.losses.rows import Rows, fits, pad

Function = Callable[..., Any]
Rule = Callable[..., Any]

RULES: dict[Function, Rule] = {}
"""The rule of each function. Add one as ``detmix.losses.RULES[function] = detmix.losses.elementwise``, say."""


def rule(*functions: str | Function) -> Callable[[Rule], Rule]:
    """Register a rule for functions: torch's by name, wherever `Tensor`, `torch` and its ``functional`` have it.

    The parameters of the rule have torch's names, so that it can be called as the function is; see `OTHER_NAMES`.
    """

    def register(made: Rule) -> Rule:
        for function in functions:
            if isinstance(function, str):
                homes = [home for home in (Tensor, torch, F) if callable(getattr(home, function, None))]
                RULES.update({getattr(home, function): made for home in homes})
            else:
                RULES[function] = made
        return made

    return register


OTHER_NAMES = {
    "axis": "dim",
    "keepdims": "keepdim",
    **dict.fromkeys(("x", "a", "x1", "self", "tensor"), "input"),
    "x2": "other",
    **dict.fromkeys(("split_size", "split_size_or_sections", "chunks"), "sizes"),
}
"""Other names that torch has for a parameter of a rule."""


class WeightedTensor(Tensor):
    """A tensor whose entries count ``weights`` times in a sum or a mean. `weighted` makes one."""

    rows: Rows

    def __init_subclass__(cls) -> None:
        """Leave the class out of the graphs of torch.compile, which cannot hold weights."""
        torch._dynamo.config.nontraceable_tensor_subclasses.add(cls)
        method: Any = cls.__torch_function__
        method.__func__._torchdynamo_disable = True  # as torch.compiler.disable says it, which costs time in each call
        torch._dynamo.eval_frame.skip_code(method.__func__.__code__)

    @property
    def weights(self) -> Tensor:
        """The weight of each entry: as many dimensions as the tensor has, each of its size or 1."""
        return self.rows.weights

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the rule of ``func``, which sees the tensors as plain ones."""
        with DisableTorchFunctionSubclass():
            chosen: Rule = RULES.get(func, _call_unknown)
            if not kwargs:
                return chosen(func, *args)
            if kwargs.get("out") is not None:
                raise lost(func, *args, **kwargs)
            names, is_open = _parameters(chosen)
            if not (names.issuperset(kwargs) or (is_open and _OTHER.isdisjoint(kwargs))):
                kwargs = _renamed(func, names, is_open, kwargs)
            return chosen(func, *args, **kwargs)


_OTHER = frozenset(OTHER_NAMES)


WeightedTensor.__init_subclass__()


class LatentTensor(WeightedTensor):
    """Integers, truth values, and floats made of these alone, with the weights of the rows that they are about.

    A sum of them is a count and uses no weights. They pass their weights on: to what they index, and to the floats that
    they are combined with.
    """

    @classmethod
    def __torch_function__(cls, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the rule of ``func``. Its results are latent if they are no floats, or made of latent ones alone."""
        out = super().__torch_function__(func, types, args, kwargs)
        if type(out) is LatentTensor or not isinstance(out, Tensor | tuple | list):
            return out
        with DisableTorchFunctionSubclass():
            real: bool | None = None
            for x in (out,) if isinstance(out, Tensor) else out:
                if type(x) is not WeightedTensor:
                    continue
                if real is None and not is_count(x):
                    operands = args[:1] if func in _LIKE_FIRST else (args, kwargs)
                    real = any(
                        isinstance(y, Tensor) and not isinstance(y, LatentTensor) and not is_count(y)
                        for y in tree_leaves(operands)
                    )
                if not real or is_count(x):
                    x.__class__ = LatentTensor
        return out


_LIKE_FIRST = (Tensor.type_as, Tensor.to, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)
"""Functions of which the second argument only says what the result is to be like."""


def weighted(x: Tensor, weights: Tensor) -> WeightedTensor:
    """View ``x`` as a tensor whose entries count ``weights`` times in a sum or a mean.

    Everything computed from the result keeps the weights until a sum applies them. A mean still divides by the number
    of entries, not by the sum of the weights.

    Args:
        x: Any tensor. One that has weights already counts the product of both. Integers and truth values, such as
            labels, indices and masks, pass their weights on to what they index and to the floats they are combined
            with; a sum of them is a count and uses no weights.
        weights: Floating point, of a shape that broadcasts to that of ``x``, such as ``(N, 1)`` for one weight a row.

    Raises:
        ValueError: If the weights do not broadcast to the shape of ``x``.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rows = weighted(scores, torch.tensor([[0.5], [1.0]]))
        >>> (2 * rows).sum()  # 2 * (0.5 * (1 + 2) + 1.0 * (3 + 4))
        tensor(17.)
    """
    with DisableTorchFunctionSubclass():
        if not fits(weights, x.shape):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} do not broadcast to the tensor's {tuple(x.shape)}."
            )
        own = pad(weights, x.ndim)
        if isinstance(x, WeightedTensor):
            own = x.weights * own
        latent = isinstance(x, LatentTensor) or is_count(x)
        return carry(x.as_subclass(LatentTensor if latent else WeightedTensor), own)


def is_count(x: Tensor) -> bool:
    """Tell whether the entries are integers or truth values: a sum of them is no loss."""
    return not (x.dtype.is_floating_point or x.dtype.is_complex)


def is_latent(x: Any) -> bool:
    """Tell whether this is a tensor with weights that a sum of it does not use."""
    return isinstance(x, LatentTensor) or (isinstance(x, WeightedTensor) and is_count(x))


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
    elif not isinstance(x, WeightedTensor) or "rows" in x.__dict__:  # a function may return its argument
        x = x.as_subclass(WeightedTensor)
    x.rows = weights if isinstance(weights, Rows) else Rows.of(weights)  # type: ignore[attr-defined]
    return x  # type: ignore[return-value]


def stripped(values: Any) -> Any:
    """Return a tensor, or tensors in lists, tuples and dicts, without weights."""
    return tree_map_only(WeightedTensor, lambda x: x.as_subclass(Tensor), values)


_OPERATORS = frozenset(dir(operator)) | {"div"}


def _call_unknown(func: Function, *args: Any, **kwargs: Any) -> Any:
    name = getattr(func, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    writes = writes or (name.startswith("__i") and name[3:-2] in _OPERATORS) or kwargs.get("inplace")
    if writes or name in ("__set__", "__delete__"):  # before anything is written
        raise lost(func, *args, **kwargs)
    out = func(*args, **kwargs)
    latent = any(is_latent(leaf) for leaf in tree_leaves((args, kwargs)))
    if any(isinstance(leaf, Tensor) and (latent or leaf.dtype != torch.bool) for leaf in tree_leaves(out)):
        raise lost(func, *args, **kwargs)
    return out  # a shape, a dtype, a number, a comparison


@rule("backward")
def refuse(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Raise, for functions that would count every row once, as ``backward`` before any sum."""
    raise lost(func, *args, **kwargs)


@functools.cache
def _parameters(rule: Rule) -> tuple[frozenset[str], bool]:
    """Return the names of a rule's parameters, and whether it takes others."""
    parameters = list(inspect.signature(rule).parameters.values())[1:]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(names), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _renamed(func: Function, names: frozenset[str], is_open: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Call arguments as the rule calls them, and refuse one that it does not know."""
    result = {}
    for key, value in kwargs.items():
        name = key if key in names else OTHER_NAMES.get(key, key)
        name = name if name in names else key
        if name not in names and not is_open:
            raise NotImplementedError(
                f"{name_of(func)} was called with {key}=, which its rule for loss weights does not know. Call it "
                f"without {key}, or replace its rule: detmix.losses.RULES[{name_of(func)}] = rule."
            )
        if name in result:
            raise TypeError(f"{name_of(func)} was called with {name} twice, as {', '.join(kwargs)}.")
        result[name] = value
    return result


def name_of(func: Function) -> str:
    """Return the name of a function of torch, as one calls it."""
    return str(resolve_name(func) or getattr(func, "__name__", repr(func)))


def shapes_of(*args: Any) -> str:
    """Return the shapes of all tensors with weights in the arguments of a call, for its error."""
    carriers = [leaf for leaf in tree_leaves(args) if isinstance(leaf, WeightedTensor)]
    return " and ".join(f"{tuple(x.shape)} with weights {tuple(x.weights.shape)}" for x in carriers)


def lost(func: Function, *args: Any, why: str = "", **kwargs: Any) -> NotImplementedError:
    """Make the error for a call that would lose weights. ``why`` names the argument that no rule allows for."""
    name, why = name_of(func), f", {why}" if why else ""
    return NotImplementedError(
        f"{name}, called on a tensor of shape {shapes_of(args, kwargs)}{why}, has no rule that keeps these loss "
        f"weights. Add one with detmix.losses.RULES[{name}] = rule, where rule is elementwise, move, reduce or drop of "
        f"detmix.losses."
    )
