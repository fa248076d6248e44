"""Watch the doors of torch that a tensor passes without ``__torch_function__``.

A subclass of `Tensor` is asked before every function of torch but these: TorchScript, ``autograd.Function``, the
autograd engine, and the transforms of ``torch.func`` and ``torch.autograd.functional``. They take a weighted tensor for
a plain one, and its weights are lost. So each of them gets a check in front. A call without weighted tensors goes on as
before.

A scripted function runs as the Python that it was made from. A function that ``torch.compile`` compiled runs outside of
the graph. The others raise. What remains are extensions in C++ that are called directly, and ``x.data = predictions``:
no check of Python sees them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap
from torch.utils import checkpoint

from detmix.losses.weighted_tensor import RULES, WeightedTensor, lost, stripped

Call = Callable[..., Any]


def holds_weights(values: Iterable[Any]) -> bool:
    """Tell whether a weighted tensor is among values, or in lists, tuples and dicts of them."""
    for value in values:
        if isinstance(value, WeightedTensor):
            return True
        kind = type(value)
        if kind in (list, tuple) and holds_weights(value):
            return True
        if kind is dict and holds_weights(value.values()):
            return True
    return False


def watched(call: Call, take: Call) -> Call:
    """Wrap ``call`` so that calls with weighted tensors go to ``take(call, *args, **kwargs)``."""

    @functools.wraps(call)
    def check(*args: Any, **kwargs: Any) -> Any:
        if holds_weights(args) or (kwargs and holds_weights(kwargs.values())):
            return take(call, *args, **kwargs)
        return call(*args, **kwargs)

    return check


def watch() -> None:
    """Put the checks in front of the doors. Importing this module does it once."""
    doors: tuple[tuple[Any, str, Call], ...] = (
        (torch._C.ScriptFunction, "__call__", _run_script),
        (torch._C.ScriptMethod, "__call__", _refuse_script),
        (torch.autograd, "_engine_run_backward", _refuse_backward),
        (torch.autograd.functional, "_grad_preprocess", _refuse_transform),
        (eager_transforms, "_wrap_for_grad", _refuse_transform),
        (eager_transforms, "_wrap_functional_tensor", _refuse_transform),
        (vmap, "_add_batch_dim", _refuse_transform),
    )
    for home, name, take in doors:
        setattr(home, name, watched(getattr(home, name), take))
    function: Any = torch.autograd.Function
    apply = vars(function)["apply"]  # a descriptor, of Python in some releases and of C in others

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return apply.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(watched(call, _run_function))


def _run_script(call: Call, script: Any, *args: Any, **kwargs: Any) -> Any:
    original = getattr(script, "_torchdynamo_inline", None)  # which torch.compile runs too
    if original is None:
        return _refuse_script(call, script)
    return original(*args, **kwargs)


def _refuse_script(call: Call, script: Any, *args: Any, **kwargs: Any) -> Any:
    owner = getattr(script, "owner", None)
    name = script.qualified_name if owner is None else f"{owner._type().qualified_name()}.{script.name}"
    raise NotImplementedError(
        f"{name} is TorchScript and would lose the loss weights of its arguments. Call the Python code that it was "
        f"made from."
    )


def _run_function(call: Call, cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls is checkpoint.CheckpointFunction:
        raise NotImplementedError(
            "torch.utils.checkpoint with use_reentrant=True would lose the loss weights in its gradient. Say "
            "use_reentrant=False."
        )
    rule = RULES.get(cls)
    if rule is None:
        raise lost(cls, *args, **kwargs)

    def run(*given: Any, **named: Any) -> Any:  # forward and backward see plain tensors
        return call(cls, *stripped(given), **stripped(named))

    return rule(run, *args, **kwargs)


def _refuse_backward(call: Call, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "torch.autograd.backward or grad was called on a tensor whose loss weights no sum has applied yet. Sum it over "
        "its rows first."
    )


def _refuse_transform(call: Call, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "A transform of torch.func or torch.autograd.functional was called on a tensor with loss weights and would "
        "lose them. Call detmix.weighted inside of the function that is transformed."
    )


watch()
