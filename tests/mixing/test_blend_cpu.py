import itertools
import sys
import warnings
from unittest import mock

import cv2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detmix.mixing import blend_cpu as kernels
from detmix.mixing.blend_cpu import copy_pixels, write
from detmix.mixing.memory import Blend
from tests.conftest import DEVICES, without_waiting

SIZES = [(5, 7), (6, 4), (3, 8), (6, 9), (1, 1), (16, 32), (0, 0), (5, 0)]
DTYPES = [torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
ORDERS = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]  # channels first, channels last, columns first


def make_image(shape, dtype=torch.uint8, seed=0, order=None):
    """Random levels, its dimensions in memory in this order."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=rng) * 200 if dtype.is_floating_point else None
    values = torch.randint(0, 256, shape, generator=rng) if values is None else values
    return torch.empty_permuted(shape, order or tuple(range(len(shape))), dtype=dtype).copy_(values)


def make_blend(sizes, lam, dtype=torch.uint8, orders=ORDERS[:1] * 3, seed=0):
    """A blend of two images on the smallest canvas, whose memory holds other numbers."""
    canvas = [max(sides) for sides in zip(*sizes, strict=True)]
    tensors = [
        make_image((3, *size), dtype, seed + i, order)
        for i, (size, order) in enumerate(zip([canvas, *sizes], orders, strict=True))
    ]
    return Blend(*tensors, lam)


def expect(blend, levels):
    """The same in real numbers."""
    shape = blend.out.shape
    total = torch.zeros(shape, dtype=torch.float64)
    for image, share in ((blend.first, blend.lam), (blend.second, 1 - blend.lam)):
        canvas = torch.tensor(levels, dtype=torch.float64).reshape(-1, 1, 1).expand(shape).clone()
        canvas[:, : image.shape[1], : image.shape[2]] = image
        total += share * canvas
    return total


def tolerance(dtype):
    """Half a level, or the steps of a float up to 256; and what float32 leaves of a product."""
    return (128 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.5) + (1e-4 if dtype.itemsize < 8 else 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@given(
    sizes=st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)),
    lam=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    orders=st.sampled_from(ORDERS).map(lambda order: [order] * 3) | st.tuples(*[st.sampled_from(ORDERS)] * 3),
    levels=st.sampled_from([[0], [114], [10, 0, 255]]),
)
def test_every_layout_is_blended(device, sizes, lam, dtype, orders, levels):
    blends = [make_blend(sizes, lam, dtype, orders), make_blend(sizes[::-1], lam, dtype, orders[:1] * 3, 7)]
    wanted = [expect(blend, levels) for blend in blends]
    moved = [Blend(*(tensor.to(device) for tensor in blend[:3]), lam) for blend in blends]
    with without_waiting(device):
        write(moved, levels)
    for blend, exact in zip(moved, wanted, strict=True):
        assert torch.all((blend.out.cpu() - exact).abs() <= tolerance(dtype))


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("sizes", [((5, 7), (6, 4)), ((3, 8), (6, 9)), ((4, 4), (4, 4))])
def test_bytes_go_through_opencv_once_each(order, sizes, monkeypatch):
    written = []
    for name in ("addWeighted", "convertScaleAbs"):
        call = getattr(cv2, name)
        monkeypatch.setattr(cv2, name, lambda *a, call=call, **k: written.append(call(*a, **k).size))
    monkeypatch.setattr(torch, "lerp", mock.Mock(side_effect=AssertionError("a float copy")))
    blend = make_blend(sizes, 0.3, orders=[order] * 3)
    write([blend], [0])
    covered = sum(size[0] * size[1] for size in sizes)
    overlap = min(sizes[0][0], sizes[1][0]) * min(sizes[0][1], sizes[1][1])
    assert sum(written) == 3 * (covered - overlap)


def test_a_part_of_a_larger_tensor_is_written_and_nothing_beside_it():
    memory = make_image((2, 3, 9, 11))
    kept = memory.clone()
    blend = Blend(memory[1, :, 1:6, 2:9], make_image((3, 5, 7)), make_image((3, 4, 7), seed=1), 0.25)
    write([blend], [9])
    assert torch.all((memory[1, :, 1:6, 2:9] - expect(blend, [9])).abs() <= 0.5 + 1e-4)
    memory[1, :, 1:6, 2:9] = kept[1, :, 1:6, 2:9]
    assert torch.equal(memory, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_out_may_be_the_memory_of_first(dtype):
    sizes = ((6, 8), (4, 5))
    wanted, blend = make_blend(sizes, 0.3, dtype), make_blend(sizes, 0.3, dtype)
    write([wanted], [7])
    write([blend._replace(out=blend.first)], [7])
    assert torch.equal(blend.first, wanted.out)


@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_entries_of_any_shape_are_blended(shape, dtype):
    out, first, second = (make_image(shape, dtype, seed) for seed in range(3))
    write([Blend(out, first, second, 0.25)], [0])
    torch.testing.assert_close(out.double(), 0.25 * first.double() + 0.75 * second.double(), atol=0.51, rtol=0)


@pytest.mark.parametrize("orders", [*itertools.product(ORDERS, ORDERS)])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 6), (3, 1, 1), (3, 0, 2), (5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_are_copied_between_memory_orders(orders, shape, dtype):
    image = make_image(shape, dtype, 0, orders[0])
    memory = make_image((shape[0], shape[1] + 2, shape[2] + 2), dtype, 1, orders[1])
    kept, out = memory.clone(), memory[:, 1:-1, 1:-1]
    copy_pixels(image, out)
    assert torch.equal(out, image)
    out.copy_(kept[:, 1:-1, 1:-1])
    assert torch.equal(memory, kept)


def test_bytes_of_pixels_are_split_into_planes_by_opencv(monkeypatch):
    monkeypatch.setattr(cv2, "split", mock.Mock(wraps=cv2.split))
    blend = make_blend(((5, 7), (6, 4)), 0.3, orders=[ORDERS[0], ORDERS[1], ORDERS[1]])
    write([blend], [7])
    assert cv2.split.call_count == 1


def test_nothing_to_write_is_nothing(monkeypatch):
    find = mock.Mock()
    monkeypatch.setattr(kernels, "_find_routine", find)
    write([], [0])
    assert not find.called


@pytest.mark.parametrize("orders", [[ORDERS[0], ORDERS[1], ORDERS[1]], [ORDERS[1], ORDERS[0], ORDERS[1]]])
def test_images_in_another_memory_order_than_out_are_bytes_all_the_same(orders, monkeypatch):
    monkeypatch.setattr(torch, "lerp", mock.Mock(side_effect=AssertionError("a float copy")))
    blend = make_blend(((5, 7), (6, 4)), 0.3, orders=orders)
    write([blend], [7])
    assert torch.all((blend.out - expect(blend, [7])).abs() <= 0.5 + 1e-4)


class Disguised(torch.Tensor):
    """A tensor of the host that says that it is on a CUDA device."""

    device, is_cuda = torch.device("cuda"), True


def on_cuda(blends, monkeypatch):
    """What the fused routine gets of blends on a CUDA device."""
    fused = mock.Mock()
    monkeypatch.setattr(kernels, "_find_fused", lambda device: {torch.uint8: fused, torch.float32: fused})
    disguised = [Blend(*(tensor.as_subclass(Disguised) for tensor in blend[:3]), blend.lam) for blend in blends]
    write(disguised, [0])
    return [(call.args[0], call.args[1]) for call in fused.call_args_list]


def test_on_a_cuda_device_all_blends_are_one_call(monkeypatch):
    blends = [make_blend(((5, 7), (6, 4)), 0.3), make_blend(((5, 5), (5, 5)), 0.6), make_blend(((5, 7), (6, 4)), 0.1)]
    ((given, layouts),) = on_cuda(blends, monkeypatch)
    assert layouts == ["channels first", "flat", "channels first"]
    assert [blend.out.data_ptr() for blend in given] == [blend.out.data_ptr() for blend in blends]


@pytest.mark.parametrize(
    ("dtype", "orders", "requires_grad"),
    [(torch.float64, ORDERS[:1], False), (torch.float32, ORDERS[2:], False), (torch.float32, ORDERS[:1], True)],
)
def test_what_the_kernel_does_not_take_is_blended_by_torch(dtype, orders, requires_grad, monkeypatch):
    blend = make_blend(((5, 7), (6, 4)), 0.3, dtype, orders * 3)
    blend.first.requires_grad_(requires_grad)
    assert not on_cuda([blend], monkeypatch)
    assert torch.all((blend.out - expect(blend, [0])).abs() < 1e-3)


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), ImportError("no triton.language")])
def test_where_triton_cannot_run_it_is_said_once_and_torch_blends(error, monkeypatch):
    fused = mock.Mock(write=mock.Mock(side_effect=error), DTYPES=[torch.uint8])
    monkeypatch.setattr("detmix.mixing.blend_triton", fused, raising=False)
    monkeypatch.setitem(sys.modules, "detmix.mixing.blend_triton", fused)
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    find = kernels._find_fused.__wrapped__
    with pytest.warns(UserWarning, match=f"Triton cannot run on cpu, so images are blended by torch, slower: {error}"):
        assert find(torch.device("cpu")) == {}
    fused.write.side_effect = None
    assert find(torch.device("cpu")) == {torch.uint8: fused.write}
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(torch.device("cpu")) == {}
