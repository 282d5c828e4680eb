"""verify: a legal graph passes at each stage, and every kind of damage is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant import passes
from fxquant.errors import IllegalGraph
from fxquant.graph import STAGES, bodies_of, evaluate, layers, stage
from fxquant.passes.verification import ABSENT

from ..conftest import MLP, Block
from .helpers import aten, calls, ops, through, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def at(where: str, model=None, x=X):
    """A legal graph at a stage."""
    model = model or MLP()
    if where == "observed":
        return through(trace(model, x, to="float"), passes.insert_observers)
    if where == "lowered":
        return through(trace(model, x, to="fused", scheme="int8dq"), passes.merge, passes.lower())
    return trace(model, x, to=where, scheme="int8dq")


@pytest.mark.parametrize("where", STAGES)
@pytest.mark.parametrize("model", [MLP, Block])
def test_what_the_passes_make_is_legal_and_is_not_touched(where, model):
    gm = at(where, model(), X if model is MLP else X[None])
    assert stage(gm) == where
    before = gm.code
    assert not passes.verify(gm).modified
    assert gm.code == before and stage(gm) == where


@pytest.mark.parametrize("where", STAGES)
def test_a_model_of_quantized_modules_is_legal(where):
    passes.verify(at(where, fxquant.quantize(MLP(), "int8wo")))


def test_folded_graphs_are_legal():
    for where in ("reference", "fused"):
        through(at(where), passes.fold_qparams, passes.verify)


FORBIDDEN = [(where, packet) for where, packets in ABSENT.items() for packet in packets]


def a_call(gm, packet) -> torch.fx.Node:
    """A call of an op of fxquant, somewhere in the graph."""
    x = gm.graph.find_nodes(op="placeholder")[0]
    args = {
        ops.quantize: (x, "int8dq", "input"),
        ops.dequantize: (x, x, None, "int8dq", "input", torch.float32),
        ops.observe: (x, "a"),
        ops.pack: (x, x, None, "int8dq", "canonical"),
        ops.dispatch: (x, [x], None, "int8dq", "canonical", "dequantize", "", 32),
    }[packet]
    with gm.graph.inserting_after(x):
        node = gm.graph.call_function(packet.default, args)
    node.meta["val"] = x.meta["val"]
    return node


@pytest.mark.parametrize(("where", "packet"), FORBIDDEN, ids=str)
def test_an_op_of_another_stage(where, packet):
    gm = at(where)
    node = a_call(gm, packet)
    with pytest.raises(IllegalGraph) as info:
        passes.verify(gm)
    assert info.value.stage == where and info.value.node is node
    assert str(packet) in str(info.value) and "may not occur here" in str(info.value)


def test_every_stage_forbids_what_only_a_later_one_has():
    assert set(ABSENT) == set(STAGES) - {"captured"}
    for where in ("float", "observed", "reference", "fused"):
        assert {ops.pack, ops.dispatch} <= set(ABSENT[where])


def emitted(gm) -> torch.fx.Node:
    return next(n for n in calls(gm, ops.dequantize.default))


def no_value(gm):
    del emitted(gm).meta["val"]


def no_value_of_an_input(gm):
    del emitted(gm).args[0].meta["val"]


def wrong_shape(gm):
    node = emitted(gm)
    node.meta["val"] = node.meta["val"][1:]


def wrong_dtype(gm):
    node = emitted(gm)
    node.meta["val"] = node.meta["val"].bfloat16()


def wrong_stride(gm):
    node = emitted(gm)
    node.meta["val"] = node.meta["val"].t().contiguous().t()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_value, "has no value"),
        (no_value_of_an_input, "has no value"),
        (wrong_shape, r"gives .*\[5, 64\].*, noted is .*\[4, 64\]"),
        (wrong_dtype, "gives .*float32.*, noted is .*bfloat16"),
        (wrong_stride, r"gives .*stride \(64, 1\), noted is .*stride \(1, 5\)"),
    ],
)
def test_values_that_are_missing_or_wrong(damage, reason):
    gm = at("reference")
    damage(gm)
    with pytest.raises(IllegalGraph, match=f"stage reference: node dequantize.*{reason}"):
        passes.verify(gm)


def test_a_call_of_a_module_that_is_no_fold():
    gm = at("float")
    gm.add_submodule("act", nn.ReLU())
    (output,) = gm.graph.find_nodes(op="output")
    (node,) = output.all_input_nodes
    with gm.graph.inserting_before(output):
        new = gm.graph.call_module("act", (node,))
    new.meta["val"] = node.meta["val"]
    output.replace_input_with(node, new)
    with pytest.raises(IllegalGraph, match="node act: calls a module that is not folded"):
        passes.verify(gm)


def test_a_layer_with_a_kernel_and_no_scheme():
    gm = at("lowered")
    layers(gm)["down"].scheme = None
    with pytest.raises(IllegalGraph, match="node down: has a kernel, but no scheme"):
        passes.verify(gm)


def wrong_value_in_a_list(gm):
    (node, *_) = calls(gm, ops.quantize.default)
    node.meta["val"] = [node.meta["val"][0], node.meta["val"][1][1:]]


def test_a_list_of_values_is_looked_at_one_by_one():
    gm = at("reference")
    wrong_value_in_a_list(gm)
    with pytest.raises(
        IllegalGraph, match=r"node quantize.*gives \[.*\[5, 1\].*noted is \[.*\[4, 1\]"
    ):
        passes.verify(gm)


def without_folds(gm):
    """Put the expression of each fold back into the graph."""
    for call in gm.graph.find_nodes(op="call_module"):
        recipe = getattr(gm, call.target).recipe.graph
        feed = dict(zip(recipe.find_nodes(op="placeholder"), call.args, strict=True))
        with gm.graph.inserting_before(call):
            result = gm.graph.graph_copy(recipe, feed)
        for node in gm.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                node.meta["val"] = evaluate(node)
        call.replace_all_uses_with(result)
        gm.graph.erase_node(call)


def test_a_weight_that_is_packed_at_each_call():
    gm = at("lowered")
    without_folds(gm)
    with pytest.raises(IllegalGraph, match="depends on parameters alone and is computed at each"):
        passes.verify(gm)


def test_a_linear_that_got_no_kernel():
    gm = at("fused")
    gm.meta["fxquant_stage"] = "lowered"
    through(gm, passes.fold_qparams)
    with pytest.raises(IllegalGraph, match=r"node linear.*: has no kernel"):
        passes.verify(gm)


def test_damage_inside_a_branch():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.a, self.b, (x,))

    gm = at("fused", Branch())
    passes.verify(gm)
    body = list(bodies_of(gm))[1]
    a_call(body, ops.observe)
    with pytest.raises(IllegalGraph, match=r"fxquant\.observe may not occur here"):
        passes.verify(gm)


def test_a_linear_that_stays_float_is_legal_at_the_end():
    gm = trace(MLP(), X, to="fused", scheme={"up": "int8wo", "down": None})
    through(gm, passes.lower(), passes.verify)
    assert len(calls(gm, aten.linear.default)) >= 1
