"""The ops that a lowered graph calls: ``pack`` for weights, ``dispatch`` where M is symbolic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import ACTIVATIONS, LIBRARY, define
from ..scheme import Quantized, Scheme, get_scheme
from .kernel import CANONICAL, KERNELS, LAYOUTS


@define("pack(Tensor codes, Tensor scale, Tensor? zero, str scheme, str layout) -> Tensor[]")
def pack(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: str, layout: str
) -> list[torch.Tensor]:
    """Canonical codes and qparams in a kernel's layout. Outputs never alias the inputs."""
    inputs = [t for t in (codes, scale, zero) if t is not None]
    packed = LAYOUTS[layout].pack(get_scheme(scheme), Quantized(codes, scale, zero))
    return [t.clone() if any(t is i for i in inputs) else t for t in packed]


@define(
    "dispatch(Tensor x, Tensor[] packed, Tensor? bias, str scheme, str layout, str plan,"
    " str epilogue, int n) -> Tensor"
)
def dispatch(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    bias: torch.Tensor | None,
    scheme: str,
    layout: str,
    plan: str,
    epilogue: str,
    n: int,
) -> torch.Tensor:
    """Run the kernel that ``plan`` names for this number of rows ("a<17;b<257;c": a below 17, ...)."""
    rows, name = x.shape[0], ""
    for step in plan.split(";"):
        name, _, limit = step.partition("<")
        if not limit or rows < int(limit):
            break
    return run_kernel(name, get_scheme(scheme), layout, x, packed, bias, epilogue, n)


@torch.library.register_fake("fxquant::dispatch", lib=LIBRARY, allow_override=True)
def _dispatch_fake(x, packed, bias, scheme, layout, plan, epilogue, n):  # the choice needs a real M
    return x.new_empty(x.shape[0], n)


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
    """The kernel's ``compute`` on weights packed as ``layout``, then the activation if it has none.

    A kernel of the canonical layout (the fallback) takes any layout, unpacked.
    """
    kernel = KERNELS[name]
    if kernel.layout.name != layout:
        assert kernel.layout.name == CANONICAL
        packed = [t for t in LAYOUTS[layout].unpack(scheme, packed, n, x.shape[1]) if t is not None]
    inside = epilogue if epilogue in kernel.epilogues else ""
    y = kernel.compute(scheme, x, packed, bias, inside)
    return y if inside == epilogue else ACTIVATIONS[epilogue](y)
