"""The Triton kernel: run by Triton's interpreter, which needs no device, and compiled for one that is not there."""

import importlib.util
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detmix.mixing import blend_cpu as kernels
from detmix.mixing.memory import Blend
from tests.conftest import without_waiting
from tests.mixing.test_blend_cpu import ORDERS, SIZES, make_blend, make_image

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch for Linux")
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fused():
    """The module, with a kernel that is interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load()


def load():
    """The module, made anew by what the environment says."""
    spec = importlib.util.spec_from_file_location("loaded", ROOT / "detmix" / "mixing" / "blend_triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(fused, blends, levels):
    layouts = [kernels._layout(blend, levels) for blend in blends]
    fused.write(blends, layouts, levels)


def by_torch(blends, levels):
    outs = [torch.empty_like(blend.out) for blend in blends]
    level = torch.tensor(levels, dtype=outs[0].dtype).reshape(-1, 1, 1)
    for blend, out in zip(blends, outs, strict=True):
        kernels._write_by_torch(blend._replace(out=out), level)
    return outs


def assert_alike(actual, expected):
    """Bytes and float32 but for ties and roundings in between; half precision but for its last place."""
    for a, b in zip(actual, expected, strict=True):
        if a.dtype == torch.uint8:
            assert torch.all((a.int() - b.int()).abs() <= 1)
            assert a.numel() < 100 or (a != b).float().mean() < 0.1
        else:
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-4)


@given(
    sizes=st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)), min_size=1, max_size=4),
    lams=st.lists(st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.9, 1.0]), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS[:2]),
    levels=st.sampled_from([[0], [114], [10, 0, 255]]),
)
@settings(deadline=None, max_examples=40)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, in lanes that are not written
def test_it_blends_as_torch_does(fused, sizes, lams, dtype, order, levels):
    order = ORDERS[0] if len(levels) > 1 else order
    blends = [make_blend(pair, lam, dtype, [order] * 3, 3 * i) for i, (pair, lam) in enumerate(zip(sizes, lams))]  # noqa: B905
    run(fused, blends, levels)
    assert_alike([blend.out for blend in blends], by_torch(blends, levels))


@pytest.mark.parametrize("share", [0, 1, 2**23, 5 * 2**21, 2**24 - 1, 2**24])
def test_bytes_are_rounded_exactly_with_ties_to_even(fused, share):
    levels = torch.arange(256, dtype=torch.uint8)
    first, second = levels.repeat(256)[None], levels.repeat_interleave(256)[None]
    out = torch.zeros_like(first)
    run(fused, [Blend(out, first, second, share / 2**24)], [0])
    exact = (first.double() * share + second.double() * (2**24 - share)) / 2**24  # exact in float64
    assert torch.equal(out, exact.round().to(torch.uint8))


def test_entries_longer_than_a_program_are_written_whole(fused):
    tensors = [make_image((3, 64, 65), seed=seed) for seed in range(3)]  # 12,480 bytes
    blend = Blend(*tensors, 0.25)
    run(fused, [blend], [0])
    assert_alike([blend.out], by_torch([blend], [0]))


def test_memory_beside_the_outs_is_left_alone(fused):
    memory = make_image((2, 3, 9, 11))
    kept = memory.clone()
    blend = Blend(memory[1, :, 1:6, 2:9], make_image((3, 5, 7)), make_image((3, 4, 7), seed=1), 0.25)
    other = Blend(make_image((3, 30, 30)), make_image((3, 30, 30)), make_image((3, 8, 7), seed=1), 0.25)
    run(fused, [blend, other], [9])
    assert_alike([blend.out, other.out], by_torch([blend, other], [9]))
    memory[1, :, 1:6, 2:9] = kept[1, :, 1:6, 2:9]
    assert torch.equal(memory, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapping_images_and_shares_changes_no_bit(fused, dtype):
    blend = make_blend(((5, 7), (6, 4)), 0.3, dtype)
    swapped = Blend(torch.empty_like(blend.out), blend.second, blend.first, 0.7)
    run(fused, [blend._replace(lam=1 - 0.7), swapped], [7])
    assert torch.equal(blend.out, swapped.out)


def test_the_middle_of_floats_is_their_mean(fused):
    blend = make_blend(((40, 40), (40, 40)), 0.5, torch.float32)
    run(fused, [blend], [0])
    assert torch.equal(blend.out, (blend.first + blend.second) * 0.5)


@pytest.fixture
def launches(fused, monkeypatch):
    """The arguments of each launch: is_aligned and width are the last two."""
    kernel, given = fused._blend, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: (given.append(args), kernel[grid](*args, **options))

    monkeypatch.setattr(fused, "_blend", Recorder())
    return given


@pytest.mark.parametrize(
    ("size", "offset", "expected"), [((16, 32), 0, True), ((15, 31), 0, False), ((16, 32), 1, False)]
)
def test_wide_reads_are_for_aligned_memory_alone(fused, launches, size, offset, expected):
    memory = torch.zeros(3 * 3 * 16 * 32 + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    tensors = [memory[start + i * 1536 :][: 3 * size[0] * size[1]].view(3, *size) for i in range(3)]
    run(fused, [Blend(*tensors, 0.5)], [0])
    assert [args[4] for args in launches] == [expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_writes_no_more_than_it_should(fused, launches, dtype):
    run(fused, [make_blend(((48, 50), (48, 50)), 0.3, dtype)], [0])
    assert [args[5] * dtype.itemsize for args in launches] == [fused.BYTES]


def test_empty_images_beside_others_and_alone_are_no_work(fused, launches):
    empty, blend = make_blend(((0, 0), (0, 0)), 0.3), make_blend(((4, 4), (4, 4)), 0.3)
    run(fused, [empty, blend], [0])
    run(fused, [empty], [0])
    assert [args[1] for args in launches] == [1]
    assert_alike([blend.out], by_torch([blend], [0]))


def test_shares_of_floats_are_their_bits(fused):
    assert struct.pack("<i", fused._bits(0.3)) == struct.pack("<f", 0.3)


@pytest.mark.parametrize("capability", [75, 90])
def test_it_compiles_for_devices_and_writes_16_bytes_at_once_where_memory_is_aligned(capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = load()
    constants = ("fields", "dtype", "is_aligned", "width")
    signature = {"jobs": "*i64", "count": "i32", **dict.fromkeys(constants, "constexpr")}
    for dtype in module.DTYPES.values():
        for is_aligned in (True, False):
            values = (17, dtype, is_aligned, module.BYTES * 8 // dtype.primitive_bitwidth)
            constexprs = {(2 + i,): value for i, value in enumerate(values)}
            source = ASTSource(module._blend, signature, constexprs, {(0,): [["tt.divisibility", 16]]})
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
            assert len(compiled.asm["cubin"]) > 0
            assert ("st.global.v4.b32" in compiled.asm["ptx"]) == is_aligned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_device_it_is_the_oracle_too(dtype):
    blends = [make_blend(pair, 0.3, dtype) for pair in (((50, 70), (60, 40)), ((64, 64), (64, 64)))]
    wanted = by_torch(blends, [7])
    moved = [Blend(*(tensor.cuda() for tensor in blend[:3]), blend.lam) for blend in blends]
    with without_waiting("cuda"):
        kernels.write(moved, [7])
    assert_alike([blend.out.cpu() for blend in moved], wanted)
