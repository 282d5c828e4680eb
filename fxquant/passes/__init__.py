"""The passes, and PIPELINE, the order they run in. Each is ``GraphModule -> PassResult``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..recipe import Recipe
from .base import Pass, rewrites
from .equalization import equalize
from .folding import fold_qparams
from .fusion import fuse
from .gating import gate
from .handover import hand_over
from .lowering import lower
from .merging import merge
from .normalization import normalize
from .observation import insert_observers
from .quantization import quantize_weights
from .verification import verify


@dataclass(frozen=True)
class Choices:
    """What the user has decided. stats and smooth: see ``equalize``, where smooth is False or there are
    no statistics nothing is smoothed; stats and ranges: see ``quantize_weights``."""

    recipe: Recipe
    strict: bool = False
    stats: Any = None
    smooth: Any = 0.5
    ranges: str = "minmax"

    @property
    def smooths(self) -> bool:
        return bool(self.stats) and self.smooth is not False


PIPELINE: tuple[tuple[str, Callable[[Choices], Pass | None]], ...] = (
    ("normalized", lambda c: normalize),
    ("equalized", lambda c: equalize(c.stats, c.smooth, c.recipe) if c.smooths else None),
    ("quantized", lambda c: quantize_weights(c.recipe, c.stats, c.ranges)),
    ("folded", lambda c: fold_qparams),
    ("fused", lambda c: fuse),
    ("handed_over", lambda c: hand_over),
    ("merged", lambda c: merge),
    ("gated", lambda c: gate),
    ("lowered", lambda c: lower(strict=c.strict)),
    ("verified", lambda c: verify),
)
"""(name of the dump after the pass, the pass for what the user has decided, or None)."""


def pipeline(recipe: Any, **decided: Any) -> list[tuple[str, Pass]]:
    """The passes of PIPELINE for ``recipe`` and whatever else of Choices is decided."""
    choices = Choices(Recipe.of(recipe), **decided)
    found = [(name, make(choices)) for name, make in PIPELINE]
    return [(name, one) for name, one in found if one is not None]


__all__ = [
    "PIPELINE",
    "Pass",
    "equalize",
    "fold_qparams",
    "fuse",
    "gate",
    "hand_over",
    "insert_observers",
    "lower",
    "merge",
    "normalize",
    "pipeline",
    "quantize_weights",
    "rewrites",
    "verify",
]
