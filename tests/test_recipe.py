"""Recipes: which layer gets which scheme, what is refused, and JSON both ways."""

from __future__ import annotations

import fnmatch
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant
from fxquant import Recipe, Rule
from fxquant.errors import InvalidOption, InvalidRule, UnknownScheme, UnusedRule
from fxquant.graph import Layer
from fxquant.scheme import ALIASES, SCHEMES

from .conftest import MLP

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"
Q = Layer(name="blocks.0.attention.q", module_type=LINEAR, in_features=64)
DOWN = Layer(name="blocks.1.mlp.down", module_type=CONV1D, in_features=256)
HEAD = Layer(name="head", module_type=LINEAR, in_features=64)
LAYERS = [Q, DOWN, HEAD]


def matched(**conditions) -> list[Layer]:
    rule = Rule(scheme="int8dq", **conditions)
    Recipe((rule,))  # validates
    return [layer for layer in LAYERS if rule.matches(layer)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", LAYERS),
        ("head", [HEAD]),
        ("hea", []),
        ("*ead", [HEAD]),
        ("blocks.*", [Q, DOWN]),
        ("blocks.?.mlp.*", [DOWN]),
        ("blocks.[!0].*", [DOWN]),
        ("*.Q", []),
        (r"re:blocks\.\d+\.attention\.[qkv]", [Q]),
        ("re:blocks", []),
        (r"re:.*\.(q|down)", [Q, DOWN]),
        ("", []),
    ],
)
def test_names_by_glob_and_regular_expression(pattern, wanted):
    """The whole name has to match, in its own case, either way."""
    assert matched(name=pattern) == wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("Linear", [Q, HEAD]),
        ("Conv1D", [DOWN]),
        ("torch.nn.*", [Q, HEAD]),
        (CONV1D, [DOWN]),
        ("re:(Linear|Conv1D)", LAYERS),
        ("linear", []),
        ("Lin", []),
    ],
)
def test_module_types_by_short_and_by_full_name(pattern, wanted):
    assert matched(module_type=pattern) == wanted


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (64, [Q, HEAD]),
        (65, []),
        ((64, 256), LAYERS),
        ((65, 256), [DOWN]),
        ((64, 255), [Q, HEAD]),
        ((None, 64), [Q, HEAD]),
        ((65, None), [DOWN]),
        ((None, None), LAYERS),
        (None, LAYERS),
    ],
)
def test_sizes_exact_or_between_two_limits_both_inclusive(size, wanted):
    assert matched(in_features=size) == wanted


def test_all_conditions_of_a_rule_must_hold():
    assert matched(name="blocks.*", module_type="Linear") == [Q]
    assert matched(name="blocks.*", module_type="Linear", in_features=256) == []
    assert matched(name="*", module_type="Linear", in_features=64) == [Q, HEAD]


def test_the_first_match_wins_and_none_keeps_float():
    recipe = Recipe.of({"head": None, "blocks.0.*": "int4wo-32", "*": "int8dq"})
    assert [recipe.rule_for(layer).scheme for layer in LAYERS] == ["int4wo-32", "int8dq", None]
    backwards = Recipe(tuple(reversed(recipe.rules)))
    assert [backwards.rule_for(layer).scheme for layer in LAYERS] == ["int8dq"] * 3
    assert Recipe.of({"blocks.*": "int8dq"}).rule_for(HEAD) is None


def test_spellings_of_one_recipe():
    wanted = Recipe((Rule(scheme="int8dq"),))
    for spec in (
        "int8dq",
        {"*": "int8dq"},
        [{"scheme": "int8dq"}],
        [Rule(scheme="int8dq")],
        wanted,
    ):
        assert Recipe.of(spec) == wanted


def test_a_rule_that_decides_nothing_is_an_error_that_lists_the_layers():
    recipe = Recipe.of({"*.lm_head": None, "*": "int8dq"})
    with pytest.raises(UnusedRule) as info:
        recipe.check_used(LAYERS)
    message = str(info.value)
    assert "lm_head" in message and "int8dq" not in message.partition("the layers are")[0]
    assert all(layer.name in message for layer in LAYERS)
    assert "remove the rule" in message


def test_a_rule_behind_one_that_takes_all_its_layers_is_unused():
    recipe = Recipe.of({"blocks.*": "int8dq", "blocks.0.*": "int4wo-32", "head": None})
    assert [rule.name for rule in recipe.unused(LAYERS)] == ["blocks.0.*"]


def test_the_default_at_the_end_may_stay_idle():
    recipe = Recipe.of({"head": None, "blocks.*": "int8dq", "*": "int8wo"})
    recipe.check_used(LAYERS)
    with pytest.raises(UnusedRule, match=r"Linear.*layers are: none"):
        Recipe.of([{"scheme": "int8wo", "module_type": "Linear"}]).check_used([])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([{"name": "a"}], "rule 0 .*scheme .or None. is missing"),
        (
            [{"scheme": "int8dq"}, {"scheme": None, "nmae": "a"}],
            "rule 1 .*'nmae'; the keys are: in_",
        ),
        ([{"scheme": "int8dq"}, "int8wo"], "rule 1 of the recipe, int8wo: expected a Rule"),
        ([{"scheme": None, "name": "re:["}], "name: unterminated character set"),
        ([{"scheme": None, "module_type": "re:("}], "module_type: missing"),
        ([{"scheme": None, "name": 3}], "name is not a string"),
        ([{"scheme": None, "in_features": "64"}], "in_features is a number or"),
        ([{"scheme": None, "in_features": [1, 2, 3]}], "in_features is a number or"),
        ([{"scheme": None, "in_features": ["a", 64]}], "in_features is a number or"),
        ({3: "int8dq"}, "name is not a string"),
    ],
)
def test_a_malformed_rule_is_named(spec, reason):
    with pytest.raises(InvalidRule, match=reason):
        Recipe.of(spec)


@pytest.mark.parametrize("scheme", ["int9", "", "INT8DQ", 8, ["int8dq"]])
def test_an_unknown_scheme_lists_all(scheme):
    with pytest.raises(UnknownScheme) as info:
        Recipe.of({"*": scheme})
    assert all(name in str(info.value) for name in [*SCHEMES, *ALIASES])


@pytest.mark.parametrize("spec", [5, None, 1.5, object()])
def test_what_is_no_recipe_at_all(spec):
    with pytest.raises(InvalidOption, match=r"recipe.*expected a scheme, a mapping"):
        Recipe.of(spec)


@pytest.mark.parametrize("text", ["", "{", "int8dq", "[1,]"])
def test_what_is_no_json(text):
    with pytest.raises(InvalidOption, match=r"recipe.*expected JSON"):
        Recipe.from_json(text)


NAMES = st.text("ab.*?[]", max_size=6)
SIZES = st.integers(1, 300)
RULES = st.builds(
    Rule,
    scheme=st.sampled_from([None, *SCHEMES, *ALIASES]),
    name=NAMES | st.sampled_from(["re:a+", r"re:(a|b)\..*"]),
    module_type=st.sampled_from(["*", "Linear", "torch.*", "re:L.*"]),
    in_features=st.none() | SIZES | st.tuples(st.none() | SIZES, st.none() | SIZES),
)
RECIPES = st.builds(Recipe, st.lists(RULES, max_size=4).map(tuple))
FOUND = st.builds(
    Layer,
    name=st.text("ab.", max_size=6),
    module_type=st.sampled_from([LINEAR, CONV1D, ""]),
    in_features=SIZES,
)


@given(RECIPES)
def test_json_round_trip(recipe):
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert Recipe.of(json.loads(text)) == recipe


@given(RECIPES, st.lists(FOUND, max_size=4))
def test_laws(recipe, found):
    """First match; removing an unused rule changes no decision; a used one decides something."""
    decisions = [recipe.rule_for(layer) for layer in found]
    for layer, decided in zip(found, decisions, strict=True):
        matching = [rule for rule in recipe.rules if rule.matches(layer)]
        assert decided is (matching[0] if matching else None)
    unused = recipe.unused(found)
    assert not any(rule is one for rule in unused for one in decisions)
    kept = Recipe(tuple(r for r in recipe.rules if not any(r is u for u in unused)))
    assert [kept.rule_for(layer) for layer in found] == decisions


@given(NAMES, st.text("ab.", max_size=6))
def test_a_glob_is_the_shells(pattern, name):
    layer = Layer(name=name)
    assert Rule(scheme=None, name=pattern).matches(layer) == fnmatch.fnmatchcase(name, pattern)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_a_recipe_decides_in_a_compiled_model_and_in_place_alike(graphs):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = MLP(out=64), nn.Linear(64, 16)

        def forward(self, x):
            return self.head(self.body(x))

    rules = [
        {"scheme": "int4wo-64", "in_features": [128, None]},
        {"scheme": None, "name": "head"},
        {"scheme": "int8wo", "module_type": "Linear"},
    ]
    model = Model().requires_grad_(False)
    report = fxquant.explain(model, X, options={"recipe": rules})
    wanted = {"body.up": "int8wo", "body.down": "int4wo-64", "head": None}
    assert {layer.name: layer.scheme for layer in report.layers} == wanted
    assert report["head"].reason == "kept float by the rule 'head'"
    fxquant.quantize(model, rules)
    schemes = {n: getattr(model.get_submodule(n), "scheme", None) for n in wanted}
    assert schemes == wanted


def test_a_layer_that_no_rule_matches_says_so():
    report = fxquant.explain(MLP(), X, options={"recipe": {"up": "int8wo"}})
    assert report["up"].scheme == "int8wo"
    assert report["down"].reason == "no rule of the recipe matches"


def test_another_model_in_the_process_does_not_use_a_rule_up(graphs):
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 8)

        def forward(self, x):
            return self.head(x)

    recipe = {"head": None, "*": "int8dq"}
    headed = Headed().requires_grad_(False)
    torch.compile(headed, backend="fxquant", options={"recipe": recipe})(X)
    model = MLP().requires_grad_(False)
    with pytest.raises(Exception, match=r"decide no layer.*'head'"):
        torch.compile(model, backend="fxquant", options={"recipe": recipe})(X)


def test_a_rule_for_a_layer_behind_a_graph_break_is_used(graphs):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Breaks().requires_grad_(False)
    recipe = {"first": "int8wo", "second": "int4wo-32"}
    torch.compile(model, backend="fxquant", options={"recipe": recipe})(X)
    assert len(graphs) == 2
