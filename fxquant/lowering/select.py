"""Which kernel computes a linear: the declared needs first, then cost, then measured tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cost import LARGEST, _compiled, crossovers
from .kernel import CANONICAL, KERNELS, LAYOUTS, Kernel, Layout, Problem
from .tuning import remembered, tuned_kernels

FALLBACK = "dequantize"

TYPICAL_ROWS = (1, 16, 256, 2048)
"""A layout is chosen once for a layer: the one whose kernels take least time over these."""


@dataclass(frozen=True)
class Choice:
    """The kernels for one linear: ``steps`` are (kernel, first M), measured or by their cost; ``refused``
    says why not others."""

    layout: Layout
    steps: tuple[tuple[Kernel, int], ...]
    refused: dict[str, str]
    measured: bool = False

    def at(self, rows: int) -> Kernel:
        """The kernel for this number of rows."""
        return next(k for k, first in reversed(self.steps) if rows >= first)

    @property
    def plan(self) -> str:
        """The steps as ``fxquant.dispatch`` reads them: ``a<17;b``."""
        limits = [first for _, first in self.steps[1:]]
        names = [kernel.name for kernel, _ in self.steps]
        return ";".join([*(f"{n}<{m}" for n, m in zip(names, limits, strict=False)), names[-1]])


def select(problem: Problem) -> Choice:
    """The layout and kernels for ``problem``; ``problem.m`` is not looked at.

    All kernels of a choice share a layout, so that prefill and decode share one packed weight.
    """
    return _select(replace(problem, m=None))


@remembered
def _select(whole: Problem) -> Choice:
    reasons = {k.name: k.refusal(whole) for k in KERNELS.values()}
    usable = [k for k in KERNELS.values() if reasons[k.name] is None]
    refused = {name: why for name, why in reasons.items() if why}
    by_layout: dict[str, list[Kernel]] = {}
    for kernel in usable:
        by_layout.setdefault(kernel.layout.name, []).append(kernel)
    if tuned := _tuned(whole, usable):
        kernels = [k for k, _ in tuned]
        others = _not_chosen(usable, kernels)
        return Choice(kernels[0].layout, tuple(tuned), refused | others, measured=True)
    fallback = KERNELS[FALLBACK]
    if whole.scheme.input is None:  # it unpacks any layout
        for kernels in by_layout.values():
            if fallback not in kernels:
                kernels.append(fallback)
    elif len(usable) > 1:  # quantized activations promise a product of codes wherever there is one
        by_layout[CANONICAL].remove(fallback)
        by_layout = {name: kernels for name, kernels in by_layout.items() if kernels}
    total = {
        name: sum(min(_compiled(k.cost(whole))(m) for k in kernels) for m in TYPICAL_ROWS)
        for name, kernels in by_layout.items()
    }
    layout = min(total, key=total.__getitem__)
    kernels = by_layout[layout]
    steps = [(kernels[i], first) for i, first in crossovers([k.cost(whole) for k in kernels])]
    chosen = [k for k, _ in steps]
    return Choice(LAYOUTS[layout], tuple(steps), refused | _not_chosen(usable, chosen))


def _not_chosen(usable: list[Kernel], chosen: list[Kernel]) -> dict[str, str]:
    return {k.name: "slower by the cost model" for k in usable if k not in chosen}


def _tuned(problem: Problem, usable: list[Kernel]) -> list[tuple[Kernel, int]]:
    """The measured steps for this shape; a stretch whose kernel cannot be used here goes to those of the
    same layout, by their cost."""
    scheme, known = problem.scheme, {k.name: k for k in usable}
    measured = tuned_kernels(problem.device.name, scheme.name, scheme.family, problem.n, problem.k)
    layout = next((known[name].layout for name, _ in measured if name in known), None)
    if layout is None:
        return []
    others = [k for k in usable if k.layout is layout]
    costly = [(others[i], first) for i, first in crossovers([k.cost(problem) for k in others])]
    steps: list[tuple[Kernel, int]] = []
    for (name, first), (_, end) in zip(measured, [*measured[1:], ("", LARGEST)], strict=True):
        steps += [(known[name], first)] if name in known else _between(costly, first, end)
    changes = [i == 0 or kernel is not steps[i - 1][0] for i, (kernel, _) in enumerate(steps)]
    return [step for step, changed in zip(steps, changes, strict=True) if changed]


def _between(steps: Sequence[tuple[Kernel, int]], first: int, end: int) -> list[tuple[Kernel, int]]:
    """The part of ``steps`` that is valid from ``first`` rows to below ``end``."""
    stretches = zip(steps, [*steps[1:], (steps[-1][0], end)], strict=True)
    return [(k, max(at, first)) for (k, at), (_, last) in stretches if at < end and last > first]
