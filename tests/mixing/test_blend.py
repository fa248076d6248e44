import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from detmix.mixing import blend_cpu as kernels
from detmix.mixing.blend import blend_images
from tests.conftest import DEVICES, without_waiting
from tests.mixing.samples import LAMS, blend_batch, blend_each, random_image

SIZES = [((5, 7), (5, 7)), ((5, 7), (6, 4)), ((3, 8), (6, 9)), ((4, 4), (1, 1)), ((2, 3), (4, 3))]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def exact_blend(first, second, lam, fill):
    """The real-valued blend, pixel by pixel, in rational numbers."""
    channels, height, width = first.shape[0], *(max(first.shape[i], second.shape[i]) for i in (1, 2))
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                value = Fraction(0)
                for image, share in ((first, Fraction(lam)), (second, 1 - Fraction(lam))):
                    inside = y < image.shape[1] and x < image.shape[2]
                    value += share * Fraction(image[c, y, x].item() if inside else fill[c])
                out[c, y, x] = float(value)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("fill", [0, 114, (10, 0, 255)])
def test_uint8_blend_is_the_exact_one_to_half_a_level(sizes, lam, fill, device):
    first, second = (random_image((3, *size), torch.uint8, i) for i, size in enumerate(sizes))
    moved = first.to(device), second.to(device)
    with without_waiting(device):
        out = blend_images(*moved, lam, fill=fill)
    exact = exact_blend(first, second, lam, [fill] * 3 if isinstance(fill, int) else fill)
    assert out.dtype == torch.uint8
    assert (out.cpu() - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_blend_is_the_exact_one_to_its_rounding(sizes, dtype, device):
    first, second = (random_image((3, *size), dtype, i) for i, size in enumerate(sizes))
    fill = (0.5, -1.0, 0.0)
    moved = first.to(device), second.to(device)
    with without_waiting(device):
        out = blend_images(*moved, 0.3, fill=fill)
    assert out.dtype == dtype
    # One rounding of the result for half precision; else three, of values no larger than twice the inputs.
    eps, largest = torch.finfo(dtype).eps, max(first.abs().max(), second.abs().max(), 1.0)
    roundings = 1 if dtype.itemsize == 2 else 3
    error = (out.cpu().double() - exact_blend(first, second, 0.3, fill)).abs().max()
    assert error <= roundings * eps * float(largest) / 2 + (0 if dtype == torch.float64 else 2e-7 * float(largest))


@pytest.mark.parametrize(
    ("dtype", "top"), [(torch.int16, 2**15 - 1), (torch.int32, 2**31 - 1), (torch.uint16, 2**16 - 1)]
)
def test_wider_integers_keep_every_level(dtype, top):
    first, second = (torch.tensor([[[value]]]).to(dtype) for value in (top, top - 2))
    assert blend_images(first, second, 0.5).item() == top - 1
    assert blend_images(first, second, 1.0).item() == top


def test_rounding_has_no_bias():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256)
    for lam in torch.rand(20).tolist():
        exact = lam * levels.double() + (1 - lam) * levels.mT.double()
        assert (blend_images(levels, levels.mT, lam) - exact).mean().abs() < 0.01


def test_an_image_blended_with_itself_is_itself():
    image = random_image((3, 9, 9), torch.uint8)
    assert torch.equal(blend_images(image, image, 0.37), image)


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_lam_of_one_is_first_and_of_zero_is_second(dtype):
    first, second = random_image((3, 4, 6), dtype), random_image((3, 5, 5), dtype, 1)
    for lam, image in ((1.0, first), (0.0, second)):
        blend = blend_images(first, second, lam, fill=7)
        expected = torch.full((3, 5, 6), 7, dtype=dtype)
        expected[:, : image.shape[1], : image.shape[2]] = image
        assert torch.equal(blend, expected)


@given(lam=LAMS, sizes=st.sampled_from(SIZES), dtype=st.sampled_from([torch.uint8, *FLOATS]), fill=st.integers(0, 3))
def test_swapping_the_images_and_the_shares_changes_nothing(lam, sizes, dtype, fill):
    first, second = (random_image((3, *size), dtype, i) for i, size in enumerate(sizes))
    assert torch.equal(blend_images(first, second, lam, fill=fill), blend_images(second, first, 1 - lam, fill=fill))


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_even_in_the_middle_nothing_depends_on_which_comes_first(dtype):
    first, second = (random_image((3, 80, 80), dtype, seed) for seed in (0, 1))
    assert torch.equal(blend_images(first, second, 0.5), blend_images(second, first, 0.5))
    pair = torch.stack([first, second])
    for images in (pair, pair[..., :8]):  # one by one, and at once
        middle = blend_batch(images, [1, 0], [0.5, 0.5])
        assert torch.equal(middle[0], middle[1])


def test_the_middle_of_large_half_precision_levels_does_not_overflow():
    first, second = (torch.full((1, 2, 2), level, dtype=torch.float16) for level in (40000.0, 50048.0))
    assert blend_images(first, second, 0.5).unique().tolist() == [45024.0]


def test_blend_keeps_the_type_of_first_and_carries_gradients():
    first, second = tv_tensors.Image(torch.rand(3, 4, 4)), torch.rand(3, 4, 4, requires_grad=True)
    out = blend_images(first, second, 0.25)
    assert isinstance(out, tv_tensors.Image)
    blend_images(first.as_subclass(torch.Tensor), second, 0.25).sum().backward()
    assert torch.equal(second.grad, torch.full((3, 4, 4), 0.75))


@pytest.mark.parametrize(
    ("first", "second", "lam", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), 0.5, "agree in channels, but first has 3 and second has 1"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), 0.5, "agree in dtype, .*float32 .*uint8"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta"), 0.5, "agree in device, .*cpu .*meta"),
        (torch.zeros(3, 4, 4), torch.zeros(4, 4), 0.5, r"second must be an image of shape \(C, H, W\).*\(4, 4\)"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), 1.5, r"lie in \[0, 1\], but it is 1.5"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), float("nan"), "but it is nan"),
    ],
)
def test_images_that_do_not_go_together_are_named(first, second, lam, message):
    with pytest.raises(ValueError, match=message):
        blend_images(first, second, lam)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_what_has_no_levels_is_named(dtype):
    images = torch.ones(2, 3, 4, 4, dtype=dtype)
    for blend in (lambda: blend_images(*images, 0.5), lambda: blend_batch(images, [1, 0], [0.5, 0.5])):
        with pytest.raises(ValueError, match=f"images must be integer or floating point .* but are {dtype}"):
            blend()


@pytest.mark.parametrize(
    ("fill", "dtype", "message"),
    [
        ((0, 0), torch.float32, r"fill must be one number or one for each of 3 channels, but it is \(0, 0\)"),
        (0.45, torch.uint8, "whole number from 0 to 255 for images of torch.uint8, but it is 0.45"),
        ((0, 256, 0), torch.uint8, r"0 to 255 .* it is \(0, 256, 0\)"),
        (float("nan"), torch.uint8, "it is nan"),
    ],
)
def test_a_fill_that_does_not_fit_is_named(fill, dtype, message):
    with pytest.raises(ValueError, match=message):
        blend_images(torch.zeros(3, 2, 2, dtype=dtype), torch.zeros(3, 2, 2, dtype=dtype), 0.5, fill=fill)


@st.composite
def plans(draw):
    size = draw(st.integers(0, 6))
    partners = [draw(st.integers(-1, size - 1)) for _ in range(size)]
    return partners, [draw(LAMS) for _ in range(size)]


@pytest.mark.parametrize("device", DEVICES)
@given(plan=plans(), dtype=st.sampled_from([torch.uint8, *FLOATS]), inplace=st.booleans(), last=st.booleans())
def test_a_batch_is_blended_entry_by_entry_in_place_or_not(device, plan, dtype, inplace, last):
    partners, lams = plan
    images = random_image((len(partners), 3, 2, 5), dtype).to(device)
    images = images.to(memory_format=torch.channels_last) if last else images
    expected = [
        blend_images(image, images[j], lam) if j >= 0 else image.clone()
        for image, j, lam in zip(images, partners, lams, strict=True)
    ]
    kept = images.clone()
    with without_waiting(device):
        out = blend_batch(images, partners, lams, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (out is images) == inplace
    assert out.stride() == kept.stride()
    if not inplace:
        assert torch.equal(images, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_in_place_copies_one_entry_of_each_circle(dtype, monkeypatch):
    copies = []
    for owner, name in ((torch.Tensor, "clone"), (np, "copy")):
        copy = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, copy=copy: copies.append(math.prod(self.shape)) or copy(self))
    batch = random_image((6, 3, 2, 2), dtype)
    blend_batch(batch, [1, 2, 0, 4, 5, 0], [0.5] * 6, inplace=True)  # a circle of three, and a chain that ends in it
    assert copies == [12]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "strided"])
def test_in_place_batches_of_several_blocks_are_those_blended_elsewhere(layout, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 4 * 50)
    images = random_image((4, 3, 80, 80), torch.float32)
    images = images.mT if layout == "strided" else images.contiguous(memory_format=layout)
    wanted = blend_batch(images, [1, 3, 0, 0], [0.25, 0.5, 0.75, 0.125])
    assert torch.equal(blend_batch(images, [1, 3, 0, 0], [0.25, 0.5, 0.75, 0.125], inplace=True), wanted)


def test_entries_of_any_modality_blend():
    rows = torch.rand(4, 7)
    out = blend_batch(rows, [3, 2, 1, 0], [0.25] * 4)
    torch.testing.assert_close(out, 0.25 * rows + 0.75 * rows.flip(0))
    assert blend_batch(torch.rand(2, 1, 5, 4, 3), [1, 0], [0.5, 0.5]).shape == (2, 1, 5, 4, 3)
    assert isinstance(blend_batch(tv_tensors.Image(torch.rand(2, 3, 4, 4)), [1, 0], [0.5, 0.5]), tv_tensors.Image)


def test_images_beyond_the_size_that_is_blended_at_once_are_blended_alike():
    for size in (2, 80):  # 3 x 80 x 80 entries are more than 2**14
        images = random_image((4, 3, size, size), torch.float32)
        out = blend_batch(images, [2, -1, 3, 1], [0.25, 1.0, 0.7, 0.5])
        assert torch.equal(out[0], blend_images(images[0], images[2], 0.25))
        assert torch.equal(out[1], images[1])
        assert torch.equal(out[2], blend_images(images[2], images[3], 0.7))


@pytest.mark.parametrize("as_list", [True, False])
def test_smaller_images_of_a_pool_lie_at_the_top_left(as_list):
    images, pool = random_image((2, 3, 6, 8), torch.uint8), random_image((1, 3, 4, 5), torch.uint8, 1)
    pool = list(pool) if as_list else pool
    out = blend_batch(images, [0, -1], [0.25, 1.0], pool=pool, fill=9)
    assert torch.equal(out[0], blend_images(images[0], pool[0], 0.25, fill=9))
    assert torch.equal(out[1], images[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partners": [1]}, "one Mix for each of 2 samples, but it holds 1"),
        ({"partners": [2, 0]}, "partner of sample 0 must be -1 or an index below 2, but it is 2"),
        ({"partners": [1, -2]}, "partner of sample 1 must be .* it is -2"),
        ({"lams": [0.5, 2.0]}, "but it is 2.0"),
        ({"pool": torch.rand(2, 3, 9, 4)}, r"image 0 of the pool must be no larger .*\(3, 4, 4\), but is \(3, 9, 4\)"),
        ({"pool": torch.rand(2, 1, 4, 4)}, "the images of the batch and their partner 0 must agree in channels"),
        ({"pool": [torch.rand(3, 4, 4), torch.rand(3, 4, 5)]}, r"image 1 of the pool must be no larger"),
        ({"pool": torch.rand(2, 7)}, r"agree in shape, dtype and device, but are \(3, 4, 4\) .* and \(7,\)"),
    ],
)
def test_a_batch_that_does_not_go_together_is_named_before_anything_is_written(arguments, message):
    images = torch.rand(2, 3, 4, 4)
    kept = copy.deepcopy(images)
    with pytest.raises(ValueError, match=message):
        blend_batch(images, **{"partners": [1, 0], "lams": [0.5, 0.5], "inplace": True, **arguments})
    assert torch.equal(images, kept)


def test_out_and_inplace_exclude_each_other():
    with pytest.raises(ValueError, match="out must be None if the blends are written into images, inplace=True"):
        blend_batch(torch.rand(2, 4), [1, 0], [0.5, 0.5], inplace=True, out=torch.rand(2, 4))


def test_each_pair_of_a_list_is_blended_on_its_own_canvas():
    images = [random_image((3, *size), torch.uint8, i) for i, size in enumerate([(4, 6), (5, 5), (2, 3)])]
    floats = torch.rand(1, 4, 4)
    seconds = [images[1], None, images[0], None]
    blends = blend_each([*images, floats], seconds, [0.3, 1.0, 0.6, 1.0], fill=7)
    assert torch.equal(blends[0], blend_images(images[0], images[1], 0.3, fill=7))
    assert torch.equal(blends[2], blend_images(images[2], images[0], 0.6, fill=7))
    for copy_, image in ((blends[1], images[1]), (blends[3], floats)):
        assert torch.equal(copy_, image)
        assert copy_.data_ptr() != image.data_ptr()
    assert blend_each([], [], []) == []


def test_nothing_of_a_list_is_written_if_one_pair_does_not_go_together():
    images, outs = list(torch.rand(2, 3, 4, 4)), list(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="agree in channels"):
        blend_each(images, [images[1], torch.rand(1, 4, 4)], [0.5, 0.5], outs=outs)
    assert not torch.stack(outs).any()


def test_gradients_flow_through_batches_of_each_kind():
    for size in (4, 80):
        images = torch.rand(2, 3, size, size, requires_grad=True)
        blend_batch(images, [1, -1], [0.25, 1.0]).sum().backward()
        assert torch.allclose(images.grad[0], torch.tensor(0.25))
        assert torch.allclose(images.grad[1], torch.tensor(1.75))
    firsts = [torch.rand(3, 4, 5, requires_grad=True), torch.rand(3, 6, 2, requires_grad=True)]
    sum(blend.sum() for blend in blend_each(firsts, firsts[::-1], [0.25, 0.5])).backward()
    assert torch.allclose(firsts[0].grad, torch.tensor(0.75))
