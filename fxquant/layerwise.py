"""sensitivity(): quantize one linear at a time and see what becomes of its output and of the end loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .backend import linears_of
from .calibration import arguments, refuse_single
from .capture import evaluating
from .conversion import check_fits, planned, weight_of
from .errors import (
    GroupSizeMismatch,
    InvalidOption,
    NonFiniteStatistics,
    NonFiniteWeight,
    NothingObserved,
    ShapeMismatch,
    UnsupportedDtype,
)
from .modules import QuantLinear
from .ops import compute_dtype
from .recipe import Recipe
from .scheme import Scheme, get_scheme
from .sensitivities import Effect, Sensitivity
from .storage import storage_of

Loss = Callable[[Any, Any], Any]


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    schemes: str | Sequence[str],
    *,
    loss: Loss | None = None,
    recipe: Any = None,
    progress: bool = True,
) -> Sensitivity:
    """Each linear's output error and the change of the end loss, for each of ``schemes``, while this
    layer alone is quantized and everything else is float.

    batches: as for ``calibrate``; they are kept, and run once in float and once for each layer and scheme.
    loss: of (output, batch), a scalar. Unless given, the output's own ``loss``, an attribute or a key
    (transformers, where the batch has labels); of an output without one the relative error, its squared
    distance to the float model's over the square of that, where a tuple or mapping counts by its first
    floating-point tensor. Changes of the loss are means over batches, each as heavy as any other; output
    errors are sums over all values. recipe: look only at the layers to which it gives a scheme.

    A layer's inputs are the float model's, except where one that is called again meets its own effect.
    Every run is in eval mode, eager, without gradients, and draws the same random numbers. Afterwards the
    model is what it was, after an error too; meanwhile one quantized layer at a time is held beside it.
    What a scheme does not fit is listed with the reason, and linears that are never called (of
    ``nn.MultiheadAttention`` only the weight of ``out_proj`` is read) are in ``Sensitivity.missed``.

    Raises UnknownScheme, InvalidOption, NothingObserved, NonFiniteStatistics for a float loss or output
    that is not finite, ShapeMismatch for outputs of changing shapes, and what ``quantize`` raises for a
    recipe.
    """
    chosen = _schemes(schemes)
    refuse_single(batches)
    model = getattr(model, "_orig_mod", model)
    rules = Recipe.of(chosen[0].name if recipe is None else recipe)
    subjects = _subjects(model, rules)
    rules.check_used(linears_of([model]))
    kept = list(batches)
    if not kept:
        raise NothingObserved(reason="there was no batch")
    with torch.no_grad(), evaluating(model), _uncompiled(model), _noting_calls(subjects) as called:
        trial = _Trial(model, kept, loss)
        reached = [subject for subject in subjects if id(subject.module) in called]
        if not reached:
            raise NothingObserved(reason="check the recipe, and that the model calls its linears")
        pairs = [(subject, scheme) for subject in reached for scheme in chosen]
        bar = tqdm(pairs, desc="sensitivity", unit="layer x scheme", disable=not progress)
        rows = tuple(_effect(subject, scheme, trial) for subject, scheme in bar)
    missed = tuple(s.names[0] for s in subjects if id(s.module) not in called)
    return Sensitivity(rows, missed, trial.loss, len(kept))


def _schemes(names: str | Sequence[str]) -> list[Scheme]:
    """Without doubles. Raises UnknownScheme and InvalidOption."""
    found = {
        get_scheme(n).name: get_scheme(n) for n in ([names] if isinstance(names, str) else names)
    }
    if not found:
        raise InvalidOption(name="schemes", value=names, expected="at least one scheme")
    for name, scheme in found.items():
        if scheme.static:
            expected = "schemes that need no calibrated ranges"
            raise InvalidOption(name="schemes", value=name, expected=expected)
    return list(found.values())


@dataclass
class _Subject:
    """A linear with all of its names. tied: another module has the same weight."""

    model: nn.Module
    module: nn.Module
    names: list[str]
    tied: bool

    @contextmanager
    def replaced_by(self, new: nn.Module) -> Iterator[None]:
        places = [(self.model.get_submodule(n.rpartition(".")[0]), n) for n in self.names]
        try:
            for parent, name in places:
                setattr(parent, name.rpartition(".")[2], new)
            yield
        finally:
            for parent, name in places:
                setattr(parent, name.rpartition(".")[2], self.module)


def _subjects(model: nn.Module, rules: Recipe) -> list[_Subject]:
    owners: dict[int, set[int]] = {}
    for owner in model.modules():
        for parameter in owner.parameters(recurse=False):
            owners.setdefault(storage_of(parameter), set()).add(id(owner))
    found: dict[int, _Subject] = {}
    for name, (module, _) in planned(model, rules).items():
        tied = len(owners.get(storage_of(weight_of(module)), ())) > 1
        found.setdefault(id(module), _Subject(model, module, [], tied)).names.append(name)
    return list(found.values())


def _effect(subject: _Subject, scheme: Scheme, trial: _Trial) -> Effect:
    module, (layer, *aliases) = subject.module, subject.names
    about: dict[str, Any] = {"layer": layer, "aliases": tuple(aliases), "scheme": scheme.name}
    try:
        check_fits(layer, module, scheme)
    except (GroupSizeMismatch, UnsupportedDtype, NonFiniteWeight) as why:
        return Effect(**about, reason=str(why))
    weight = weight_of(module)
    q = scheme.weight.quantize_weight(weight)
    new = QuantLinear(scheme.name, q, module.bias, weight.shape[1]).eval()  # type: ignore[arg-type]
    error = energy = 0.0

    def compare(_: nn.Module, args: Any, kwargs: Any, found: torch.Tensor) -> None:
        nonlocal error, energy
        e, s = _squares(found, module.forward(*args, **kwargs))
        error, energy = error + e, energy + s

    new.register_forward_hook(compare, with_kwargs=True)
    with subject.replaced_by(new):
        change = trial.change()
    return Effect(
        **about,
        relative_error=_ratio(error, energy),
        loss_change=change,
        saved_bytes=(0 if subject.tied else weight.nbytes)
        - sum(t.nbytes for t in q if t is not None),
    )


class _Trial:
    """The model on all batches; losses, or else outputs, of its float self are kept to compare with."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: Loss | None):
        self.model, self.batches, self.given = model, batches, loss
        tensors = [*model.parameters(), *model.buffers()]
        self.devices = {t.device for t in tensors if t.is_cuda}
        self.float = [self._judged(batch) for batch in batches]
        outputs = [x for x in self.float if isinstance(x, torch.Tensor)]
        if len(outputs) not in (0, len(batches)):
            expected = "a loss in each output, or in none"
            raise InvalidOption(name="batches", value="with and without a loss", expected=expected)
        name = "the output" if outputs else "the loss"
        for number, x in enumerate(self.float, 1):
            if not torch.as_tensor(x).isfinite().all():
                raise NonFiniteStatistics(name=name, batch=number)
        self.loss = None if outputs else sum(self.float) / len(batches)  # type: ignore[arg-type]

    def change(self) -> float:
        """The mean change of the loss, infinite where it is no finite number."""
        total = 0.0
        for batch, before in zip(self.batches, self.float, strict=True):
            after = self._judged(batch)
            if isinstance(before, torch.Tensor):
                if after.shape != before.shape:
                    shapes = {"found": list(after.shape), "expected": list(before.shape)}
                    raise ShapeMismatch(what="the output", **shapes)
                total += _ratio(*_squares(after, before))
            else:
                total += after - before
        return total / len(self.batches) if math.isfinite(total) else math.inf

    def _judged(self, batch: Any) -> Any:
        """The batch's loss, or the output's tensor where there is none."""
        args, kwargs = arguments(batch)
        with torch.random.fork_rng(self.devices, device_type="cuda"):
            output = self.model(*args, **kwargs)
            if self.given is not None:
                return _scalar(self.given(output, batch))
        loss = getattr(output, "loss", None)
        if loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        return _tensor(output) if loss is None else _scalar(loss)


def _scalar(loss: Any) -> float:
    single = isinstance(loss, torch.Tensor) and loss.numel() == 1 and not loss.is_complex()
    if not single and not isinstance(loss, Real):
        shape = f" of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
        value = f"{type(loss).__name__}{shape}"
        raise InvalidOption(name="loss", value=value, expected="a scalar for each batch")
    return float(loss)


def _tensor(output: Any) -> torch.Tensor:
    parts = output.values() if isinstance(output, Mapping) else output
    for part in parts if isinstance(output, Mapping | tuple | list) else (output,):
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            return part
    expected = (
        "a function of (output, batch), as the model's output, of type "
        f"{type(output).__name__}, has neither a loss nor a floating-point tensor"
    )
    raise InvalidOption(name="loss", value=None, expected=expected)


def _squares(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Sums of the squared differences and of the squared values wanted."""
    wanted = wanted.to(compute_dtype(wanted.dtype))
    error = found.to(wanted.dtype) - wanted
    return float(error.square().sum()), float(wanted.square().sum())


def _ratio(error: float, energy: float) -> float:
    if error == 0:
        return 0.0
    ratio = error / energy if energy else math.inf
    return ratio if math.isfinite(ratio) else math.inf


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """What ``Module.compile`` has compiled runs eagerly."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@contextmanager
def _noting_calls(subjects: Sequence[_Subject]) -> Iterator[set[int]]:
    """The modules that are called, by id. Watched all the time, so that fused paths of torch, which
    a hook turns off (nn.TransformerEncoderLayer), are taken by no run."""
    called: set[int] = set()
    handles = [
        s.module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
        for s in subjects
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
