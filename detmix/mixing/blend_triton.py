"""Blend a whole batch with one Triton kernel: one launch, and each byte is read and written once.

torch's operations need a launch for every window of every image, and store integer images as floats in between. This
module is imported only where there is a CUDA device. Triton comes with torch for Linux.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from detmix.mixing.memory import Blend, Layout

DTYPES = {
    torch.uint8: tl.uint8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
BYTES = 4096
"""Bytes that one program writes at most."""


@triton.jit  # type: ignore[untyped-decorator]
def _blend(  # type: ignore[no-untyped-def]
    jobs, count, fields: tl.constexpr, dtype: tl.constexpr, is_aligned: tl.constexpr, width: tl.constexpr
):
    """Blend a block of a row of a plane of job ``program_id(1)``. ``jobs`` holds the addresses and sizes of all."""
    job = jobs + tl.program_id(1) * fields
    planes, rows, columns = tl.load(job).to(tl.int32), tl.load(job + 1).to(tl.int32), tl.load(job + 2).to(tl.int32)
    blocks = (columns + width - 1) // width
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    plane, row = line // rows, line % rows
    columns = tl.where(plane < planes, columns, 0)  # jobs smaller than the largest have programs too many
    bits = tl.load(job + 3)
    level = tl.load(jobs + count * fields + tl.where(plane < planes, plane, 0))
    x = block * width + tl.arange(0, width)

    first_columns = tl.where(row < tl.load(job + 7), tl.load(job + 8).to(tl.int32), 0)
    second_columns = tl.where(row < tl.load(job + 12), tl.load(job + 13).to(tl.int32), 0)
    first = plane * tl.load(job + 5) + row * tl.load(job + 6)
    second = plane * tl.load(job + 10) + row * tl.load(job + 11)
    out = plane * tl.load(job + 15) + row * tl.load(job + 16)
    first_memory = tl.load(job + 4).to(tl.pointer_type(dtype))
    second_memory = tl.load(job + 9).to(tl.pointer_type(dtype))
    out_memory = tl.load(job + 14).to(tl.pointer_type(dtype))
    if is_aligned:  # then 16 bytes can be read and written at once
        columns = tl.multiple_of(columns, 16)
        first_columns, second_columns = tl.multiple_of(first_columns, 16), tl.multiple_of(second_columns, 16)
        first, second, out = tl.multiple_of(first, 16), tl.multiple_of(second, 16), tl.multiple_of(out, 16)
        first_memory = tl.multiple_of(first_memory, 16)
        second_memory = tl.multiple_of(second_memory, 16)
        out_memory = tl.multiple_of(out_memory, 16)

    if dtype == tl.uint8:
        # Fixed point, so exact. A tie goes to the even level, as in OpenCV and torch.
        share = bits.to(tl.uint32)
        value = level.to(tl.uint8)
        a = tl.load(first_memory + first + x, mask=x < first_columns, other=value).to(tl.uint32)
        b = tl.load(second_memory + second + x, mask=x < second_columns, other=value).to(tl.uint32)
        total = a * share + b * (16777216 - share)
        mixed = (total + 8388607 + ((total >> 24) & 1)) >> 24
    else:
        # torch's lerp, and the mean at 0.5, as in `detmix.mixing.blend_cpu`.
        weight = bits.to(tl.int32).to(tl.float32, bitcast=True)
        value = level.to(tl.int32).to(tl.float32, bitcast=True).to(dtype)
        a = tl.load(first_memory + first + x, mask=x < first_columns, other=value).to(tl.float32)
        b = tl.load(second_memory + second + x, mask=x < second_columns, other=value).to(tl.float32)
        mixed = tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))
        if dtype == tl.float32:
            mixed = tl.where(weight == 0.5, (a + b) * 0.5, mixed)
    tl.store(out_memory + out + x, mixed.to(dtype), mask=x < columns)


def write(blends: Sequence[Blend], layouts: Sequence[Layout], levels: Sequence[float]) -> None:
    """Write blends of one of `DTYPES` as `detmix.mixing.blend_cpu.write` does, without autograd.

    uint8 images are rounded exactly.

    Args:
        blends: See `detmix.mixing.blend_cpu.write`.
        layouts: Memory layout of each.
        levels: See `detmix.mixing.blend_cpu.write`.
    """
    dtype = blends[0].out.dtype
    rows = [_describe(*job) for job in zip(blends, layouts, strict=True) if job[0].out.numel()]
    if not rows:
        return
    planes = max(row[0] for row in rows)
    encode = int if dtype == torch.uint8 else _bits
    tail = [encode(value) for value in (levels if len(levels) > 1 else list(levels) * planes)]
    # Addresses, strides and widths of each job; not its plane, row and share numbers.
    aligned = all(value % 16 == 0 for row in rows for value in (*row[4:7], *row[8:12], *row[13:], row[2]))
    block = min(BYTES // dtype.itemsize, triton.next_power_of_2(max(row[2] for row in rows)))
    programs = max(row[0] * row[1] * -(-row[2] // block) for row in rows)
    flat = torch.tensor([value for row in rows for value in row] + tail)
    with torch.cuda.device_of(blends[0].out):  # type: ignore[no-untyped-call]
        jobs = flat.to(blends[0].out.device, non_blocking=True)
        # Without fused multiply-add every Triton version gives the same floats.
        _blend[programs, len(rows)](
            jobs, len(rows), len(rows[0]), DTYPES[dtype], aligned, block, enable_fp_fusion=False
        )


def _describe(blend: Blend, layout: Layout) -> list[int]:
    """Describe a blend to the kernel: planes, rows, columns, share, then address, strides and size of each tensor."""
    out, first, second, lam = blend
    share = round(lam * 2**24) if out.dtype == torch.uint8 else _bits(1 - lam)
    planes, places = 1, []
    for tensor in (first, second, out):
        if layout == "flat":
            place = [0, 0, 1, tensor.numel()]
        elif layout == "channels first":
            planes, place = tensor.shape[0], [*tensor.stride()[:2], *tensor.shape[1:]]
        else:
            place = [0, tensor.stride(1), tensor.shape[1], tensor.shape[2] * tensor.shape[0]]
        places += [tensor.data_ptr(), *place]
    return [planes, *places[-2:], share, *places[:-2]]


def _bits(value: float) -> int:
    number: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return number
