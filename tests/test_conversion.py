"""quantize(): canonical codes in place of float weights, one resident copy, and its whole life."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant import weights
from fxquant.errors import (
    AlreadyQuantized,
    GroupSizeMismatch,
    NonFiniteWeight,
    NothingQuantized,
    UnusedRule,
)
from fxquant.scheme import SCHEMES

from .conftest import MLP, Block, sqnr

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def held(model: nn.Module) -> int:
    """Bytes of the storages that a model's tensors really own."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


DYNAMIC = [s for s, row in SCHEMES.items() if not row.static]


@pytest.mark.parametrize("scheme", [s for s in DYNAMIC if not s.endswith(("128", "256", "sym"))])
@torch.no_grad()
def test_eager_and_compiled_equal_the_float_models_compilation(scheme, graphs):
    model = MLP().requires_grad_(False)
    run = torch.compile(model, backend="fxquant", options={"scheme": scheme}, fullgraph=True)
    wanted = run(X)
    quantized = fxquant.quantize(copy.deepcopy(model), scheme)
    assert all(isinstance(m, fxquant.QuantLinear) for m in (quantized.up, quantized.down))
    assert sqnr(quantized(X), wanted) > 60
    compiled = torch.compile(quantized, backend="fxquant", fullgraph=True)
    assert torch.equal(compiled(X), wanted)


@pytest.mark.parametrize("scheme", ["int8dq", "int4wo-32", "8da4w-32", "int3wo-32", "int2wo-32"])
@torch.no_grad()
def test_one_resident_copy(scheme, graphs):
    model = fxquant.quantize(Block(256).requires_grad_(False), scheme)
    packable = fxquant.quantize(Block(256), SCHEMES[scheme].product.name)  # of 3 bits, in 4
    canonical = sum(t.nbytes for name, t in packable.named_buffers() if "bias" not in name)
    before = weights.resident_bytes()
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    x = torch.randn(2, 7, 256)
    y = run(x)
    assert len([m for m in model.modules() if isinstance(m, fxquant.QuantLinear)]) == 6
    packed = weights.resident_bytes() - before
    left = sum(b.untyped_storage().nbytes() for b in model.buffers())
    assert left + packed <= 1.05 * canonical + 8 * 256 * 4, (left, packed, canonical)
    assert sqnr(model(x), y) > 55, "eager after compiling: the codes come back"
    assert torch.equal(run(x), y)
    assert torch.equal(run(x), y)


@pytest.mark.parametrize(
    "scheme", ["int8dq", "int4wo-32", "8da4w-32", "int4wo-64-sym", "int3wo-32", "fp8wo"]
)
@torch.no_grad()
def test_state_dict_round_trips_through_meta(scheme, graphs):
    model = fxquant.quantize(MLP().requires_grad_(False), scheme)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    y = run(X)
    state = model.state_dict()
    assert set(state) == set(fresh)
    for key, value in fresh.items():
        assert torch.equal(state[key].view(torch.uint8), value.view(torch.uint8)), key
    with torch.device("meta"):
        other = fxquant.quantize(MLP().requires_grad_(False), scheme)
    other.load_state_dict(state, assign=True)
    run_other = torch.compile(other, backend="fxquant", fullgraph=True)
    assert torch.equal(run_other(X), y)
    for key, value in fresh.items():  # the caller's tensors are not given up
        assert torch.equal(state[key].view(torch.uint8), value.view(torch.uint8)), key


@torch.no_grad()
def test_load_into_a_compiled_model_is_seen(graphs):
    a, b = (fxquant.quantize(MLP().requires_grad_(False), "int4wo-32") for _ in range(2))
    run_a, run_b = (torch.compile(m, backend="fxquant", fullgraph=True) for m in (a, b))
    y_b = run_b(X)
    assert not torch.equal(run_a(X), y_b)
    a.load_state_dict(b.state_dict())
    assert torch.equal(run_a(X), y_b)


@torch.no_grad()
def test_copy_cast_and_device_move_after_compiling(graphs):
    model = fxquant.quantize(MLP().requires_grad_(False), "8da4w-32")
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    y = run(X)
    clone = copy.deepcopy(model)
    assert sqnr(clone(X), y) > 55
    assert torch.equal(run(X), y)
    scale = model.up.scale
    model.to(torch.bfloat16)
    assert torch.equal(model.up.scale, scale), "qparams keep the scheme's dtype"
    assert model(X.bfloat16()).dtype == torch.bfloat16
    assert sqnr(model(X.bfloat16()), y) > 25
    assert sqnr(run(X.bfloat16()), y) > 25


@torch.no_grad()
def test_changing_rows_share_one_packed_copy(graphs):
    model = fxquant.quantize(MLP(256).requires_grad_(False), "int4wo-32")
    run = torch.compile(model, backend="fxquant", fullgraph=True)
    before = weights.resident_bytes()
    for rows in (1, 3, 5, 40):
        x = torch.randn(rows, 256)
        y = run(x)
        assert sqnr(y, model(x)) > 55
    run(x)
    assert len(graphs) <= 3
    packed = weights.resident_bytes() - before
    assert packed < 1.1 * sum(t.nbytes for t in fxquant.quantize(MLP(256), "int4wo-32").buffers())


@torch.no_grad()
def test_float_weights_are_freed_and_ties_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    model[2].weight = model[0].weight
    y = model(X)
    fxquant.quantize(model, "int8wo")
    assert model[0]._codes is model[2]._codes
    assert held(model) < 64 * 64 + 4 * 64 * 4
    assert sqnr(model(X), y) > 38


def test_recipe_excludes_and_the_rest_stays_float(graphs):
    model = fxquant.quantize(MLP().requires_grad_(False), {"down": None, "*": "int8wo"})
    assert type(model.down) is nn.Linear
    report = fxquant.explain(model, X)
    assert report["up"].scheme == "int8wo" and report["down"].scheme is None
    assert report["down"].reason


def test_bad_input_changes_nothing():
    cases = [
        (GroupSizeMismatch, "down: in_features 100 .* 64", nn.Linear(100, 8), "int4wo-64"),
        (NonFiniteWeight, r"down: .* inf at \(0, 1\)", _poisoned(), "int8wo"),
    ]
    for error, message, down, scheme in cases:
        model = MLP()
        model.down = down
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=message):
            fxquant.quantize(model, scheme)
        assert type(model.up) is nn.Linear
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
    with pytest.raises(UnusedRule, match=r"layer_9.*up"):
        fxquant.quantize(MLP(), {"layer_9": "int8wo", "*": "int8dq"})
    with pytest.raises(NothingQuantized):
        fxquant.quantize(nn.Sequential(nn.ReLU()), "int8wo")
    with pytest.raises(AlreadyQuantized, match=r"up is already quantized with int8wo"):
        fxquant.quantize(fxquant.quantize(MLP(), "int8wo"), "int8wo")


def _poisoned() -> nn.Linear:
    linear = nn.Linear(128, 8)
    with torch.no_grad():
        linear.weight[0, 1] = float("inf")
    return linear


def test_loading_a_wrong_shape_is_refused():
    model = fxquant.quantize(MLP(), "int4wo-32")
    state = model.state_dict()
    state["up.scale"] = state["up.scale"][:, :1]
    with pytest.raises(RuntimeError, match=r"up\.scale has shape \[128, 1\].*expected \[128, 2\]"):
        model.load_state_dict(state)


def test_codes_come_home_from_another_device(monkeypatch):
    """Each weight goes where the codes are found, alone, and its codes come back."""
    there, home, moves = torch.device("cpu"), torch.device("cpu"), []
    model, wanted = MLP(), MLP()
    wanted.load_state_dict(model.state_dict())
    move = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args[:1] in ((there,), (home,)):
            moves.append((tuple(self.shape), self.dtype))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    fxquant.quantize(model, "int4wo-32", device="cpu")
    monkeypatch.undo()
    weights = [(tuple(m.weight.shape), torch.float32) for m in (wanted.up, wanted.down)]
    codes = [((n, k // 2), torch.uint8) for (n, k), _ in weights]
    wide = [m for m in moves if m in weights or m in codes]
    assert wide == [weights[0], codes[0], weights[1], codes[1]], "one after another"
    fxquant.quantize(wanted, "int4wo-32")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:77"])
def test_a_device_that_is_none_is_named(device):
    model = MLP()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(fxquant.errors.InvalidOption, match=f"device.*{device}"):
        fxquant.quantize(model, "int4wo-32", device=device)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_quantized_model_on_meta_gives_shapes():
    with torch.device("meta"):
        model = fxquant.quantize(MLP(), "int8wo")
        y = model(torch.empty(3, 64))
    assert y.is_meta and y.shape[0] == 3
