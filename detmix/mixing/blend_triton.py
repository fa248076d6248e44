"""One Triton kernel that blends a whole batch: each byte is read and written once, and there is one launch.

torch's operations take a launch for every part of every image, and for integers write all that lies between in floats.
Imported where there is a CUDA device and Triton, which comes with torch for Linux.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.uint8: tl.uint8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
BYTES = 4096
"""What a program writes at most."""


@triton.jit  # type: ignore[untyped-decorator]
def _blend(  # type: ignore[no-untyped-def]
    table, jobs, fields: tl.constexpr, dtype: tl.constexpr, is_aligned: tl.constexpr, width: tl.constexpr
):
    """Blend a block of a row of a plane of job ``program_id(1)``, whose addresses and sizes the table holds."""
    job = table + tl.program_id(1) * fields
    planes, rows, columns = tl.load(job).to(tl.int32), tl.load(job + 1).to(tl.int32), tl.load(job + 2).to(tl.int32)
    blocks = (columns + width - 1) // width
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    plane, row = line // rows, line % rows
    columns = tl.where(plane < planes, columns, 0)  # jobs smaller than the largest have programs too many
    bits = tl.load(job + 3)
    level = tl.load(table + jobs * fields + tl.where(plane < planes, plane, 0))
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
        # In fixed point, so exact; a tie goes to the even level, as OpenCV's and torch's do.
        share = bits.to(tl.uint32)
        value = level.to(tl.uint8)
        a = tl.load(first_memory + first + x, mask=x < first_columns, other=value).to(tl.uint32)
        b = tl.load(second_memory + second + x, mask=x < second_columns, other=value).to(tl.uint32)
        total = a * share + b * (16777216 - share)
        mixed = (total + 8388607 + ((total >> 24) & 1)) >> 24
    else:
        # torch's lerp, and the mean in the middle, as `detmix.mixing.blend_cpu` does.
        weight = bits.to(tl.int32).to(tl.float32, bitcast=True)
        value = level.to(tl.int32).to(tl.float32, bitcast=True).to(dtype)
        a = tl.load(first_memory + first + x, mask=x < first_columns, other=value).to(tl.float32)
        b = tl.load(second_memory + second + x, mask=x < second_columns, other=value).to(tl.float32)
        mixed = tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))
        if dtype == tl.float32:
            mixed = tl.where(weight == 0.5, (a + b) * 0.5, mixed)
    tl.store(out_memory + out + x, mixed.to(dtype), mask=x < columns)


def write(blends: Sequence[Any], layouts: Sequence[str], levels: Sequence[float]) -> None:
    """Write blends of one of `DTYPES` as `detmix.mixing.blend_cpu.write` does, without autograd; bytes are rounded exactly.

    Args:
        blends: See `detmix.mixing.blend_cpu.write`.
        layouts: The `detmix.mixing.memory.Layout` of each.
        levels: See `detmix.mixing.blend_cpu.write`.
    """
    dtype = blends[0].out.dtype
    rows = [_row(*job) for job in zip(blends, layouts, strict=True) if job[0].out.numel()]
    if not rows:
        return
    planes = max(row[0] for row in rows)
    encode = int if dtype == torch.uint8 else _bits
    tail = [encode(value) for value in (levels if len(levels) > 1 else list(levels) * planes)]
    # Each job's addresses, strides and widths in bytes, but for those that say nothing of memory.
    aligned = all(value % 16 == 0 for row in rows for value in (*row[4:7], *row[8:12], *row[13:], row[2]))
    block = min(BYTES // dtype.itemsize, triton.next_power_of_2(max(row[2] for row in rows)))
    programs = max(row[0] * row[1] * -(-row[2] // block) for row in rows)
    flat = torch.tensor([value for row in rows for value in row] + tail)
    with torch.cuda.device_of(blends[0].out):  # type: ignore[no-untyped-call]
        table = flat.to(blends[0].out.device, non_blocking=True)
        # Without fused multiply-add a float is the same whichever Triton compiled it.
        _blend[programs, len(rows)](
            table, len(rows), len(rows[0]), DTYPES[dtype], aligned, block, enable_fp_fusion=False
        )


def _row(blend: Any, layout: str) -> list[int]:
    """The table's row of a blend: planes, rows, columns, share, and address, strides and size of all three tensors."""
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
