"""The ``fxquant::`` op library: schemas, fakes and reference implementations.

The reference computes in float32 (float64 for float64 activations) and is the meaning of every
later stage. Ops name their scheme by string, so that a graph can be printed, diffed and cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from . import observers
from .scheme import Quantized, QuantSpec, get_scheme

LIBRARY = torch.library.Library("fxquant", "DEF")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def define(schema: str) -> Callable[[Callable], Callable]:
    """Define an op whose reference is traceable, so that it is its own fake as well."""
    name = schema[: schema.index("(")]

    def register(reference: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
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


@define("quantize(Tensor x, str scheme, str role) -> Tensor[]")
def quantize(x: torch.Tensor, scheme: str, role: str) -> list[torch.Tensor]:
    """Codes, scale and, for formats that have one, zero point of ``x``."""
    spec = spec_of(scheme, role)
    found = spec.quantize_weight(x) if role == "weight" else spec.quantize(x)
    return [t for t in found if t is not None]


@torch.library.register_fake("fxquant::quantize", lib=LIBRARY, allow_override=True)
def _quantize_fake(x, scheme, role):  # shapes alone: the reference is a score of ops
    spec = spec_of(scheme, role)
    per_byte = spec.codes_per_byte
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // per_byte), dtype=spec.codes_dtype)
    blocks = [
        1 if b == -1 else n // b for n, b in zip(x.shape, spec.block_size(x.dim()), strict=True)
    ]
    scale = x.new_empty(blocks, dtype=spec.scale_dtype)
    zero = {"none": None, "float": spec.scale_dtype, "int": torch.int32}[spec.zero_point_domain]
    return [codes, scale] if zero is None else [codes, scale, x.new_empty(blocks, dtype=zero)]


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
    per_byte = spec_of(scheme, role).codes_per_byte
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * per_byte), dtype=dtype)


@define(
    "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, str scheme,"
    " str epilogue) -> Tensor"
)
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    scheme: str,
    epilogue: str,
) -> torch.Tensor:
    """``activation(dequantize(quantize(x)) @ dequantize(codes).T + bias)``, rounded once to x.dtype."""
    row = get_scheme(scheme)
    wide = compute_dtype(x.dtype)
    x_wide = x.to(wide)
    if row.input is not None:
        x_wide = row.input.dequantize(row.input.quantize(x), wide)
    w = row.weight.dequantize(Quantized(codes, scale, zero), wide)
    y = F.linear(x_wide, w, None if bias is None else bias.to(wide))
    return ACTIVATIONS[epilogue](y).to(x.dtype)


@torch.library.register_fake("fxquant::linear", lib=LIBRARY, allow_override=True)
def _linear_fake(x, codes, scale, zero, bias, scheme, epilogue):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@define("observe(Tensor x, str name) -> Tensor")
def observe(x: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of ``x``, which is sent to whoever collects values (``observers.collecting``)."""
    observers.send(name, x)
    return x.clone()


@torch.library.register_fake("fxquant::observe", lib=LIBRARY, allow_override=True)
def _observe_fake(x, name):
    return torch.empty_like(x)
