"""Small samples that every test can build."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._pytree import tree_flatten
from torchvision import tv_tensors

from detmix.datasets.shapes import draw_shapes

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, with what they start, take a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# The same examples at every run, however busy the machine is.
settings.register_profile("detmix", derandomize=True, deadline=None, database=None)
settings.load_profile("detmix")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """On a CUDA device, make everything that waits for it an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def make_sample(
    num_boxes: int = 2, size: tuple[int, int] = (12, 16), seed: int = 0
) -> tuple[torch.Tensor, dict[str, Any]]:
    """One (image, target) pair with every key torchvision's detectors know: image uint8 (3, H, W)."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size
    corner = torch.rand(num_boxes, 2, generator=rng) * torch.tensor([width / 2, height / 2])
    side = (1 + torch.rand(num_boxes, 2, generator=rng)) * torch.tensor([width / 4, height / 4])
    points = corner[:, None] + side[:, None] * torch.rand(num_boxes, 3, 2, generator=rng)
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.cat([corner, corner + side], 1), format="XYXY", canvas_size=size),
        "labels": torch.randint(1, 4, (num_boxes,), generator=rng),
        "masks": tv_tensors.Mask(torch.randint(0, 2, (num_boxes, height, width), generator=rng, dtype=torch.uint8)),
        "keypoints": torch.cat([points, torch.ones(num_boxes, 3, 1)], 2),
        "area": side.prod(1),
        "iscrowd": torch.zeros(num_boxes, dtype=torch.int64),
        "image_id": seed,
    }
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8))
    return image, target


@pytest.fixture
def sample() -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    """The function ``sample(num_boxes, size, seed)``."""
    return make_sample


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with 8 drawn training images and 6 for validation, the last with a crowd."""
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=8, num_val=6)


def draw_truncated(tmp_path, *names, num_train=8, num_val=6):
    """A drawn set of its own for a test, some of whose images are cut short after a sound header."""
    root = draw_shapes(tmp_path / "shapes", num_train=num_train, num_val=num_val)
    for name in names:
        path = root / "images" / f"{name}.png"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that two nested structures hold equal tensors, of one type and dtype, and equal values."""
    leaves, spec = tree_flatten(actual)
    expected_leaves, expected_spec = tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(leaves, expected_leaves, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b
