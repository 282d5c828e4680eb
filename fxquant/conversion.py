"""quantize: a model's linears become QuantLinears, in place; their float weights are freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .backend import linears_of
from .calibration import Stats
from .errors import (
    AlreadyQuantized,
    GroupSizeMismatch,
    InvalidOption,
    NonFiniteWeight,
    NothingQuantized,
    UnsupportedDtype,
)
from .graph import Layer
from .modules import QuantLinear
from .passes.quantization import FLOATS
from .recipe import Recipe
from .scheme import SCHEMES, Quantized, Scheme, get_scheme


def quantize(
    model: nn.Module, recipe: Any, *, stats: Stats | None = None, smooth: Any = None
) -> nn.Module:
    """Quantize the linears of ``model`` in place and return it.

    stats: what ``calibrate`` returned for this model: layers whose activations are quantized are
    smoothed first (SmoothQuant), ``smooth`` (0 to 1, or by layer, 0.5 unless given) of the difficulty
    going to the weights, its inverse into the norm or linear before them. Groups for which that has
    no place stay as they are, with a warning in the log.

    recipe: a scheme's name, a mapping of name patterns, rules, or a Recipe. Served are
    ``nn.Linear`` and transformers' ``Conv1D``; tied weights stay tied. Everything is checked
    before anything is changed: UnknownScheme, InvalidRule, UnusedRule, GroupSizeMismatch,
    UnsupportedDtype, NonFiniteWeight, AlreadyQuantized, NothingQuantized. A model on the meta
    device becomes a quantized one on meta, ready for ``load_state_dict(..., assign=True)``.
    """
    if smooth is not None and stats is None:
        expected = "stats beside it, as fxquant.calibrate returns them"
        raise InvalidOption(name="smooth", value=smooth, expected=expected)
    rules = Recipe.of(recipe)
    plan = planned(model, rules)
    rules.check_used(linears_of([model]))
    if not plan:
        present = ", ".join(layer.name for layer in linears_of([model])) or "none"
        raise NothingQuantized(reasons=f"no rule gives a scheme to a linear; linears: {present}")
    for name, (module, scheme) in plan.items():
        check_fits(name, module, scheme)
    if stats is not None:
        wanted = [name for name, (_, scheme) in plan.items() if scheme.input is not None]
        stats.structure.fold(model, stats, 0.5 if smooth is None else smooth, wanted)
    shared: dict[tuple[int, str], Quantized] = {}
    for name, (module, scheme) in plan.items():
        weight = weight_of(module)
        key = (id(weight), scheme.name)
        if key not in shared:
            with torch.no_grad():
                shared[key] = scheme.weight.quantize_weight(weight)
        new = QuantLinear(scheme.name, shared[key], module.bias, weight.shape[1])  # type: ignore
        new.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as [out_features, in_features]; Conv1D holds it transposed."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
    return weight.t() if _is_conv1d(module) else _parameter(module)


def _parameter(module: nn.Module) -> torch.Tensor:
    return module.weight  # type: ignore[return-value]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or _is_conv1d(module)


def planned(model: nn.Module, rules: Recipe) -> dict[str, tuple[nn.Module, Scheme]]:
    """The linears that get a scheme, by name. Raises AlreadyQuantized and NothingQuantized."""
    found: dict[str, tuple[nn.Module, Scheme]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            layer = _layer(name, module, module.out_features, module.in_features)
            rule = rules.rule_for(layer)
            if rule is not None and rule.scheme is not None:
                raise AlreadyQuantized(layer=name, scheme=module.scheme)
        elif _is_linear(module):
            if not name:
                reason = "the model is itself a linear; wrap it, in nn.Sequential say"
                raise NothingQuantized(reasons=reason)
            out_features, in_features = weight_of(module).shape
            rule = rules.rule_for(_layer(name, module, out_features, in_features))
            if rule is not None and rule.scheme is not None:
                found[name] = (module, get_scheme(rule.scheme))
    return found


def _layer(name: str, module: nn.Module, out_features: int, in_features: int) -> Layer:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return Layer(name=name, module_type=kind, out_features=out_features, in_features=in_features)


def check_fits(name: str, module: nn.Module, scheme: Scheme) -> None:
    """Raises UnsupportedDtype, GroupSizeMismatch or NonFiniteWeight."""
    weight = weight_of(module)
    if weight.dtype not in FLOATS:
        choices = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise UnsupportedDtype(layer=name, dtype=weight.dtype, choices=choices)
    size, k = scheme.weight.group_size, weight.shape[1]
    if size and k % size:
        sizes = {s.weight.group_size for s in SCHEMES.values() if s.family == scheme.family}
        fitting = sorted(s for s in sizes if s and k % s == 0)
        choices = f"({', '.join(map(str, fitting))})" if fitting else "no known size"
        raise GroupSizeMismatch(
            layer=name, in_features=k, group_size=size, scheme=scheme.name, choices=choices
        )
    if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
        index = tuple(int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
        raise NonFiniteWeight(layer=name, value=weight[index].item(), index=index)
