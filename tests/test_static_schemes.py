"""Static schemes through the backend: what is refused, changing rows, modules that hold qparams, Inductor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxquant
from fxquant import weights
from fxquant.errors import InvalidOption, NotQuantized, RangeConflict, UncalibratedInput
from fxquant.graph import layers
from fxquant.lowering.kernel import KERNELS
from fxquant.modules import INPUT
from fxquant.scheme import SCHEMES

from .conftest import MLP, Block, called, sqnr
from .passes.helpers import count

STATIC = [name for name, row in SCHEMES.items() if row.static]


def calibrated(model: nn.Module, *batches, **options):
    return fxquant.calibrate(model, batches, compiled=False, progress=False, **options)


@pytest.mark.parametrize("recipe", [{"scheme": "int8static"}, {"recipe": {"up": "FP8_STATIC"}}])
def test_without_statistics_it_is_said_what_to_do(recipe):
    with pytest.raises(InvalidOption, match=r"stats=fxquant\.calibrate\(model, batches\)"):
        fxquant.compile(MLP(), **recipe)
    with pytest.raises(InvalidOption, match="stats beside it"):
        fxquant.compile(MLP(), "int8dq", ranges="mse")
    with pytest.raises(InvalidOption, match="one of minmax, percentile, mse"):
        fxquant.compile(MLP(), "int8dq", stats={}, ranges="median")


@torch.no_grad()
def test_a_layer_that_no_batch_reached(graphs, caplog):
    model, x = MLP().requires_grad_(False), torch.randn(5, 64)
    stats = calibrated(model, x)
    del stats._found["down:input"]
    with caplog.at_level("WARNING", "fxquant"):
        y = fxquant.compile(model, "int8static", stats=stats)(x)
    assert "down stays float: int8static needs statistics of its input" in caplog.text
    assert sqnr(y, model(x)) > 33
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"down \(int8static needs statistics") as info:
        fxquant.compile(model, "int8static", stats=stats, strict=True)(x)
    assert isinstance(info.value.inner_exception, NotQuantized)


@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_explain_names_the_scheme_and_the_kernel(scheme):
    model, x = Block().requires_grad_(False), torch.randn(2, 7, 64)
    report = fxquant.explain(model, x, options={"scheme": scheme, "stats": calibrated(model, x)})
    assert {layer.scheme for layer in report.layers} == {scheme}
    families = {kernel for layer in report.layers for kernel in KERNELS[layer.kernel].families}
    assert SCHEMES[scheme].product.family in families and scheme in str(report)


@pytest.mark.parametrize("smooth", [False, 0.5])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_any_number_of_rows_in_two_graphs(scheme, smooth, graphs):
    model, x = Block().requires_grad_(False), torch.randn(64, 7, 64)
    stats = calibrated(model, x)
    run = fxquant.compile(model, scheme, stats=stats, smooth=smooth, fullgraph=True)
    whole = run(x)
    assert sqnr(whole, model(x)) > SCHEMES[scheme].sqnr - 2
    for rows in (1, 2, 3, 17, 40):
        y = run(x[:rows])
        assert sqnr(y, whole[:rows]) > 60, "ranges are static: a row does not depend on others"
    assert len(graphs) <= 3


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(x).relu() * 3


@torch.no_grad()
def test_a_graph_that_blocks_share_would_give_them_one_range(graphs):
    model, x = nn.Sequential(Broken(), Broken()).requires_grad_(False), torch.randn(4, 16)
    stats = calibrated(model, x)
    with pytest.raises(RangeConflict, match=r"1\.fc: its input .* range of 0\.fc"):
        fxquant.compile(model, "int8static", stats=stats)(x)
    torch.compiler.reset()
    fxquant.compile(model, "int8dq", stats=stats)(x)
    torch.compiler.reset()
    one = nn.Sequential(Broken())
    run = fxquant.compile(one, "int8static", stats=calibrated(one, x))
    before = run(x)
    one[0].fc.weight = nn.Parameter(-one[0].fc.weight, requires_grad=False)  # the same layer: fine
    assert not torch.equal(run(x), before) and sqnr(run(x), one(x)) > 30


class Siblings(nn.Module):
    def __init__(self, linears):
        super().__init__()
        self.gate, self.up, self.down = linears

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("smooth", [False, 0.5])
@pytest.mark.parametrize("scheme", STATIC)
@torch.no_grad()
def test_in_place(scheme, smooth, graphs):
    torch.manual_seed(0)
    linears = [nn.Linear(256, 256, bias=i != 1).requires_grad_(False) for i in range(3)]
    model, x = Siblings(linears), torch.rand(9, 256)
    expected, graph = (
        model(x),
        fxquant.compile(copy.deepcopy(model), scheme, stats=calibrated(model, x), smooth=smooth)(x),
    )
    held = fxquant.quantize(model, scheme, stats=calibrated(model, x), smooth=smooth)
    wanted = held(x)
    assert sqnr(wanted, expected) > 25 and sqnr(wanted, graph) > 40
    assert held.gate.input_scale is held.up.input_scale and held.down.input_scale.shape == (1,)
    assert (held.gate.input_zero is None) == (scheme != "int8static")
    canonical = sum(b.nbytes for name, b in held.named_buffers() if "_codes" in name)
    before = weights.resident_bytes()
    graphs.clear()
    run = torch.compile(held, backend="fxquant", fullgraph=True)
    y = run(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
    (gm,) = graphs
    assert count(gm)["fx.quantize_static"] == 2, "gate and up hold the same qparams"
    found = layers(gm)
    assert {layer.scheme for layer in found.values()} == {scheme}
    assert found["gate"].merged == ("gate", "up")
    for _ in range(2):  # one copy from the first call on, and after a look at the codes
        packed = weights.resident_bytes() - before
        left = sum(
            b.untyped_storage().nbytes() for name, b in held.named_buffers() if "_codes" in name
        )
        assert left + packed <= 1.05 * canonical + 4 * 4 * 3 * 256, (left, packed, canonical)
        assert held.up.codes.shape == (256, 256)
        assert torch.equal(run(x), y)
    held.down.input_scale *= 3  # a buffer, not a constant of the graph
    assert not torch.equal(run(x), y)
    torch.testing.assert_close(run(x), held(x), rtol=0, atol=0.02 * float(wanted.abs().max()))


def one_input(gate: fxquant.QuantLinear, up: fxquant.QuantLinear) -> bool:
    """Whether the layers hold the same tensors of their input."""
    return all(getattr(gate, name) is getattr(up, name) for name in INPUT)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "scheme, smooth", [("int8static", False), ("fp8static", 0.5), ("int8dq", 0.5)]
)
@torch.no_grad()
def test_layers_of_one_input_are_merged_after_loading(scheme, smooth, assign, graphs, tmp_path):
    """A file of safetensors, into a model that has not seen data; qparams and divisors of inputs."""

    def fresh():
        return Siblings([nn.Linear(64, 64).requires_grad_(False) for _ in range(3)])

    model, x = fresh(), torch.rand(9, 64)
    model = fxquant.quantize(model, scheme, stats=calibrated(model, x), smooth=smooth)
    assert one_input(model.gate, model.up) and model.gate.input_group is not None
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = fxquant.quantize(fresh(), scheme)
    if not assign:
        other = fxquant.quantize(fresh(), scheme, stats=calibrated(fresh(), x), smooth=smooth)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
    assert one_input(other.gate, other.up) and not one_input(other.gate, other.down)
    assert torch.equal(other(x), model(x))
    torch.compile(other, backend="fxquant", fullgraph=True)(x)
    assert layers(graphs[-1])["gate"].merged == ("gate", "up")
    for moved in (copy.deepcopy(other).bfloat16(), copy.deepcopy(other).to("meta")):
        assert one_input(moved.gate, moved.up), "one move of the model leaves it so"
    assert not {id(t) for t in model.buffers()} & {id(t) for t in other.buffers()}


@torch.no_grad()
def test_what_differs_is_not_shared_after_loading(graphs):
    """Ranges that were changed one by one, and layers whose equal ranges are chance, stay apart."""
    linears = [nn.Linear(64, 64).requires_grad_(False) for _ in range(3)]
    model, x = Siblings(linears), torch.rand(9, 64)
    model = fxquant.quantize(model, "int8static", stats=calibrated(model, x), smooth=False)
    state = model.state_dict()
    state["up.input_scale"] = state["up.input_scale"] * 2
    for name in ("input_scale", "input_zero"):
        state[f"down.{name}"] = state[f"gate.{name}"].clone()
    model.load_state_dict(state)
    assert torch.equal(model.up.input_scale, model.gate.input_scale * 2)
    assert model.down.input_scale is not model.gate.input_scale
    wanted, run = model(x), torch.compile(model, backend="fxquant", fullgraph=True)
    assert sqnr(run(x), wanted) > 50
    model.up.input_scale *= 3
    assert torch.equal(model.down.input_scale, state["gate.input_scale"])
    assert sqnr(run(x), model(x)) > 50


@torch.no_grad()
def test_in_place_needs_statistics_and_the_checkpoint_holds_them():
    model, x = MLP().requires_grad_(False), torch.randn(9, 64)
    with pytest.raises(UncalibratedInput, match=r"^up: int8static takes the scale"):
        fxquant.quantize(model, "int8static")
    stats = calibrated(model, x, kinds={"input": ("channel", "histogram")})
    with pytest.raises(InvalidOption, match="percentile"):
        fxquant.quantize(model, "int8static", stats=stats, ranges="percentile")  # it is smoothed
    cut, whole = (
        fxquant.quantize(copy.deepcopy(model), "int8static", stats=stats, smooth=False, ranges=how)
        for how in ("mse", "minmax")
    )
    assert cut.up.input_scale < whole.up.input_scale
    with torch.device("meta"):
        empty = MLP()
    empty = fxquant.quantize(empty, "int8static")
    empty.load_state_dict(cut.state_dict(), assign=True)
    assert torch.equal(empty(x), cut(x)) and not torch.equal(whole(x), cut(x))
    whole.load_state_dict(cut.state_dict())
    assert torch.equal(whole(x), cut(x))
    state = cut.state_dict()
    del state["up.input_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up.input_scale"):
        whole.load_state_dict(state)
    dynamic = fxquant.quantize(MLP(), "int8dq")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up.input_scale"):
        dynamic.load_state_dict(cut.state_dict())


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int8static", torch.bfloat16), ("fp8static", torch.float32)]
)
@torch.no_grad()
def test_inductor(scheme, dtype):
    model, x = Block().to(dtype).requires_grad_(False), torch.randn(2, 7, 64).to(dtype)
    stats = calibrated(model, x)
    graph = fxquant.trace(model, (x,))
    for name, one in fxquant.passes.pipeline(scheme, stats=stats):
        if name != "lowered":
            one(graph)
        else:
            break
    wanted = graph(x)
    with fresh_cache():
        run = fxquant.compile(model, scheme, stats=stats, fullgraph=True)
        y, code = run_and_get_code(run, x)
    assert code and not called("quantize", code) and not called("dequantize", code)
    assert sqnr(y, wanted) > (40 if dtype == torch.bfloat16 else 60)
    assert sqnr(y, model(x)) > SCHEMES[scheme].sqnr
    assert torch.equal(run(x), y)
