"""sensitivity() leaves the model and the random numbers as they were, and names what it cannot measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import (
    AlreadyQuantized,
    InvalidOption,
    NonFiniteStatistics,
    NothingObserved,
    ShapeMismatch,
    UnknownScheme,
    UnusedRule,
)

from .conftest import MLP
from .sensitivity_cases import Reused, measured


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}


def modules_of(model: nn.Module) -> list[tuple[str, int, bool, int]]:
    """What must stay: names, identities, modes and hooks, in their order."""
    return [
        (name, id(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    ]


class Noisy(nn.Module):
    """Training mode and random numbers would change each run's loss, and its own buffers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(32, 32).eval()

    def forward(self, x):
        noise = torch.randn(len(x), 32)
        return {"loss": self.frozen(self.drop(self.norm(self.linear(x))) + noise).square().mean()}


def test_the_model_and_the_random_numbers_are_as_they_were():
    model = Noisy()
    x = torch.randn(6, 64)
    before, modules, state = snapshot(model), modules_of(model), torch.get_rng_state()
    first, second = (measured(model, [x]) for _ in range(2))
    assert first == second
    assert modules_of(model) == modules
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    small, large = (first["linear", s].loss_change for s in ("int8wo", "int4wo-32"))
    assert abs(small) < 0.01 * first.loss, "other noise would move the loss by more than that"
    assert abs(small) < abs(large)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_after_an_error_the_model_is_as_it_was(calls):
    model, x = Reused().train(), torch.randn(5, 64)
    before, modules = snapshot(model), modules_of(model)
    left = [True] * calls

    def loss(output, batch):
        assert batch is x and not torch.is_grad_enabled()
        left.pop()  # IndexError at last
        return output.square().mean()

    with pytest.raises(IndexError):
        measured(model, [x], loss=loss)
    assert modules_of(model) == modules
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_one_quantized_layer_at_a_time():
    model = Reused()
    seen = []

    def loss(output, _):
        quantized = [m for m in model.modules() if isinstance(m, fxquant.QuantLinear)]
        seen.append([m.scheme for m in quantized])
        return output.sum()

    found = measured(model, [torch.randn(2, 64)] * 2, ["int8wo", "int8dq"], loss=loss)
    assert (
        seen
        == [[]] * 2
        + [["int8wo"]] * 2
        + ([["int8dq"]] * 2 + [["int8wo"]] * 2) * 2
        + [["int8dq"]] * 2
    )
    assert len(found.rows) == 6


def test_bad_input_is_named():
    model, x = MLP(), torch.randn(5, 64)
    cases = [
        (UnknownScheme, "int9", dict(schemes=["int8wo", "int9"])),
        (InvalidOption, "at least one scheme", dict(schemes=[])),
        (InvalidOption, "an iterable of batches", dict(batches=x)),
        (NothingObserved, "there was no batch", dict(batches=iter(()))),
        (UnusedRule, "decide no layer.*head", dict(recipe={"*.head": "int8wo", "up": "int8wo"})),
        (NothingObserved, "check the recipe", dict(recipe={"*": None})),
        (InvalidOption, "Tensor of shape .*a scalar", dict(loss=lambda y, _: y)),
        (InvalidOption, "NoneType.*a scalar", dict(loss=lambda y, _: None)),
        (NonFiniteStatistics, "loss: .* batch 1", dict(loss=lambda y, _: y.sum() / 0)),
        (NonFiniteStatistics, "output: .* batch 2", dict(batches=[x, x / 0])),
    ]
    for kind, pattern, changed in cases:
        given = {"batches": [x], "schemes": "int8wo"} | changed
        with pytest.raises(kind, match=pattern):
            measured(model, **given)
    with pytest.raises(AlreadyQuantized, match="up"):
        measured(fxquant.quantize(MLP(), {"up": "int8wo", "*": None}), [x], "int8wo")


def test_schemes_with_calibrated_ranges_are_refused():
    with pytest.raises(
        InvalidOption, match="'int8static': expected schemes that need no calibrated"
    ):
        measured(MLP(), [torch.randn(5, 64)], ["int8wo", "int8static"])


def test_outputs_without_anything_to_compare_are_named():
    class Counts(MLP):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    class Filters(MLP):
        def forward(self, x):
            return super().forward(x)[: 2 if isinstance(self.up, fxquant.QuantLinear) else 3]

    class Sometimes(MLP):
        def forward(self, x):
            y = super().forward(x)
            return {"loss": y.sum()} if len(x) > 2 else {"y": y}

    x = torch.randn(5, 64)
    with pytest.raises(InvalidOption, match=r"'loss'.*of type Tensor, has neither"):
        measured(Counts(), [x])
    with pytest.raises(ShapeMismatch, match=r"the output has shape \[2, 32\], expected \[3, 32\]"):
        measured(Filters(), [x])
    with pytest.raises(InvalidOption, match="a loss in each output, or in none"):
        measured(Sometimes(), [x, x[:2]])
