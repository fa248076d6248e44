"""Memory of the caller's that blends are written into, and layouts that they keep."""

import pytest
import torch
from torchvision import tv_tensors

from detmix.mixing.blend import blend_images
from tests.mixing.samples import blend_batch, blend_each, random_image


@pytest.mark.parametrize("second_size", [(6, 8), (9, 4)])
def test_channels_last_stays_so(second_size):
    first = torch.rand(6, 8, 3).permute(2, 0, 1)
    out = blend_images(first, torch.rand(3, *second_size), 0.5)
    assert out.stride(0) == 1
    batch = torch.rand(4, 3, 6, 8).to(memory_format=torch.channels_last)
    assert blend_batch(batch, [1, 2, 3, 0], [0.5] * 4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [8, 80])  # blended at once, and one by one
@pytest.mark.parametrize("pool", [None, "pool"])
def test_a_batch_is_blended_into_memory_of_the_callers(dtype, size, pool):
    images = tv_tensors.Image(random_image((3, 3, size, size), dtype))
    pool = random_image((2, 3, size, size), dtype, 1) if pool else None
    wanted = blend_batch(images, [1, -1, 0], [0.25, 1.0, 0.7], pool=pool)
    kept, out = images.clone(), torch.empty_like(images)
    memory = out.data_ptr()
    assert blend_batch(images, [1, -1, 0], [0.25, 1.0, 0.7], pool=pool, out=out) is out
    assert out.data_ptr() == memory
    assert torch.equal(out, wanted)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_nothing_is_allocated_where_there_is_an_out(dtype):
    images = random_image((4, 3, 80, 80), dtype).requires_grad_(dtype.is_floating_point)
    out = torch.empty_like(images, requires_grad=False)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        blend_batch(images, [1, 2, 3, 0], [0.3] * 4, out=out)
        blend_images(images[0], images[1], 0.3, out=out[0])
    assert max(event.cpu_memory_usage for event in profile.events()) < 100  # the level


def test_images_are_blended_into_memory_of_the_callers():
    memory = torch.zeros(2, 3, 6, 7, dtype=torch.uint8)
    first, second = random_image((3, 5, 7), torch.uint8), random_image((3, 6, 4), torch.uint8, 1)
    out = memory[1]
    assert blend_images(first, second, 0.3, fill=9, out=out) is out
    assert torch.equal(memory[1], blend_images(first, second, 0.3, fill=9))
    assert not memory[0].any()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(3, 4, 5), r"out must have the blend's shape, \(3, 4, 4\), but has \(3, 4, 5\)"),
        (torch.zeros(3, 4, 4).double(), "out must have the blend's dtype, torch.float32, but has torch.float64"),
        (torch.zeros(3, 4, 4, device="meta"), "out must have the blend's device, cpu, but has meta"),
    ],
)
def test_an_out_that_does_not_fit_is_named(out, message):
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        blend_images(*images, 0.5, out=out)
    with pytest.raises(ValueError, match=message.replace(r"(3,", r"(2, 3,")):
        blend_batch(images, [1, 0], [0.5, 0.5], out=out.expand(2, *out.shape))


def test_an_out_within_the_memory_of_the_images_is_named():
    memory = torch.rand(5, 3, 4, 4)
    kept = memory.clone()
    for arguments in (
        {"images": memory[:2], "out": memory[1:3]},
        {"images": memory[:2], "out": memory[:2]},
        {"images": memory[:2], "out": memory[2:4], "pool": memory[3:5]},
        {"images": memory[:2], "out": memory[2:4], "pool": [memory[4], memory[3]]},
    ):
        with pytest.raises(ValueError, match="out must not share memory with what is blended; inplace=True writes"):
            blend_batch(partners=[1, 0], lams=[0.5, 0.5], **arguments)
    with pytest.raises(ValueError, match="out must not share memory"):
        blend_batch(memory.view(-1)[:3], [1, 0, 2], [0.5] * 3, out=memory.view(-1)[2:5])
    with pytest.raises(ValueError, match="out must not share memory"):
        blend_images(memory[0], memory[1], 0.5, out=memory[1])
    with pytest.raises(ValueError, match="out must not share memory"):
        blend_each(memory[1:4], [memory[4]] * 3, [0.5] * 3, outs=memory[:3])  # each apart from its own images
    assert torch.equal(memory, kept)
    blend_batch(memory[:2], [1, 0], [0.5, 0.5], out=memory[2:4])  # beside them is apart from them
    assert torch.equal(memory[[0, 1, 4]], kept[[0, 1, 4]])


@pytest.mark.parametrize("as_list", [False, True])
def test_in_place_a_pool_of_the_batch_itself_is_read_before_it_is_written(as_list):
    images = torch.rand(3, 3, 4, 4)
    wanted = blend_batch(images, [1, 2, 0], [0.25, 0.5, 0.75])
    out = blend_batch(images, [1, 2, 0], [0.25, 0.5, 0.75], pool=list(images) if as_list else images, inplace=True)
    assert out is images
    assert torch.equal(out, wanted)
