"""The ops that a lowered graph calls: ``pack`` for weights, ``dispatch`` where M is symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops import LIBRARY, define, finish, outputs
from ..scheme import Quantized, QuantSpec, Scheme, get_scheme
from ..storage import storage_of
from .kernel import CANONICAL, KERNELS, LAYOUTS


@define("pack(Tensor codes, Tensor scale, Tensor? zero, str scheme, str layout) -> Tensor[]")
def pack(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: str, layout: str
) -> list[torch.Tensor]:
    """Canonical codes and qparams in a kernel's layout, as the scheme whose kernels it is wants them.

    Outputs share no storage with the inputs, not as views either: once packed, those are freed.
    """
    inputs = {storage_of(t) for t in (codes, scale, zero) if t is not None}
    row = get_scheme(scheme)
    q = row.weight.recoded(Quantized(codes, scale, zero), row.product.weight)
    packed = LAYOUTS[layout].pack(row.product, q)
    packed = [t.clone() if storage_of(t) in inputs else t for t in packed]
    if codes.is_cuda and not torch.cuda.is_current_stream_capturing():
        # kernels fetch their weight before those ahead of them have ended: these must not be among them
        torch.cuda.current_stream(codes.device).synchronize()
    return packed


@dataclass(frozen=True)
class Prequantized:
    """Stands for ``scheme.input`` where the activations were quantized before: ``quantize`` is free."""

    spec: QuantSpec
    codes: Quantized

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)

    def quantize(self, x: torch.Tensor) -> Quantized:
        return self.codes


def prequantized(scheme: Scheme, codes: Sequence[torch.Tensor | None]) -> Scheme:
    """``scheme`` for one call, with the activations' (codes, scale[, zero]) at hand."""
    if scheme.input is None:
        return scheme
    spec: Any = Prequantized(scheme.input, Quantized(*codes, *[None] * (3 - len(codes))))  # type: ignore
    return replace(scheme, input=spec)


def shaped_like(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stands for activations [M, K] of which codes alone exist: their shape and dtype, no memory.

    What multiplies codes asks nothing else of them.
    """
    return codes.new_empty((1, 1), dtype=dtype).expand(codes.shape)


@define(
    "dispatch(Tensor x, Tensor[] codes, Tensor[] packed, Tensor? bias, str scheme, str layout, str plan,"
    " str epilogue, int n, ScalarType? dtype=None) -> Tensor"
)
def dispatch(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    packed: list[torch.Tensor],
    bias: torch.Tensor | None,
    scheme: str,
    layout: str,
    plan: str,
    epilogue: str,
    n: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the kernel that ``plan`` names for this number of rows ("a<17;b<257;c": a below 17, ...).

    codes: ``x`` as the scheme quantizes it, or nothing where it does not. dtype: that of activations
    which come as codes, ``x`` too.
    """
    rows, name = x.shape[0], ""
    for step in plan.split(";"):
        name, _, limit = step.partition("<")
        if not limit or rows < int(limit):
            break
    row = prequantized(get_scheme(scheme), codes)
    x = x if dtype is None else shaped_like(x, dtype)
    return run_kernel(name, row, layout, x, packed, bias, epilogue, n)


@torch.library.register_fake("fxquant::dispatch", lib=LIBRARY, allow_override=True)
def _dispatch_fake(
    x, codes, packed, bias, scheme, layout, plan, epilogue, n, dtype=None
):  # the choice needs a real M
    return x.new_empty(x.shape[0], outputs(n, epilogue), dtype=dtype or x.dtype)


def run_kernel(
    name: str,
    scheme: Scheme,
    layout: str,
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    epilogue: str,
    n: int,
) -> torch.Tensor:
    """The kernel's ``compute`` on weights packed as ``layout``, then the epilogue if it has none.

    A kernel of the canonical layout (the fallback) takes any layout, unpacked.
    """
    kernel = KERNELS[name]
    if kernel.layout.name != layout:
        assert kernel.layout.name == CANONICAL
        packed = [t for t in LAYOUTS[layout].unpack(scheme, packed, n, x.shape[1]) if t is not None]
    inside = epilogue if epilogue in kernel.epilogues else ""
    y = kernel.compute(scheme, x, packed, bias, inside)
    return y if inside == epilogue else finish(y, epilogue)
