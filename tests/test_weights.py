"""Weights are inputs: every route by which a weight can change is seen, and none recompiles."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import fxquant
from fxquant import weights
from fxquant.errors import GradRequired, NonFiniteWeight, RecipeConflict

from .conftest import MLP, Block, sqnr

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, **options):
    options = options or {"scheme": "int8wo"}
    return torch.compile(model, backend="fxquant", options=options, fullgraph=True)


def assert_follows(run, model: nn.Module, x: torch.Tensor = X) -> None:
    with torch.no_grad():
        assert sqnr(run(x), model(x)) > 38, "the compiled model does not follow its weights"


def in_place(model: MLP) -> None:
    with torch.no_grad():
        model.up.weight.mul_(-0.5)


def in_place_one_row(model: MLP) -> None:
    with torch.no_grad():
        model.down.weight[3].add_(1.0)


def swapped(model: MLP) -> None:
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight) / 8, requires_grad=False)


def data_pointer(model: MLP) -> None:
    model.up.weight.data = torch.randn_like(model.up.weight) / 8


def loaded(model: MLP) -> None:
    model.load_state_dict(MLP().state_dict())


def assigned(model: MLP) -> None:
    model.load_state_dict(MLP().requires_grad_(False).state_dict(), assign=True)


def new_module(model: MLP) -> None:
    model.up = nn.Linear(64, 128).requires_grad_(False)


def lora_merge(model: MLP) -> None:
    with torch.no_grad():
        model.up.weight += torch.randn(128, 4) @ torch.randn(4, 64) / 16


def written_through_data(model: MLP) -> None:
    model.up.weight.data.mul_(-0.5)
    fxquant.invalidate(model)


ROUTES = [
    in_place,
    in_place_one_row,
    swapped,
    data_pointer,
    loaded,
    assigned,
    new_module,
    lora_merge,
    written_through_data,
]


@pytest.mark.parametrize("change", ROUTES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_is_seen(change, graphs):
    model = MLP().requires_grad_(False)
    run = compiled(model)
    assert_follows(run, model)
    before = run(X)
    change(model)
    assert_follows(run, model)
    assert not torch.equal(run(X), before)
    assert len(graphs) == 1 or change is new_module


def test_cast_is_seen(graphs):
    model = MLP().requires_grad_(False)
    run = compiled(model)
    assert_follows(run, model)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert sqnr(run(X.bfloat16()), model(X.bfloat16())) > 34
    assert run(X.bfloat16()).dtype == torch.bfloat16


def test_two_instances_share_a_graph_and_not_their_weights(graphs):
    a, b = MLP().requires_grad_(False), MLP().requires_grad_(False)
    run_a, run_b = compiled(a), compiled(b)
    for _ in range(2):
        assert_follows(run_a, a)
        assert_follows(run_b, b)
    assert len(graphs) == 1


def test_twelve_blocks_one_by_one_make_one_graph(graphs):
    blocks = nn.ModuleList(Block().requires_grad_(False) for _ in range(12)).eval()
    runs = [compiled(block) for block in blocks]
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        for run, block in zip(runs, blocks, strict=True):
            assert sqnr(run(x), block(x)) > 38
    assert len(graphs) == 1


def test_tied_weights_are_quantized_once(graphs):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    model[2].weight = model[0].weight
    run = compiled(model)
    assert_follows(run, model)
    assert sum("codes" in n.name or "folded" in n.name for n in _folded(graphs[0])) == 2
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_follows(run, model)


def _folded(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.find_nodes(op="placeholder") if n.name.startswith("folded")]


def test_low_rank_update_in_the_forward_is_folded(graphs):
    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(64, 32)
            self.a, self.b = (
                nn.Parameter(torch.randn(4, 64) / 8),
                nn.Parameter(torch.randn(32, 4) / 8),
            )

        def forward(self, x):
            return nn.functional.linear(x, self.base.weight + self.b @ self.a, self.base.bias)

    model = LoRA().requires_grad_(False)
    run = compiled(model)
    assert_follows(run, model)
    with torch.no_grad():
        model.a.mul_(3)
    assert_follows(run, model)
    assert len(graphs) == 1


def test_a_buffer_that_the_graph_writes_is_not_folded(graphs):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("w", torch.randn(64, 64) / 8)

        def forward(self, x):
            self.w.mul_(2.0)
            return self.fc(x) + nn.functional.linear(x, self.w)

    model = Counts().requires_grad_(False)
    other = copy.deepcopy(model)
    run = compiled(model)
    for _ in range(3):
        assert sqnr(run(X), other(X)) > 38
        assert torch.equal(model.w, other.w)


def test_grad_is_refused_with_the_remedy():
    model = MLP()
    with pytest.raises(Exception, match=r"up\.(weight|bias) requires grad.*torch\.no_grad") as info:
        compiled(model)(X)
    assert isinstance(info.value.__cause__ or info.value.inner_exception, GradRequired)
    with torch.no_grad():
        compiled(model)(X)


def test_non_finite_weight_is_named():
    model = MLP().requires_grad_(False)
    model.down.weight[3, 5] = float("nan")
    with pytest.raises(Exception, match=r"down: the weight holds nan at \(3, 5\)") as info:
        compiled(model)(X)
    assert isinstance(info.value.inner_exception, NonFiniteWeight)


def test_weight_that_turns_non_finite_later_is_named(graphs):
    model = MLP().requires_grad_(False)
    run = compiled(model)
    run(X)
    model.up.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteWeight, match="up: the weight holds inf"):
        run(X)


def test_blocks_that_a_recipe_tells_apart_are_refused(graphs):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(MLP(out=64) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Stack().requires_grad_(False)
    recipe = {"blocks.2.*": None, "*": "int8wo"}
    for block in model.blocks:
        block.compile(backend="fxquant", options={"recipe": recipe})
    with pytest.raises(RecipeConflict, match=r"blocks\.2\.(up|down): .*no scheme"):
        model(X)


def test_folded_weights_die_with_their_model(graphs):
    gc.collect()
    before = weights.resident_bytes()
    model = MLP().requires_grad_(False)
    run = compiled(model)
    run(X)
    assert weights.resident_bytes() > before
    del model, run
    graphs.clear()
    torch._dynamo.reset()
    gc.collect()
    assert weights.resident_bytes() == before


def test_a_memo_computes_again_whenever_something_changed():
    from fxquant.weights import Memo

    weight, calls = torch.ones(3), []

    def compute():
        calls.append(weight.clone())
        return [calls[-1]]

    memo = Memo()
    assert memo([weight], compute) and memo([weight], compute) and len(calls) == 1
    weight.add_(1)
    memo([weight], compute)
    assert len(calls) == 2, "an in-place write"
    weight.data = torch.zeros(3)
    memo([weight], compute)
    assert len(calls) == 3, "other memory"
    memo([weight.clone()], compute)
    assert len(calls) == 4, "another tensor"
    fxquant.invalidate()
    memo([weight.clone()], compute)
    assert len(calls) == 5, "invalidated"
    other = weight.clone()
    memo([other], compute)
    calls.clear()  # the result is dead
    memo([other], compute)
    assert len(calls) == 1, "the memo owns nothing"
