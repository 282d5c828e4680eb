"""equalize: the outliers of activations move into the weights that read them (SmoothQuant).

Xiao et al. 2023 (arXiv 2211.10438), equation 4: input channel j of a linear is divided by
``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)``, its weights are multiplied by it, and the float model
is what it was. Which linears share a scale and what takes up its inverse is read from the graph: from
the input of a linear back through whatever leaves channels alone to a norm, a linear or a product, and
through an attention to its values. Where nothing can take it up, or something else reads the same value,
the division is a node of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import InvalidOption, ShapeMismatch
from ..graph import (
    constants,
    emit,
    inline,
    layer_of,
    layers,
    memory_of,
    move_before,
    new_constant,
    note,
    value,
    written,
)
from ..inductor import trace_function
from ..recipe import Recipe
from ..scheme import get_scheme
from .attention import values_of
from .base import Pass
from .folding import folds

aten = torch.ops.aten
log = logging.getLogger("fxquant.passes")

SAME_CHANNELS = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.type_as.default,
        aten.relu.default,  # relu(x / s) = relu(x) / s
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
    }
)
"""Ops that commute with a positive factor for each index of the last dimension, where they keep it."""


@dataclass
class Group:
    """Linears that read the channels of one value. absorbs: (node, argument) of the parameters, along
    whose first dimension the inverse goes; empty where nothing can take it up."""

    root: fx.Node
    linears: list[fx.Node] = field(default_factory=list)
    absorbs: list[tuple[fx.Node, int]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(layer_of(node) for node in self.linears))


def equalize(stats: Mapping[str, Any], alpha: Any = 0.5, recipe: Any = "int8dq") -> Pass:
    """The pass that smooths every linear whose activations ``recipe`` quantizes.

    stats: observers by ``<layer>:input`` (fxquant.Stats), of the kind "channel". alpha: how much of the
    difficulty moves, 0 (none) to 1; or a mapping from layers' names to it, 0.5 where it has none. The
    first name of a group decides. Layers without statistics stay as they are and are logged.
    Raises InvalidOption for an alpha out of range.
    """
    rules = Recipe.of(recipe)
    for one in alpha.values() if isinstance(alpha, Mapping) else (alpha,):
        alpha_of(one, [""])

    def rewrite(gm: fx.GraphModule) -> bool:
        changed = False
        for group in groups_of(gm):
            if gm.meta.get("fxquant_body"):  # its constants would have nobody to feed them
                log.warning("not equalized inside of a region: %s", ", ".join(group.names))
                continue
            if not any(_quantizes_input(gm, rules, name) for name in group.names):
                continue
            channels = int(value(group.linears[0].args[1]).shape[1])
            largest = largest_inputs(stats, group.names, channels)
            if largest is None:
                log.warning("not equalized for want of statistics: %s", ", ".join(group.names))
                continue
            own = alpha_of(alpha, group.names)
            if own is not None:
                _smooth(gm, group, largest, own)
                changed = True
        return changed

    return Pass(rewrite, requires=("float", "observed"), name="equalize")


def _quantizes_input(gm: fx.GraphModule, rules: Recipe, name: str) -> bool:
    rule = rules.rule_for(layers(gm)[name])
    return (
        rule is not None and rule.scheme is not None and get_scheme(rule.scheme).input is not None
    )


def groups_of(gm: fx.GraphModule) -> list[Group]:
    """The groups of ``gm``'s linears with constant weights, in the order of the graph."""
    constant, changed = constants(gm), written(gm)
    found: dict[fx.Node, Group] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        if value(node.args[1]).dim() != 2 or memory_of(node.args[0]) & changed:
            continue  # what one linear reads, another may read changed
        if node.args[1] in constant and node.args[0] not in constant:
            root = _root(node.args[0])
            found.setdefault(root, Group(root)).linears.append(node)
    for group in found.values():
        if _read_by_alone(group.root, set(group.linears)):
            group.absorbs = _absorbers(group.root, constant)
    return list(found.values())


def _keeps_channels(node: fx.Node) -> bool:
    if node.target not in SAME_CHANNELS:
        return False
    x = value(node.args[0])
    if node.target is aten.slice.Tensor:
        return node.args[1] not in (-1, x.dim() - 1) if len(node.args) > 1 else x.dim() > 1
    if not x.is_floating_point() or not value(node).is_floating_point():
        return False
    same = x.dim() > 0 and value(node).dim() > 0 and value(node).shape[-1] == x.shape[-1]
    return bool(same)


def _root(node: fx.Node) -> fx.Node:
    """The value whose channels ``node`` has."""
    while _keeps_channels(node):
        node = node.args[0]
    return node


def _read_by_alone(node: fx.Node, linears: set[fx.Node]) -> bool:
    """Whether every use of ``node`` ends as the input of one of ``linears``."""
    for user in node.users:
        if user in linears:
            if node in user.args[1:]:
                return False
        elif not (_keeps_channels(user) and _read_by_alone(user, linears)):
            return False
    return bool(node.users)


def _absorbers(node: fx.Node, constant: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, int]]:
    """The parameters by which ``node``'s channels can be divided; none if there is no way."""
    if node.op != "call_function":
        return []
    if node.target is aten.layer_norm.default:
        return _all_constant(
            node, [i for i in (2, 3) if len(node.args) > i], constant, vectors=True
        )
    if node.target is aten.rms_norm.default:
        return _all_constant(node, [2] if len(node.args) > 2 else [], constant, vectors=True)
    if node.target is aten.linear.default and value(node.args[1]).dim() == 2:
        return _all_constant(node, [i for i in (1, 2) if len(node.args) > i], constant)
    if node.target is aten.mul.Tensor:
        channels = value(node).shape[-1]
        for i in (0, 1):
            vector = node.args[i] in constant and value(node.args[i]).shape == (channels,)
            if vector and value(node.args[i]).is_floating_point():
                return [(node, i)]
        factors = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in constant]
        ways = (_absorbers(_root(a), constant) for a in factors if _alone(a, node, channels))
        return next(filter(None, ways), [])
    if (found := values_of(node)) is not None and _alone(*found, value(node).shape[-1]):
        return _absorbers(_root(found[0]), constant)
    return []


def _alone(arg: fx.Node, user: fx.Node, channels: int) -> bool:
    """Whether ``arg``, from its root on, goes nowhere but into ``user``, channel by channel."""
    if value(arg).dim() == 0 or value(arg).shape[-1] != channels:
        return False
    node = _root(arg)
    while node is not arg:
        if len(node.users) != 1:
            return False
        (node,) = node.users
    return list(arg.users) == [user] and list(user.args).count(arg) == 1


def _all_constant(
    node: fx.Node, places: list[int], constant: Mapping[fx.Node, Any], vectors: bool = False
) -> list[tuple[fx.Node, int]]:
    """These arguments of ``node``, those that are None left out, if all others are parameters."""
    given = [i for i in places if node.args[i] is not None]
    if not given or given[0] != places[0]:  # a norm without a weight has nothing to divide
        return []
    if any(node.args[i] not in constant for i in given):
        return []
    if not all(value(node.args[i]).is_floating_point() for i in given):
        return []
    if vectors and any(value(node.args[i]).dim() != 1 for i in given):
        return []
    return [(node, i) for i in given]


def _smooth(gm: fx.GraphModule, group: Group, largest: torch.Tensor, alpha: float) -> None:
    graph, first = gm.graph, group.linears[0]
    anchor = min([*group.linears, *(node for node, _ in group.absorbs)])
    for node in group.linears:
        move_before(anchor, node.args[1])  # transposed or cast, it may come later
    with graph.inserting_before(anchor):
        x_max = new_constant(gm, "smooth", largest.to(value(first.args[1]).device))
        weights = list(dict.fromkeys(n.args[1] for n in group.linears))
        values = [value(x_max), *map(value, weights)]
        body = trace_function(lambda x, *w: smoothing_scale(x, w, alpha), *values)
        scale = inline(graph, first, body, [x_max, *weights])
        inverse = emit(graph, first, aten.reciprocal.default, scale)
    for node in group.linears:
        node.update_arg(1, folds(_scaled(graph, node, node.args[1], scale)))
        note(node).update(smoothed=alpha, smoothed_by=scale.name)
    for node, place in group.absorbs:
        rows = node.target is aten.linear.default and place == 1
        node.update_arg(place, folds(_scaled(graph, node, node.args[place], inverse, rows)))
    if not group.absorbs:
        folds(inverse)
        for x in dict.fromkeys(n.args[0] for n in group.linears):
            users = [n for n in group.linears if n.args[0] is x]
            smaller = _scaled(graph, min(users), x, inverse)
            for node in users:
                node.update_arg(0, smaller)


def _scaled(
    graph: fx.Graph, user: fx.Node, node: fx.Node, factor: fx.Node, rows: bool = False
) -> fx.Node:
    """``node`` times the factor along its last dimension, or its rows; rounded once to its dtype."""
    dtype = value(node).dtype
    with graph.inserting_before(user):
        if rows:
            factor = emit(graph, user, aten.unsqueeze.default, factor, 1)
        found = emit(graph, user, aten.mul.Tensor, _float32(graph, user, node), factor)
        return (
            found if value(found).dtype == dtype else emit(graph, user, aten.to.dtype, found, dtype)
        )


def smoothing_scale(
    x_max: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float
) -> torch.Tensor:
    """s [K] of equation 4 in float32 (float64 for float64 weights), for activations of ``max |X|`` [K]
    and weights [N, K] that read them; 1 for channels that are zero throughout on either side."""
    wide = torch.float64 if torch.float64 in {w.dtype for w in weights} else torch.float32
    w_max = torch.stack([w.abs().amax(0).to(wide) for w in weights]).amax(0)
    x_max = x_max.to(wide)
    scale = x_max.pow(alpha) / w_max.pow(1.0 - alpha)
    usable = (torch.minimum(x_max, w_max) > 0) & scale.isfinite() & scale.reciprocal().isfinite()
    return torch.where(usable, scale, 1.0)


def alpha_of(alpha: Any, names: Sequence[str]) -> float | None:
    """The alpha of a group, by its first layer's name; None where it is to be left as it is. Raises
    InvalidOption if it is none."""
    own = alpha.get(names[0], 0.5) if isinstance(alpha, Mapping) else alpha
    if own is None or own is False:
        return None
    if not isinstance(own, int | float) or isinstance(own, bool) or not 0.0 <= own <= 1.0:
        raise InvalidOption(name="smooth", value=own, expected="a number from 0 to 1, or False")
    return float(own)


def largest_inputs(
    stats: Mapping[str, Any], names: Sequence[str], channels: int
) -> torch.Tensor | None:
    """``max |X|`` [K] over the inputs of these layers, float32 on the CPU; None without statistics.
    Raises ShapeMismatch for statistics of another width."""
    seen = []
    for name in names:
        observer = stats.get(f"{name}:input", {}).get("channel")
        if observer is None or not observer.batches:
            continue
        if observer.absmax.shape != (channels,):
            what, found = f"statistics of {name}", tuple(observer.absmax.shape)
            raise ShapeMismatch(what=what, found=found, expected=(channels,))
        seen.append(observer.absmax.float().cpu())
    return torch.stack(seen).amax(0) if seen else None


def _float32(graph: fx.Graph, like: fx.Node, node: fx.Node) -> fx.Node:
    if value(node).dtype in (torch.float32, torch.float64):
        return node
    return emit(graph, like, aten.to.dtype, node, torch.float32)
