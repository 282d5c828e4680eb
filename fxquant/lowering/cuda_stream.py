"""CUDA C++: every scheme's linear at few rows, the weight streamed once (``cuda/stream.cu``).

``cuda_layout`` says how the weight lies in memory; ``cuda_prefill`` computes many rows from the same
bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import sympy
import torch

from ..ops import GATES, outputs
from ..scheme import QuantSpec, Scheme, get_scheme
from . import nvrtc
from .cuda_layout import STREAM, Format, format_of
from .cuda_needs import ANY_FLOAT, COMMON, HALF, UNZEROED, grouped
from .cuda_shapes import Shape, shape_for
from .cuda_wgmma import warpgroup_product
from .dequantize import LAYOUT as ROW_MAJOR
from .devices import device_row
from .hopper import spread
from .kernel import Problem, kernel
from .triton_launch import (
    EPILOGUES,
    LIBRARY,
    estimate,
    input_is,
    weight_is,
)
from .triton_quantize import are_known

CODE = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
ACTIVATION = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
FINISHES = (*EPILOGUES, *GATES)

SOURCES = Path(__file__).parent / "cuda"

BASE = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}
"""Bits under which a code of up to 7 bits is the float 128 + u, or 1024 + u, twice in a word."""

SIGNS = 0x80808080
"""Turned over in nibbles from 0 to 15, those become signed, in the high halves of bytes."""


def quantizing(form: Format, x: torch.dtype) -> Format:
    """The form for activations that come as ``x``: if as floats where the product takes codes, the kernel
    makes those."""
    return form if x.itemsize * 8 == form.x_bits else form._replace(x_type=CODE[x])


def defines(form: Format, shape: Shape, **rest: int) -> tuple[tuple[str, int], ...]:
    values = {**form._asdict(), **shape._asdict(), "gated": 0, **rest}
    return tuple((name.upper(), int(value)) for name, value in values.items())


@lru_cache
def text_of(*names: str) -> str:
    return "\n".join((SOURCES / name).read_text() for name in names)


def source(form: Format, shape: Shape, half: bool) -> str:
    """The text of ``stream_linear``: one function of it depends on the number of tokens."""
    head = warpgroup_product(form, shape.tokens, half) if shape.warpgroup else ""
    return head + text_of(
        "constants.cuh",
        "ptx.cuh",
        "unpack.cuh",
        "products.cuh",
        "multiply.cuh",
        "quantize.cuh",
        "fixed.cuh",
        "epilogue.cuh",
        "stream.cu",
    )


def compile_linear(
    text: str,
    entry: str,
    form: Format,
    shape: Shape,
    x: torch.dtype,
    y: torch.dtype,
    bias: torch.dtype | None,
    epilogue: str,
    device: int,
    *,
    threads: int,
) -> nvrtc.Function:
    """The kernel ``entry`` of ``text`` for one form, one cut and these types."""
    constants = defines(
        form,
        shape,
        x_half=x == torch.float16,
        y_type=CODE[y],
        bias_type=0 if bias is None else CODE[bias],
        activation=ACTIVATION[GATES.get(epilogue, epilogue)],
        gated=epilogue in GATES,
    )
    return nvrtc.function(text, entry, constants, threads, device, True)


@lru_cache(maxsize=4096)
def compiled(
    form: Format,
    shape: Shape,
    x: torch.dtype,
    y: torch.dtype,
    bias: torch.dtype | None,
    epilogue: str,
    device: int,
) -> nvrtc.Function:
    """The kernel for these types, built unless the cache has it."""
    text = source(form, shape, x == torch.float16)
    types = (x, y, bias, epilogue, device)
    return compile_linear(text, "stream_linear", form, shape, *types, threads=shape.threads)


@lru_cache(maxsize=4096)
def launch_of(
    scheme: Scheme,
    shape: Shape,
    n: int,
    m: int,
    k: int,
    types: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    epilogue: str,
    device: int,
    units: int,
) -> tuple[Callable[[bytes], None], int]:
    """To be called with the arguments: the kernel for these types, its blocks and their shared memory. And
    the argument ``base``, which depends on how the kernel unpacks."""
    form = quantizing(format_of(scheme), types[0])
    shape = shape.paired(form, k) if epilogue in GATES else shape
    call = compiled(form, shape, *types, epilogue, device)
    grid = (-(-n // shape.rows), -(-m // shape.tokens), shape.splits)
    shared = shape.shared(form) + shape.activations(form, k)
    shared = spread(shared, math.prod(grid), shape.splits, units)
    base = SIGNS if shape.fixed else BASE.get(types[0], 0)
    return partial(call.launch, grid, shared), base


def run(
    scheme: Scheme,
    shape: Shape,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    n: int,
    epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One launch, cut as ``shape``: y[m, n] (of GATES [m, n / 2]) of contiguous x[m, k], x_scale float32
    [m] and x_zero int32 [m]; or of one row x[1, k] that the kernel quantizes as the scheme wants it."""
    (m, k), per_row = x.shape, packed[1].float()
    w_scale, w_sum = (None, per_row) if format_of(scheme).x_zero else (per_row, None)
    types = (x.dtype, dtype, None if bias is None else bias.dtype)
    where = x.device.index, device_row(x.device).units
    launch, base = launch_of(scheme, shape, n, m, k, types, epilogue, *where)
    y = x.new_empty(m, outputs(n, epilogue), dtype=dtype)
    pointers = (x, x_scale, x_zero, packed[0], w_scale, w_sum, bias, y)
    addresses = (0 if t is None else t.data_ptr() for t in pointers)
    arguments = struct.pack("<8Q4iIi", *addresses, m, n, k, k * x.element_size(), base, 0)
    launch(arguments)
    return y


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` contiguous at a 16-byte address: copies are 16 bytes wide."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def of_rows(qparam: torch.Tensor | None, m: int) -> torch.Tensor | None:
    """A scale as float32 or a zero point as int32, one for each of ``m`` rows, as ``run`` takes them."""
    if qparam is None:
        return None
    kind = torch.float32 if qparam.is_floating_point() else torch.int32
    if qparam.dtype == kind and qparam.shape == (m, 1) and qparam.is_contiguous():
        return qparam
    return qparam.to(kind).expand(m, 1).contiguous()


def define_linear(name: str, pick: Callable[..., Any], run: Callable[..., torch.Tensor]) -> None:
    """The op ``fxquant::<name>``: x[m, k] (16-bit float, int8 or float8; or as ``run`` takes it) times the
    packed weight, y[m, n] in ``dtype``, by one ``run`` of the cut that ``pick`` finds for it."""

    def linear(x, x_scale, x_zero, packed, bias, scheme, epilogue, n, dtype):
        if x.shape[0] == 0:
            return x.new_empty(0, outputs(n, epilogue), dtype=dtype)
        row, m = get_scheme(scheme), x.shape[0]
        cut = pick(row, n, x.shape[1], m, device_row(x.device).name)
        scale, zero = (of_rows(t, m) for t in (x_scale, x_zero))
        bias = None if bias is None else bias.contiguous()
        return run(row, cut, aligned(x), scale, zero, packed, bias, n, epilogue, dtype)

    def fake(x, x_scale, x_zero, packed, bias, scheme, epilogue, n, dtype):
        return x.new_empty(x.shape[0], outputs(n, epilogue), dtype=dtype)

    LIBRARY.define(
        f"{name}(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor[] packed, Tensor? bias,"
        " str scheme, str epilogue, int n, ScalarType dtype) -> Tensor"
    )
    LIBRARY.impl(name, linear, "CUDA")
    torch.library.register_fake(f"fxquant::{name}", fake, lib=LIBRARY)


define_linear("stream_linear", shape_for, run)


RATES = {
    # family: (fraction of the bandwidth, operand type, fraction of its peak), 28672 x 4096 on an H200
    "w4a16": (0.9, "bfloat16", 0.7),
    "w2a16": (0.5, "bfloat16", 0.7),
    "w8a16": (0.86, "bfloat16", 0.55),
    "wf8a16": (0.87, "bfloat16", 0.6),
    "w4a8": (0.85, "int8", 0.52),
    "w8a8": (0.92, "int8", 0.7),
    "wf8af8": (0.9, "bfloat16", 0.36),
}


def cost(p: Problem) -> sympy.Expr:
    memory, operations, compute = RATES[p.scheme.family]
    if p.scheme.weight.group_size == 32 and p.scheme.input is not None:
        compute *= 0.6  # a sum leaves the tensor core after every 32 products
    return estimate(p, operations=operations, memory=memory, compute=compute)


def _linear(x, scale, zero, packed, bias, scheme, epilogue, n, dtype):
    op = torch.ops.fxquant.stream_linear.default
    return op(x, scale, zero, packed, bias, scheme.name, epilogue, n, dtype)


LONGEST = 1 << 16
"""Values of a row whose codes have room beside the stages of a plain cut."""


def _is_quantized_here(spec: Any, rows: Any, k: int) -> bool:
    """Whether the kernel quantizes these activations: one row, as a QuantSpec says that it knows. (Codes
    that were made before come as another kind of specification.)"""
    known = isinstance(spec, QuantSpec) and spec.granularity == "token" and are_known(spec)
    return known and isinstance(rows, int) and rows == 1 and k <= LONGEST


def quantizes(p: Problem) -> bool:
    return _is_quantized_here(p.scheme.input, p.m, p.k)


def _operands(scheme: Scheme, x: torch.Tensor) -> tuple[Any, Any, Any]:
    """Activations as the kernel takes them, with their scale and zero point if they are codes."""
    if _is_quantized_here(scheme.input, *x.shape):
        return x, None, None
    return scheme.input.quantize(x)  # type: ignore[union-attr]


@kernel(
    families=["w4a16", "w2a16"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*COMMON, HALF, weight_is("group", "none", "float"), grouped],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float32}, {"k": 48}],
)
def cuda_w4a16(scheme, x, packed, bias, epilogue):
    n = packed[1].numel()
    return _linear(x, None, None, packed, bias, scheme, epilogue, n, x.dtype)


@kernel(
    families=["w8a16", "wf8a16"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*COMMON, HALF, weight_is("channel", "none")],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float32}, {"k": 40}, {"n": 1 << 20}],
)
def cuda_w8a16(scheme, x, packed, bias, epilogue):
    n = packed[1].numel()
    return _linear(x, None, None, packed, bias, scheme, epilogue, n, x.dtype)


@kernel(
    families=["w4a8"],
    device="cuda",
    layout=STREAM,
    cost=cost,
    needs=[*COMMON, ANY_FLOAT, weight_is("group", "none"), input_is("int"), grouped],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float64}, {"k": 48}],
    quantizes=quantizes,
)
def cuda_w4a8(scheme, x, packed, bias, epilogue):
    n = packed[1].numel()
    return _linear(*_operands(scheme, x), packed, bias, scheme, epilogue, n, x.dtype)


@kernel(
    families=["w8a8", "wf8af8"],
    device="cuda",
    layout=ROW_MAJOR,
    cost=cost,
    needs=[*COMMON, ANY_FLOAT, *UNZEROED],
    epilogues=FINISHES,
    faults=[{"dtype": torch.float64}, {"k": 131072}, {"k": 40}],
    quantizes=quantizes,
)
def cuda_w8a8(scheme, x, packed, bias, epilogue):
    n = packed[0].shape[0]
    return _linear(*_operands(scheme, x), packed, bias, scheme, epilogue, n, x.dtype)
