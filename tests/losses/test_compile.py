"""Weighted detectors in torch.compile."""

import copy

import pytest
import torch

from detmix.losses import weight_losses
from tests.losses.tiny import EVERY, WEIGHTS, assert_same_bits, gradients, losses_of, tiny, weighted_copy

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in ("ssdlite", "fasterrcnn")]


@pytest.fixture
def compiled():
    """A compile function, and the operations of the graphs it made."""
    operations = []

    def backend(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph  # runs the very same kernels

    torch.compiler.reset()
    yield lambda module: torch.compile(module, backend=backend), operations
    torch.compiler.reset()


def assert_same_training(model, original):
    """Assert that losses and gradients of a model that is compiled, or holds what is, have the original's bits."""
    expected, losses = losses_of(original, WEIGHTS), losses_of(model, WEIGHTS)
    assert_same_bits(losses, expected)
    grads = {name.replace("_orig_mod.", ""): grad for name, grad in gradients(model, losses).items()}
    assert_same_bits(grads, gradients(original, expected))


@pytest.mark.parametrize("name", EVERY)
def test_a_compiled_backbone_keeps_every_bit_of_weighted_losses(compiled, name):
    model, (compile_, operations) = tiny(name), compiled
    original = weighted_copy(model)
    owner = model.model.model if hasattr(model, "model") else model
    owner.backbone = compile_(owner.backbone)
    assert_same_training(weight_losses(model), original)
    assert any("conv2d" in operation for operation in operations)


# torch's own: dynamo looks for a .grad of what enters a graph, and torchvision's nms names its size as torch once did.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["ssdlite", "fasterrcnn", *SLOW])
def test_a_compiled_model_keeps_every_bit_of_weighted_losses_and_computes_them_outside_of_graphs(compiled, name):
    original = weighted_copy(tiny(name))
    model, (compile_, operations) = copy.deepcopy(original), compiled
    assert_same_training(compile_(model), original)
    assert any("conv2d" in operation for operation in operations)
    assert not [o for o in operations if "cross_entropy" in o or "l1_loss" in o or "nll_loss" in o]
