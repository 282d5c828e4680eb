"""Smoothing a model by the groups that calibration has seen in its graphs.

``passes.equalize`` rewrites a graph; here the same groups are folded into the parameters themselves,
by the names that calibration noted, so that no graph is needed and the result is a model of the same
class. Where nothing before a group can take up the inverse, its layers divide their inputs.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .errors import InvalidOption
from .graph import parameters
from .inductor import storage_of
from .passes.equalization import Group, alpha_of, groups_of, largest_inputs, smoothing_scale
from .scheme import Scheme
from .solvers import Gram, search_scales
from .solvers.smoothquant import least_error

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
        for name, tensor in model.named_parameters():
            if name in self.factors:
                tensor.copy_(self.of(name, tensor))


@dataclass
class Structure:
    """What the graphs of a model say about smoothing: JSON through and through.

    groups: by the names of its linears, the parameters to multiply and those to divide, none where the
    graph does not show them as they are. uses: by parameter, each use of it: the groups that it is one
    for, none where it is anything else. (up's weight is multiplied for gate and up, divided for down.)
    """

    groups: dict[str, tuple[list[Place], list[Place]]] = field(default_factory=dict)
    uses: dict[str, list[list[str]]] = field(default_factory=dict)

    @staticmethod
    def of(groups: dict[str, Any], uses: dict[str, list[list[str]]]) -> Structure:
        """From what JSON made of one: tuples have become lists."""
        found = {k: [[(n, d) for n, d in part] for part in parts] for k, parts in groups.items()}
        return Structure({k: (a, b) for k, (a, b) in found.items()}, uses)

    def learn(self, gm: fx.GraphModule) -> None:
        """Add what a graph at the float stage shows."""
        names, members = parameters(gm), defaultdict(list)
        for group in groups_of(gm):
            key = ", ".join(group.names)
            self._agree(key, _places(group, names))
            for place in (*((node, 1) for node in group.linears), *group.absorbs):
                members[place].append(key)
        for node, name in names.items():
            used = self.uses.setdefault(name, [])
            for user in node.users:
                readers = user.users if user.target in STORED else [user]
                source = user if user.target in STORED else node
                for reader in readers:
                    for use in _uses(members, source, reader):
                        if use not in used:
                            used.append(use)

    def merge(self, other: Structure) -> None:
        """Add what another process has seen."""
        for key, found in other.groups.items():
            self._agree(key, found)
        for name, uses in other.uses.items():
            mine = self.uses.setdefault(name, [])
            mine += [use for use in uses if use not in mine]

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
            names = key.split(", ")
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
        tensors = dict(model.named_parameters(remove_duplicate=False))
        storages = Counter(storage_of(t) for t in [*tensors.values(), *model.buffers()])
        wanted = schemes if smooth == "awq" else _quantizing(schemes)
        covered = {name for key in self.groups for name in key.split(", ")}
        if unknown := sorted(set(wanted) - covered):
            log.warning("not smoothed: in no graph that calibration saw: %s", ", ".join(unknown))
        found = Folds()
        for key, weights in self._weights(tensors, wanted):
            names, (places, absorbs) = key.split(", "), self.groups[key]
            largest = largest_inputs(stats, names, next(iter(weights.values())).shape[1])
            reason = self._obstacle(key, places, tensors, storages)
            loose = self._obstacle(key, absorbs, tensors, storages)
            loose = loose or ("" if absorbs else "nothing before it can take up the scale")
            if largest is None:
                reason = reason or "no statistics"
            elif smooth == "awq":  # a division at run time would cost what the format gains
                reason = reason or loose
            if reason or largest is None:
                log.warning("not smoothed: %s: %s", key, reason)
                continue
            scale = _scale(smooth, names, weights, largest, stats, schemes)
            if scale is None:
                log.info("not smoothed: %s: its outputs err least as it is", key)
            elif loose:
                log.info("%s: %s: its layers divide their inputs", key, loose)
                own = {name: scale for name in names if name in wanted}
                found.divisors |= own
                found.scales |= own
                found.multiply([p for p in places if _layer(p) in wanted], scale)
            else:
                found.scales |= dict.fromkeys(names, scale)
                found.multiply(places, scale)
                found.multiply(absorbs, scale.reciprocal())
        return found

    def beside(self, layer: str) -> list[str]:
        """The layers that read what ``layer`` reads, itself among them."""
        keys = (key.split(", ") for key in self.groups)
        return next((names for names in keys if layer in names), [layer])

    def _weights(
        self, tensors: Mapping[str, torch.Tensor], wanted: Schemes
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The groups that have a wanted layer, with the weight [N, K] of each layer."""
        for key, (places, _) in self.groups.items():
            known = bool(places) and all(name in tensors for name, _ in places)
            if known and set(key.split(", ")) & set(wanted):
                views = {
                    _layer(p): tensors[p[0]] if p[1] == 1 else tensors[p[0]].t() for p in places
                }
                yield key, views

    def _obstacle(
        self,
        key: str,
        places: list[Place],
        tensors: Mapping[str, torch.Tensor],
        storages: Counter[int],
    ) -> str:
        for name, _ in places:
            if name not in tensors:
                return f"{name} is not a parameter of this model"
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
    members: Mapping[tuple[fx.Node, int], list[str]], node: fx.Node, user: fx.Node
) -> list[list[str]]:
    """For each argument of ``user`` that is ``node``, the groups for whose sake it is."""
    return [members.get((user, i), []) for i, arg in enumerate(user.args) if arg is node] or [[]]


def _places(group: Group, names: Mapping[fx.Node, str]) -> tuple[list[Place], list[Place]]:
    """Parameters to multiply and to divide; none where one is not there as it is."""
    linears = [_place(node.args[1], 1, names) for node in group.linears]
    absorbs = [_place(node.args[i], 0, names) for node, i in group.absorbs]
    known = None not in linears, None not in absorbs
    return list(dict.fromkeys(linears)) if known[0] else [], absorbs if all(known) else []  # type: ignore


def _place(node: Any, dimension: int, names: Mapping[fx.Node, str]) -> Place | None:
    if node in names:
        return names[node], dimension
    if node.target in STORED and node.args[0] in names:
        return names[node.args[0]], 1 - dimension if node.target is aten.t.default else dimension
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
    candidates = [torch.ones_like(largest), *scales]
    found = least_error(rows, [*known.values()], [schemes[name] for name in known], candidates)
    return (None, *ALPHAS)[found.best]


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
