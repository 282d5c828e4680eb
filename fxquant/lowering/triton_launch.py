"""What the Triton kernels share: the op library, the activations, the tiles, needs and costs.

Triton is optional (CPU wheels of torch come without it). Where it is missing the modules still
load, and ``HAS_TRITON`` makes every kernel's ``needs`` refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch

from .cost import roofline
from .devices import device_row
from .kernel import Need, Problem

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    INTERPRET = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = tl = None  # type: ignore[assignment]
    HAS_TRITON = INTERPRET = False

LIBRARY = torch.library.Library("fxquant", "FRAGMENT")
EPILOGUES = ("relu", "gelu", "gelu_tanh", "silu")
DEVICES = ("CUDA", "CPU") if INTERPRET else ("CUDA",)


def jit(function: Callable) -> Any:
    """``triton.jit``. The number of rows ``M`` never specializes: one binary serves them all."""
    if not HAS_TRITON:
        return function
    rows = [name for name in function.__annotations__ if name == "M"]
    return triton.jit(function, do_not_specialize=rows)


def define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Define an op that launches a kernel: on CUDA, and on the CPU under Triton's interpreter."""
    name = schema[: schema.index("(")]

    def register(launch: Callable) -> Callable:
        LIBRARY.define(schema)
        for key in DEVICES:
            LIBRARY.impl(name, launch, key)
        torch.library.register_fake(f"fxquant::{name}", fake, lib=LIBRARY)
        return launch

    return register


_STARTED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def start(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    **options: Any,
) -> None:
    """``kernel[(programs,)](*arguments, **constants, **options)`` on the first argument's device, before the
    previous kernel has ended if OVERLAP is true. constants: all that the kernel has, in their order.

    Triton binds and looks at all of them for each launch, to find what it has compiled. From the second
    launch with the same constants, of arguments of the same kinds, on, it is found by those.
    """
    if INTERPRET:
        kernel[(programs,)](*arguments, **constants, **options)
        return
    kinds = tuple(_kind_of(argument) for argument in arguments)
    key = (kernel, arguments[0].device, kinds, *constants.values(), *options.values())
    found = _STARTED.get(key)
    with torch.cuda.device_of(arguments[0]):
        if found is not None:
            compiled, rest = found
            compiled[programs, 1, 1](*arguments, *rest)
            return
        names = kernel.arg_names[len(arguments) :]
        assert names == list(constants), "the kernel's constants in their order"
        early = {"launch_pdl": True} if constants.get("OVERLAP") else {}
        compiled = kernel[(programs,)](*arguments, **constants, **options, **early)
        if compiled is not None:  # a hook of Triton's may have declined
            _STARTED[key] = compiled, tuple(constants.values())


def _kind_of(argument: Any) -> Any:
    """What Triton compiles an argument for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None:
        return None
    return argument == 1, argument % 16 == 0, argument.bit_length() > 31


@jit
def activate(y, EPILOGUE: tl.constexpr):
    """The activation called ``EPILOGUE`` of float32 ``y``; a NaN stays a NaN."""
    if EPILOGUE == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif EPILOGUE == "silu":
        y = y / (1 + tl.exp(-y))
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif EPILOGUE == "gelu_tanh":
        inner = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        y = y / (1 + tl.exp(-inner))  # (1 + tanh(z)) / 2 == sigmoid(2 z)
    return y


@jit
def tile_of(pid, tiles_m, tiles_n):
    """The (row, column) tile of program ``pid``: eight rows of tiles share weights in L2."""
    band = 8 * tiles_n
    first = pid // band * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + pid % band % height, pid % band // height


@jit
def store(
    acc, y, bias, offs_m, offs_n, M: int, N,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Bias, activation and one rounding of ``acc[m, n]``, written to ``y[M, N]``."""
    if HAS_BIAS:
        acc += tl.load(bias + tl.minimum(offs_n, N - 1)).to(tl.float32)[None, :]
    acc = activate(acc, EPILOGUE)
    at = y + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), (offs_m[:, None] < M) & (offs_n[None, :] < N))


@jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """Programmatic dependent launch: the next kernel may begin what needs nothing of this one (fetch its
    weights), and reads come after this. At once, unlike a linear (``cuda/ptx.cuh``): this one is short."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlaps(device: torch.device) -> bool:
    """Whether a kernel with the constant OVERLAP may wait there by itself for the one ahead."""
    return not INTERPRET and "sm90" in device_row(device).features


class Tile(NamedTuple):
    """Rows and columns of the output per program, depth of a step, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def programs(self, rows: int, n: int) -> int:
        return -(-rows // self.m) * -(-n // self.n)

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def pick(tiles: Sequence[tuple[int | None, Tile]], rows: int) -> Tile:
    """The tile for this many rows: the first of ``(limit, tile)`` with ``rows <= limit``."""
    return next(tile for limit, tile in tiles if limit is None or rows <= limit)


def operand(dtype: torch.dtype) -> Any:
    """The Triton type in which ``dtype`` enters a dot.

    The interpreter multiplies bfloat16 as bit patterns and truncates where the GPU rounds, so there
    bfloat16 is widened to float32 (exact) and ``output`` leaves the rounding to torch.
    """
    if INTERPRET and dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).split(".")[1]))


def output(like: torch.Tensor, rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized y[rows, n] for the kernel to write; the launch returns ``y.to(dtype)``."""
    widen = INTERPRET and dtype == torch.bfloat16
    return like.new_empty(rows, n, dtype=torch.float32 if widen else dtype)


def has_triton(p: Problem) -> str | None:
    return None if HAS_TRITON else "needs Triton, which is not installed"


def weight_is(granularity: str, *domains: str) -> Need:
    """The weight is quantized per ``granularity``, its zero point in one of ``domains``."""

    def need(p: Problem) -> str | None:
        w = p.scheme.weight
        if w.granularity != granularity:
            return f"takes weights quantized per {granularity}, not per {w.granularity}"
        if w.zero_point_domain not in domains:
            return f"takes weights with zero points of {domains}, not {w.zero_point_domain}"
        return None

    return need


def input_is(*domains: str) -> Need:
    """The activations are quantized per token, their zero point in one of ``domains``."""

    def need(p: Problem) -> str | None:
        x = p.scheme.input
        if x is None or x.granularity not in ("token", "tensor"):
            return "takes activations quantized per token or tensor"
        if x.zero_point_domain not in domains:
            return f"takes activations with zero points of {domains}, not {x.zero_point_domain}"
        return None

    return need


def k_at_most(limit: int, why: str) -> Need:
    """``k`` is at most ``limit``, above which ``why``."""
    return lambda p: None if p.k <= limit else f"k = {p.k} is over {limit}: {why}"


def weight_bytes(p: Problem) -> float:
    """Bytes of codes and qparams of the weight."""
    w = p.scheme.weight
    blocks = p.n * (p.k // w.group_size if w.group_size else 1)
    per_block = w.scale_dtype.itemsize * (1 if w.zero_point_domain == "none" else 2)
    return p.n * p.k * w.bits / 8 + blocks * per_block


def estimate(p: Problem, *, operations: str, memory: float, compute: float) -> sympy.Expr:
    """Seconds of one launch that reads the weight at the fraction ``memory`` of the device's
    bandwidth and does its ``operations`` at the fraction ``compute`` of their peak."""
    moved = weight_bytes(p) / memory
    return roofline(p, weight_bytes=moved, operations=operations, efficiency=compute)
