"""The contract of a pass: stages, what must not change, what is cleaned up, and PassManager."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.passes.infra.pass_manager import PassManager

import fxquant
from fxquant import passes
from fxquant.errors import SignatureChanged, StageMismatch
from fxquant.graph import STAGES, stage

from ..conftest import MLP, Block, sqnr
from .helpers import aten, count, trace

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

TAKES = [
    (passes.normalize, {"captured", "float"}, "float"),
    (passes.insert_observers, {"float"}, "observed"),
    (passes.quantize_weights("int8dq"), {"float", "observed"}, "reference"),
    (passes.fold_qparams, {"reference", "fused", "lowered"}, None),
    (passes.fuse, {"reference"}, "fused"),
    (passes.merge, {"fused"}, "fused"),
    (passes.gate, {"fused"}, "fused"),
    (passes.lower(), {"fused"}, "lowered"),
    (passes.verify, set(STAGES), None),
]


@pytest.mark.parametrize(("one", "takes", "leaves"), TAKES, ids=lambda v: getattr(v, "name", ""))
def test_a_pass_takes_its_stages_and_refuses_the_others(one, takes, leaves):
    assert set(one.requires) == takes and one.ensures == leaves
    for found in STAGES:
        gm = fxquant.trace(MLP(), (X,))
        gm.meta["fxquant_stage"] = found
        before = gm.code
        if found in takes:
            continue
        with pytest.raises(StageMismatch) as info:
            one(gm)
        assert (info.value.pass_name, info.value.found) == (one.name, found)
        assert all(name in str(info.value) for name in takes)
        assert gm.code == before and stage(gm) == found


def test_the_pipeline_leads_from_stage_to_stage():
    gm = fxquant.trace(Block(), (X[None],))
    found = [stage(gm)]
    for _, one in passes.pipeline("int8dq"):
        assert one(gm).graph_module is gm
        found.append(stage(gm))
    kept = list(dict.fromkeys(found))
    assert kept == ["captured", "float", "reference", "fused", "lowered"]
    assert [name for name, _ in passes.PIPELINE] == [
        "normalized",
        "equalized",
        "quantized",
        "folded",
        "fused",
        "handed_over",
        "merged",
        "gated",
        "lowered",
        "verified",
    ]


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-32", "fp8dq"])
@torch.no_grad()
def test_all_in_torchs_own_pass_manager(scheme):
    model, x = Block().requires_grad_(False), torch.randn(2, 7, 64)
    by_hand = fxquant.trace(model, (x,))
    for _, one in passes.pipeline(scheme):
        one(by_hand)
    manager = PassManager(
        passes=[one for _, one in passes.pipeline(scheme)],
        run_checks_after_each_pass=True,
        suppress_check_failures=False,
    )
    result = manager(fxquant.trace(model, (x,)))
    assert result.modified and stage(result.graph_module) == "lowered"
    assert count(result.graph_module) == count(by_hand)
    assert torch.equal(result.graph_module(x), by_hand(x))
    floor = fxquant.SCHEMES[scheme].sqnr
    assert floor < sqnr(by_hand(x), model(x)) < floor + 25


def test_modified_tells_whether_anything_changed():
    gm = fxquant.trace(torch.nn.Sequential(torch.nn.ReLU()), (X,))
    assert [bool(one(gm).modified) for _, one in passes.pipeline("int8dq")] == [False] * 9
    gm = fxquant.trace(MLP(), (X,))
    changed = {name: bool(one(gm).modified) for name, one in passes.pipeline("int8dq")}
    # linears were linears already, and no two share an input
    assert changed == {
        "normalized": False,
        "quantized": True,
        "folded": True,
        "fused": True,
        "handed_over": False,
        "merged": False,
        "gated": False,
        "lowered": True,
        "verified": False,
    }


def last(gm: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    (output,) = gm.graph.find_nodes(op="output")
    (node,) = output.all_input_nodes
    return output, node


def append(gm: fx.GraphModule, target, *args) -> None:
    """Let the output be ``target(old output, *args)``."""
    output, node = last(gm)
    with gm.graph.inserting_before(output):
        new = gm.graph.call_function(target, (node, *args))
    new.meta["val"] = target(node.meta["val"], *args)
    output.replace_input_with(node, new)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (aten.select.int, (0, 0), r"outputs: .*float32\[5, 32\] stride \(32, 1\).*float32\[32\]"),
        (
            aten.to.dtype,
            (torch.bfloat16,),
            r"it was .*float32\[5, 32\].* it is .*bfloat16\[5, 32\]",
        ),
        (aten.t.default, (), r"it is .*\[32, 5\] stride \(1, 32\)"),
    ],
    ids=["shape", "dtype", "stride"],
)
def test_a_changed_output_is_an_error(target, args, message):
    @passes.rewrites("captured", ensures="float")
    def careless(gm):
        append(gm, target, *args)
        return True

    with pytest.raises(SignatureChanged, match=message):
        careless(fxquant.trace(MLP(), (X,)))


def test_a_changed_input_is_an_error():
    @passes.rewrites("captured")
    def careless(gm):
        (x,) = gm.graph.find_nodes(op="placeholder")
        with gm.graph.inserting_after(x):
            gm.graph.placeholder("extra").meta["val"] = x.meta["val"]
        return True

    with pytest.raises(SignatureChanged, match="pass careless changed inputs"):
        careless(fxquant.trace(MLP(), (X,)))


def test_what_a_pass_leaves_behind_is_removed_and_the_code_is_rebuilt():
    @passes.rewrites("captured")
    def leaves_dead_code(gm):
        """Its own words."""
        output, node = last(gm)
        with gm.graph.inserting_before(output):
            gm.graph.call_function(aten.neg.default, (node,))
        append(gm, aten.neg.default)
        append(gm, aten.abs.default)
        return True

    gm = fxquant.trace(MLP(), (X,))
    wanted = gm(X).abs()
    leaves_dead_code(gm)
    assert count(gm)["neg"] == 1
    assert torch.equal(gm(X), wanted)
    assert leaves_dead_code.__doc__ == "Its own words."
    assert repr(leaves_dead_code) == "<pass leaves_dead_code: captured -> same>"
    assert repr(passes.normalize) == "<pass normalize: captured|float -> float>"


def test_a_graph_in_the_wrong_order_does_not_pass():
    @passes.rewrites("captured")
    def careless(gm):
        first = next(n for n in gm.graph.nodes if n.op == "call_function")
        last(gm)[1].append(first)
        return True

    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        careless(fxquant.trace(MLP(), (X,)))


def test_bodies_come_first_and_share_the_list_of_layers():
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.c(torch.cond(x.sum() > 0, self.a, lambda x: self.b(x) * 2, (x,)))

    seen = []

    @passes.rewrites("captured", "float")
    def look(gm):
        seen.append((bool(gm.meta.get("fxquant_body")), count(gm)["linear"]))
        return False

    gm = trace(Branch(), X, to="float")
    assert set(gm.meta["fxquant_layers"]) == {"a", "b", "c"}
    look(gm)
    assert seen == [(True, 1), (True, 1), (False, 1)]


def test_inputs_of_a_lowered_graph_are_still_the_users():
    """Positions, keywords and a nested output survive every pass."""

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 32)

        def forward(self, x, *, scale):
            return {"y": self.fc(x) * scale, "rest": (x, [scale])}

    model = Nested().requires_grad_(False)
    gm = fxquant.trace(model, (X,), {"scale": torch.tensor(2.0)})
    for _, one in passes.pipeline("int8wo"):
        one(gm)
    found, wanted = (m(X, scale=torch.tensor(3.0)) for m in (gm, model))
    assert sqnr(found["y"], wanted["y"]) > 38
    assert torch.equal(found["rest"][0], X) and found["rest"][1][0] == 3
