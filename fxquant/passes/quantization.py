"""quantize_weights: linears become the reference form, ``linear(dq(q(x)), dq(codes, ...), b)``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..graph import Layer, constants, emit, layer_of, layers, value
from ..recipe import Recipe
from ..scheme import Scheme, get_scheme
from .base import Pass
from .static import StaticInputs, check_ranges

aten = torch.ops.aten
ops = torch.ops.fxquant

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantize_weights(
    recipe: Any, stats: Mapping[str, Any] | None = None, ranges: str = "minmax"
) -> Pass:
    """The pass that gives each linear the scheme that ``recipe`` (or a scheme's name) decides.

    stats: observers by ``<layer>:input`` (fxquant.Stats), which static schemes need. ranges: how the
    range of a static input is chosen, "minmax", or "percentile" or "mse" of a histogram. A layer that
    stays float has its reason in the list of layers. Raises InvalidOption, and what ``ends_of`` raises.
    """
    rules = Recipe.of(recipe)
    check_ranges(ranges)

    def rewrite(gm: fx.GraphModule) -> bool:
        constant = constants(gm)
        decided = {
            node: scheme
            for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)
            if (scheme := _decide(layers(gm)[layer_of(node)], rules, node, constant))
        }
        static = {node: scheme for node, scheme in decided.items() if scheme.static}
        inputs = StaticInputs(gm, static, stats, ranges)
        codes: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        changed = False
        for node, scheme in decided.items():
            layer = layers(gm)[layer_of(node)]
            if scheme.static and node not in inputs.ends:
                layer.reason = (
                    f"{scheme.name} needs statistics of its input: "
                    "fxquant.calibrate with batches that reach it"
                )
                continue
            _to_reference(gm, node, scheme, codes, inputs)
            layer.scheme = scheme.name
            changed = True
        return changed

    stages = ("float", "observed")
    return Pass(rewrite, requires=stages, ensures="reference", name="quantize_weights")


def _decide(layer: Layer, recipe: Recipe, node: fx.Node, constant: Any) -> Scheme | None:
    if node.args[1] not in constant:
        return None  # normalize has said why
    rule = recipe.rule_for(layer)
    if rule is None:
        layer.reason = "no rule of the recipe matches"
        return None
    if rule.scheme is None:
        layer.reason = f"kept float by the rule {rule.name!r}"
        return None
    scheme = get_scheme(rule.scheme)
    layer.reason = refusal(scheme, value(node.args[1]))
    return None if layer.reason else scheme


def refusal(scheme: Scheme, weight: torch.Tensor) -> str:
    """Why ``weight`` [N, K] cannot be quantized with ``scheme``, or "" if it can."""
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, not floating point".replace("torch.", "")
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has shape {tuple(weight.shape)}, not (out_features, in_features)"
    size = scheme.weight.group_size
    if size and weight.shape[1] % size:
        return f"in_features {weight.shape[1]} is not a multiple of group_size {size}"
    return ""


def _to_reference(
    gm: fx.GraphModule,
    node: fx.Node,
    scheme: Scheme,
    codes: dict[tuple[fx.Node, str], list[fx.Node]],
    inputs: StaticInputs,
) -> None:
    x, weight = node.args[:2]
    dtype = value(weight).dtype
    with gm.graph.inserting_before(node):
        if scheme.static:
            node.update_arg(0, inputs.quantized(node, scheme))
        elif scheme.input is not None:
            quantized = _quantize(gm.graph, node, x, scheme, "input")
            dq = (*_three(quantized), scheme.name, "input", value(x).dtype)
            node.update_arg(0, emit(gm.graph, node, ops.dequantize.default, *dq))
        key = (weight, scheme.name)
        if key not in codes:
            codes[key] = _quantize(gm.graph, node, weight, scheme, "weight")
        dq = (*_three(codes[key]), scheme.name, "weight", dtype)
        node.update_arg(1, emit(gm.graph, node, ops.dequantize.default, *dq))


def _quantize(graph: fx.Graph, like: fx.Node, x: Any, scheme: Scheme, role: str) -> list[fx.Node]:
    found = emit(graph, like, ops.quantize.default, x, scheme.name, role)
    return [emit(graph, like, operator.getitem, found, i) for i in range(len(value(found)))]


def _three(nodes: list[fx.Node]) -> list[fx.Node | None]:
    return [*nodes, None] if len(nodes) == 2 else list(nodes)
