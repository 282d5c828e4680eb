"""Options: what is accepted, what is refused, and when."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant
import fxquant.backend
from fxquant import Config, Recipe, Rule, Stats
from fxquant.config import OPTIONS
from fxquant.errors import (
    InvalidOption,
    NothingQuantized,
    UnknownOption,
    UnknownScheme,
    UnusedRule,
)

from .conftest import MLP, sqnr

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def frozen() -> MLP:
    return MLP().requires_grad_(False)


def test_defaults(monkeypatch):
    monkeypatch.delenv("FXQUANT_DUMP_DIR", raising=False)
    for options in (None, {}):
        assert Config.of(options) == Config(recipe=None, dump_dir=None, strict=False, inductor={})


def test_every_option_arrives(tmp_path):
    given = {
        "scheme": "W8A8",
        "dump_dir": tmp_path,
        "strict": True,
        "stats": Stats(),
        "smooth": 0.7,
        "ranges": "mse",
        "inductor": {"cpp_wrapper": True},
    }
    config = Config.of(MappingProxyType(given))
    assert config.recipe == Recipe((Rule(scheme="W8A8"),))
    assert config.dump_dir == str(tmp_path) and config.strict is True
    assert config.inductor == {"cpp_wrapper": True}
    assert config.stats is given["stats"] and (config.smooth, config.ranges) == (0.7, "mse")
    assert Config.of({"recipe": {"*": None}}).recipe == Recipe((Rule(scheme=None),))
    assert set(given) | {"recipe"} == set(OPTIONS)


@given(st.text(max_size=8).filter(lambda name: name not in OPTIONS), st.integers())
def test_an_unknown_option_lists_those_there_are(name, value):
    with pytest.raises(UnknownOption) as info:
        Config.of({"scheme": "int8dq", name: value})
    assert repr(name) in str(info.value) and ", ".join(OPTIONS) in str(info.value)


ILL_TYPED = {
    "scheme": [8, None, ["int8dq"], {"*": "int8dq"}],
    "recipe": [8, 1.5],
    "dump_dir": [1, True, ["a"], b"a"],
    "strict": [1, 0, "True", None],
    "stats": [1, "stats.safetensors", [], None],
    "inductor": [[], "max_autotune", None, 1],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in ILL_TYPED.items() for v in vs])
def test_an_ill_typed_option_names_value_and_type(name, value):
    with pytest.raises(InvalidOption) as info:
        Config.of({name: value})
    assert (info.value.name, info.value.value) == (name, value)
    assert f"option {name!r} is {value!r}: expected " in str(info.value)


def test_scheme_and_recipe_exclude_each_other():
    with pytest.raises(InvalidOption, match=r"scheme and recipe.*expected only one of them"):
        Config.of({"scheme": "int8dq", "recipe": "int8wo"})


def test_an_unknown_inductor_setting_is_named():
    with pytest.raises(UnknownOption, match=r"inductor\['max_autotun'\]"):
        Config.of({"inductor": {"max_autotune": True, "max_autotun": True}})


@given(st.booleans())
def test_a_mode_becomes_inductor_settings_that_the_user_can_override(flag):
    mode = "max-autotune-no-cudagraphs"
    assert Config.of({}, mode).inductor == torch._inductor.list_mode_options(mode)
    assert Config.of({}, mode).inductor["max_autotune"] is True
    config = Config.of({"inductor": {"max_autotune": flag}}, mode)
    assert config.inductor["max_autotune"] is flag
    assert Config.of({}, "default").inductor == Config.of({}).inductor == {}


def test_a_configuration_is_fixed():
    with pytest.raises(AttributeError):
        Config.of({}).strict = True


def test_the_callers_mapping_is_neither_kept_nor_changed():
    inductor = {"cpp_wrapper": True}
    options = {"scheme": "int8dq", "inductor": inductor}
    config = Config.of(options, "reduce-overhead")
    assert options == {"scheme": "int8dq", "inductor": {"cpp_wrapper": True}}
    inductor["cpp_wrapper"] = False
    assert config.inductor["cpp_wrapper"] is True


def test_dump_dir_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FXQUANT_DUMP_DIR", str(tmp_path / "environment"))
    assert Config.of({}).dump_dir == str(tmp_path / "environment")
    assert Config.of({"dump_dir": tmp_path / "option"}).dump_dir == str(tmp_path / "option")
    monkeypatch.setenv("FXQUANT_DUMP_DIR", "")
    assert Config.of({}).dump_dir is None


# fxquant.compile: the same, before the first call -----------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"scheme": "int9"}, UnknownScheme, "int9"),
        ({"recipe": {"*.head": None, "*": "int8dq"}}, UnusedRule, "layers are: down, up"),
        ({"recipe": 5}, InvalidOption, "recipe"),
        ({"scheme": "int8dq", "recipe": "int8dq"}, InvalidOption, "only one"),
        ({"strict": 1}, InvalidOption, "strict"),
        ({"dump_dir": 3}, InvalidOption, "dump_dir"),
        ({"inductor": {"nope": 1}}, UnknownOption, "nope"),
        ({"inductor": 3}, InvalidOption, "inductor"),
    ],
)
def test_compile_refuses_before_the_first_call(arguments, kind, message):
    with pytest.raises(kind, match=message):
        fxquant.compile(MLP(), **arguments)


def test_compile_refuses_a_model_without_linears():
    with pytest.raises(NothingQuantized):
        fxquant.compile(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)))


@torch.no_grad()
def test_compile_passes_everything_on(monkeypatch, tmp_path):
    seen = {}

    def compile_graph(gm, origin, inputs, extras, patches, tag):
        seen.update(patches=patches, tag=tag)
        return gm.forward

    monkeypatch.setattr(fxquant.backend, "compile_graph", compile_graph)
    model = frozen()
    recipe = {"up": "int4wo-32", "*": None}
    run = fxquant.compile(
        model,
        recipe=recipe,
        mode="max-autotune-no-cudagraphs",
        fullgraph=True,
        dynamic=True,
        dump_dir=str(tmp_path),
        inductor={"cpp_wrapper": True},
    )
    assert 15 < sqnr(run(X), model(X)) < 40
    options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert seen["patches"] == {**options, "cpp_wrapper": True}
    assert Recipe.of(recipe).to_json() in seen["tag"]
    text = (tmp_path / "graph_0" / "01_normalized.py").read_text()
    assert "Sym(" in text, "dynamic=True did not arrive"


@torch.no_grad()
def test_mode_goes_through_torch_compile(monkeypatch):
    seen = []

    def compile_graph(gm, origin, inputs, extras, patches, tag):
        seen.append(patches)
        return gm.forward

    monkeypatch.setattr(fxquant.backend, "compile_graph", compile_graph)
    torch.compile(frozen(), backend="fxquant", mode="max-autotune-no-cudagraphs")(X)
    assert seen == [torch._inductor.list_mode_options("max-autotune-no-cudagraphs")]


# The default, and strict ------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_scheme_every_linear_becomes_int8dq(graphs):
    report = fxquant.explain(frozen(), X)
    assert {layer.scheme for layer in report.layers} == {"int8dq"}


@torch.no_grad()
def test_without_a_scheme_a_quantized_model_keeps_its_float_layers(graphs):
    model = fxquant.quantize(frozen(), {"up": "int8wo"})
    report = fxquant.explain(model, X)
    assert {layer.name: layer.scheme for layer in report.layers} == {"up": "int8wo", "down": None}
    other = frozen()  # and its being alive decides nothing for another model
    report = fxquant.explain(other, X)
    assert {layer.scheme for layer in report.layers} == {"int8dq"}


def strict(model, x=X, **options):
    return torch.compile(model, backend="fxquant", options={"strict": True, **options})(x)


@torch.no_grad()
def test_strict_is_content_with_a_recipe_that_keeps_layers_float(graphs):
    model = frozen()
    y = strict(model, recipe={"down": None, "*": "int8wo"})
    assert 38 < sqnr(y, model(X)) < 60


@torch.no_grad()
def test_strict_refuses_what_does_not_fit_and_names_all(graphs):
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 80))
    model = model.append(nn.Linear(80, 32)).requires_grad_(False)
    with pytest.raises(Exception, match=r"strict: .*1 \(in_features 48 .*\), 3 \(in_features 80 "):
        strict(model, scheme="int4wo-32")
    report = fxquant.explain(model, X, options={"scheme": "int4wo-32"})
    assert {layer.name for layer in report.unquantized} == {"1", "3"}
    y = torch.compile(model, backend="fxquant", options={"scheme": "int4wo-32"})(X)
    assert 15 < sqnr(y, model(X)) < 40, "without strict the others are quantized"


def test_strict_refuses_a_graph_that_cannot_be_captured(graphs, monkeypatch):
    def fail(gm, values):
        raise RuntimeError("no such op")

    monkeypatch.setattr("fxquant.capture.retrace", fail)
    model = frozen()
    with pytest.raises(
        Exception, match="ATen form: RuntimeError: no such op; its linears stay float"
    ):
        strict(model)
    run = torch.compile(model, backend="fxquant")
    assert torch.equal(run(X), model(X))
