"""The passes, and PIPELINE, the order they run in. Each is ``GraphModule -> PassResult``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..recipe import Recipe
from .base import Pass, rewrites
from .equalization import equalize
from .folding import fold_qparams
from .fusion import fuse
from .lowering import lower
from .merging import merge
from .normalization import normalize
from .observation import insert_observers
from .quantization import quantize_weights
from .verification import verify

PIPELINE: tuple[tuple[str, Callable[[Recipe, bool], Pass]], ...] = (
    ("normalized", lambda recipe, strict: normalize),
    ("quantized", lambda recipe, strict: quantize_weights(recipe)),
    ("folded", lambda recipe, strict: fold_qparams),
    ("fused", lambda recipe, strict: fuse),
    ("merged", lambda recipe, strict: merge),
    ("lowered", lambda recipe, strict: lower(strict=strict)),
    ("verified", lambda recipe, strict: verify),
)
"""(name of the dump after the pass, the pass for a recipe and strictness)."""


def pipeline(recipe: Any, *, strict: bool = False) -> list[tuple[str, Pass]]:
    """The passes of PIPELINE for ``recipe``."""
    rules = Recipe.of(recipe)
    return [(name, make(rules, strict)) for name, make in PIPELINE]


__all__ = [
    "PIPELINE",
    "Pass",
    "equalize",
    "fold_qparams",
    "fuse",
    "insert_observers",
    "lower",
    "merge",
    "normalize",
    "pipeline",
    "quantize_weights",
    "rewrites",
    "verify",
]
