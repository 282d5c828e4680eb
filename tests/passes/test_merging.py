"""merge: linears that share an input become one, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import passes
from fxquant.graph import layers, value

from ..conftest import Block, sqnr
from .helpers import aten, calls, count, exact, integers, ops, through, trace


class Fork(nn.Module):
    """Three linears a, b, c of the same width on one input; ``call(m, x)`` joins them."""

    def __init__(self, call, bias=(True, True, True), sizes=(32, 32, 32)):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(64, n, bias=b) for n, b in zip(sizes, bias, strict=True)
        )
        self.call = call
        exact(self.requires_grad_(False))

    def forward(self, x):
        return self.call(self, x)


def three(m, x):
    return torch.cat([m.a(x), m.b(x) * 2, m.c(x) * 3], -1)


def merged(model, x, scheme="int8wo", **kw):
    """The graph before and after merge, its result compared bit for bit on exact numbers."""
    gm = trace(model, x, to="fused", scheme=scheme, **kw)
    wanted = gm(x)
    through(gm, passes.merge)
    found = gm(x)
    pairs = (
        [(found, wanted)] if isinstance(wanted, torch.Tensor) else zip(found, wanted, strict=True)
    )
    for y, z in pairs:
        assert torch.equal(y, z) and y.stride() == z.stride()
    return gm


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32", "8da4w-32", "fp8wo"])
@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3, (True, False, True)], ids=str)
@torch.no_grad()
def test_three_become_one(bias, scheme):
    x = integers(5, 64)
    gm = trace(Fork(three, bias), x, to="fused", scheme=scheme)
    wanted = gm(x)
    through(gm, passes.merge)
    (node,) = calls(gm, ops.linear.default)
    assert value(node).shape == (5, 96)
    assert (node.args[4] is None) == (not any(bias))
    (split,) = calls(gm, aten.split_with_sizes.default)
    assert split.args == (node, [32, 32, 32], -1)
    if scheme == "int8wo":  # exact numbers: any order of summing gives the same
        assert torch.equal(gm(x), wanted)
    assert sqnr(gm(x), wanted) > 110
    assert layers(gm)["b"].merged == ("a", "b", "c")


@torch.no_grad()
def test_parts_of_different_sizes_keep_their_order():
    gm = merged(Fork(three, sizes=(32, 96, 8)), integers(2, 3, 64))
    (split,) = calls(gm, aten.split_with_sizes.default)
    assert split.args[1] == [32, 96, 8]


@torch.no_grad()
def test_a_block_becomes_three_products():
    model, x = Block().requires_grad_(False), torch.randn(2, 7, 64)
    gm = trace(model, x, to="fused", scheme="int8dq")
    wanted = gm(x)
    through(gm, passes.merge)
    sizes = [value(n).shape[-1] for n in calls(gm, ops.linear.default)]
    assert sizes == [3 * 64, 2 * 128, 64]
    assert count(gm)["silu"] == count(gm)["mul"] == 1
    assert sqnr(gm(x), wanted) > 100 and 36 < sqnr(gm(x), model(x)) < 60
    through(gm, passes.fold_qparams, passes.lower(), passes.verify)
    assert 36 < sqnr(gm(x), model(x)) < 60
    kernels = {layer.kernel for layer in layers(gm).values()}
    assert None not in kernels, "a merged layer has its kernel too"


def test_provenance_of_the_whole_and_of_its_parts():
    x = torch.randn(2, 7, 64)
    gm = through(trace(Block(), x, to="fused"), passes.merge)
    whole = calls(gm, ops.linear.default)[0]
    notes = whole.meta["custom"]["fxquant"]
    assert notes["layer"] == "q+k+v" and notes["members"] == ("q", "k", "v")
    assert "q, k, v = (" in whole.meta["stack_trace"]
    (split,) = (u for u in whole.users)
    parts = list(split.users)
    assert [p.meta["custom"]["fxquant"]["layer"] for p in parts] == ["q", "k", "v"]
    paths = [next(reversed(p.meta["nn_module_stack"].values()))[0] for p in parts]
    assert paths == ["q", "k", "v"]


@torch.no_grad()
def test_a_view_that_the_parts_do_not_allow_becomes_a_reshape():
    def call(m, x):
        return m.a(x).view(-1) + m.b(x).view(-1), m.c(x).view(2, 3, 4, 8).transpose(1, 2) * 2

    gm = merged(Fork(call), integers(2, 3, 64))
    assert count(gm)["reshape"] == 2 and count(gm)["view"] == 1
    assert count(gm)["clone"] == 0


RETURNED = {
    "as it is": lambda m, x: (m.a(x), m.b(x) * 1, m.c(x)),
    "transposed": lambda m, x: (m.a(x).t(), m.b(x) * 1, m.c(x) * 1),
    "a part of it": lambda m, x: (m.a(x)[:, 3:9], m.b(x) * 1, m.c(x) * 1),
    "flattened": lambda m, x: (m.a(x).view(-1), m.b(x).view(-1), m.c(x)),
    "twice": lambda m, x: (lambda y: (y, y.view(-1), m.b(x) * 1))(m.a(x)),
}


@pytest.mark.parametrize("name", RETURNED)
@torch.no_grad()
def test_what_is_returned_keeps_its_strides(name):
    gm = merged(Fork(RETURNED[name]), integers(5, 64))
    assert count(gm)["fx.linear"] < 3


@torch.no_grad()
def test_only_the_parts_that_are_returned_are_copied():
    gm = merged(
        Fork(lambda m, x: (m.a(x), m.b(x).view(5, 4, 8).sum(1), m.c(x) + 1)), integers(5, 64)
    )
    assert count(gm)["clone"] == 1


@torch.no_grad()
def test_a_part_that_is_read_by_strides_is_copied():
    def call(m, x):
        return torch.as_strided(m.a(x), (4, 3, 16), (32, 8, 1)) + m.b(x).sum() + m.c(x).sum()

    gm = merged(Fork(call), integers(5, 64))
    assert count(gm)["fx.linear"] == 1 and count(gm)["clone"] == 1


@torch.no_grad()
def test_a_part_that_goes_into_a_branch_is_copied():
    def call(m, x):
        a, b = m.a(x), m.b(x)
        return (
            torch.cond(x.sum() > 0, lambda a: a.view(-1) * 2, lambda a: a.view(-1) + 1, (a,))
            + b.sum()
        )

    model, x = Fork(call), integers(5, 64)
    gm = merged(model, x)
    assert count(gm)["fx.linear"] == 1
    assert sqnr(gm(-x), model(-x)) > 38


@torch.no_grad()
def test_parts_may_be_written_to():
    def call(m, x):
        a, b, c = m.a(x), m.b(x), m.c(x)
        a.mul_(0.5)
        b.relu_()
        c[:, 0] = 7
        return a + b * c

    gm = merged(Fork(call), integers(5, 64))
    assert count(gm)["fx.linear"] == 1


def gelu_of(m, x):
    return F.gelu(m.a(x)) + m.b(x)


NOT_MERGED = {
    "one alone": lambda m, x: m.a(x),
    "different inputs": lambda m, x: m.a(x) + m.b(x * 2),
    "one after the other": lambda m, x: m.a(x) @ m.b(x[:, :]).t(),
    "the same weight twice": lambda m, x: m.a(x) + m.a(x),
    "a bias that depends on the first": lambda m, x: F.linear(x, m.b.weight, m.a(x).mean(0)),
}


@pytest.mark.parametrize("name", NOT_MERGED)
@torch.no_grad()
def test_not_merged(name):
    x = integers(5, 64)
    gm = trace(Fork(NOT_MERGED[name]), x, to="fused")
    before, wanted = count(gm), gm(x)
    assert not passes.merge(gm).modified
    assert count(gm) == before and torch.equal(gm(x), wanted)
    assert all(layer.merged == () for layer in layers(gm).values())


@torch.no_grad()
def test_different_schemes_are_not_merged():
    recipe = {"a": "int8wo", "b": "int4wo-32", "c": "int8wo"}
    gm = trace(Fork(three), integers(5, 64), to="fused", scheme=recipe)
    through(gm, passes.merge)
    assert sorted(value(n).shape[-1] for n in calls(gm, ops.linear.default)) == [32, 64]
    assert layers(gm)["c"].merged == ("a", "c") and layers(gm)["b"].merged == ()


@torch.no_grad()
def test_a_float_layer_is_not_merged():
    gm = trace(Fork(three), integers(5, 64), to="fused", scheme={"b": None, "*": "int8wo"})
    through(gm, passes.merge)
    assert count(gm)["linear"] == 1 and count(gm)["fx.linear"] == 1


@torch.no_grad()
def test_a_linear_with_an_activation_of_its_own_is_not_merged():
    gm = trace(Fork(three), integers(5, 64), to="fused")
    a, b, _ = calls(gm, ops.linear.default)
    for node in (a, b):
        node.update_arg(6, "relu")
    gm.recompile()
    wanted = gm(integers(5, 64))
    assert not passes.merge(gm).modified
    assert wanted.shape == (5, 96)


@pytest.mark.parametrize("view", [False, True], ids=["itself", "through a view"])
@torch.no_grad()
def test_an_input_that_is_written_to_in_between(view):
    def call(m, x):
        x = x * 1.0
        part = x[:2] if view else x
        y = m.a(x)
        part.add_(1)
        return y + m.b(x) + m.c(x)

    model, x = Fork(call), integers(5, 64)
    gm = merged(model, x)
    assert sqnr(gm(x), model(x)) > 40
    # b and c read the same state of x and may still be one
    assert count(gm)["fx.linear"] == 2 and layers(gm)["a"].merged == ()


@torch.no_grad()
def test_a_weight_that_is_computed_later_is_moved_up():
    def call(m, x):
        y = m.a(x)
        return y + F.linear(x, m.b.weight * 2, m.c.bias + m.b.bias)

    gm = merged(Fork(call), integers(5, 64))
    assert count(gm)["fx.linear"] == 1


@torch.no_grad()
def test_regions_are_not_merged_across(graphs):
    """autocast ends between b and c: what stands in different regions may differ in dtype."""

    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 32) for _ in range(3))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x).float() + self.b(x).float()
            return y + self.c(x)

    model, x = Regions().requires_grad_(False), torch.randn(5, 64)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    assert 34 < sqnr(run(x), model(x)) < 60
    assert layers(graphs[0])["c"].merged == ()


@torch.no_grad()
def test_what_a_region_casts_behind_the_parts_keeps_its_dtype(graphs):
    """A part has strides of its own; ``prod`` behind it is float32 under autocast, whatever comes in."""

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.a(x)[..., :2].prod(-1), self.b(x)

    model, x = Region().requires_grad_(False), torch.randn(5, 64)
    run = torch.compile(model, backend="fxquant", options={"scheme": "int8wo"}, fullgraph=True)
    for y, wanted in zip(run(x), model(x), strict=True):
        assert y.dtype == wanted.dtype and sqnr(y, wanted) > 30
    assert layers(graphs[0])["a"].merged == ("a", "b")


@torch.no_grad()
def test_quantized_modules_are_merged_too():
    model = fxquant.quantize(Fork(three), "int4wo-32")
    x = torch.randn(5, 64)
    gm = trace(model, x, to="fused")
    wanted = gm(x)
    through(gm, passes.merge)
    assert count(gm)["fx.linear"] == 1
    assert sqnr(gm(x), wanted) > 110


def test_once_is_enough():
    gm = through(trace(Fork(three), integers(5, 64), to="fused"), passes.merge)
    before = gm.code
    assert not passes.merge(gm).modified and gm.code == before


@torch.no_grad()
def test_symbolic_rows():
    rows = torch.export.Dim("rows", min=2)
    model = Fork(three)
    gm = fxquant.trace(model, (integers(5, 64),), dynamic_shapes={"x": {0: rows}})
    through(gm, passes.normalize, passes.quantize_weights("int8wo"), passes.fuse, passes.merge)
    assert count(gm)["fx.linear"] == 1
    x = integers(11, 64)
    assert torch.equal(gm(x), model(x))
