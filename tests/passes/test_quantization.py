"""quantize_weights: the reference form, which is what every later stage means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layers, stage
from fxquant.scheme import SCHEMES

from ..conftest import MLP, Block, sqnr
from .helpers import Call, assert_provenance, aten, calls, count, exact, integers, ops, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
FITTING = [
    name
    for name, row in SCHEMES.items()
    if (row.weight.group_size or 1) <= 64 and not row.static  # those: test_static.py
]


def fake_quantized(spec, x: torch.Tensor) -> torch.Tensor:
    return x if spec is None else spec.dequantize(spec.quantize(x), x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", FITTING)
@torch.no_grad()
def test_the_reference_is_linear_on_fake_quantized_tensors(scheme, dtype):
    model = MLP().requires_grad_(False).to(dtype)
    x, row = X.to(dtype), SCHEMES[scheme]

    def linear(x, layer):
        return F.linear(
            fake_quantized(row.input, x), fake_quantized(row.weight, layer.weight), layer.bias
        )

    gm = trace(model, x, to="reference", scheme=scheme)
    assert stage(gm) == "reference"
    found = count(gm)
    inputs = 2 if row.input is not None else 0
    assert found["linear"] == 2 and found["fx.quantize"] == found["fx.dequantize"] == 2 + inputs
    wanted = linear(F.gelu(linear(x, model.up)), model.down)
    y = gm(x)
    assert torch.equal(y, wanted)
    assert not torch.equal(y, model(x)), "nothing was quantized"


@torch.no_grad()
def test_an_exact_weight_gives_the_float_result():
    model, x = exact(Call(lambda m, x: F.linear(x, m.w, m.b))), integers(5, 64)
    gm = trace(model, x, to="reference", scheme="int8wo")
    assert torch.equal(gm(x), model(x))


def test_the_form_of_the_nodes():
    gm = trace(MLP(), X, to="reference", scheme="8da4w-32")
    up, down = calls(gm, aten.linear.default)
    for node, layer, line in ((up, "up", "self.up(x)"), (down, "down", "self.down(")):
        x, weight = node.args[:2]
        assert x.target is weight.target is ops.dequantize.default
        assert x.args[3:5] == ("8da4w-32", "input") and weight.args[3:5] == ("8da4w-32", "weight")
        quantized = [v.args[0].args[0] for v in (x, weight)]
        assert [q.target for q in quantized] == [ops.quantize.default] * 2
        assert quantized[1].args[0].target == f"{layer}.weight"
        assert (
            x.args[2] is not None and weight.args[2] is None
        )  # asymmetric tokens, symmetric groups
        assert_provenance([node, x, weight, *quantized], layer, line)


@torch.no_grad()
def test_per_layer_schemes_and_reasons():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 64)
            self.d = nn.Linear(64, 8)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    recipe = {"a": "int8dq", "b": "int4wo-32", "c": None}
    model = Model()
    gm = trace(model, X, to="reference", scheme=recipe)
    found = layers(gm)
    assert [layer.scheme for layer in found.values()] == ["int8dq", None, None, None]
    assert found["b"].reason == "in_features 48 is not a multiple of group_size 32"
    assert found["c"].reason == "kept float by the rule 'c'"
    assert found["d"].reason == "no rule of the recipe matches"
    assert count(gm)["fx.quantize"] == 2
    assert 36 < sqnr(gm(X), model(X)) < 60


def test_the_alias_of_a_scheme_is_written_out():
    gm = trace(MLP(), X, to="reference", scheme="W8A8")
    assert {n.args[1] for n in calls(gm, ops.quantize.default)} == {"int8dq"}
    assert layers(gm)["up"].scheme == "int8dq"


@torch.no_grad()
def test_a_shared_weight_has_its_codes_once_for_each_scheme():
    model = Call(lambda m, x: F.linear(x, m.w) + F.linear(x * 2, m.w, m.b) + F.linear(x, m.other))
    gm = trace(model, X, to="reference", scheme="int8wo")
    found = count(gm)
    assert (found["linear"], found["fx.quantize"], found["fx.dequantize"]) == (3, 2, 3)
    assert 38 < sqnr(gm(X), model(X)) < 60


def test_a_merged_weight_is_quantized_as_a_whole():
    gm = trace(lambda m, x: F.linear(x, torch.cat([m.w, m.other])), X, to="reference")
    (quantize,) = calls(gm, ops.quantize.default)
    assert quantize.args[0].target is aten.cat.default


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(64, dtype=torch.float32), "its weight has shape (64,), not (out_features"),
        (torch.zeros(0, 64), "its weight has shape (0, 64), not"),
        (torch.zeros(8, 64, dtype=torch.complex64), "its weight is complex64, not floating point"),
    ],
)
def test_weights_that_cannot_be_quantized_say_why(weight, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", weight)

        def forward(self, x):
            return F.linear(x.to(self.w.dtype), self.w)

    model = Model()
    gm = trace(model, X, to="reference", scheme="int8wo")
    (layer,) = layers(gm).values()
    assert layer.scheme is None and reason in layer.reason
    assert count(gm)["fx.quantize"] == 0
    assert torch.equal(gm(X), model(X))


def test_nothing_matches_and_nothing_changes():
    model = Block().requires_grad_(False)
    x = torch.randn(2, 7, 64)
    gm = trace(model, x, to="float")
    before = gm.code
    assert not passes.quantize_weights({"head": "int8dq"})(gm).modified
    assert gm.code == before and stage(gm) == "reference"
    assert torch.equal(gm(x), model(x))


def test_unknown_schemes_are_refused_when_the_pass_is_made():
    with pytest.raises(fxquant.errors.UnknownScheme):
        passes.quantize_weights("int9")
