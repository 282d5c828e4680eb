"""Better codes for one linear: solvers by name, each a function of a weight, a spec and a Gram.

``SOLVERS[name](weight, spec, gram, layer=...)`` returns a Solution: codes and qparams as the spec's
own quantization holds them, and a Record of the error on the data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import InvalidOption
from ..scheme import QuantSpec
from . import awq, gptq, hqq, rtn
from .awq import ScaleSearch, search_scales
from .gram import Gram
from .objective import Record, Solution, output_error
from .smoothquant import LeastError, least_error


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A row of SOLVERS. ``needs_data``: without a Gram that holds tokens it is NoCalibrationData."""

    name: str
    function: Callable[..., Solution]
    needs_data: bool
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, weight: torch.Tensor, spec: QuantSpec, gram: Gram | None = None, **options: Any
    ) -> Solution:
        return self.function(weight, spec, gram, **{**self.options, **options})


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            name="rtn",
            function=rtn.solve,
            needs_data=False,
            summary="round to nearest, min-max ranges",
        ),
        Solver(
            name="mse",
            function=rtn.solve,
            needs_data=False,
            summary="round to nearest, ranges of the least squared error",
            options={"ranges": "mse"},
        ),
        Solver(
            name="mse-diag",
            function=rtn.solve,
            needs_data=True,
            summary="the same, errors weighted by the inputs' mean squares",
            options={"ranges": "mse-diag"},
        ),
        Solver(
            name="hqq",
            function=hqq.solve,
            needs_data=False,
            summary="zero points of the least p-norm of errors",
        ),
        Solver(
            name="gptq",
            function=gptq.solve,
            needs_data=True,
            summary="column by column, later ones making up for the errors of earlier ones",
        ),
    )
}


def get_solver(name: str | Solver, **options: Any) -> Solver:
    """The solver called ``name``, with some of its function's options. Raises InvalidOption, which lists
    what exists."""
    if isinstance(name, Solver):
        return name
    try:
        found = SOLVERS[name]
        known = list(inspect.signature(found.function).parameters)[3:]
        for option in options:
            if option not in known or option == "layer":
                expected = f"an option of {name}: {', '.join(known[:-1])}"
                raise InvalidOption(name=option, value=options[option], expected=expected)
        return replace(found, options={**found.options, **options}) if options else found
    except (KeyError, TypeError):
        expected = f"one of {', '.join(SOLVERS)}"
        raise InvalidOption(name="solver", value=name, expected=expected) from None


__all__ = [
    "SOLVERS",
    "Gram",
    "LeastError",
    "Record",
    "ScaleSearch",
    "Solution",
    "Solver",
    "awq",
    "get_solver",
    "gptq",
    "hqq",
    "least_error",
    "output_error",
    "rtn",
    "search_scales",
]
