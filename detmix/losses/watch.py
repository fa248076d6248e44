"""Watch that what `detmix.weight_losses` has weighted stays so.

A head or loss function that replaces a weighted one would drop the weights silently.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from detmix.losses.heads import WeightedHead
from detmix.losses.transformers import is_weighted_function


class HeadWatch:
    """Raise if a module is called with weights and no longer holds the weighted heads that it held.

    A forward pre-hook of the module that owns the heads. It holds names alone, so it can be pickled and copied with its
    module. It looks in training, where there are losses, and not while `torch.compile` traces.
    """

    def __init__(self) -> None:
        self.heads: dict[str, str] = {}
        """Attributes of the module that hold weighted heads, and the names of their classes."""
        self.has_function = False
        """Whether the module is a detector of ``transformers``, which computes losses in eval mode too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the heads if any target has weights.

        Raises:
            RuntimeError: If an attribute holds something else. The message names it, and both classes.
        """
        if torch.compiler.is_compiling() or not (module.training or self.has_function):
            return
        if not _have_weights((*args, *kwargs.values())):
            return
        if module.training:
            for name, expected in self.heads.items():
                if not isinstance(head := getattr(module, name, None), WeightedHead):
                    raise _unweighted(module, name, expected, type(head).__name__)
        if self.has_function and not is_weighted_function(function := module.loss_function):
            got = getattr(function, "__name__", type(function).__name__)
            raise _unweighted(module, "loss_function", "WeightedLossFunction", got)


def watch_heads(model: nn.Module) -> None:
    """Give each module that owns weighted heads one `HeadWatch`, and update those that it has."""
    for owner in model.modules():
        heads = {
            name: type(child).__name__ for name, child in owner._modules.items() if isinstance(child, WeightedHead)
        }
        has_function = is_weighted_function(vars(owner).get("_loss_function"))
        watch = next((hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, HeadWatch)), None)
        if watch is None and (heads or has_function):
            watch = HeadWatch()
            owner.register_forward_pre_hook(watch, with_kwargs=True)
        if watch is not None:
            watch.heads, watch.has_function = heads, has_function


def _have_weights(arguments: Iterable[Any]) -> bool:
    return any(
        isinstance(target, Mapping) and "weights" in target
        for argument in arguments
        if isinstance(argument, list | tuple)
        for target in argument
    )


def _unweighted(module: nn.Module, name: str, expected: str, got: str) -> RuntimeError:
    return RuntimeError(
        f"{name} of {type(module).__name__} was a {expected} and is now a {got}, whose losses use no weights, but the "
        f"targets hold some: call detmix.weight_losses(model) again, or leave them out."
    )
