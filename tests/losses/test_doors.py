"""Calls that go past ``__torch_function__``: each counts the weights right, or raises and says what to do."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss

from detmix.losses import RULES, WeightedTensor, elementwise, weighted
from detmix.losses.doors import holds_weights
from tests.losses.test_weighted_tensor import rand

W = torch.tensor([[0.25], [0.5], [2.0]])
TARGETS = (rand(3, 4, seed=1) > 0.5).float()

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def focal(x: Tensor, y: Tensor) -> Tensor:
    p = x.sigmoid()
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return (loss * (1 - (p * y + (1 - p) * (1 - y))) ** 2).sum()


def rows(loss, x=None):
    """The sum of the losses of single rows, each times its weight."""
    x = rand(3, 4) if x is None else x
    return sum(w * loss(x[i : i + 1], TARGETS[i : i + 1]) for i, w in enumerate(W.flatten()))


class Squares(torch.autograd.Function):
    """A sum, whose backward needs nothing but what forward saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**2).sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class ScaledSquares(torch.autograd.Function):
    """Entry by entry, with a gradient for the scale that sums over rows."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return scale * x**2

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return 2 * grad * scale * x, (grad * x**2).sum()


class Loss(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return focal(x, y)


SCRIPTED = {
    "scripted": lambda: torch.jit.script(focal),
    "traced": lambda: torch.jit.trace(focal, (rand(3, 4), TARGETS)),
}


@pytest.mark.parametrize("kind", SCRIPTED)
def test_a_scripted_function_runs_as_its_python(kind):
    function = SCRIPTED[kind]()
    x = rand(3, 4).requires_grad_()
    loss = function(weighted(x, W), TARGETS)
    torch.testing.assert_close(loss, rows(focal))
    (gradient,) = torch.autograd.grad(loss, x)
    y = rand(3, 4).requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(rows(focal, y), y)[0])
    torch.testing.assert_close(function(rand(3, 4), TARGETS), focal(rand(3, 4), TARGETS))


def test_a_scripted_function_takes_keywords_and_defaults():
    scripted = torch.jit.script(sigmoid_focal_loss)
    stock = sigmoid_focal_loss(rand(3, 4), TARGETS)
    torch.testing.assert_close(scripted(weighted(rand(3, 4), W), targets=TARGETS, reduction="sum"), (W * stock).sum())
    torch.testing.assert_close(scripted(weighted(rand(3, 4), W), TARGETS, 0.25, 2.0, "mean"), (W * stock).mean())
    labels = torch.tensor([0, 3, 1])
    entropy = torch.jit.script(weighted_labels)
    losses = F.cross_entropy(rand(3, 4), labels, reduction="none")
    torch.testing.assert_close(entropy(rand(3, 4), weighted(labels, W[:, 0])), (W[:, 0] * losses).sum())


def weighted_labels(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction="sum")


def scripted_losses(folder):
    """TorchScript that knows no Python it was made from."""
    torch.jit.script(focal).save(str(folder / "function.pt"))
    inputs = rand(3, 4), TARGETS
    return {
        "a file": torch.jit.load(folder / "function.pt"),
        "a module": torch.jit.script(Loss()),
        "a frozen module": torch.jit.freeze(torch.jit.script(Loss().eval())),
        "a traced module": torch.jit.trace(Loss(), inputs),
        "a method": torch.jit.script(Loss()).forward,
    }


@pytest.mark.parametrize("kind", ["a file", "a module", "a frozen module", "a traced module", "a method"])
def test_torchscript_without_its_python_is_refused_by_name(kind, tmp_path):
    function = scripted_losses(tmp_path)[kind]
    with pytest.raises(NotImplementedError, match=r"__torch__\.\S+ is TorchScript and would lose the loss weights"):
        function(weighted(rand(3, 4), W), TARGETS)
    torch.testing.assert_close(function(rand(3, 4), TARGETS), focal(rand(3, 4), TARGETS))


def test_a_checkpoint_counts_weights_in_its_gradient_or_says_how_to():
    x = rand(3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"use_reentrant=True would lose .* Say use_reentrant=False"):
        checkpoint(focal, weighted(x, W), TARGETS, use_reentrant=True)
    checkpoint(focal, weighted(x, W), TARGETS, use_reentrant=False).backward()
    y = rand(3, 4).requires_grad_()
    torch.testing.assert_close(x.grad, torch.autograd.grad(rows(focal, y), y)[0])
    assert checkpoint(focal, rand(3, 4).requires_grad_(), TARGETS, use_reentrant=True).requires_grad


@pytest.mark.parametrize("call", [lambda x: Squares.apply(x), lambda x: ScaledSquares.apply(x, torch.tensor(3.0))])
def test_an_autograd_function_without_a_rule_is_refused_by_name(call):
    with pytest.raises(NotImplementedError, match=r"Squares, called on a tensor of shape \(3, 4\) with weights"):
        call(weighted(rand(3, 4), W))
    assert type(call(rand(3, 4))) is Tensor


def test_an_autograd_function_with_a_rule_sees_plain_tensors(monkeypatch):
    monkeypatch.setitem(RULES, ScaledSquares, elementwise)
    x, scale = rand(3, 4).requires_grad_(), torch.tensor(3.0, requires_grad=True)
    losses = ScaledSquares.apply(weighted(x, W), scale)
    assert type(losses) is WeightedTensor
    losses.sum().backward()
    torch.testing.assert_close(x.grad, 6 * W * x)
    torch.testing.assert_close(scale.grad, (W * x**2).sum())  # not with squared weights


TRANSFORMS = {
    "grad": lambda x: torch.func.grad(lambda x: focal(x, TARGETS))(x),
    "grad_and_value": lambda x: torch.func.grad_and_value(lambda x: focal(x, TARGETS))(x),
    "vjp": lambda x: torch.func.vjp(lambda x: focal(x, TARGETS), x),
    "jvp": lambda x: torch.func.jvp(lambda x: focal(x, TARGETS), (x,), (rand(3, 4),)),
    "jacrev": lambda x: torch.func.jacrev(lambda x: focal(x, TARGETS))(x),
    "jacfwd": lambda x: torch.func.jacfwd(lambda x: focal(x, TARGETS))(x),
    "hessian": lambda x: torch.func.hessian(lambda x: focal(x, TARGETS))(x),
    "functionalize": lambda x: torch.func.functionalize(lambda x: focal(x, TARGETS))(x),
    "vmap": lambda x: torch.func.vmap(lambda x: (x**2).sum())(x),
    "vmap of a dict": lambda x: torch.func.vmap(lambda x: (x["x"] ** 2).sum())({"x": x}),
    "chunked vmap": lambda x: torch.func.vmap(lambda x: (x**2).sum(), chunk_size=2)(x),
    "jacobian": lambda x: torch.autograd.functional.jacobian(lambda x: focal(x, TARGETS), x),
    "functional vjp": lambda x: torch.autograd.functional.vjp(lambda x: focal(x, TARGETS), x),
    "functional hvp": lambda x: torch.autograd.functional.hvp(lambda x: focal(x, TARGETS), x, rand(3, 4)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_a_weighted_tensor_is_refused(name):
    with pytest.raises(NotImplementedError, match="loss weights"):
        TRANSFORMS[name](weighted(rand(3, 4), W))
    if name != "jvp":
        TRANSFORMS[name](rand(3, 4))


def test_a_transform_of_a_function_that_weights_inside_counts_weights():
    gradient = torch.func.grad(lambda x: focal(weighted(x, W), TARGETS))(rand(3, 4))
    y = rand(3, 4).requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(rows(focal, y), y)[0])


def squares(x):
    return (weighted(x, W) ** 2).sum(1)


BACKWARDS = {
    "backward": lambda x: torch.autograd.backward(squares(x)[2]),
    "backward of a list": lambda x: torch.autograd.backward([squares(x)[2]]),
    "backward of rows": lambda x: torch.autograd.backward(squares(x), torch.ones(3)),
    "backward of rows and a loss": lambda x: torch.autograd.backward([x.sum(), squares(x)[2]]),
    "backward with inputs": lambda x: torch.autograd.backward(squares(x)[2], inputs=[x]),
    "method": lambda x: squares(x)[2].backward(),
    "grad": lambda x: torch.autograd.grad(squares(x)[2], x),
    "grad of rows": lambda x: torch.autograd.grad(squares(x), x, torch.ones(3)),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_gradient_before_the_sum_over_rows_is_refused(name):
    x = rand(3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="loss weights"):
        BACKWARDS[name](x)
    assert x.grad is None
    torch.autograd.backward(squares(x).sum())
    torch.testing.assert_close(x.grad, 2 * W * x)


def test_a_compiled_loss_runs_outside_of_the_graph():
    compiled = torch.compile(focal, backend="eager")
    torch.testing.assert_close(compiled(weighted(rand(3, 4), W), TARGETS), rows(focal))
    torch.testing.assert_close(compiled(rand(3, 4), TARGETS), focal(rand(3, 4), TARGETS))
    labels = torch.tensor([0, 3, 1])
    entropy = torch.compile(weighted_labels, backend="eager")
    expected = weighted_labels(rand(3, 4), weighted(labels, W[:, 0]))
    torch.testing.assert_close(entropy(rand(3, 4), weighted(labels, W[:, 0])), expected)
    torch._dynamo.reset()
    whole = torch.compile(focal, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="WeightedTensor"):
        whole(weighted(rand(3, 4), W), TARGETS)
    torch._dynamo.reset()


def test_functions_and_scripts_still_compile_into_one_graph():
    scripted = torch.jit.script(focal)
    both = torch.compile(lambda x: Squares.apply(x) + scripted(x, TARGETS), backend="eager", fullgraph=True)
    x = rand(3, 4).requires_grad_()
    torch.testing.assert_close(both(x), (x**2).sum() + focal(x, TARGETS))
    torch._dynamo.reset()


def test_other_threads_are_watched_too():
    found = []

    def work():
        try:
            Squares.apply(weighted(rand(3, 4), W))
        except NotImplementedError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found


def test_weights_are_found_in_nested_arguments():
    x = weighted(rand(3, 4), W)
    assert all(holds_weights([value]) for value in (x, [x], ({"a": [0, x]},), {"b": (x,)}))
    assert not holds_weights([rand(3, 4), [1, "x"], {"a": None}])
