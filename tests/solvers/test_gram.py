"""Gram: the sums are those of the data, whole or in parts, and what is no data is refused."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import (
    InvalidOption,
    NoCalibrationData,
    NonFiniteActivation,
    ShapeMismatch,
    UnsupportedDtype,
)
from fxquant.solvers import Gram
from fxquant.solvers import gram as gram_module
from fxquant.solvers.gram import hessian_for

G = torch.Generator().manual_seed(0)
X = torch.randint(-8, 9, (5, 7, 12), generator=G).float()  # all sums are exact


def same(a: Gram, b: Gram) -> None:
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_the_data(dtype):
    gram = Gram(12, dtype=dtype).add(X)
    rows = X.reshape(35, 12)
    wanted = torch.zeros(12, 12)
    for row in rows:
        wanted += row[:, None] * row
    assert gram.hessian.dtype == dtype and torch.equal(gram.hessian, wanted.to(dtype))
    assert torch.equal(gram.abs_sum, rows.abs().sum(0).to(dtype))
    assert torch.equal(gram.abs_max, rows.abs().amax(0).to(dtype))
    assert gram.tokens == 35 and gram.features == 12
    torch.testing.assert_close(gram.abs_mean, rows.abs().mean(0).to(dtype))


def test_parts_merged_and_slabs_equal_the_whole(monkeypatch):
    whole = Gram(12).add(X)
    same(Gram(12).add(X[:2]).add(X[2:].flatten(0, 1)), whole)
    same(Gram(12).add(X[:1]).merge(Gram(12)).merge(Gram(12, dtype=torch.float64).add(X[1:])), whole)
    monkeypatch.setattr(gram_module, "SLAB", 5 * 12)
    same(Gram(12).add(X), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype):
    same(Gram(12).add(X.to(dtype)), Gram(12).add(X))


def test_sums_of_half_precision_are_not_rounded_to_it():
    x = torch.ones(4099, 2, dtype=torch.float16)  # float16 holds no odd integer above 2048
    gram = Gram(2).add(x)
    assert gram.hessian.tolist() == [[4099.0] * 2] * 2 and gram.abs_sum.tolist() == [4099.0] * 2


def test_no_tokens_and_a_vector():
    gram = Gram(12).add(torch.zeros(0, 12)).add(torch.zeros(3, 0, 12))
    same(gram, Gram(12))
    same(gram.add(X[0, 0]), Gram(12).add(X[:1, 0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused_and_not_counted(value, dtype):
    gram, bad = Gram(12, layer="up").add(X), X.to(dtype).clone()
    bad[4, 2, 7] = value
    with pytest.raises(NonFiniteActivation, match=r"^up: .*\(5, 7, 12\).* channel 7;"):
        gram.add(bad)
    same(gram, Gram(12).add(X))


def test_wrong_shapes_and_dtypes():
    gram = Gram(12, layer="up")
    for x in (torch.zeros(3, 11), torch.tensor(1.0)):
        with pytest.raises(ShapeMismatch, match=r"^up: an input has shape .*last dimension of 12"):
            gram.add(x)
    with pytest.raises(UnsupportedDtype, match="int64"):
        gram.add(torch.zeros(3, 12, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match=r"\(8, 8\), expected \(12, 12\)"):
        gram.merge(Gram(8))
    with pytest.raises(InvalidOption, match=r"float32 or torch.float64"):
        Gram(12, dtype=torch.bfloat16)
    same(gram, Gram(12))


def test_divided_is_the_gram_of_divided_inputs():
    scales = 2.0 ** torch.arange(-6, 6)
    same(Gram(12).add(X).divided(scales), Gram(12).add(X / scales))
    with pytest.raises(ShapeMismatch, match="scales"):
        Gram(12).divided(torch.ones(11))


def test_state_survives_plain_tensors_and_goes_on_counting(tmp_path):
    from safetensors.torch import load_file, save_file

    whole = Gram(12, dtype=torch.float64).add(X)
    part = Gram(12, dtype=torch.float64).add(X[:3])
    save_file(part.state_dict(), tmp_path / "gram.safetensors")
    same(Gram.from_state_dict(load_file(tmp_path / "gram.safetensors")).add(X[3:]), whole)


def test_a_damaged_state_is_refused():
    state = Gram(12).add(X).state_dict()
    with pytest.raises(InvalidOption, match="hessian, abs_sum, abs_max, tokens"):
        Gram.from_state_dict({k: v for k, v in state.items() if k != "tokens"})
    for name, value in {"hessian": torch.zeros(12), "abs_max": torch.zeros(11)}.items():
        with pytest.raises(ShapeMismatch, match=f"up: {name}|up: "):
            Gram.from_state_dict({**state, name: value}, layer="up")
    with pytest.raises(ShapeMismatch):
        Gram.from_state_dict({**state, "hessian": torch.zeros(11, 12)})


def test_counts_under_inference_mode_and_after_it():
    with torch.inference_mode():
        gram = Gram(12).add(X[:2])
    same(gram.add(X[2:].clone().requires_grad_()), Gram(12).add(X))
    assert not gram.hessian.requires_grad


def test_a_hessian_needs_tokens_and_the_weights_width():
    weight = torch.zeros(3, 12)
    for gram in (None, Gram(12)):
        with pytest.raises(NoCalibrationData, match=r"^up: gptq works on .*rtn, mse, hqq"):
            hessian_for(gram, weight, solver="gptq", layer="up")
    with pytest.raises(ShapeMismatch, match=r"^up: .*\(8, 8\), expected \(12, 12\)"):
        hessian_for(Gram(8).add(torch.ones(1, 8)), weight, solver="gptq", layer="up")
