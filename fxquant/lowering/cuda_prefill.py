"""CUDA C++ and cuBLAS: many rows against the layout of ``cuda_stream``.

The weight is written out in the activations' type, a slab of channels at a time, and multiplied by
torch's own kernel. A slab stays in the L2 cache between the two, so that the wide weight costs
little of the memory's time and at most ``SLAB_BYTES`` of its room.
"""

from __future__ import annotations

import struct

import torch

from . import nvrtc
from .cuda_stream import CODE, TILE, Format, Shape, defines, source

SLAB_BYTES = 1 << 25
THREADS = 256
WARPS = THREADS // 32


def dequantize_tiles(
    form: Format,
    stream: torch.Tensor,
    w_scale: torch.Tensor | None,
    n: int,
    k: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Channels from ``first * 16`` on, as many as ``out`` [rows, k] has, in its type."""
    shape = Shape(1, 1, 1, 1, form.unit, 2)  # unused by this kernel, but the source asks for one
    constants = defines(
        form, shape, x_half=out.dtype == torch.float16, y_type=CODE[out.dtype], bias_type=0, activation=0
    )
    text, device = source(form, shape, False), out.device.index
    call = nvrtc.function(text, "stream_dequantize", constants, THREADS, 0, device, False)
    tiles = -(-out.shape[0] // TILE)
    scale = 0 if w_scale is None else w_scale.data_ptr()
    arguments = struct.pack("<3Q4i", stream.data_ptr(), scale, out.data_ptr(), n, k, first, tiles)
    with torch.cuda.device(device):
        call.launch((-(-tiles * (k // form.unit) // WARPS), 1, 1), arguments)


def matmul(
    form: Format,
    x: torch.Tensor,
    stream: torch.Tensor,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    slab_bytes: int = SLAB_BYTES,
) -> torch.Tensor:
    m, k = x.shape
    y = x.new_empty(m, n)
    rows = max(slab_bytes // (k * x.element_size()) // 128, 1) * 128
    slab = x.new_empty(min(rows, n), k)
    for first in range(0, n, rows):
        w = slab[: min(rows, n - first)]
        dequantize_tiles(form, stream, w_scale, n, k, first // TILE, w)
        out = y[:, first : first + rows]
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(bias[first : first + rows], x, w.t(), out=out)
    return y
