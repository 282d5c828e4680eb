"""What a kernel declares: the schemes it serves, its layout, what it needs, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ..scheme import Quantized, Scheme

M = sympy.Symbol("M", positive=True, integer=True)
"""Rows of the activations: every cost is an expression in it, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a machine can do: one row of capabilities.

    bandwidth in bytes/s; peak in operations/s (a multiply-add is two) by operand type
    ("float32", "bfloat16", "int8", "float8"); launch in seconds per kernel call.
    """

    name: str
    type: str
    bandwidth: float
    peak: dict[str, float] = field(hash=False)
    launch: float
    features: frozenset[str] = frozenset()
    units: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear to lower: ``y[M, n] = x[M, k] @ weight[n, k].T + bias``; ``m`` is None if symbolic."""

    scheme: Scheme
    n: int
    k: int
    m: int | None
    dtype: torch.dtype
    bias: bool
    device: Device


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a kernel wants its weight. ``pack`` and ``unpack`` are exact inverses, in torch ops.

    pack(scheme, quantized) -> the tensors the kernel takes.
    unpack(scheme, tensors, n, k) -> the canonical Quantized, bit for bit.
    """

    name: str
    pack: Callable[[Scheme, Quantized], list[torch.Tensor]]
    unpack: Callable[[Scheme, Sequence[torch.Tensor], int, int], Quantized]


Need = Callable[[Problem], str | None]
"""Returns None where the problem can be served, else the reason in words."""

Compute = Callable[
    [Scheme, torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None, str], torch.Tensor
]
"""compute(scheme, x[M, k], packed, bias | None, epilogue) -> y[M, n] in x.dtype; traceable."""


def never(problem: Problem) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute a quantized linear.

    ``epilogues`` names those of ``ops.ACTIVATIONS`` and ``ops.GATES`` that the kernel applies itself;
    others follow it as ordinary nodes. ``quantizes``: whether the kernel quantizes the activations of a
    problem itself, so that nothing does before it. ``faults`` are problems that ``needs`` must refuse: a
    test runs them.
    """

    name: str
    families: frozenset[str]
    device: str
    layout: Layout
    compute: Compute
    cost: Callable[[Problem], sympy.Expr]
    needs: tuple[Need, ...] = ()
    epilogues: frozenset[str] = field(default_factory=frozenset)
    quantizes: Callable[[Problem], bool] = never
    faults: tuple[dict[str, object], ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """The first reason why this kernel cannot serve ``problem``, or None."""
        if problem.scheme.family not in self.families:
            return f"serves {', '.join(sorted(self.families))}, not {problem.scheme.family}"
        if self.device not in ("any", problem.device.type):
            return f"runs on {self.device}, not {problem.device.type}"
        return next((why for need in self.needs if (why := need(problem))), None)


CANONICAL = "canonical"
"""The layout of codes as they are stored; its kernels accept every layout, unpacked."""

KERNELS: dict[str, Kernel] = {}
LAYOUTS: dict[str, Layout] = {}


def kernel(
    *,
    families: Sequence[str],
    device: str,
    layout: Layout,
    cost: Callable[[Problem], sympy.Expr],
    needs: Sequence[Need] = (),
    epilogues: Sequence[str] = (),
    quantizes: Callable[[Problem], bool] = never,
    faults: Sequence[dict[str, object]] = (),
) -> Callable[[Compute], Compute]:
    """Declare the decorated ``compute`` function as a kernel under its own name."""

    def declare(compute: Compute) -> Compute:
        name = compute.__name__
        KERNELS[name] = Kernel(
            name=name,
            families=frozenset(families),
            device=device,
            layout=layout,
            compute=compute,
            cost=cost,
            needs=tuple(needs),
            epilogues=frozenset(epilogues),
            quantizes=quantizes,
            faults=tuple(faults),
        )
        LAYOUTS[layout.name] = layout
        return compute

    return declare


def activations_in(*dtypes: torch.dtype) -> Need:
    """The activations have one of ``dtypes``."""
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return lambda p: None if p.dtype in dtypes else f"takes activations of {names}, not {p.dtype}"


def multiple_of(attribute: str, value: int) -> Need:
    """``n`` or ``k`` is a multiple of ``value``."""

    def need(p: Problem) -> str | None:
        found = getattr(p, attribute)
        return None if found % value == 0 else f"{attribute} = {found} is not a multiple of {value}"

    return need


def at_most_rows(limit: int) -> Need:
    """The number of rows is known and at most ``limit``."""

    def need(p: Problem) -> str | None:
        return (
            None if p.m is not None and p.m <= limit else f"serves up to {limit} rows, here {p.m}"
        )

    return need


def has_feature(name: str) -> Need:
    """The device lists the feature ``name``."""
    return lambda p: (
        None if name in p.device.features else f"needs {name}, {p.device.name} has none"
    )
