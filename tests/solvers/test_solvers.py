"""The table of solvers: one way to call them all, and codes that every kernel takes."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import InvalidOption, NoCalibrationData, UnsupportedSpec
from fxquant.scheme import SCHEMES
from fxquant.solvers import SOLVERS, get_solver

from .problems import assert_canonical, gram_of, problem


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_solver_takes_every_scheme_or_says_why_not(solver, scheme):
    spec = SCHEMES[scheme].weight
    w, x = problem(n=4, k=256, tokens=64)
    try:
        codes, record = SOLVERS[solver](w, spec, gram_of(x), layer="up")
    except UnsupportedSpec:
        assert solver == "hqq" and spec.zero_point_domain != "float"
        return
    assert_canonical(codes, w, spec)
    assert record.solver == solver and record.tokens == 64
    # these two lower an error of the weight, not of the outputs
    assert solver in ("mse", "hqq") or record.error <= record.baseline


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_needs_data_is_true(solver):
    w, _ = problem()
    spec = SCHEMES["int4wo-32"].weight
    if solver.needs_data:
        with pytest.raises(NoCalibrationData, match=f"^up: {solver.name} works on"):
            solver(w, spec, layer="up")
    else:
        assert solver(w, spec, layer="up").record.tokens == 0


def test_options_of_a_row_are_overridden_by_those_of_a_call():
    w, _ = problem()
    spec = SCHEMES["int4wo-32"].weight
    assert torch.equal(
        SOLVERS["mse"](w, spec, ranges="minmax").quantized.codes, spec.quantize(w).codes
    )


def test_unknown_names_are_refused_with_the_known_ones():
    assert get_solver("gptq") is SOLVERS["gptq"]
    for name in ("obq", None, []):
        with pytest.raises(InvalidOption, match=r"'solver' is .*rtn, mse, mse-diag, hqq, gptq"):
            get_solver(name)
