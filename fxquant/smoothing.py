"""Smoothing a model by the groups that calibration has seen in its graphs.

``passes.equalize`` rewrites a graph; here the same groups are folded into the parameters themselves,
by the names that calibration noted, so that no graph is needed and the result is a model of the same
class. Where nothing before a group can take up the inverse, its layers divide their inputs.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .capture import clean
from .errors import InvalidOption
from .graph import parameters
from .passes.equalization import alpha_of, groups_of, largest_inputs, smoothing_scale
from .scheme import Scheme
from .solvers import Gram, search_scales
from .solvers.smoothquant import least_error
from .storage import storage_of

aten = torch.ops.aten
log = logging.getLogger("fxquant.smoothing")

STORED = (aten.t.default, aten.to.dtype)
"""How a graph may read a parameter that is folded into: transposed, or cast by autocast."""

Schemes = Mapping[str, Scheme]
"""The scheme of each layer that is quantized, by name."""

Place = tuple[str, int]
"""A parameter's name and the dimension of it that the channels are."""

SEARCHES = ("auto", "awq")
"""How scales may be searched for by output error: SmoothQuant's alpha, or AWQ's."""

ALPHAS = tuple(step / 20 for step in range(21))
"""What ``"auto"`` tries, besides leaving a group as it is."""


@dataclass
class Folds:
    """What smoothing does to a model. factors: by parameter, what multiplies it along which dimension.
    scales: by layer, what its inputs are divided by, [K]; divisors: those of layers that do so
    themselves."""

    factors: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    divisors: dict[str, torch.Tensor] = field(default_factory=dict)

    def multiply(self, places: Sequence[Place], factor: torch.Tensor) -> None:
        """Multiply these parameters by ``factor`` [K] too."""
        for name, dimension in places:
            self.factors.setdefault(name, []).append((dimension, factor))

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter ``name``, now ``tensor``, with its factors; in float32 where there are any,
        float64 stays."""
        for dimension, factor in self.factors.get(name, ()):
            shape = [1] * tensor.dim()
            shape[dimension] = -1
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            tensor = wide * factor.to(tensor.device).view(shape)
        return tensor

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``of``, in the dtype of ``tensor``."""
        return self.of(name, tensor).to(tensor.dtype)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Write the factors into the parameters that ``model`` still has."""
        for path, tensor in model.named_parameters():
            if (name := clean(path)) in self.factors:
                tensor.copy_(self.of(name, tensor))


@dataclass(frozen=True)
class Shown:
    """What one graph says about smoothing, by its own nodes: Dynamo may use it for the parameters of
    other blocks too.

    groups: the layers of each, with the places to multiply and to divide, a node and a dimension each; none
    where the graph does not show a parameter as it is. uses: by parameter, each use of it: the groups
    that it is one for, none where it is anything else. (up's weight is multiplied for gate and up, divided
    for down.)
    """

    groups: list[tuple[list[str], list[tuple[fx.Node, int]], list[tuple[fx.Node, int]]]]
    uses: dict[fx.Node, list[list[int]]]

    @staticmethod
    def of(gm: fx.GraphModule) -> Shown:
        """What ``gm``, at the float stage, shows."""
        names, members, found = parameters(gm), defaultdict(list), []
        for i, group in enumerate(groups_of(gm)):
            linears = [_place(node.args[1], 1, names) for node in group.linears]
            absorbs = [_place(node.args[k], 0, names) for node, k in group.absorbs]
            weights = [] if None in linears else list(dict.fromkeys(linears))
            found.append((group.names, weights, absorbs if weights and None not in absorbs else []))
            for place in (*((node, 1) for node in group.linears), *group.absorbs):
                members[place].append(i)
        uses: dict[fx.Node, list[list[int]]] = {node: [] for node in names}
        for node in names:
            for user in node.users:
                readers = user.users if user.target in STORED else [user]
                source = user if user.target in STORED else node
                uses[node] += [use for r in readers for use in _uses(members, source, r)]
        return Shown(found, uses)  # type: ignore[arg-type]


@dataclass
class Structure:
    """What the graphs of a model say about smoothing: JSON through and through.

    groups: by the names of its layers, one a line, the parameters to multiply and those to divide. uses:
    by parameter, each use of it: the groups that it is one for. See Shown.
    """

    groups: dict[str, tuple[list[Place], list[Place]]] = field(default_factory=dict)
    uses: dict[str, list[list[str]]] = field(default_factory=dict)

    @staticmethod
    def of(groups: dict[str, Any], uses: dict[str, list[list[str]]]) -> Structure:
        """From what JSON made of one: tuples have become lists."""
        found = {k: [[(n, d) for n, d in part] for part in parts] for k, parts in groups.items()}
        return Structure({k: (a, b) for k, (a, b) in found.items()}, uses)

    def learn(
        self, shown: Shown, names: Mapping[fx.Node, str], layers: Mapping[str, str] | None = None
    ) -> None:
        """Add what a graph shows. names: of the parameters behind its nodes, in the model; layers: of its
        layers, where they have others than in the graph."""
        layers, keys = layers or {}, []
        for members, *sides in shown.groups:
            keys.append("\n".join(dict.fromkeys(layers.get(name, name) for name in members)))
            weights, absorbs = ([(names[node], d) for node, d in side] for side in sides)
            self._agree(keys[-1], (weights, absorbs))
        for node, uses in shown.uses.items():
            self._used(names[node], [[keys[i] for i in use] for use in uses])

    def hide(self, names: Iterable[str]) -> None:
        """Note that these parameters are used where no graph shows how."""
        for name in names:
            self._used(name, [[]])

    def _used(self, name: str, uses: list[list[str]]) -> None:
        mine = self.uses.setdefault(name, [])
        mine += [use for i, use in enumerate(uses) if use not in mine and use not in uses[:i]]

    def merge(self, other: Structure) -> None:
        """Add what another process has seen."""
        for key, found in other.groups.items():
            self._agree(key, found)
        for name, uses in other.uses.items():
            self._used(name, uses)

    def _agree(self, key: str, found: tuple[list[Place], list[Place]]) -> None:
        """Where two graphs disagree nothing is foldable."""
        weights, absorbs = self.groups.get(key, found)
        same = weights == found[0], absorbs == found[1]
        self.groups[key] = weights if same[0] else [], absorbs if all(same) else []

    def alphas(
        self, tensors: Mapping[str, torch.Tensor], stats: Mapping[str, Any], schemes: Schemes
    ) -> dict[str, float | None]:
        """By the first layer of each group, the alpha that lets its outputs err least; None to leave it
        as it is. Raises what ``folds`` raises."""
        found: dict[str, float | None] = {}
        for key, weights in self._weights(tensors, _quantizing(schemes)):
            names = key.split("\n")
            largest = largest_inputs(stats, names, next(iter(weights.values())).shape[1])
            if largest is not None:
                found[names[0]] = _alpha(names, weights, largest, stats, schemes)
        return found

    def folds(
        self, model: nn.Module, stats: Mapping[str, Any], smooth: Any, schemes: Schemes
    ) -> Folds:
        """How to smooth every group that has one of the layers of ``schemes``; nothing is changed.

        smooth: an alpha, one by the name of a group's first layer, "auto" or "awq". What no batch of
        the calibration ran (another branch, code that Dynamo leaves alone) is not known here. A group
        stays as it is, and is logged, where a weight has other uses or there are no statistics.

        Raises InvalidOption (also for statistics without samples, where they are needed) and
        ShapeMismatch.
        """
        tensors = {clean(n): t for n, t in model.named_parameters(remove_duplicate=False)}
        storages = Counter(map(storage_of, {*tensors.values(), *model.buffers()}))
        wanted = schemes if smooth == "awq" else _quantizing(schemes)
        covered = {name for key in self.groups for name in key.split("\n")}
        if unknown := sorted(set(wanted) - covered):
            log.warning("not smoothed: in no graph that calibration saw: %s", ", ".join(unknown))
        hidden = {n: t for n, t in tensors.items() if t.dim() == 2 and n not in self.uses}
        found = Folds()
        for key, weights in self._weights(tensors, wanted):
            names, (places, absorbs) = key.split("\n"), self.groups[key]
            said, width = ", ".join(names), next(iter(weights.values())).shape[1]
            largest = largest_inputs(stats, names, width)
            reason = self._obstacle(key, places, tensors, storages)
            loose = self._obstacle(key, absorbs, tensors, storages)
            loose = loose or ("" if absorbs else "nothing before it can take up the scale")
            if not loose and (
                reader := next((n for n, t in hidden.items() if width in t.shape), "")
            ):
                loose = f"{reader}, in no graph that calibration saw, may read the same values"
            if largest is None:
                reason = reason or "no statistics"
            elif smooth == "awq":  # a division at run time would cost what the format gains
                reason = reason or loose
            if reason or largest is None:
                log.warning("not smoothed: %s: %s", said, reason)
                continue
            scale = _scale(smooth, names, weights, largest, stats, schemes)
            if scale is None:
                log.info("not smoothed: %s: its outputs err least as it is", said)
            elif loose:
                log.info("%s: %s: its layers divide their inputs", said, loose)
                own = {name: scale for name in names if name in wanted}
                found.divisors |= own
                found.scales |= own
                found.multiply([p for p in places if _layer(p) in wanted], scale)
            else:
                found.scales |= dict.fromkeys(names, scale)
                found.multiply(places, scale)
                found.multiply(absorbs, scale.reciprocal())
        return found

    def beside(self, layer: str) -> tuple[str, ...]:
        """The layers that read what ``layer`` reads, itself among them."""
        keys = (key.split("\n") for key in self.groups)
        return tuple(next((names for names in keys if layer in names), [layer]))

    def _weights(
        self, tensors: Mapping[str, torch.Tensor], wanted: Schemes
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The groups that have a wanted layer, with the weight [N, K] of each layer."""
        for key, (places, _) in self.groups.items():
            if not set(names := key.split("\n")) & set(wanted):
                continue
            missing = [name for name, _ in places if name not in tensors]
            if missing:
                expected = (
                    f"of the model as it is: {missing[0]} is none of its parameters (any more)"
                )
                raise InvalidOption(name="stats", value="statistics", expected=expected)
            if places:
                stored = {_layer((name, at)): (tensors[name], at) for name, at in places}
                yield key, {name: w if at == 1 else w.t() for name, (w, at) in stored.items()}
            else:
                log.warning(
                    "not smoothed: %s: no graph shows its weights as they are", ", ".join(names)
                )

    def _obstacle(
        self,
        key: str,
        places: list[Place],
        tensors: Mapping[str, torch.Tensor],
        storages: Counter[int],
    ) -> str:
        for name, _ in places:
            if not all(key in use for use in self.uses.get(name, [[]])):
                return f"{name} is used elsewhere too"
            if storages[storage_of(tensors[name])] > 1:
                return f"{name} is tied to another parameter"
        return ""


def _quantizing(schemes: Schemes) -> dict[str, Scheme]:
    """The layers whose activations are quantized."""
    return {name: scheme for name, scheme in schemes.items() if scheme.input is not None}


def _layer(place: Place) -> str:
    return place[0].rpartition(".")[0]


def _uses(
    members: Mapping[tuple[fx.Node, int], list[int]], node: fx.Node, user: fx.Node
) -> list[list[int]]:
    """For each argument of ``user`` that is ``node``, the groups for whose sake it is."""
    return [members.get((user, i), []) for i, arg in enumerate(user.args) if arg is node] or [[]]


def _place(node: Any, dimension: int, names: Mapping[fx.Node, str]) -> tuple[fx.Node, int] | None:
    """The parameter that ``node`` is, or is the transposed or cast form of."""
    if node in names:
        return node, dimension
    if node.target in STORED and node.args[0] in names:
        return node.args[0], 1 - dimension if node.target is aten.t.default else dimension
    return None


def _scale(
    smooth: Any,
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    largest: torch.Tensor,
    stats: Mapping[str, Any],
    schemes: Schemes,
) -> torch.Tensor | None:
    """What a group's weights [N, K] are multiplied by, [K]; None to leave them as they are."""
    if smooth == "awq":
        return _awq(names, weights, stats, schemes)
    found = _alpha(names, weights, largest, stats, schemes) if smooth == "auto" else smooth
    alpha = alpha_of(found, names)
    if alpha is None:
        return None
    device = next(iter(weights.values())).device
    return smoothing_scale(largest.to(device), [*weights.values()], alpha)


def _alpha(
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    largest: torch.Tensor,
    stats: Mapping[str, Any],
    schemes: Schemes,
) -> float | None:
    known = {name: weight for name, weight in weights.items() if name in schemes}
    rows = _sample(stats, names, "auto").to(next(iter(known.values())).device)
    largest = largest.to(rows.device)
    scales = [smoothing_scale(largest, [*weights.values()], alpha) for alpha in ALPHAS]
    found = least_error(rows, [*known.values()], [schemes[name] for name in known], scales)
    return None if found.best is None else ALPHAS[found.best]


def _awq(
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    stats: Mapping[str, Any],
    schemes: Schemes,
) -> torch.Tensor | None:
    known = {name: weight for name, weight in weights.items() if name in schemes}
    specs = [schemes[name].weight for name in known]
    rows, device = _sample(stats, names, "awq"), next(iter(known.values())).device
    gram = Gram(rows.shape[1], device=device, layer=", ".join(names)).add(rows.to(device))
    best = search_scales([*known.values()], gram, specs, layer=", ".join(names))
    return best.scales if best.alpha else None


def _sample(stats: Mapping[str, Any], names: Sequence[str], smooth: str) -> torch.Tensor:
    """Inputs [t, K] that a group was calibrated with. Raises InvalidOption."""
    for name in names:
        observer = stats.get(f"{name}:input", {}).get("sample")
        if observer is not None and observer.batches:
            return observer.rows
    kinds = '{"input": ("minmax", "channel", "sample")}'
    expected = f"statistics with samples of the inputs of {names[0]}: calibrate(..., kinds={kinds})"
    raise InvalidOption(name="smooth", value=smooth, expected=expected)
