"""Weighted detectors in DistributedDataParallel and FSDP."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from tests.losses.tiny import EVERY, batch, gradients, losses_on, split, tiny, weighted_copy

COUNTS = (3, 2)
HALVES = (torch.tensor([0.3, 0.0, 1.7, 0.9, 0.4]), torch.tensor([1.0, 0.2, 0.6, 0.5, 1.3]))


def deterministic(name):
    """A weighted detector that draws nothing: a draw for half of a batch is not half of the draw for the whole."""
    model = weighted_copy(tiny(name))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
        if hasattr(module, "fg_bg_sampler"):
            module.fg_bg_sampler.batch_size_per_image = 10_000  # takes all rows
    if name == "rtdetr":
        model.model.config.label_noise_ratio = model.model.config.box_noise_scale = 0.0
    return model


def train(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for name in EVERY:
        # The halves differ in their weights alone: most losses are divided by counts of rows of the batch, which the
        # processes do not add up, and are the joined batch's where each half has half of its rows.
        half = batch(split(HALVES[rank], COUNTS), COUNTS)
        parallel = DistributedDataParallel(deterministic(name))
        losses = losses_on(parallel, *half)
        results["ddp", name] = losses, gradients(parallel.module, losses)
        sharded = fully_shard(deterministic(name), mesh=mesh)
        losses = losses_on(sharded, *half)
        shards = gradients(sharded, losses)
        whole = {k: shard if shard is None else shard.full_tensor() for k, shard in shards.items()}
        results["fsdp", name] = losses, whole
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.detach, results), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", EVERY)
def test_two_processes_agree_with_one_on_the_joined_batch(ranks, name, wrapper):
    (first, grads), (second, others) = (results[wrapper, name] for results in ranks)
    model = deterministic(name)
    images, targets = batch(None, COUNTS)
    plain = losses_on(model, images, targets)
    weighted = [target for half in HALVES for target in batch(split(half, COUNTS), COUNTS)[1]]
    joined = losses_on(model, images * 2, weighted)
    for term, loss in joined.items():
        assert_close((first[term] + second[term]) / 2, loss)
        assert "cardinality" in term or not torch.isclose(loss, plain[term]), term
    expected, unweighted = gradients(model, joined), gradients(model, plain)
    for parameter, grad in expected.items():
        assert_close(grads[parameter], grad, msg=lambda text, name=parameter: f"{name}: {text}")
        assert_close(others[parameter], grads[parameter], rtol=0, atol=0)
    changed = [grad is not None and not torch.allclose(grad, unweighted[k], rtol=0.01) for k, grad in expected.items()]
    assert sum(changed) > len(changed) / 2
