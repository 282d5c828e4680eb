"""The ``torch.compile`` backend: capture, passes, then Inductor on what is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .capture import NAMES, clean, from_dynamo, learn_names
from .config import DEFAULT_SCHEME, Config
from .dump import Dump
from .errors import (
    CaptureFailed,
    GradRequired,
    NothingQuantized,
    NotQuantized,
    RangeConflict,
    RecipeConflict,
)
from .graph import Layer, layers, parameters
from .inductor import Regions, ambient, compile_graph
from .lifting import Rewritten, lift, sources_hash
from .modules import QuantLinear
from .passes import pipeline
from .recipe import Recipe
from .scheme import get_scheme

log = logging.getLogger("fxquant.backend")


def fxquant_backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Quantize the linears of a Dynamo graph and compile the result with Inductor.

    options: ``scheme`` or ``recipe``, ``stats``, ``smooth`` and ``ranges``, ``dump_dir``, ``strict``,
    ``inductor``. Raises the errors of Config.of, GradRequired, UnusedRule, NonFiniteWeight, and
    NotQuantized under ``strict``; TorchDynamo wraps them in BackendCompilerFailed.
    """
    config = Config.of(options, mode)
    rewritten = rewrite(gm, example_inputs, config)
    tag = cache_tag(config)
    if rewritten is None:
        return compile_graph(gm, gm, example_inputs, [], config.inductor, tag)
    inputs = [example_inputs[i] for i in rewritten.kept]
    extras = rewritten.extras(example_inputs)
    started = time.perf_counter()
    compiled = compile_graph(rewritten.gm, gm, inputs, extras, config.inductor, tag)
    log.info("Inductor took %.1f s", time.perf_counter() - started)
    return Runner(compiled, rewritten, _watch(gm, example_inputs, config, rewritten.layers))


class Runner:
    """The compiled graph, fed with the packed form of whatever parameters it is called with."""

    def __init__(self, compiled: Callable[..., Any], rewritten: Rewritten, watch: Watch | None):
        self.compiled = compiled
        self.kept = rewritten.kept
        self.extras = rewritten.extras
        self.watch = watch

    def __call__(self, *args: Any) -> Any:
        if self.watch is not None:
            self.watch(args)
        return self.compiled(*[args[i] for i in self.kept], *self.extras(args))


class Watch:
    """Sees when a graph is reused for other parameters whose names ask for another scheme, or whose
    input has a static range of its own."""

    def __init__(self, recipe: Recipe, weights: list[tuple[int, Layer]], seen: tuple[int, ...]):
        self.recipe = recipe
        self.weights = weights
        self.seen = {seen}

    def __call__(self, args: Sequence[Any]) -> None:
        """Raises RecipeConflict, RangeConflict."""
        key = tuple(id(args[i]) for i, _ in self.weights)
        if key in self.seen:
            return
        names = NAMES.tensors()
        for i, layer in self.weights:
            name = names.get(id(args[i]), "").removesuffix(".weight") or layer.name
            rule = self.recipe.rule_for(
                Layer(name=name, module_type=layer.module_type, in_features=layer.in_features)
            )
            wanted = rule.scheme if rule else None
            compiled = (rule0 := self.recipe.rule_for(layer)) and rule0.scheme
            if wanted != compiled:
                raise RecipeConflict(
                    layer=name,
                    wanted=wanted or "no scheme",
                    first=layer.name,
                    compiled=compiled or "no scheme",
                )
            if name != layer.name and _is_static(layer):
                raise RangeConflict(layer=name, first=layer.name)
        self.seen.add(key)


def _watch(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, found: dict[str, Layer]
) -> Watch | None:
    if config.recipe is None:
        return None
    if not config.recipe.by_name and not any(map(_is_static, found.values())):
        return None
    names = NAMES.tensors()
    weights = []
    for i, example in enumerate(inputs):
        if isinstance(example, torch.Tensor) and example.dim() == 2:
            name = names.get(id(example), "").removesuffix(".weight")
            if name in found:
                weights.append((i, found[name]))
    return Watch(config.recipe, weights, tuple(id(inputs[i]) for i, _ in weights))


def _is_static(layer: Layer) -> bool:
    return layer.scheme is not None and get_scheme(layer.scheme).static


def rewrite(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: Config,
    on_layers: Callable[[dict[str, Layer]], object] = lambda found: None,
) -> Rewritten | None:
    """Run the pipeline on a Dynamo graph. None if it holds no linear, or cannot be captured.

    ``on_layers`` is told what was decided for each layer, also where nothing is quantized.
    """
    try:
        canonical = from_dynamo(gm, inputs)
    except CaptureFailed as error:
        if config.strict:
            raise
        log.warning("%s", error)
        return None
    around = Regions.record(canonical.graph, ambient())
    dump = Dump(config.dump_dir)
    dump.graph("captured", canonical)
    models = learn_names()
    recipe = config.recipe or _default_recipe(models)
    smooth = _alphas(canonical, inputs, recipe, models, config)
    _run_passes(canonical, recipe, replace(config, smooth=smooth), dump)
    found = layers(canonical)
    on_layers(found)
    dump.manifest(canonical, {"recipe": recipe.to_json(), "strict": config.strict})
    _report_float_layers(found, recipe, config)
    if config.recipe is not None:
        # a rule may decide a layer of another graph of this model
        config.recipe.check_used([*found.values(), *linears_of(models)])
    if not any(layer.kernel for layer in found.values()):
        return None
    _refuse_gradients(canonical, inputs)
    for mark in reversed(around):  # it is compiled under autocast, and run so
        canonical.graph.erase_node(mark)
    return lift(canonical, found)


def _alphas(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    recipe: Recipe,
    models: Sequence[nn.Module],
    config: Config,
) -> Any:
    """What ``equalize`` is told: "auto" becomes the alphas that suit the weights as they are now."""
    if config.smooth != "auto" or config.stats is None:
        return config.smooth
    names = parameters(gm)
    pairs = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    weights = {names[node]: x for node, x in pairs if node in names}
    schemes = {
        layer.name: get_scheme(rule.scheme)
        for layer in linears_of(models)
        if (rule := recipe.rule_for(layer)) is not None and rule.scheme is not None
    }
    return config.stats.structure.alphas(weights, config.stats, schemes)


def _run_passes(gm: fx.GraphModule, recipe: Recipe, config: Config, dump: Dump) -> None:
    """A plain loop: torch.fx's PassManager would bury a named error under a nameless one."""
    decided = {"stats": config.stats, "smooth": config.smooth, "ranges": config.ranges}
    for name, one in pipeline(recipe, strict=config.strict, **decided):
        started = time.perf_counter()
        one(gm)
        log.debug("%s: %.3f s", one, time.perf_counter() - started)
        dump.graph(name, gm)


def _default_recipe(models: Sequence[nn.Module]) -> Recipe:
    """int8dq; nothing for a model that holds quantized modules: its other layers were left float."""
    held = any(isinstance(m, QuantLinear) for model in models for m in model.modules())
    return Recipe(()) if held else Recipe.of(DEFAULT_SCHEME)


def _report_float_layers(found: dict[str, Layer], recipe: Recipe, config: Config) -> None:
    missed = []
    for layer in found.values():
        if layer.scheme is None:
            rule = recipe.rule_for(layer)
            by_choice = rule is None or rule.scheme is None
            log.log(
                logging.INFO if by_choice else logging.WARNING,
                "%s stays float: %s",
                layer.name,
                layer.reason,
            )
            if not by_choice:
                missed.append(f"{layer.name} ({layer.reason})")
    if missed and config.strict:
        raise NotQuantized(layers=", ".join(missed))


def linears_of(roots: Sequence[nn.Module]) -> list[Layer]:
    """Everything in the models that owns a two-dimensional weight, quantized or not, as layers."""
    found = []
    for root in roots:
        for full, module in root.named_modules():
            name = clean(full)
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            shapes = {
                f"{name}.{key}".lstrip(".").removesuffix(".weight"): tuple(weight.shape)
                for key, weight in module.named_parameters(recurse=False)
            }
            if isinstance(module, QuantLinear):
                shapes = {name: (module.out_features, module.in_features)}
            for path, shape in shapes.items():
                if len(shape) == 2:
                    out, into = shape
                    found.append(
                        Layer(name=path, module_type=kind, in_features=into, out_features=out)
                    )
    return found


def _refuse_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    if not torch.is_grad_enabled():
        return
    names = {n.name: name for n, name in parameters(gm).items()}
    for node, example in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(example, torch.Tensor) and example.requires_grad:
            raise GradRequired(name=names.get(node.name, node.name))


def cache_tag(config: Config) -> str:
    """What Inductor's cache must distinguish: fxquant's sources and this compile's settings."""
    recipe = config.recipe.to_json() if config.recipe else ""
    smooth = config.smooth if config.stats else None
    return f"{sources_hash()} {recipe} {smooth}"


def compile(
    model: nn.Module,
    scheme: str | None = None,
    *,
    recipe: Any = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    dump_dir: str | None = None,
    strict: bool = False,
    stats: Any = None,
    smooth: Any = None,
    ranges: str | None = None,
    inductor: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxquant")`` whose settings are checked now.

    stats: what ``calibrate`` returned: activations that the scheme quantizes are smoothed with it
    (SmoothQuant), ``smooth`` (0 to 1, 0.5 unless given) of the difficulty going to the weights, "auto"
    for what lets each group's outputs err least on calibrated samples, False for none. Static schemes
    need statistics: ``ranges`` says how they give the range of an input ("minmax"; "percentile" or "mse"
    of a histogram, without smoothing).

    Raises UnknownScheme, InvalidRule, InvalidOption, UnknownOption; UnusedRule for a rule that
    matches no linear of ``model``; NothingQuantized for a model without one.
    """
    given = {"scheme": scheme, "recipe": recipe, "dump_dir": dump_dir, "inductor": inductor}
    given |= {"stats": stats, "smooth": smooth, "ranges": ranges}
    options = {k: v for k, v in given.items() if v is not None} | {"strict": strict}
    config = Config.of(options, mode)
    NAMES.add(model)
    present = linears_of([model])
    if not present and not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise NothingQuantized(reasons="the model owns no two-dimensional weight")
    if config.recipe is not None:
        config.recipe.check_used(present)
    if mode is not None:
        options["inductor"] = config.inductor
    return torch.compile(
        model, backend=fxquant_backend, options=options, fullgraph=fullgraph, dynamic=dynamic
    )


__all__ = ["Rewritten", "compile", "fxquant_backend", "rewrite"]
