"""Check on one batch that a detector's losses use ``target["weights"]``: `check_weighting`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, Any], Any]
TOLERANCE = 1e-4
"""Largest departure from a line, as a share of the loss. float32 sums leave 1e-6."""
OBJECTS = (
    *("bbox_regression", "bbox_ctrness", "loss_rpn_box_reg", "loss_box_reg", "loss_mask", "loss_keypoint"),
    *("loss_bbox", "loss_giou", "loss_dice", "loss_fgl"),
)
"""Losses of torchvision's detectors and of DETR's family that boxes alone have, by how their names begin."""


@dataclass(frozen=True)
class Term:
    """Hold one loss of a detector at four settings of the weights.

    Attributes:
        name: Its name in the detector's losses.
        stock: Its value for targets without weights.
        one: Its value with all weights 1.
        between: Its value with all weights ``weight``.
        zero: Its value with all weights 0: what is left is the loss of the background.
        fault: What is wrong with it; empty if nothing is.
    """

    name: str
    stock: float
    one: float
    between: float
    zero: float
    fault: str = ""


@dataclass(frozen=True)
class WeightingReport:
    """Hold the losses of a detector at several weights. ``print`` shows them as a table.

    Attributes:
        weight: The weight between 0 and 1.
        terms: A `Term` for each loss.
    """

    weight: float
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        """Write the table."""
        head = ("term", "stock", "at 1", f"at {self.weight:g}", "at 0", "")
        rows: list[tuple[str, ...]] = [head]
        for term in self.terms:
            numbers = [f"{value:.6g}" for value in (term.stock, term.one, term.between, term.zero)]
            rows.append((term.name, *numbers, term.fault or "ok"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for name, *numbers, fault in rows:
            cells = [name.ljust(widths[0]), *(x.rjust(w) for x, w in zip(numbers, widths[1:], strict=False)), fault]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def check_weighting(
    model: nn.Module,
    batch: Any,
    *,
    weight: float = 0.5,
    losses: Losses | None = None,
    unweighted: Collection[str] = (),
    objects: Collection[str] = OBJECTS,
) -> WeightingReport:
    """Check on one batch that each loss of a detector uses ``target["weights"]``.

    Runs the batch without weights and at weights 1, ``weight`` and 0, each time from the same state of torch's random
    numbers. With all weights 1, every loss and its gradient must equal the stock one bit for bit. A loss must change
    with the weights, and its gradient too. It must be affine in them. A loss that boxes alone have must be 0 at weights
    of 0. Parameters, buffers, gradients and random numbers are left as they were.

    Args:
        model: Detector, for which `weight_losses` was called or whose losses use weights in another way.
        batch: ``(images, targets)`` for ``model(images, targets)``, or a mapping with ``"labels"`` or ``"targets"`` for
            ``model(**batch)``. Targets are a list of mappings with ``boxes``. Their own weights do not matter.
        weight: Weight between 0 and 1.
        losses: Function of the model and a batch that returns the losses: a tensor or a mapping of tensors. ``None``
            calls the model and takes its ``loss_dict``, or the mapping that it returns.
        unweighted: Names of losses that use no weights on purpose. Losses without a gradient, such as counts, are never
            expected to.
        objects: Beginnings of the names of losses that boxes alone have, so that nothing of them is left at weights of
            0. What is left of any other loss is the background's, which the table shows.

    Returns:
        The losses at each setting.

    Raises:
        TypeError: If the batch, or what the model returns, has another form.
        ValueError: If there is no box in the batch, ``weight`` is not between 0 and 1, a name is none of the losses, or
            two runs of the same batch differ.
        RuntimeError: If a loss fails a check. The message names it and shows the table.

    Example:
        >>> from detmix import match_weights, weighted
        >>> def losses(model, batch):
        ...     images, targets = batch
        ...     rows = match_weights(targets[0], torch.tensor([0, -1]))  # the second row has no box
        ...     return {"box": weighted(model(images), rows[:, None]).square().sum()}
        >>> batch = torch.ones(2, 3), [{"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]])}]
        >>> print(check_weighting(nn.Linear(3, 1), batch, losses=losses).terms[0].fault or "ok")
        ok
    """
    if not 0 < weight < 1:
        raise ValueError(f"weight must lie between 0 and 1, but it is {weight}.")
    targets = _targets(batch)
    if not any(len(target["boxes"]) for target in targets):
        raise ValueError("batch must hold a box, but none of its targets has one.")
    run = losses or _call
    with _kept(model):
        stock, again = _run(model, run, _with(batch, None)), _run(model, run, _with(batch, None), gradients=False)
        for name, value in stock.values.items():
            if not _same(again.values[name], value):
                raise ValueError(
                    f"The loss {name} must be the same when a batch is run twice, but it is {float(value):.9g} and "
                    f"{float(again.values[name]):.9g}: seed what it draws, other than by torch, in losses."
                )
        if unknown := sorted(set(unweighted) - stock.values.keys()):
            raise ValueError(f"unweighted must name losses of {sorted(stock.values)}, but it holds {unknown[0]!r}.")
        one, zero = (_run(model, run, _with(batch, value)) for value in (1.0, 0.0))
        between = _run(model, run, _with(batch, weight), gradients=False)
    terms = []
    for name in stock.values:
        runs = stock, one, between, zero
        if missing := [r for r in runs if name not in r.values]:
            raise ValueError(f"The loss {name} must be there at all weights, but {len(missing)} of 4 runs lack it.")
        fault = "" if name in unweighted else _fault(name, runs, weight, name.startswith(tuple(objects)))
        at = [float(r.values[name]) for r in runs]
        terms.append(Term(name, at[0], at[1], at[2], at[3], fault))
    report = WeightingReport(weight, tuple(terms))
    if faults := [f"{term.name} {term.fault}" for term in terms if term.fault]:
        raise RuntimeError(f"{type(model).__name__} does not use target['weights']: {'; '.join(faults)}.\n{report}")
    return report


@dataclass(frozen=True)
class _Run:
    values: dict[str, Tensor]
    gradients: Mapping[str, Sequence[Tensor | None]]


def _run(model: nn.Module, losses: Losses, batch: Any, gradients: bool = True) -> _Run:
    with torch.random.fork_rng([i for i in {p.device.index for p in model.parameters() if p.is_cuda} if i is not None]):
        torch.manual_seed(0)
        found = _named(losses(model, batch))
    parameters = [p for p in model.parameters() if p.requires_grad]
    computed = {
        name: torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for name, value in found.items()
        if gradients and value.requires_grad and parameters
    }
    return _Run({name: value.detach() for name, value in found.items()}, computed)


def _fault(name: str, runs: Sequence[_Run], weight: float, of_objects: bool) -> str:
    stock, one, between, zero = (r.values[name] for r in runs)
    if not _same(stock, one):
        return f"is {float(one):.9g} at weights of 1, where the stock loss is {float(stock):.9g}"
    if name not in runs[0].gradients:  # a loss without a gradient trains nothing
        return ""
    if _same(one, zero):
        return "ignores weights" if float(one) else ""
    if not all(map(_same, runs[0].gradients[name], runs[1].gradients[name])):
        return "has another gradient at weights of 1 than the stock loss"
    if all(map(_same, runs[1].gradients[name], runs[3].gradients[name])):
        return "ignores weights in its gradient"
    line = zero.double() + weight * (one.double() - zero.double())
    if abs(float(between.double() - line)) > TOLERANCE * max(abs(float(one)), abs(float(zero))):
        return f"is {float(between):.6g} at weights of {weight:g}, where a line from 0 to 1 is at {float(line):.6g}"
    if of_objects and abs(float(zero)) > TOLERANCE * abs(float(one)):
        return f"is {float(zero):.6g} at weights of 0, where nothing must be left of it"
    return ""


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _named(output: Any) -> dict[str, Tensor]:
    """Name the losses that a detector returns."""
    found = getattr(output, "loss_dict", None)
    if found is None:
        found = output
    if isinstance(found, tuple) and found and isinstance(found[0], Tensor | Mapping):
        found = found[0]
    if isinstance(found, Tensor):
        found = {"loss": found}
    if not isinstance(found, Mapping) or not found:
        raise TypeError(
            f"losses must be a tensor or a mapping of tensors, but the model returned {type(output).__name__}."
        )
    named = {}
    for name, value in found.items():
        value = torch.as_tensor(value)
        if value.numel() == 1:
            named[str(name)] = value.reshape(())
        elif value.ndim == 1:
            named |= {f"{name}[{i}]": part for i, part in enumerate(value)}
        else:
            raise TypeError(f"The loss {name} must be a number, but it is a tensor of shape {tuple(value.shape)}.")
    return named


def _targets(batch: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        targets = batch.get("labels", batch.get("targets"))
    else:
        targets = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(targets, Sequence) or not all(isinstance(t, Mapping) and "boxes" in t for t in targets):
        raise TypeError(
            "batch must be (images, targets) or a mapping with labels or targets: a list of mappings with boxes. It "
            f"is a {type(batch).__name__} without them."
        )
    return targets


def _with(batch: Any, weight: float | None) -> Any:
    """Give all boxes one weight, or none."""
    changed = [{key: value for key, value in target.items() if key != "weights"} for target in _targets(batch)]
    if weight is not None:
        for target in changed:
            target["weights"] = torch.full((len(target["boxes"]),), weight, device=target["boxes"].device)
    if not isinstance(batch, Mapping):
        return (batch[0], changed, *batch[2:])
    return {**batch, "labels" if "labels" in batch else "targets": changed}


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Run in training mode, and give modes and buffers back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    if not model.training:
        model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
