"""CUDA C++ and cuBLAS: many rows against the layout of ``cuda_layout``.

The weight is written out in the activations' type and multiplied by torch's own kernel, a slab of
channels at a time: that bounds the room it takes. (Slabs small enough for the L2 cache were slower
on an H200: 777 us instead of 684 for 2048 x 28672 x 4096.)
"""

from __future__ import annotations

import struct

import sympy
import torch

from ..scheme import get_scheme
from . import nvrtc
from .cost import roofline
from .cuda_layout import STREAM, TILE, Format, format_of
from .cuda_needs import COMMON, HALF, stream_holds
from .cuda_shapes import Shape
from .cuda_stream import CODE, defines, text_of
from .kernel import Problem, kernel
from .triton_launch import LIBRARY, weight_bytes

SOURCES = ("constants.cuh", "ptx.cuh", "dequantize.cu")
SLAB_BYTES = 1 << 28
THREADS = 256
WARPS = THREADS // 32


def dequantize_tiles(
    form: Format,
    stream: torch.Tensor,
    per_row: torch.Tensor,
    n: int,
    k: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Channels from ``first * 16`` on, as many as ``out`` [rows, k] has, in its type."""
    shape = Shape(1, 1, 1, 1, form.unit, 2)  # unused by this kernel, but the source asks for one
    constants = defines(
        form,
        shape,
        x_half=out.dtype == torch.float16,
        y_type=CODE[out.dtype],
        bias_type=0,
        activation=0,
    )
    text, device = text_of(*SOURCES), out.device.index
    call = nvrtc.function(text, "stream_dequantize", constants, THREADS, device, False)
    tiles = -(-out.shape[0] // TILE)
    pointers = (t.data_ptr() for t in (stream, per_row, out))
    arguments = struct.pack("<3Q4i", *pointers, n, k, first, tiles)
    call.launch((-(-tiles * (k // form.unit) // WARPS), 1, 1), 0, arguments)


def matmul(
    form: Format,
    x: torch.Tensor,
    stream: torch.Tensor,
    per_row: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    slab_bytes: int = SLAB_BYTES,
) -> torch.Tensor:
    """y[m, n] = x[m, k] (16-bit) times the weight of a stream, plus bias."""
    m, k = x.shape
    y = x.new_empty(m, n)
    rows = max(slab_bytes // (k * x.element_size()) // 128, 1) * 128
    slab = x.new_empty(min(rows, n), k)
    for first in range(0, n, rows):
        w = slab[: min(rows, n - first)]
        dequantize_tiles(form, stream, per_row, n, k, first // TILE, w)
        out = y[:, first : first + rows]
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(bias[first : first + rows], x, w.t(), out=out)
    return y


LIBRARY.define(
    "stream_matmul(Tensor x, Tensor[] packed, Tensor? bias, str scheme, int n) -> Tensor"
)


@torch.library.register_fake("fxquant::stream_matmul", lib=LIBRARY)
def _fake(x, packed, bias, scheme, n):
    return x.new_empty(x.shape[0], n)


@torch.library.impl("fxquant::stream_matmul", "CUDA", lib=LIBRARY)
def stream_matmul(x, packed, bias, scheme, n):
    """x[m, k] bfloat16 or float16 times the packed weight, wide: y[m, n]."""
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    bias = None if bias is None else bias.to(x.dtype)
    form = format_of(get_scheme(scheme))
    return matmul(form, x.contiguous(), packed[0], packed[1], bias, n)


NARROW = 128


def wide(p: Problem) -> str | None:
    """Below this cuBLAS splits k, and adds the parts in the type of the result."""
    return None if p.n >= NARROW else f"n = {p.n} is below {NARROW}: not worth a second kernel"


def cost(p: Problem) -> sympy.Expr:
    """The float product, and the weight read, written and read again."""
    product = roofline(p, weight_bytes=2 * p.n * p.k, operations="bfloat16", launches=2)
    return product + (weight_bytes(p) + 2 * p.n * p.k) / p.device.bandwidth


@kernel(
    families=["w4a16", "w2a16", "w8a16", "wf8a16"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*COMMON, HALF, wide, stream_holds],
    faults=[{"dtype": torch.float32}, {"k": 40}, {"n": 64}],
)
def cuda_dequantize(scheme, x, packed, bias, epilogue):
    op = torch.ops.fxquant.stream_matmul.default
    return op(x, packed, bias, scheme.name, packed[1].numel())


@kernel(
    families=["w4a8"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*COMMON, HALF, wide, stream_holds],
    faults=[{"dtype": torch.float32}, {"k": 40}, {"n": 64}],
)
def cuda_dequantize_w4a8(scheme, x, packed, bias, epilogue):
    """The codes less their zero point are integers up to 255, which both 16-bit types hold."""
    q = scheme.input.quantize(x)
    codes = (q.codes.float() - q.zero.float()).to(x.dtype)
    y = torch.ops.fxquant.stream_matmul.default(codes, packed, None, scheme.name, packed[1].numel())
    y = y.float() * q.scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)
