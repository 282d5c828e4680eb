"""calibrate(): run data through the observed graph; statistics by layer name.

The structure comes from the graph: Dynamo captures whatever the model (or any code around it) runs,
``insert_observers`` puts nodes at the inputs of its linears, and what passes them is counted under the
layer's name in the user's model. Recompiled graphs, graph breaks and further instances add to the same
statistics.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate
from torch import fx, nn
from tqdm import tqdm

from .capture import NAMES, from_dynamo
from .config import DEFAULT_SCHEME
from .errors import (
    CaptureFailed,
    EmptyObserver,
    InvalidOption,
    NonFiniteStatistics,
    NothingObserved,
)
from .graph import Layer, layers
from .inductor import calling, compile_graph
from .lifting import lift, sources_hash
from .observers import OBSERVERS, Observer, collecting, restored, state_of
from .passes import insert_observers, normalize
from .recipe import Recipe
from .smoothing import Structure

log = logging.getLogger("fxquant.calibration")

KINDS: Mapping[str, Sequence[str]] = {"input": ("minmax", "channel")}
"""What is observed unless asked otherwise, by port: enough for static ranges and for SmoothQuant."""

FORMAT = "fxquant-stats-1"


class Stats(Mapping[str, dict[str, Observer]]):
    """Observers by ``<layer>:<port>``, then by kind.

    kinds: which to keep, by port. ``stats["layers.0.q_proj:input"]["channel"].absmax`` is the running
    absolute maximum of each input channel.
    """

    def __init__(self, kinds: Mapping[str, Sequence[str]] = KINDS):
        for port, found in kinds.items():
            if port != "input" or isinstance(found, str):
                expected = 'a mapping from "input" to a list of names'
                raise InvalidOption(name="kinds", value=dict(kinds), expected=expected)
        for kind in {kind for found in kinds.values() for kind in found}:
            if kind not in OBSERVERS:
                raise InvalidOption(
                    name="kinds", value=kind, expected=f"among {', '.join(OBSERVERS)}"
                )
        self.kinds = {port: tuple(found) for port, found in kinds.items()}
        self._found: dict[str, dict[str, Observer]] = {}
        self.missed: list[str] = []
        """Layers that the recipe quantizes and no batch has reached."""
        self.structure = Structure()
        """What the model's graphs say about smoothing."""

    def __getitem__(self, name: str) -> dict[str, Observer]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def reached(self) -> set[str]:
        """The layers that have seen a value."""
        return {
            name.rpartition(":")[0]
            for name, found in self._found.items()
            if any(observer.batches for observer in found.values())
        }

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count the values of ``x`` under ``name``. Raises NonFiniteStatistics (histograms)."""
        wanted = self.kinds.get(name.rpartition(":")[2], ())
        found = self._found.setdefault(name, {kind: OBSERVERS[kind]() for kind in wanted})
        for observer in found.values():
            try:
                observer.update(x)
            except NonFiniteStatistics as error:
                raise NonFiniteStatistics(name=name, batch=error.batch) from None

    def check(self) -> None:
        """Raises NonFiniteStatistics for the first layer that has met a NaN or an infinity."""
        for name, found in self._found.items():
            for observer in found.values():
                if observer.batches and not observer.finite():
                    raise NonFiniteStatistics(name=name, batch=observer.batches)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` (another process, say) has seen. Raises InvalidOption where they differ."""
        for name, theirs in other.items():
            mine = self._found.setdefault(name, {})
            for kind, observer in theirs.items():
                mine.setdefault(kind, OBSERVERS[kind]()).merge(observer)
        self.missed = sorted({*self.missed, *other.missed} - self.reached)
        self.structure.merge(other.structure)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors = {
            f"{name}|{kind}|{field}": tensor.detach().cpu().contiguous().clone()
            for name, found in self._found.items()
            for kind, observer in found.items()
            for field, tensor in state_of(observer)
        }
        order = [(name, list(found)) for name, found in self._found.items()]
        about = {"kinds": self.kinds, "missed": self.missed, "order": order}
        about["structure"] = dataclasses.asdict(self.structure)
        save_file(tensors, path, {"format": FORMAT, "about": json.dumps(about)})

    @staticmethod
    def load(path: str | Path) -> Stats:
        """What ``save`` wrote. Raises InvalidOption for a file of something else."""
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            if written.get("format") != FORMAT:
                raise InvalidOption(name="path", value=str(path), expected=f"a file of {FORMAT}")
            about = json.loads(written["about"])
            stats = Stats(about["kinds"])
            stats.missed = about["missed"]
            stats.structure = Structure.of(**about["structure"])
            states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, kind, field = key.rsplit("|", 2)
                states.setdefault((name, kind), {})[field] = file.get_tensor(key)
        for name, kinds in about["order"]:
            stats._found[name] = {kind: restored(kind, states[name, kind]) for kind in kinds}
        return stats

    def __str__(self) -> str:
        rows = []
        for name, found in self._found.items():
            for kind, observer in found.items():
                try:
                    low, high = observer.range()
                except EmptyObserver:
                    continue
                spread = f"{float(low.min()):.4g}", f"{float(high.max()):.4g}"
                rows.append((name, kind, observer.batches, *spread))
        return tabulate(rows, headers=("observer", "kind", "batches", "lowest", "highest"))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: str | None = None,
    *,
    recipe: Any = None,
    kinds: Mapping[str, Sequence[str]] = KINDS,
    compiled: bool = True,
    progress: bool = True,
) -> Stats:
    """Run ``batches`` through the observed ``model``; its linears' statistics by name.

    batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword ones; a
    DataLoader is such an iterable. scheme or recipe: which layers will be quantized, and so must be
    reached; int8dq unless given. compiled: with Inductor, else the observed graphs run node by node.
    Outputs are dropped; training mode, parameters and buffers are the caller's.

    Raises NothingObserved without a batch or a reached layer, NonFiniteStatistics, InvalidOption; layers
    never reached are in ``Stats.missed`` and in a warning.
    """
    refuse_single(batches)
    with Calibration(model, scheme, recipe=recipe, kinds=kinds, compiled=compiled) as stats:
        count = 0
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            args, kwargs = arguments(batch)
            with torch.no_grad():
                model(*args, **kwargs)
            stats.check()
            count += 1
        if count == 0:
            raise NothingObserved(reason="there was no batch")
    return stats


def refuse_single(batches: Any) -> None:
    """Raises InvalidOption for one batch in the place of several."""
    if isinstance(batches, torch.Tensor | Mapping):
        raise InvalidOption(
            name="batches", value=type(batches).__name__, expected="an iterable of batches"
        )


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What the model is called with for ``batch``: positional and keyword arguments."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch, {}) if isinstance(batch, tuple | list) else ((batch,), {})


class Calibration:
    """``calibrate`` around any code that calls ``model``: a generate loop, a pipeline::

        with fxquant.Calibration(model) as stats:
            model.generate(...)

    Compiled graphs run without gradients. On leaving, calls of ``model`` are what they were. Raises
    what ``calibrate`` raises, on leaving without another error.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: str | None = None,
        *,
        recipe: Any = None,
        kinds: Mapping[str, Sequence[str]] = KINDS,
        compiled: bool = True,
    ):
        if scheme is not None and recipe is not None:
            value = (scheme, recipe)
            raise InvalidOption(name="scheme and recipe", value=value, expected="only one of them")
        self.model = getattr(model, "_orig_mod", model)
        self.recipe = Recipe.of(recipe or scheme or DEFAULT_SCHEME)
        self.stats = Stats(kinds)
        self.compiled = compiled
        self.wanted: set[str] = set()

    def __enter__(self) -> Stats:
        NAMES.add(self.model)
        self._within = self._observing()
        self._within.__enter__()
        return self.stats

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._within.__exit__(kind, error, trace)
        if kind is None:
            self._finish()

    @contextmanager
    def _observing(self) -> Iterator[None]:
        with calling(self.model, self._backend), NAMES.rooted(self.model):
            yield

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            canonical = from_dynamo(gm, inputs)
        except CaptureFailed as error:
            log.warning("%s", error)
            return gm.forward
        normalize(canonical)
        self.stats.structure.learn(canonical)
        if not insert_observers(canonical).modified:
            return gm.forward
        self.wanted |= {name for name, layer in layers(canonical).items() if self._chosen(layer)}
        run = self._compiled(gm, canonical, inputs) if self.compiled else canonical.forward
        return self._counting(run, canonical, inputs)

    def _compiled(
        self, gm: fx.GraphModule, canonical: fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., Any]:
        found = lift(canonical, layers(canonical))
        feeds = [inputs[i] for i in found.kept]
        with torch.no_grad():
            tag = f"{sources_hash()} observed"
            run = compile_graph(found.gm, gm, feeds, found.constants, {}, tag)

        def without_gradients(*args: Any) -> Any:
            with torch.no_grad():
                return run(*[args[i] for i in found.kept], *found.constants)

        return without_gradients

    def _counting(
        self, run: Callable[..., Any], gm: fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., Any]:
        """``run``, whose values are counted under the names of the layers it is called with: Dynamo uses
        one graph for all blocks that look alike."""
        known, names = layers(gm), NAMES.tensors()
        weights = {
            i: layer
            for i, x in enumerate(inputs)
            if (layer := names.get(id(x), "").removesuffix(".weight")) in known
        }

        def counted(*args: Any) -> Any:
            actual: dict[str, str] = {}
            if any(args[i] is not inputs[i] for i in weights):
                here = NAMES.tensors()
                actual = {
                    layer: here.get(id(args[i]), f"{layer}.weight").removesuffix(".weight")
                    for i, layer in weights.items()
                }

            def collect(name: str, x: torch.Tensor) -> None:
                layer, _, port = name.rpartition(":")
                if layer in self.wanted:
                    self.stats.add(f"{actual.get(layer, layer)}:{port}", x)

            with collecting(collect):
                return run(*args)

        return counted

    def _chosen(self, layer: Layer) -> bool:
        rule = self.recipe.rule_for(layer)
        return rule is not None and rule.scheme is not None

    def _finish(self) -> None:
        self.stats.check()
        reached = self.stats.reached
        if not reached:
            raise NothingObserved(reason="check the recipe, and that the model itself is called")
        owned = [layer for layer in _linears(self.model) if self._chosen(layer)]
        self.stats.missed = sorted({layer.name for layer in owned} - reached)
        if self.stats.missed:
            log.warning("no batch reached: %s", ", ".join(self.stats.missed))


def _linears(model: nn.Module) -> list[Layer]:
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight is not None and weight.dim() == 2:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            out, into = weight.shape
            found.append(Layer(name=name, module_type=kind, in_features=into, out_features=out))
    return found
