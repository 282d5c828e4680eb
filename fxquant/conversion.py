"""quantize: a model's linears become QuantLinears, in place; their float weights are freed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backend import linears_of
from .calibration import Stats, arguments, refuse_single
from .capture import clean
from .errors import (
    AlreadyQuantized,
    GroupSizeMismatch,
    InvalidOption,
    NonFiniteWeight,
    NothingQuantized,
    UncalibratedInput,
    UnsupportedDtype,
)
from .graph import Layer
from .modules import Qparams, QuantLinear, share_inputs
from .observers import GramMatrix
from .passes.equalization import alpha_of
from .passes.quantization import FLOATS
from .passes.static import check_ranges, ends_of
from .recipe import Recipe
from .scheme import SCHEMES, Quantized, Scheme, get_scheme
from .sequential import Target, solve_in_order
from .smoothing import SEARCHES, Folds
from .solvers import SOLVERS, Gram, Record, Solver, get_solver

Coded = tuple[Quantized, Record | None]
"""Codes of a weight, and what their solver noted."""


@torch.no_grad()
def quantize(
    model: nn.Module,
    recipe: Any,
    *,
    stats: Stats | None = None,
    smooth: Any = None,
    ranges: str = "minmax",
    solver: str | Solver | None = None,
    batches: Iterable[Any] | None = None,
    device: torch.device | str | None = None,
    keep: str = "cpu",
    folder: str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize the linears of ``model`` in place and return it.

    recipe: a scheme's name, a mapping of name patterns, rules, or a Recipe. Served are
    ``nn.Linear`` and transformers' ``Conv1D``; tied weights stay tied. A model on the meta device
    becomes a quantized one on meta, ready for ``load_state_dict(..., assign=True)``.

    stats: what ``calibrate`` returned for this model: the ranges of static schemes, and smoothing.
    smooth: how much of the activations' difficulty goes to the weights (SmoothQuant), where activations
    are quantized: 0 to 1, by a mapping from layers' names, or "auto", which tries; "awq" scales the
    weights that matter, of any scheme; False leaves them alone. 0.5 where there are statistics. The inverse
    goes into the norm or linear before the layers, or the layers divide their inputs. ranges: how those of
    static schemes are chosen, "minmax", or "percentile" or "mse" of a histogram.

    solver: how codes are found, one of ``fxquant.solvers``; None is plain round to nearest. With
    ``batches`` (as for ``calibrate``) layers are solved in the order of the graph, each on inputs that
    carry the error of those before, a segment at a time on ``device``; between
    segments the batches' values wait on the "cpu", on "disk" or on the "device" (``keep``). What is
    solved is written to ``folder``, from which a run that was interrupted goes on. Without batches, a
    solver that needs data takes statistics of the kind "gram": each layer is solved on the float model's
    inputs. That serves models which are not one graph.

    device: where codes are found, by default where the model is. A model on the CPU can be quantized by a
    GPU that has no room for it: one weight after another goes there, and its codes come back.

    Everything is checked before anything is changed, and nothing is before all is solved:
    UnknownScheme, InvalidRule, UnusedRule, GroupSizeMismatch, UnsupportedDtype, NonFiniteWeight,
    AlreadyQuantized, NothingQuantized, InvalidOption, NoCalibrationData, UncalibratedInput, and those of
    ``sequential.solve_in_order``.
    """
    given, model = model, getattr(model, "_orig_mod", model)
    rules, solver = Recipe.of(recipe), None if solver is None else get_solver(solver)
    _check_options(stats, smooth, solver, batches, folder)
    place = _place(device)
    check_ranges(ranges)
    plan = planned(model, rules)
    rules.check_used(linears_of([model]))
    if not plan:
        present = ", ".join(layer.name for layer in linears_of([model])) or "none"
        raise NothingQuantized(reasons=f"no rule gives a scheme to a linear; linears: {present}")
    for name, (module, scheme) in plan.items():
        check_fits(name, module, scheme)
        if solver is not None and not solver.needs_data:  # whether it serves the scheme at all
            solver(torch.zeros(1, scheme.weight.group_size or 1), scheme.weight, layer=name)
    folds = Folds()
    if stats is not None and smooth is not False:
        schemes = {name: scheme for name, (_, scheme) in plan.items()}
        if isinstance(smooth, Mapping) and (unknown := [n for n in smooth if n not in schemes]):
            expected = "names of layers that are quantized"
            raise InvalidOption(name="smooth", value=unknown[0], expected=expected)
        folds = stats.structure.folds(model, stats, 0.5 if smooth is None else smooth, schemes)
    known: dict[Any, Qparams] = {}
    targets = {
        name: Target(
            _folded_weight(name, module, folds),
            scheme,
            _parameter(module).device,
            folds.divisors.get(name),
            _qparams(name, module, scheme, folds, stats, ranges, known) if scheme.static else None,
            _group(name, module, stats) if scheme.static or name in folds.divisors else None,
        )
        for name, (module, scheme) in _once(plan).items()
    }
    solved: Mapping[str, Coded] = {}
    if batches is not None:
        assert solver is not None
        solved = solve_in_order(
            model,
            map(arguments, batches),
            targets,
            solver,
            folds.rounded,
            device=place or _device(model),
            keep=keep,
            folder=None if folder is None else Path(folder),
            progress=progress,
        )
    elif solver is not None and solver.needs_data:
        assert stats is not None
        grams = {name: _gram(name, stats, folds) for name in targets}
        solved = {
            name: _codes(target, place, solver, name, grams[name])
            for name, target in targets.items()
        }
    else:
        solved = _solved(plan, targets, solver, place)
    _convert(model, plan, targets, solved)
    folds.apply(model)
    share_inputs(model)
    model.register_load_state_dict_post_hook(share_inputs)
    return given


def _place(device: torch.device | str | None) -> torch.device | None:
    """Where codes are found. Raises InvalidOption for what is no device of this machine."""
    if device is None:
        return None
    try:
        torch.empty(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        expected = f"a device of this machine ({str(error).splitlines()[0]})"
        raise InvalidOption(name="device", value=str(device), expected=expected) from None


def _once(plan: Mapping[str, tuple[nn.Module, Scheme]]) -> dict[str, tuple[nn.Module, Scheme]]:
    """``plan`` without the further names of a module."""
    first = {id(module): name for name, (module, _) in [*plan.items()][::-1]}
    return {name: found for name, found in plan.items() if first[id(found[0])] == name}


def _check_options(
    stats: Any, smooth: Any, solver: Solver | None, batches: Any, folder: Any
) -> None:
    if batches is not None:
        refuse_single(batches)
    elif folder is not None:
        raise InvalidOption(name="folder", value=folder, expected="nothing, without batches to run")
    if smooth is not None and smooth is not False and stats is None:
        expected = "stats beside it, as fxquant.calibrate returns them"
        raise InvalidOption(name="smooth", value=smooth, expected=expected)
    if isinstance(smooth, str):
        if smooth not in SEARCHES:
            expected = f"a number from 0 to 1, False, or one of {', '.join(SEARCHES)}"
            raise InvalidOption(name="smooth", value=smooth, expected=expected)
    elif smooth is not None:
        for one in smooth.values() if isinstance(smooth, Mapping) else (smooth,):
            alpha_of(one, [""])
    if batches is not None and solver is None:
        expected = f"one of {', '.join(SOLVERS)}, beside batches"
        raise InvalidOption(name="solver", value=None, expected=expected)
    grams = stats is not None and "gram" in stats.kinds.get("input", ())
    if solver is not None and solver.needs_data and batches is None and not grams:
        expected = (
            f"what {solver.name} works on: an iterable of batches, as for fxquant.calibrate, or "
            'stats of kinds={"input": ("channel", "gram")}'
        )
        raise InvalidOption(name="batches", value=None, expected=expected)


def _folded_weight(name: str, module: nn.Module, folds: Folds) -> Callable[[], torch.Tensor]:
    def weight() -> torch.Tensor:
        folded = folds.of(f"{name}.weight", module.weight.detach())  # type: ignore[union-attr, operator, arg-type]
        return folded.t() if _is_conv1d(module) else folded

    return weight


def _qparams(
    name: str,
    module: nn.Module,
    scheme: Scheme,
    folds: Folds,
    stats: Stats | None,
    ranges: str,
    known: dict[Any, Qparams],
) -> Qparams:
    """Of a static layer's inputs, from what they are once smoothed. Layers that read one value get the
    same tensors, by which a compiled graph sees that it has to quantize that value once."""
    weight, spec, smoothing = weight_of(module), scheme.input, folds.scales.get(name)
    assert spec is not None
    names = (name,) if stats is None else stats.structure.beside(name)
    key = (names, scheme.name, id(smoothing), weight.device)
    if key not in known:
        ends: torch.Tensor | None = torch.zeros(2, 1)
        if weight.is_meta:  # the checkpoint will bring them
            smoothing = None
        else:
            channels = weight.shape[1]
            ends = ends_of(stats or {}, names, channels, spec, ranges, smoothing is not None)
        if ends is None:
            raise UncalibratedInput(layer=name, scheme=scheme.name)
        found = torch.ops.fxquant.static_qparams(
            ends, None if smoothing is None else smoothing.to(ends.device), scheme.name
        )
        scale, zero = (*(t.to(weight.device) for t in found), None)[:2]
        known[key] = scale, zero
    return known[key]


def _group(name: str, module: nn.Module, stats: Stats | None) -> torch.Tensor | None:
    """A number for the layers that read what ``name`` reads; None where there are no others."""
    names = () if stats is None else stats.structure.beside(name)
    if len(names) < 2:
        return None
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    return torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64).to(weight_of(module).device)


def _gram(name: str, stats: Stats, folds: Folds) -> Gram | None:
    """Of a layer's inputs as they are once smoothed; None without statistics."""
    observer = stats.get(f"{name}:input", {}).get("gram")
    if not isinstance(observer, GramMatrix) or not observer.batches:
        return None
    fields = dict(zip(("hessian", "abs_sum", "abs_max"), observer.state(), strict=True))
    gram = Gram.from_state_dict({**fields, "tokens": torch.tensor(observer.tokens)}, name)
    scale = folds.scales.get(name)
    return gram if scale is None else gram.divided(scale)


def _convert(
    model: nn.Module,
    plan: Mapping[str, tuple[nn.Module, Scheme]],
    targets: Mapping[str, Target],
    solved: Mapping[str, Coded],
) -> None:
    """Put QuantLinears in the places of linears. Tied weights get the same codes, a module with several
    names stays one."""
    shared: dict[tuple[int, str], Coded] = {}
    made: dict[int, QuantLinear] = {}
    for name, (module, scheme) in plan.items():
        if id(module) not in made:
            codes = shared.setdefault((id(_parameter(module)), scheme.name), solved[name])
            made[id(module)] = _quantized(module, targets[name], *codes)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])


def _quantized(module: nn.Module, target: Target, codes: Quantized, record: Any) -> QuantLinear:
    smoothing = None if target.smoothing is None else target.smoothing.to(target.home)
    new = QuantLinear(
        target.scheme.name,
        codes,
        module.bias,  # type: ignore[arg-type]
        weight_of(module).shape[1],
        smoothing=smoothing,
        qparams=target.qparams,
        group=target.group,
    )
    new.record = record
    return new.train(module.training)


def _solved(
    plan: Mapping[str, tuple[nn.Module, Scheme]],
    targets: Mapping[str, Target],
    solver: Solver | None,
    place: torch.device | None,
) -> dict[str, Coded]:
    """Without data, each weight once."""
    shared: dict[tuple[int, str], Coded] = {}
    found: dict[str, Coded] = {}
    for name, target in targets.items():
        key = (id(_parameter(plan[name][0])), target.scheme.name)
        if key not in shared:
            shared[key] = _codes(target, place, solver, name)
        found[name] = shared[key]
    return found


def _codes(
    target: Target,
    place: torch.device | None,
    solver: Solver | None,
    name: str,
    gram: Gram | None = None,
) -> Coded:
    """Of one weight, found at ``place`` (where the weight is, if None) and brought home."""
    weight, spec = target.weight(), target.scheme.weight
    if weight.is_meta:
        return spec.quantize_weight(weight), None
    if place is not None:
        weight, gram = weight.to(place), None if gram is None else gram.to(place)
    if solver is None:
        return spec.quantize_weight(weight).to(target.home), None
    solution = solver(weight, spec, gram, layer=name)
    return solution._replace(quantized=solution.quantized.to(target.home))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
    """The linears that get a scheme, by name."""
    found: dict[str, tuple[nn.Module, Scheme]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = clean(path)
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


def _finite(weight: torch.Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def check_fits(name: str, module: nn.Module, scheme: Scheme) -> None:
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
    # of the extremes: a mask of the whole weight would take as much room as the weight
    if weight.numel() and weight.device.type != "meta" and not _finite(weight):
        index = tuple(int(i) for i in (~torch.isfinite(weight)).nonzero()[0])
        raise NonFiniteWeight(layer=name, value=weight[index].item(), index=index)
