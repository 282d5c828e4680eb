"""calibrate(): statistics of any model by layer name, from any batches, compiled or not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fxquant
from fxquant import Stats

from .conftest import MLP, Block
from .test_architectures import llama, made


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True], ids=["observed", "compiled"])
@torch.no_grad()
def test_ranges_are_those_of_the_float_model(compiled):
    model = MLP().requires_grad_(False)
    data = [torch.randn(n, 64) * s for n, s in ((5, 1.0), (5, 3.0), (9, 0.5))]
    kinds = {p: ["minmax", "channel", "sample"] for p in ("input", "output", "weight")}
    stats = fxquant.calibrate(model, data, compiled=compiled, progress=False, kinds=kinds)
    first = [model.up(x) for x in data]
    hidden = [nn.functional.gelu(y) for y in first]
    expected = {
        "up:input": data,
        "up:output": first,
        "up:weight": [model.up.weight.t()],
        "down:input": hidden,
        "down:output": [model.down(y) for y in hidden],
        "down:weight": [model.down.weight.t()],
    }
    assert set(stats) == set(expected) and not stats.missed
    for name, seen in expected.items():
        whole, found = torch.cat(seen), stats[name]
        low, high = found["minmax"].range()
        torch.testing.assert_close((low, high), (whole.min(), whole.max()), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found["channel"].absmax, whole.abs().amax(0))
        assert found["minmax"].batches == len(seen), name
        assert_same_rows(found["sample"].rows, whole)
    assert "down:input" in str(stats)
    x = data[0]
    assert model._compiled_call_impl is None and torch.equal(model(x), model.down(hidden[0]))


def assert_same_rows(found, whole):
    """In any order; rounding does not change which row is which."""
    assert found.shape == whole.shape
    nearest = torch.cdist(found.double(), whole.double()).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(whole)))
    torch.testing.assert_close(found, whole[nearest], rtol=1e-5, atol=1e-6)


class Keyworded(nn.Module):
    """Takes keywords, breaks the graph, uses a layer twice, one never, and returns no tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)

    def forward(self, x, scale=1.0):
        y = self.first(x * scale)
        torch._dynamo.graph_break()
        return {"y": self.second(self.second(y)), "name": "a text"}


def test_keywords_graph_breaks_and_layers_never_reached(caplog):
    model = Keyworded().requires_grad_(False)
    x = torch.randn(3, 16)
    with caplog.at_level(logging.WARNING, "fxquant"):
        stats = fxquant.calibrate(
            model, [{"x": x, "scale": 2.0}], "int8dq", compiled=False, progress=False
        )
    assert set(stats) == {"first:input", "second:input"}
    assert stats["first:input"]["minmax"].range()[1] == (2 * x).max()
    assert stats["second:input"]["minmax"].batches == 2
    assert stats.missed == ["never"] and "never" in caplog.text


def test_a_data_loader_of_ragged_tuples_and_a_recipe():
    model = Block().requires_grad_(False)
    data = [(torch.randn(1, n, 64),) for n in (3, 7, 4, 9)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    recipe = {"re:[qkv]": "int8dq", "*": None}
    stats = fxquant.calibrate(
        model, loader, recipe=recipe, kinds={"input": ["token"]}, compiled=False, progress=False
    )
    assert set(stats) == {"q:input", "k:input", "v:input"}
    assert stats["q:input"]["token"].tokens == 23


class Named(nn.Module):
    """Takes what a data set gives by name, returns no tensor at all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, values, mask, label=None):
        torch._assert(label is None or len(label) == len(values), "collated")
        return Answer(text=str(self.fc(values * mask).sum().item()))


class Answer:
    def __init__(self, text: str):
        self.text = text


def test_a_data_loader_of_dicts_and_an_output_of_the_users_class():
    rows = [{"values": torch.full((8,), float(i)), "mask": torch.ones(8)} for i in range(5)]
    loader = torch.utils.data.DataLoader([row | {"label": 3} for row in rows], batch_size=2)
    kinds = {"input": ("token", "sample")}
    stats = fxquant.calibrate(Named(), loader, kinds=kinds, compiled=False, progress=False)
    found = stats["fc:input"]
    assert (found["token"].tokens, found["token"].batches) == (5, 3)
    assert sorted(found["sample"].rows[:, 0].tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_around_a_loop_of_the_users_own():
    model = MLP().requires_grad_(False)
    x = torch.randn(2, 64)
    with fxquant.Calibration(model, kinds={"input": ["histogram"]}, compiled=False) as stats:
        for _ in range(3):
            with torch.no_grad():
                y = model(x)
            x = y[:, :1].expand(2, 64).contiguous()
    assert stats["up:input"]["histogram"].batches == 3
    before = stats["up:input"]["histogram"].batches
    model(torch.randn(2, 64))
    assert stats["up:input"]["histogram"].batches == before, "the model is as it was"


@torch.no_grad()
def test_around_generate():
    """Ten prompt tokens and three steps of two, every token once; logits of the last ones alone."""
    model, _ = made(llama)
    ids = torch.randint(3, 96, (2, 5))
    with fxquant.Calibration(model, kinds={"input": ("token",)}, compiled=False) as stats:
        text = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.shape == (2, 9) and not stats.missed and len(stats) == 8
    counted = {name: found["token"].tokens for name, found in stats.items()}
    assert counted.pop("lm_head:input") == 2 * 4
    assert set(counted.values()) == {2 * (5 + 3)}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_of_inference_is_observed(training, caplog):
    """No dropout, and running statistics as they are; the model's mode is what it was."""
    layers = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)
    model, x = nn.Sequential(*layers).train(training), torch.randn(16, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {"input": ["sample"], "output": ["minmax"]}
    caplog.set_level(logging.WARNING, "fxquant")
    stats = fxquant.calibrate(model, [x], kinds=kinds, compiled=False, progress=False)
    assert "train mode" not in caplog.text and not (stats["3:input"]["sample"].rows == 0).any()
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad(), fxquant.Calibration(model, kinds=kinds, compiled=False) as own:
        model(x)
    dropped = (own["3:input"]["sample"].rows == 0).double().mean()
    assert (0.4 < dropped < 0.6) if training else dropped == 0, (
        "around the user's code: its own mode"
    )
    assert ("in train mode" in caplog.text) == training


@pytest.mark.parametrize(
    "recipe", ["int8dq", {"up": "int8dq", "*": None}, fxquant.Recipe.of("8da4w-32")]
)
def test_a_scheme_or_whatever_makes_a_recipe(recipe):
    model, quiet = MLP(), {"compiled": False, "progress": False}
    x = [torch.randn(2, 64)]
    expected = {"up:input"} if isinstance(recipe, dict) else {"up:input", "down:input"}
    assert set(fxquant.calibrate(model, x, recipe, **quiet)) == expected
    assert set(fxquant.calibrate(model, x, recipe=recipe, **quiet)) == expected
    with pytest.raises(fxquant.FxQuantError, match="no batch reached"):
        fxquant.calibrate(model, x, [], **quiet)


def test_the_batch_that_is_named_is_the_callers():
    """The second batch, though the layer has been used five times by then; wherever it is found."""
    x = torch.randn(3, 16)
    bad = x.clone()
    bad[2, 5] = torch.inf
    for kind in ("minmax", "histogram"):
        with pytest.raises(fxquant.FxQuantError, match=r"second:\w+: .*infinity, in batch 2"):
            fxquant.calibrate(
                Twice(), [x, bad], kinds={"input": [kind]}, compiled=False, progress=False
            )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.second(self.second(x)))


def test_a_weight_that_is_not_finite_is_named():
    model = MLP()
    with torch.no_grad():
        model.down.weight[3, 4] = torch.nan
    with pytest.raises(fxquant.FxQuantError, match=r"down:weight: .*NaN"):
        fxquant.calibrate(
            model,
            [torch.randn(2, 64)],
            kinds={"weight": ["channel"]},
            compiled=False,
            progress=False,
        )


def test_two_processes_merged_saved_and_loaded(tmp_path):
    model = MLP().requires_grad_(False)
    kinds = {"input": ["minmax", "channel", "histogram", "moving_average", "token"]}
    data = [torch.randn(4, 64) * s for s in (1.0, 2.0, 0.1, 5.0)]

    def run(part):
        return fxquant.calibrate(model, part, kinds=kinds, compiled=False, progress=False)

    whole, first, second = run(data), run(data[:1]), run(data[1:])
    second.save(tmp_path / "second.safetensors")
    first.merge(Stats.load(tmp_path / "second.safetensors"))
    assert set(first) == set(whole)
    for name in whole:
        for kind in ("minmax", "channel", "histogram"):
            a, b = first[name][kind], whole[name][kind]
            assert torch.equal(a.low, b.low) and torch.equal(a.high, b.high)
        assert torch.equal(first[name]["histogram"].counts, whole[name]["histogram"].counts)
    first.save(tmp_path / "first.safetensors")
    assert str(Stats.load(tmp_path / "first.safetensors")) == str(first)


def test_bad_input_is_named(tmp_path):
    model = MLP().requires_grad_(False)
    quiet = {"compiled": False, "progress": False}
    with pytest.raises(fxquant.FxQuantError, match="there was no batch"):
        fxquant.calibrate(model, [], **quiet)
    bad = torch.randn(2, 64)
    bad[1, 3] = torch.nan
    with pytest.raises(fxquant.FxQuantError, match=r"up:input.*NaN.*batch 2"):
        fxquant.calibrate(model, [torch.randn(2, 64), bad], **quiet)
    with pytest.raises(fxquant.FxQuantError, match="no batch reached"):
        fxquant.calibrate(nn.Sequential(nn.ReLU()), [torch.randn(2, 64)], **quiet)
    with pytest.raises(fxquant.FxQuantError, match="minmaxx"):
        fxquant.calibrate(model, [bad], kinds={"input": ["minmaxx"]}, **quiet)
    with pytest.raises(fxquant.FxQuantError, match="unknown scheme"):
        fxquant.calibrate(model, [bad], "int9", **quiet)
    with pytest.raises(fxquant.FxQuantError, match="only one of them"):
        fxquant.calibrate(model, [bad], "int8dq", recipe={"*": "int8dq"}, **quiet)
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, other)
    with pytest.raises(fxquant.FxQuantError, match="fxquant-stats"):
        Stats.load(other)


def test_an_error_of_the_users_code_passes_through_and_the_model_is_as_it_was():
    model = MLP()
    with pytest.raises(ZeroDivisionError), fxquant.Calibration(model, compiled=False):
        1 / 0  # noqa: B018
    assert model._compiled_call_impl is None


def test_any_number_of_calibrations():
    for i in range(12):
        stats = fxquant.calibrate(MLP(), [torch.randn(2, 64)], compiled=False, progress=False)
        assert len(stats) == 2, i


@torch.no_grad()
def test_merged_statistics_know_the_structure_and_empty_batches_reach_nothing():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.a(self.norm(x)), self.b(x[:0])

    model = Expert().eval().requires_grad_(False)
    part = fxquant.calibrate(model, [torch.randn(3, 16)], compiled=False, progress=False)
    assert part.missed == ["b"]
    stats = Stats()
    stats.merge(part)
    assert stats.missed == ["b"]
    before = model.norm.weight.clone()
    fxquant.quantize(model, "int8dq", stats=stats)
    assert not torch.equal(model.norm.weight, before)
    with pytest.raises(fxquant.FxQuantError, match="stats beside it"):
        fxquant.quantize(MLP(), "int8dq", smooth=0.5)
