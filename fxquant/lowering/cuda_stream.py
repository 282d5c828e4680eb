"""CUDA C++: every scheme's linear at few rows, the weight streamed once (``cuda/stream.cu``).

``cuda_layout`` says how the weight lies in memory; ``cuda_prefill`` computes many rows from the same
bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch

from ..ops import GATES, outputs
from ..scheme import QuantSpec, Scheme, get_scheme
from . import nvrtc
from .cuda_layout import STREAM, TILE, Format, format_of
from .cuda_needs import ANY_FLOAT, COMMON, HALF, UNZEROED, grouped
from .cuda_wgmma import warpgroup_product
from .dequantize import LAYOUT as ROW_MAJOR
from .devices import device_row
from .hopper import room, spread, taken
from .kernel import Problem, kernel
from .triton_launch import (
    EPILOGUES,
    LIBRARY,
    estimate,
    input_is,
    weight_is,
)
from .triton_quantize import are_known
from .tuning import measured_shape, remembered, tuned_shapes

CODE = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
ACTIVATION = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
FINISHES = (*EPILOGUES, *GATES)

SOURCES = Path(__file__).parent / "cuda"

BASE = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}
"""Bits under which a code of up to 7 bits is the float 128 + u, or 1024 + u, twice in a word."""

SIGNS = 0x80808080
"""Turned over in nibbles from 0 to 15, those become signed, in the high halves of bytes."""

BESIDE_CODES = 512
"""Bytes beside the codes that a block makes of its row: scale and zero point, and what they are found in."""

BUSY = 0.6
"""The part of the multiprocessors that must have a block: with fewer the cut of another layer is changed
for another. (On an H200 that gained up to 50 % below this and lost up to 20 % above.)"""


def whole_lines(size: int) -> int:
    return -(-size // 128) * 128


class Shape(NamedTuple):
    """How a block of threads is cut: the names are the constants in ``stream.cu``. fixed: 4-bit weights are
    multiplied by the one row's activations as fixed-point numbers (``fixed.cuh``), which takes fewer
    instructions for each weight and a moment more before the first."""

    warps_n: int
    warps_k: int
    row_tiles: int
    tokens: int
    step: int
    stages: int
    warpgroup: int = 0
    blocks: int = 1
    splits: int = 1
    fixed: int = 0

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def rows(self) -> int:
        return TILE * self.row_tiles * self.warps_n

    @property
    def one_row(self) -> bool:
        return self.tokens == 1 and not self.warpgroup

    def stage_bytes(self, form: Format, fetched: bool = False) -> int:
        """Bytes of one stage of the pipeline, ``fetched`` by the copy engine or in whole lines by threads."""
        row = self.step * form.x_bits // 8
        tile = self.step // form.unit * form.unit_bytes
        if form.row_major:
            tile = TILE * (row if fetched or row % 128 == 0 else row + 16)
        elif not fetched:
            tile = whole_lines(tile)
        stage = self.warps_n * self.row_tiles * tile
        if not self.makes(form):
            stage += self.tokens * row if self.warpgroup else whole_lines(self.tokens * (row + 16))
        return -(-stage // 1024) * 1024 if self.warpgroup else stage

    def shared(self, form: Format) -> int:
        """Bytes of shared memory: the pipeline, or the partial sums that follow it."""
        sums = self.warps_k * max(self.tokens, 8) * (self.rows + 4) * 4
        return max(self.warps_k * self.stages * self.stage_bytes(form), sums)

    def makes(self, form: Format) -> bool:
        """Whether a block makes fixed-point numbers or codes of its row of activations."""
        return bool(self.fixed or form.x_type)

    def activations(self, form: Format, k: int) -> int:
        """Bytes of shared memory beside those, for what a block makes of its part of the activations."""
        if not self.makes(form):
            return 0
        steps = -(-k // (self.step * self.warps_k * self.splits)) * self.warps_k
        if self.fixed:
            return steps * (3 * self.step + 8 * self.step // form.unit)
        return BESIDE_CODES + steps * self.step

    def busy(self, n: int, rows: int) -> float:
        """The part of the multiprocessors that have a block, while the last blocks are computed too."""
        return taken(-(-n // self.rows) * -(-rows // self.tokens) * self.splits)

    def serves(self, form: Format, rows: int) -> bool:
        """Whether so many rows may be cut like this: one that the kernel quantizes comes alone."""
        return self.one_row if rows == 1 and form.x_bits == 8 else rows == 1 or self.tokens > 1

    def paired(self, form: Format, k: int) -> Shape:
        """The same with an even number of tiles, of which half are of each half of the channels (GATES)."""
        if self.warps_n * self.row_tiles % 2 == 0:
            return self
        pairs = self._replace(row_tiles=2 * self.row_tiles, warps_k=max(self.warps_k // 2, 1))
        return pairs if pairs.fits(form, k) else plain_shape(form, k, self.tokens)

    def fits(self, form: Format, k: int) -> bool:
        """Whether the kernel can be cut like this."""
        fits = k % self.step == 0 and self.step % form.unit == 0 and self.threads <= 1024
        fits = fits and self.step & (self.step - 1) == 0
        forms = (form, form._replace(x_type=1)) if self.one_row and form.x_bits == 8 else (form,)
        fits = fits and all(
            room(self.shared(f) + self.activations(f, k), self.blocks) for f in forms
        )
        if form.x_type:
            fits = fits and self.one_row
        if self.fixed:
            fits = fits and self.one_row and (form.bits, form.x_bits) == (4, 16) and form.chunk > 0
        return fits and (self.fits_wgmma(form) if self.warpgroup else self.stages >= 2)

    def fits_wgmma(self, form: Format, fetched: bool = False) -> bool:
        """Four warps a group, rows of 128 bytes, numbers of columns that the instruction has, and a stage
        more. Its float8 sums have 14 bits: those stay with mma, unless they are moved on in time."""
        row, columns = (
            self.step * form.x_bits // 8,
            8 if form.x_bits == 16 or self.tokens <= 32 else 16,
        )
        shaped = self.warps_n % 4 == 0 and row % 128 == 0 and self.tokens % columns == 0
        moved = fetched or not (form.float8 and form.x_bits == 8)
        return shaped and moved and self.stages >= 3


@remembered
def shape_for(scheme: Scheme, n: int, k: int, rows: int, device: str) -> Shape:
    """The cut for this many rows: measured for this layer, or else for the likest one whose blocks keep
    the multiprocessors of this one busy, or a plain one."""
    form = format_of(scheme)
    found = tuned_shapes(device, "shapes", scheme.name, scheme.family, n, k, rows)
    shapes = (Shape(*one) for one in found)
    fitting = [one for one in shapes if one.fits(form, k) and one.serves(form, rows)]
    if not fitting:
        return plain_shape(form, k, rows)
    measured = measured_shape(device, "shapes", scheme.name, n, k, rows)
    if measured is not None and fitting[0] == Shape(*measured):
        return fitting[0]
    narrow = (shape._replace(row_tiles=1) for shape in fitting)
    options = [*fitting[:1], *(shape for shape in narrow if shape.fits(form, k)), *fitting[1:]]
    full = (shape for shape in options if shape.busy(n, rows) > BUSY)
    return next(full, max(options, key=lambda shape: shape.busy(n, rows)))


def quantizing(form: Format, x: torch.dtype) -> Format:
    """The form for activations that come as ``x``: if as floats where the product takes codes, the kernel
    makes those."""
    return form if x.itemsize * 8 == form.x_bits else form._replace(x_type=CODE[x])


def plain_shape(form: Format, k: int, rows: int) -> Shape:
    """A cut that serves any layer."""
    steps = (s for s in (128, 64, 32) if s % form.unit == 0)
    step = next(s for s in steps if k % s == 0)
    if rows == 1:
        return Shape(1, 4, 2, 1, step, 4)
    tokens = min(-(-rows // 8) * 8, 64)
    if tokens <= 16:
        return Shape(4, 2, 2, tokens, step, 4)
    return Shape(4, 1, 2, tokens, step, 3)


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
    form: Format, shape: Shape, n: int, m: int, k: int, units: int
) -> tuple[tuple[int, int, int], int]:
    """The grid of blocks, and the bytes of shared memory of each; a launch outside of a graph asks again."""
    grid = (-(-n // shape.rows), -(-m // shape.tokens), shape.splits)
    shared = shape.shared(form) + shape.activations(form, k)
    return grid, spread(shared, math.prod(grid), shape.splits, units)


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
    form, (m, k) = quantizing(format_of(scheme), x.dtype), x.shape
    per_row = packed[1].float().reshape(-1)
    w_scale, w_sum = (None, per_row) if form.x_zero else (per_row, None)
    shape = shape.paired(form, k) if epilogue in GATES else shape
    types = (x.dtype, dtype, None if bias is None else bias.dtype)
    call = compiled(form, shape, *types, epilogue, x.device.index)
    y = x.new_empty(m, outputs(n, epilogue), dtype=dtype)
    pointers = (x, x_scale, x_zero, packed[0], w_scale, w_sum, bias, y)
    addresses = (0 if t is None else t.data_ptr() for t in pointers)
    base = SIGNS if shape.fixed else BASE.get(x.dtype, 0)
    arguments = struct.pack("<8Q4iIi", *addresses, m, n, k, k * x.element_size(), base, 0)
    grid, shared = launch_of(form, shape, n, m, k, device_row(x.device).units)
    with torch.cuda.device(x.device):
        call.launch(grid, arguments, shared)
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
