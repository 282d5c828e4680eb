"""sensitivity(): each layer quantized alone and measured; ranked, kept, plotted, made a recipe."""

from __future__ import annotations

import copy
import json
import math
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidOption

from .conftest import MLP, Block
from .sensitivity_cases import Reused, measured
from .test_architectures import gpt2, llama


@torch.no_grad()
def alone(model: nn.Module, name: str, scheme: str) -> nn.Module:
    """A copy of the model with one layer quantized by ``quantize``."""
    rules = {name: scheme, "*": None}
    return fxquant.quantize(copy.deepcopy(model).eval(), rules)


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-64", "fp8dq"])
@torch.no_grad()
def test_output_error_and_divergence_are_those_of_the_layer_alone(scheme):
    model = MLP()
    data = [torch.randn(n, 64) * s for n, s in ((5, 1.0), (9, 3.0))]
    found = measured(model, iter(data), scheme)
    assert [row.layer for row in found.rows] == ["up", "down"]
    assert found.loss is None and found.batches == 2 and not found.missed
    inputs = {"up": data, "down": [nn.functional.gelu(model.up(x)) for x in data]}
    for name, seen in inputs.items():
        changed, x = alone(model, name, scheme), torch.cat(seen)
        wanted, got = (m.get_submodule(name)(x).double() for m in (model, changed))
        error = float((got - wanted).square().sum() / wanted.square().sum())
        row = found[name, scheme]
        assert row.relative_error == pytest.approx(error, rel=1e-4)
        assert row.error_db == pytest.approx(10 * math.log10(error), abs=1e-3)
        ratios = [
            float((changed(x) - model(x)).square().sum() / model(x).square().sum()) for x in data
        ]
        assert row.loss_change == pytest.approx(sum(ratios) / 2, rel=1e-4)
        layer = changed.get_submodule(name)
        held = sum(t.nbytes for t in layer.canonical() if t is not None)
        assert row.saved_bytes == model.get_submodule(name).weight.nbytes - held


def test_loss_of_a_transformers_model_with_labels():
    model, inputs = llama()
    batches = [inputs | {"labels": inputs["input_ids"]}]
    batches += [{k: v.flip(1) for k, v in batches[0].items()}]
    found = measured(model, batches, ["W8A8", "int2wo-32", "int8dq"])
    assert {row.scheme for row in found.rows} == {"int8dq", "int2wo-32"} and len(found.rows) == 16
    with torch.no_grad():
        model.eval()
        floats = [model(**batch).loss for batch in batches]
        assert found.loss == pytest.approx(float(sum(floats) / 2), rel=1e-6)
        for name in ("model.layers.0.self_attn.v_proj", "lm_head"):
            changed = alone(model, name, "int2wo-32")
            losses = [changed(**batch).loss for batch in batches]
            wanted = float(sum(losses) - sum(floats)) / 2
            assert found[name, "int2wo-32"].loss_change == pytest.approx(wanted, rel=1e-3)
            assert abs(wanted) > 1e-4, "a change that rounding would not give"
    worst = [abs(row.loss_change) for row in found.rows if row.scheme == "int2wo-32"]
    assert max(worst) > 5 * max(abs(r.loss_change) for r in found.rows if r.scheme == "int8dq")


def test_conv1d_and_a_tied_head():
    model, inputs = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    found = measured(model, [inputs], "int4wo-32")
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    blocks = {f"transformer.h.0.{name}" for name in names}
    assert {row.layer for row in found.rows} == blocks | {"lm_head"}
    model.eval()
    with torch.no_grad():
        x = torch.randn(7, 64)
        fc = "transformer.h.0.mlp.c_fc"
        for name in (fc, "lm_head"):
            changed = alone(model, name, "int4wo-32")
            wanted = model(**inputs).logits
            error = (changed(**inputs).logits - wanted).square().sum() / wanted.square().sum()
            assert found[name, "int4wo-32"].loss_change == pytest.approx(float(error), rel=1e-3)
        assert torch.equal(changed.transformer.wte.weight, model.transformer.wte.weight)
        assert not torch.equal(changed.lm_head(x), model.lm_head(x))
    assert found["lm_head", "int4wo-32"].saved_bytes < 0, "the embedding keeps the float weight"
    assert found[fc, "int4wo-32"].saved_bytes > 0
    assert {rule.name for rule in found.recipe(math.inf).rules} == blocks | {"*"}


def test_a_layer_made_sensitive_ranks_first():
    model = Block().requires_grad_(False)
    model.v.weight[:, 3] *= 300  # each group's scale follows this column, its other values are lost
    batches = [torch.randn(2, 9, 64) for _ in range(2)]
    found = measured(model, batches, ["int8wo", "int4wo-64"])
    first = found.ranked()[0]
    assert (first.layer, first.scheme) == ("v", "int4wo-64")
    assert str(found).splitlines()[2].split()[:2] == ["v", "int4wo-64"]
    table = str(found)
    assert "outputs compared" in table and "batches: 2" in table
    changes = [row.loss_change for row in found.ranked()]
    assert changes == sorted(changes, reverse=True) and len(changes) == 12


def test_shared_modules_misfits_and_layers_never_called():
    model, x = Reused(), torch.randn(5, 64)
    found = measured(model, [x], ["int4wo-64", "int4wo-32"])
    assert [row.layer for row in found.rows] == ["first", "first", "odd", "odd", "last", "last"]
    assert found.missed == ("never",)
    row = found["again.0", "int4wo-64"]
    assert row.layer == "first" and row.aliases == ("again.0",)
    with torch.no_grad():
        both = fxquant.quantize(copy.deepcopy(model), {"re:first|again.0": "int4wo-64", "*": None})
        wanted = model(x)
        error = float((both(x) - wanted).square().sum() / wanted.square().sum())
    assert row.loss_change == pytest.approx(error, rel=1e-4)
    bad = found["last", "int4wo-64"]
    assert "in_features 96" in bad.reason and bad.loss_change == bad.relative_error == math.inf
    assert not found["last", "int4wo-32"].reason
    assert found.ranked()[-1] is bad
    assert "group_size 64" in str(found) and "called by no batch: never" in str(found)
    rules = found.recipe(limit=math.inf)
    quantized = fxquant.quantize(model, rules)
    assert quantized.first.scheme == quantized.again[0].scheme == "int4wo-64"
    assert quantized.last.scheme == "int4wo-32" and type(quantized.never) is nn.Linear


def test_recipe_chooses_layers_and_limit_chooses_schemes():
    model = Block().requires_grad_(False)
    model.v.weight[:, 3] *= 6
    batches = [torch.randn(2, 9, 64)]
    schemes = ["int8wo", "int4wo-64", "int2wo-64"]
    found = measured(model, batches, schemes, recipe={"re:[qkv]|down": "int8wo", "*": None})
    assert {row.layer for row in found.rows} == {"q", "k", "v", "down"}
    limit = max(found[name, "int4wo-64"].loss_change for name in ("q", "k"))
    assert found["v", "int4wo-64"].loss_change > limit > found["v", "int8wo"].loss_change
    chosen = {rule.name: rule.scheme for rule in found.recipe(limit).rules}
    for name in ("q", "k", "v", "down"):
        fitting = [s for s in schemes if found[name, s].loss_change <= limit]
        assert chosen.get(name) == (fitting[-1] if fitting else None)
    assert chosen["v"] == "int8wo" and chosen["*"] is None
    quantized = fxquant.quantize(model, found.recipe(limit))
    assert quantized.v.scheme == "int8wo" and type(quantized.gate) is nn.Linear
    assert [rule.scheme for rule in found.recipe(-1.0).rules] == [None]


class Explodes(MLP):
    """The loss is no number once the first layer is quantized."""

    def forward(self, x):
        y = super().forward(x)
        return {"loss": y.sum() * (math.nan if isinstance(self.up, fxquant.QuantLinear) else 1.0)}


def test_json_round_trip_with_what_is_infinite():
    found = measured(Reused(), [torch.randn(5, 64)], ["int8wo", "int4wo-64"])
    assert fxquant.Sensitivity.from_json(found.to_json()) == found
    broken = measured(Explodes(), [torch.randn(5, 64)], "int4wo-32")
    assert broken.rows[0].loss_change == math.inf and not broken.rows[0].reason
    text = broken.to_json()
    assert json.loads(text)["rows"][0]["loss_change"] is None
    assert fxquant.Sensitivity.from_json(text) == broken
    for wrong in ("[]", "no json", '{"rows": []}', '{"rows": [{"layer": 1}], "missed": []}'):
        with pytest.raises(InvalidOption, match=r"what Sensitivity\.to_json wrote"):
            fxquant.Sensitivity.from_json(wrong)


def test_an_exact_layer_has_no_error_and_no_change():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 8))
    model.requires_grad_(False)
    model[0].weight.zero_()
    model[1].weight.zero_()
    found = measured(model, [torch.randn(5, 64)], "int8wo")
    for name in "01":  # the output is the bias; nothing at all, and no error over nothing is none
        row = found[name, "int8wo"]
        assert (row.relative_error, row.loss_change, row.error_db) == (0.0, 0.0, -math.inf)
    assert fxquant.Sensitivity.from_json(found.to_json()) == found


def test_plots(tmp_path):
    found = measured(Reused(), [torch.randn(5, 64)], ["int8wo", "int4wo-64"])
    found.plot(tmp_path / "s.svg")
    root = ElementTree.parse(tmp_path / "s.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    expected = {"first", "odd", "last", "int8wo", "int4wo-64", "loss change", "output error, dB"}
    assert expected <= texts
    found.plot(str(tmp_path / "s.png"))
    data = (tmp_path / "s.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    with pytest.raises(InvalidOption, match=r"s\.txt.*\.svg, \.png, \.pdf"):
        found.plot(tmp_path / "s.txt")


def test_outputs_that_are_tuples_compare_their_first_floating_tensor():
    class Pair(MLP):
        def forward(self, x):
            y = super().forward(x)
            return y.argmax(-1), y, torch.randn(3)

    model, x = Pair(), torch.randn(5, 64)
    plain = MLP()
    plain.load_state_dict(model.state_dict())
    assert measured(model, [(x,)]) == measured(plain, [x])


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 32)

    def forward(self, x):
        return self.fc(input=x)


def test_a_layer_called_by_keyword_in_a_model_compiled_in_place():
    model, x, ran = Keyword(), torch.randn(5, 64), []

    def backend(gm, inputs):
        ran.append(gm)
        return gm.forward

    model.compile(backend=backend)
    found = measured(model, [x], "int8wo")["fc", "int8wo"]
    assert found.error_db < -40 and not ran, "every run is eager"
    model(x)
    assert ran, "and afterwards it is compiled again"


def test_a_name_that_looks_like_a_pattern():
    model = nn.ModuleDict({"a[0]": nn.Linear(64, 32), "a0": nn.Linear(64, 32)})
    model.forward = lambda x: model["a[0]"](x) + model["a0"](2 * x)
    found = measured(model, [torch.randn(5, 64)], "int8wo")
    changes = {row.layer: row.loss_change for row in found.rows}
    assert changes["a[0]"] < changes["a0"]
    quantized = fxquant.quantize(model, found.recipe(changes["a[0]"]))
    assert quantized["a[0]"].scheme == "int8wo" and type(quantized["a0"]) is nn.Linear


def test_compiled_models_and_torch_encoders():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 7, 64)
    found = measured(torch.compile(model, backend="eager"), [x], "int8dq")
    reached = [f"layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2")]
    assert [row.layer for row in found.rows] == reached
    assert found.missed == tuple(f"layers.{i}.self_attn.out_proj" for i in range(2))
    assert all(-60 < row.error_db < -30 for row in found.rows)
