"""calibrate(): run data through the observed graph; statistics by layer name.

The structure comes from the graph: Dynamo captures whatever the model (or any code around it) runs,
``insert_observers`` puts nodes at the inputs of its linears (and outputs and weights, where asked), and
what passes them is counted under the layer's name in the user's model. Recompiled graphs, graph breaks
and further instances add to the same statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn
from tqdm import tqdm

from .capture import NAMES, clean, evaluating, from_dynamo
from .config import DEFAULT_SCHEME
from .errors import CaptureFailed, InvalidOption, NonFiniteStatistics, NothingObserved
from .graph import Layer, layers, parameters
from .inductor import calling, compile_graph
from .lifting import lift, sources_hash
from .observers import Observer, collecting
from .passes import normalize
from .passes.observation import observers_at
from .recipe import Recipe
from .smoothing import Shown
from .stats import KINDS, Stats
from .weights import RESIDENTS

log = logging.getLogger("fxquant.calibration")

Learn = Callable[[Sequence[Any], Mapping[str, str]], None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: Any = None,
    *,
    recipe: Any = None,
    kinds: Mapping[str, Sequence[str | Observer]] = KINDS,
    compiled: bool = True,
    progress: bool = True,
) -> Stats:
    """Run ``batches`` through the observed ``model``; its linears' statistics by name.

    batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword ones; a
    DataLoader is such an iterable. scheme, or recipe (one of them): a scheme's name or whatever else
    ``Recipe.of`` takes: which layers will be quantized, and so must be reached; int8dq unless given.
    kinds: what to observe, see Stats. compiled: with Inductor, else the observed graphs run node by node.
    Outputs are dropped. The model runs in eval mode, whatever its own, and is left as it was; a buffer that
    it writes to even so is the caller's.

    Raises NothingObserved without a batch or a reached layer, NonFiniteStatistics, InvalidOption; layers
    never reached are in ``Stats.missed`` and in a warning.
    """
    refuse_single(batches)
    within = Calibration(model, scheme, recipe=recipe, kinds=kinds, compiled=compiled)
    with evaluating(model), within as stats:
        count = 0
        for count, batch in enumerate(tqdm(batches, desc="calibrate", disable=not progress), 1):
            args, kwargs = arguments(batch)
            try:
                with torch.no_grad():
                    model(*args, **kwargs)
                stats.check()
            except NonFiniteStatistics as error:  # which counts the layer's uses, not the batches
                raise NonFiniteStatistics(name=error.name, batch=count) from None
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

    Compiled graphs run without gradients. The mode is the code's own; a warning says where a part of the
    model is in train mode. On leaving, calls of ``model`` are what they were. Raises
    what ``calibrate`` raises, on leaving without another error.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: Any = None,
        *,
        recipe: Any = None,
        kinds: Mapping[str, Sequence[str | Observer]] = KINDS,
        compiled: bool = True,
    ):
        if scheme is not None and recipe is not None:
            value = (scheme, recipe)
            raise InvalidOption(name="scheme and recipe", value=value, expected="only one of them")
        self.model = getattr(model, "_orig_mod", model)
        given = recipe if scheme is None else scheme
        self.recipe = Recipe.of(DEFAULT_SCHEME if given is None else given)
        self.stats = Stats(kinds)
        self.compiled = compiled

    def __enter__(self) -> Stats:
        training = [name for name, module in self.model.named_modules() if module.training]
        if training:
            names = ", ".join(name or "the model" for name in training[:3])
            log.warning("observed in train mode, with dropout and statistics of batches: %s", names)
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
            self.stats.structure.hide(_parameter_names(self.model, inputs).values())
            return gm.forward
        normalize(canonical)
        learn = self._learner(canonical)
        learn(inputs, {})
        if not observers_at(*self.stats.kinds)(canonical).modified:
            return gm.forward
        run = self._compiled(gm, canonical, inputs) if self.compiled else canonical.forward
        return self._counting(run, canonical, inputs, learn)

    def _learner(self, gm: fx.GraphModule) -> Learn:
        """Notes what ``gm``, as it is now, says about smoothing, under the names of its arguments."""
        shown, names = Shown.of(gm), parameters(gm)
        places = gm.graph.find_nodes(op="placeholder")

        def learn(args: Sequence[Any], layers: Mapping[str, str]) -> None:
            found = _parameter_names(self.model, args)
            bound = {node: found[i] for i, node in enumerate(places) if i in found}
            self.stats.structure.learn(shown, names | bound, layers)

        return learn

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
        self, run: Callable[..., Any], gm: fx.GraphModule, inputs: list[Any], learn: Learn
    ) -> Callable[..., Any]:
        """``run``, whose values are counted under the names of the layers it is called with: Dynamo uses
        one graph for all blocks that look alike."""
        known, names = layers(gm), _names(self.model)
        weights = {
            layer: i
            for i, x in enumerate(inputs)
            for layer in names.get(id(x), ())
            if layer in known
        }

        def counted(*args: Any) -> Any:
            RESIDENTS.fill(args)
            actual = dict(known)
            if any(args[i] is not inputs[i] for i in weights.values()):
                here = _names(self.model)
                for layer, i in weights.items():
                    name = _likest(layer, here.get(id(args[i]), [layer]))
                    actual[layer] = replace(known[layer], name=name)
                learn(args, {layer: found.name for layer, found in actual.items()})

            def collect(name: str, x: torch.Tensor) -> None:
                layer, _, port = name.rpartition(":")
                if layer in actual and self._chosen(actual[layer]):
                    self.stats.add(f"{actual[layer].name}:{port}", x)

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


def _parameter_names(model: nn.Module, args: Sequence[Any]) -> dict[int, str]:
    """By position, the names of those ``args`` that are parameters or buffers of ``model``."""
    held = (*model.named_parameters(), *model.named_buffers())
    known = {id(tensor): clean(name) for name, tensor in held}
    return {i: known[id(x)] for i, x in enumerate(args) if id(x) in known}


def _names(model: nn.Module) -> dict[int, list[str]]:
    """By identity, the layers that each parameter is the weight of (other parameters: their names)."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(tensor), []).append(clean(name).removesuffix(".weight"))
    return found


def _likest(layer: str, names: Sequence[str]) -> str:
    """The one of ``names`` that shares the longest end with ``layer``: what is ``layers.0.up`` in one
    block is ``layers.7.up`` in another, whatever else its weight is tied to."""

    def shared(name: str) -> int:
        ends = zip(reversed(layer.split(".")), reversed(name.split(".")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))

    return max(names, key=shared)


def _linears(model: nn.Module) -> list[Layer]:
    """The layers of a class that is a linear: ``nn.Linear`` and transformers' ``Conv1D``."""
    found = []
    for path, module in model.named_modules():
        name, weight = clean(path), getattr(module, "weight", None)
        turned = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (isinstance(module, nn.Linear) or turned) and weight is not None and weight.dim() == 2:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            out, into = reversed(weight.shape) if turned else weight.shape
            found.append(Layer(name=name, module_type=kind, in_features=into, out_features=out))
    return found
