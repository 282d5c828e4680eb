"""Solving that stops, goes on or is refused: until all is solved nothing of the model has changed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import (
    CaptureFailed,
    InvalidOption,
    NoCalibrationData,
    NonFiniteActivation,
    NothingObserved,
    ResumeMismatch,
    UnsupportedSpec,
)
from fxquant.solvers import get_solver

from .conftest import MLP, Block
from .sequential_reference import QUIET, stages_of


def interrupted_after(count: int):
    """GPTQ that stops at the layer after ``count`` ones; what it was asked for is listed."""
    asked: list[str] = []

    def solve(weight, spec, gram=None, *, layer="weight", **options):
        if len(asked) == count:
            raise KeyboardInterrupt
        asked.append(layer)
        return get_solver("gptq")(weight, spec, gram, layer=layer, **options)

    return replace(get_solver("gptq"), function=solve), asked


def test_an_interrupted_run_changes_nothing_and_goes_on_where_it_was(tmp_path):
    model = nn.Sequential(*(Block(32) for _ in range(3))).eval().requires_grad_(False)
    data = [torch.randn(2, 5, 32) for _ in range(3)]
    whole, before = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    fxquant.quantize(whole, "int4wo-32", solver="gptq", batches=data, **QUIET)
    run = {"recipe": "int4wo-32", "batches": data, "folder": tmp_path / "run", **QUIET}
    first, asked = interrupted_after(14)
    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize(model, solver=first, **run)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    second, rest = interrupted_after(-1)
    fxquant.quantize(model, solver=second, **run)
    assert 0 < len(rest) < 18 and rest[-1] == "2.down"
    assert set(asked) | set(rest) == {n for stage in stages_of(3) for n in stage}
    mine, theirs = model.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert model.get_submodule("0.q").record == whole.get_submodule("0.q").record


@pytest.mark.parametrize("what", ["weights", "batches", "scheme", "options"])
def test_a_folder_of_another_run_is_refused(tmp_path, what):
    model = MLP().eval().requires_grad_(False)
    data = [torch.randn(6, 64)]
    run = {"recipe": "int4wo-32", "solver": "gptq", "batches": data, "folder": tmp_path, **QUIET}
    fxquant.quantize(copy.deepcopy(model), **run)
    if what == "weights":
        model.up.weight[3, 5] += 1
    run |= {
        "weights": {},
        "batches": {"batches": [torch.randn(6, 64)]},
        "scheme": {"recipe": "int4wo-64"},
        "options": {"solver": get_solver("gptq", act_order=False)},
    }[what]
    with pytest.raises(ResumeMismatch, match="another folder"):
        fxquant.quantize(model, **run)
    assert isinstance(model.up, nn.Linear)


@pytest.mark.parametrize("what", ["folds", "numbers"])
def test_other_folds_or_numbers_in_a_batch_are_another_run(tmp_path, what):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x, power=1.0):
            return self.up(self.norm(x) ** power)

    model = Scaled().eval().requires_grad_(False)
    x = torch.randn(6, 32)
    run = {"solver": "gptq", "batches": [{"x": x, "power": 2.0}], "folder": tmp_path, **QUIET}
    fxquant.quantize(copy.deepcopy(model), "int8dq", **run)
    if what == "folds":
        run["stats"] = fxquant.calibrate(model, run["batches"], compiled=False, progress=False)
    else:
        run["batches"] = [{"x": x, "power": 3.0}]
    with pytest.raises(ResumeMismatch):
        fxquant.quantize(model, "int8dq", **run)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.never, self.tied = (nn.Linear(32, 32) for _ in range(3))
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.first(x).relu_())


def test_what_no_batch_reaches_is_an_error_before_anything_changes():
    model = Sometimes().eval().requires_grad_(False)
    data = [torch.randn(5, 32)]
    with pytest.raises(NoCalibrationData, match="never: gptq"):
        fxquant.quantize(model, "int4wo-32", solver="gptq", batches=data, **QUIET)
    assert isinstance(model.first, nn.Linear)
    recipe = {"never": None, "*": "int4wo-32"}
    fxquant.quantize(model, recipe, solver="gptq", batches=data, **QUIET)
    assert torch.equal(model.first.codes, model.tied.codes), "tied weights stay tied"
    assert isinstance(model.never, nn.Linear)


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(x)


def test_bad_input_is_named():
    model = MLP().eval().requires_grad_(False)
    good, bad = torch.randn(4, 64), torch.randn(4, 64)
    bad[2, 7] = torch.inf
    gptq = {"solver": "gptq", **QUIET}
    with pytest.raises(NothingObserved, match="there was no batch"):
        fxquant.quantize(model, "int4wo-32", batches=[], **gptq)
    with pytest.raises(NonFiniteActivation, match=r"^up: .*channel 7"):
        fxquant.quantize(model, "int4wo-32", batches=[good, bad], **gptq)
    with pytest.raises(CaptureFailed, match="one graph"):
        broken = Breaks().eval().requires_grad_(False)
        fxquant.quantize(nn.Sequential(broken), "int4wo-32", batches=[torch.randn(2, 32)], **gptq)
    with pytest.raises(InvalidOption, match="batches"):
        fxquant.quantize(model, "int4wo-32", solver="gptq")
    with pytest.raises(InvalidOption, match="without batches"):
        fxquant.quantize(model, "int4wo-32", solver="hqq", folder="somewhere")
    with pytest.raises(InvalidOption, match="keep"):
        fxquant.quantize(model, "int4wo-32", batches=[good], keep="attic", **gptq)
    with pytest.raises(InvalidOption, match="one of rtn"):
        fxquant.quantize(model, "int4wo-32", solver="gptqq", batches=[good])
    with pytest.raises(InvalidOption, match="block_size"):
        get_solver("gptq", block=64)
    with pytest.raises(InvalidOption, match="solver"):
        fxquant.quantize(model, "int4wo-32", batches=[good])
    with pytest.raises(InvalidOption, match="an iterable of batches"):
        fxquant.quantize(model, "int4wo-32", batches=good, **gptq)
    with pytest.raises(InvalidOption, match="gram"):
        stats = fxquant.calibrate(model, [good], compiled=False, progress=False)
        fxquant.quantize(model, "int4wo-32", stats=stats, **gptq)
    assert isinstance(model.up, nn.Linear) and isinstance(model.down, nn.Linear)


def test_a_failing_solver_without_data_changes_nothing():
    model = MLP().requires_grad_(False)
    calls = []

    def solve(weight, spec, gram=None, *, layer="weight", **options):
        calls.append(layer)
        if len(calls) == 4:  # two trials of one row come first
            raise KeyboardInterrupt
        return get_solver("mse")(weight, spec, layer=layer)

    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize(model, "int4wo-32", solver=replace(get_solver("mse"), function=solve))
    assert calls == ["up", "down", "up", "down"]
    assert isinstance(model.up, nn.Linear) and isinstance(model.down, nn.Linear)


def test_a_solver_that_does_not_serve_a_scheme_says_so_before_anything_changes():
    model = MLP().requires_grad_(False)
    recipe = {"up": "int4wo-32", "down": "int8wo"}
    with pytest.raises(UnsupportedSpec, match=r"^down: hqq cannot solve"):
        fxquant.quantize(model, recipe, solver="hqq")
    assert isinstance(model.up, nn.Linear)
