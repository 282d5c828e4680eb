"""The reported error is that of the outputs, and the best candidate of each row is taken."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.scheme import Quantized
from fxquant.solvers import SOLVERS, objective, output_error
from fxquant.solvers.objective import best_rows, energy

from .problems import SPECS, gram_of, plain, problem, true_error

NAMED = ("uint4-16-float", "int4-channel", "int3-32", "e4m3-channel")


@pytest.mark.parametrize("name", NAMED)
def test_error_is_that_of_the_outputs(name, monkeypatch):
    spec = SPECS[name]
    w, x = problem(dtype=torch.float64)
    q = spec.quantize_weight(w)
    outputs = x @ (w - spec.dequantize(q, torch.float64)).T
    hessian = gram_of(x).hessian
    found = output_error(w, q, spec, hessian)
    torch.testing.assert_close(found, outputs.square().sum(0), rtol=1e-12, atol=0)
    monkeypatch.setattr(objective, "SLAB", 4 * 96)
    assert torch.equal(output_error(w, q, spec, hessian).round(decimals=9), found.round(decimals=9))
    change = w - spec.dequantize(q, torch.float64)
    assert torch.equal(output_error(w, q, spec, None), change.square().sum(1))


def test_rounding_makes_no_energy_negative():
    x = torch.ones(1, 64) * 1e3
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    rows = rows - rows.mean(1, keepdim=True)  # in the null space of x^T x, up to rounding
    assert ((rows @ (x.T @ x)) * rows).sum(1).amin() < 0
    assert energy(rows, x.T @ x).amin() == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_records_hold_true_figures(solver):
    spec = SPECS["uint4-16-float"]
    w, x = problem()
    codes, record = SOLVERS[solver](w, spec, gram_of(x))
    assert record.solver == solver and record.tokens == 300
    assert record.error == pytest.approx(true_error(w, codes, spec, x), rel=1e-4)
    rtn = spec.quantize_weight(w)
    assert record.baseline == pytest.approx(true_error(w, rtn, spec, x), rel=1e-4)
    signal = float((x.double() @ w.double().T).square().sum())
    assert record.signal == pytest.approx(signal, rel=1e-4)
    assert record.relative == record.error / record.signal
    assert record.gain == 1 - record.error / record.baseline
    assert sum(record.rows.values()) == len(w)


def test_an_error_of_nothing_has_figures():
    codes, record = SOLVERS["rtn"](torch.zeros(3, 32), SPECS["int4-16"])
    assert record.tokens == 0 and record.relative == record.gain == 0.0
    assert not plain(codes, SPECS["int4-16"]).any()


@pytest.mark.parametrize("name", ["uint4-16-float", "int4-channel", "e4m3-channel"])
def test_best_rows_takes_codes_and_qparams_together(name):
    spec = SPECS[name]
    weights = [torch.randn(4, 32, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    a, b, c = (spec.quantize(w) for w in weights)
    errors = {
        "a": torch.tensor([1.0, 2.0, 3.0, 5.0]),
        "b": torch.tensor([1.0, 1.0, 4.0, math.nan]),
        "c": torch.tensor([2.0, 3.0, 2.0, math.nan]),
    }
    best, error, rows = best_rows({"a": a, "b": b, "c": c}, errors)
    assert error.tolist() == [1.0, 1.0, 2.0, 5.0]  # a tie and NaN leave the earlier one
    assert {name: int(count) for name, count in rows.items()} == {"a": 2, "b": 1, "c": 1}
    for row, source in enumerate((a, b, c, a)):
        for field, found, wanted in zip(Quantized._fields, best, source, strict=True):
            if wanted is not None:
                assert found.dtype == wanted.dtype, field
                assert torch.equal(found[row].double(), wanted[row].double()), (field, row)
