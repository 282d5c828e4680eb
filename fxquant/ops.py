"""The ``fxquant::`` op library: schemas, fakes and reference implementations.

The reference computes in float32 (float64 for float64 activations) and is the meaning of every
later stage. Ops name their scheme by string, so that a graph can be printed, diffed and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import observers
from .errors import InvalidOption
from .inductor import outside_autocast
from .scheme import Quantized, QuantSpec, get_scheme

LIBRARY = torch.library.Library("fxquant", "DEF")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

GATES = {f"{name}_mul": name for name in ACTIVATIONS if name}
"""Epilogues of two linears in one: the activation of the first half of the channels, times the second."""


def finish(y: torch.Tensor, epilogue: str) -> torch.Tensor:
    """``y`` [..., N] through one of ACTIVATIONS, or [..., N / 2] through one of GATES."""
    if epilogue not in GATES:
        return ACTIVATIONS[epilogue](y)
    first, second = y.chunk(2, -1)
    return ACTIVATIONS[GATES[epilogue]](first) * second


def outputs(n: int, epilogue: str) -> int:
    """How many channels the epilogue makes of the ``n`` of a weight."""
    return n // 2 if epilogue in GATES else n


def define(schema: str) -> Callable[[Callable], Callable]:
    """Define an op whose reference is traceable, so that it is its own fake as well. Autocast does not
    reach into it."""
    name = schema[: schema.index("(")]

    def register(reference: Callable) -> Callable:
        @wraps(reference)
        def outside(*args: Any, **kwargs: Any) -> Any:
            with outside_autocast():
                return reference(*args, **kwargs)

        LIBRARY.define(schema)
        LIBRARY.impl(name, outside, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxquant::{name}", reference, lib=LIBRARY)
        return reference

    return register


def spec_of(scheme: str, role: str) -> QuantSpec:
    """The QuantSpec of ``role`` ("weight" or "input") in ``scheme``."""
    spec = getattr(get_scheme(scheme), role)
    assert isinstance(spec, QuantSpec), f"{scheme} does not quantize its {role}"
    return spec


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bundle(tensors: Sequence[torch.Tensor]) -> Quantized:
    """(codes, scale[, zero]) as a Quantized."""
    return Quantized(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)


@define('quantize(Tensor x, str scheme, str role, str gate="") -> Tensor[]')
def quantize(x: torch.Tensor, scheme: str, role: str, gate: str = "") -> list[torch.Tensor]:
    """Codes, scale and, for formats that have one, zero point of ``x``, or of what one of GATES makes
    of it."""
    spec = spec_of(scheme, role)
    x = finish(x, gate)
    found = spec.quantize_weight(x) if role == "weight" else spec.quantize(x)
    return [t for t in found if t is not None]


@torch.library.register_fake("fxquant::quantize", lib=LIBRARY, allow_override=True)
def quantize_fake(x, scheme, role, gate=""):  # shapes alone: the reference is a score of ops
    spec = spec_of(scheme, role)
    *lead, k = x.shape
    shape = [*lead, outputs(k, gate)]
    codes = x.new_empty([*lead, spec.stored_width(shape[-1])], dtype=spec.codes_dtype)
    extents = zip(shape, spec.block_size(x.dim()), strict=True)
    blocks = [1 if b == -1 else n // b for n, b in extents]
    scale = x.new_empty(blocks, dtype=spec.scale_dtype)
    zero = {"none": None, "float": spec.scale_dtype, "int": torch.int32}[spec.zero_point_domain]
    return [codes, scale] if zero is None else [codes, scale, x.new_empty(blocks, dtype=zero)]


@define("static_qparams(Tensor ends, Tensor? smoothing, str scheme) -> Tensor[]")
def static_qparams(
    ends: torch.Tensor, smoothing: torch.Tensor | None, scheme: str
) -> list[torch.Tensor]:
    """Scale [1] float32 and, for schemes that have one, zero point [1] int32 of a static input.

    ends: its smallest and largest values [2, K] by channel, or [2, 1]; smoothing: float32 [K], what
    the channels of the input were divided by after that.
    """
    values = ends if smoothing is None else ends / smoothing
    return [t for t in spec_of(scheme, "input").qparams(values.flatten()) if t is not None]


@define("quantize_static(Tensor x, Tensor scale, Tensor? zero, str scheme) -> Tensor")
def quantize_static(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """Codes of ``x`` for the ``scale`` and ``zero`` [1] of a static scheme's input."""
    return spec_of(scheme, "input").encode(x, scale, zero)


@torch.library.register_fake("fxquant::quantize_static", lib=LIBRARY, allow_override=True)
def _quantize_static_fake(x, scale, zero, scheme):
    return x.new_empty(x.shape, dtype=spec_of(scheme, "input").codes_dtype)


@define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, str scheme, str role, ScalarType dtype)"
    " -> Tensor"
)
def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: str,
    role: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return spec_of(scheme, role).dequantize(Quantized(codes, scale, zero), dtype)


@torch.library.register_fake("fxquant::dequantize", lib=LIBRARY, allow_override=True)
def _dequantize_fake(codes, scale, zero, scheme, role, dtype):
    width = spec_of(scheme, role).width(codes.shape[-1])
    return codes.new_empty((*codes.shape[:-1], width), dtype=dtype)


@define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, str scheme,"
    " str epilogue, Tensor? x_scale=None, Tensor? x_zero=None, ScalarType? dtype=None) -> Tensor"
)
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    epilogue: str,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``finish(dequantize(quantize(x)) @ dequantize(codes).T + bias)``, rounded once to x.dtype. (Kernels
    may round both halves of one of GATES before their product, as the ops it stands for did.)

    For a static scheme ``x`` is codes already (``quantize_static``), x_scale and x_zero [1] are what
    they were made with, and the result has ``dtype``. Raises InvalidOption where these are missing,
    or given to another scheme.
    """
    row = get_scheme(scheme)
    result = _result_dtype(x, scheme, x_scale, dtype)
    wide = compute_dtype(result)
    if row.input is None:
        x_wide = x.to(wide)
    else:
        q = row.input.quantize(x) if x_scale is None else Quantized(x, x_scale, x_zero)
        x_wide = row.input.dequantize(q, wide)
    w = row.weight.dequantize(Quantized(codes, scale, zero), wide)
    y = F.linear(x_wide, w, None if bias is None else bias.to(wide))
    return finish(y, epilogue).to(result)


def _result_dtype(
    x: torch.Tensor, scheme: str, x_scale: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    given = ("none" if x_scale is None else "a tensor", dtype)
    if not get_scheme(scheme).static:
        if x_scale is not None or dtype is not None:
            expected = f"neither: the input of {scheme} is not static"
            raise InvalidOption(name="x_scale, dtype", value=given, expected=expected)
        return x.dtype
    if x_scale is None or dtype is None:
        expected = f"both, beside codes of x: {scheme} takes its input's scale from calibration"
        raise InvalidOption(name="x_scale, dtype", value=given, expected=expected)
    return dtype


@torch.library.register_fake("fxquant::linear", lib=LIBRARY, allow_override=True)
def _linear_fake(
    x, codes, scale, zero, bias, scheme, epilogue, x_scale=None, x_zero=None, dtype=None
):
    result = _result_dtype(x, scheme, x_scale, dtype)
    return x.new_empty((*x.shape[:-1], outputs(codes.shape[0], epilogue)), dtype=result)


class LinearArguments(NamedTuple):
    """The arguments of a ``fxquant::linear`` node, by name: ``LinearArguments(*node.args)``."""

    x: Any
    codes: Any
    scale: Any
    zero: Any
    bias: Any
    scheme: str
    epilogue: str
    x_scale: Any = None
    x_zero: Any = None
    dtype: torch.dtype | None = None


@define("observe(Tensor x, str name) -> Tensor")
def observe(x: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of ``x``, which is sent to whoever collects values (``observers.collecting``)."""
    observers.send(name, x)
    return x.clone()


@torch.library.register_fake("fxquant::observe", lib=LIBRARY, allow_override=True)
def _observe_fake(x, name):
    return torch.empty_like(x)
