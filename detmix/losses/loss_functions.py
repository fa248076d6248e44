"""Make the detectors of ``transformers`` heed ``label["weights"]``.

They build their criterion anew at each step, inside of a function that the model holds as ``loss_function``. The same
code is run here with the names of its criteria bound to weighted subclasses of them; nothing is copied or patched.
"""

from types import FunctionType
from typing import Any

from torch import nn

from detmix.losses.criteria import WeightedCriterion


class WeightedLossFunction:
    """A model's loss function, with its criterion weighted.

    Args:
        function: A function of the module level that names a criterion with DETR's ``get_loss``.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, its losses weighted."""
        names = self.function.__globals__ | weighted_criteria(self.function)
        rebound = FunctionType(self.function.__code__, names, argdefs=self.function.__defaults__)
        rebound.__kwdefaults__ = self.function.__kwdefaults__
        return rebound(*args, **kwargs)


def weighted_criteria(function: Any) -> dict[str, type]:
    """Weighted subclasses of the criteria that a function names, by name; empty if it is no function or names none."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return {}
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {
        name: type(f"Weighted{name}", (WeightedCriterion, criterion), {})
        for name, criterion in named.items()
        if isinstance(criterion, type) and issubclass(criterion, nn.Module) and hasattr(criterion, "get_loss")
    }


def is_transformers_detector(module: nn.Module) -> bool:
    """Whether a module is a model of ``transformers`` whose loss has a criterion; that package is not imported."""
    own = any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__)
    if not own or getattr(module, "loss_type", None) is None:
        return False
    function: Any = module.loss_function
    return isinstance(function, WeightedLossFunction) or bool(weighted_criteria(function))
