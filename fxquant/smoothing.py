"""SmoothQuant in place, on a model whose graphs calibration has seen.

``passes.equalize`` rewrites a graph; here the same groups are folded into the parameters themselves,
by the names that calibration noted, so that no graph is needed and the result is a model of the same
class.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .graph import parameters
from .inductor import storage_of
from .passes.equalization import Group, alpha_of, groups_of, largest_inputs, smoothing_scale

aten = torch.ops.aten
log = logging.getLogger("fxquant.smoothing")

STORED = (aten.t.default, aten.to.dtype)
"""How a graph may read a parameter that is folded into: transposed, or cast by autocast."""

Place = tuple[str, int]
"""A parameter's name and the dimension of it that the channels are."""


@dataclass
class Structure:
    """What the graphs of a model say about smoothing: JSON through and through.

    groups: by the names of its linears, the parameters to multiply and those to divide, where the
    graph shows them as they are. uses: by parameter, the groups that use it, "" for anything else.
    """

    groups: dict[str, tuple[list[Place], list[Place]]] = field(default_factory=dict)
    uses: dict[str, list[str]] = field(default_factory=dict)

    @staticmethod
    def of(groups: dict[str, Any], uses: dict[str, list[str]]) -> Structure:
        """From what JSON made of one: tuples have become lists."""
        found = {k: [[(n, d) for n, d in part] for part in parts] for k, parts in groups.items()}
        return Structure({k: (a, b) for k, (a, b) in found.items()}, uses)

    def learn(self, gm: fx.GraphModule) -> None:
        """Add what a graph at the float stage shows."""
        names, members = parameters(gm), {}
        for group in groups_of(gm):
            key = ", ".join(group.names)
            found = _places(group, names)
            self.groups[key] = found if self.groups.get(key, found) == found else ([], [])
            for node in group.linears:
                members[node, 1] = key
            members |= dict.fromkeys(group.absorbs, key)
        for node, name in names.items():
            used = self.uses.setdefault(name, [])
            for user in node.users:
                readers = user.users if user.target in STORED else [user]
                source = user if user.target in STORED else node
                for tag in {_tag(members, source, reader) for reader in readers}:
                    if tag not in used:
                        used.append(tag)

    def merge(self, other: Structure) -> None:
        """Add what another process has seen; where the two disagree nothing is foldable."""
        for key, found in other.groups.items():
            self.groups[key] = found if self.groups.get(key, found) == found else ([], [])
        for name, tags in other.uses.items():
            mine = self.uses.setdefault(name, [])
            mine += [tag for tag in tags if tag not in mine]

    def fold(
        self, model: nn.Module, stats: Mapping[str, Any], alpha: Any, wanted: Collection[str]
    ) -> None:
        """Smooth in place every group that has one of the ``wanted`` layers. Raises InvalidOption and
        ShapeMismatch.

        What no batch of the calibration ran (another branch, code that Dynamo leaves alone) is not
        known here. A group stays as it is, and is logged, where its inverse has nowhere to go or a
        parameter has other uses: ``torch.compile`` with the same statistics smooths it in the graph.
        """
        tensors = dict(model.named_parameters(remove_duplicate=False))
        storages = Counter(storage_of(t) for t in [*tensors.values(), *model.buffers()])
        plan, covered = [], {name for key in self.groups for name in key.split(", ")}
        if unknown := sorted(set(wanted) - covered):
            log.warning("not smoothed: in no graph that calibration saw: %s", ", ".join(unknown))
        for key, (weights, absorbs) in self.groups.items():
            names = key.split(", ")
            if not set(names) & set(wanted):
                continue
            own, largest = alpha_of(alpha, names), None
            reason = self._obstacle(key, weights + absorbs, bool(absorbs), tensors, storages)
            if not reason:
                name, at = weights[0]
                largest = largest_inputs(stats, names, tensors[name].shape[at])
                reason = "" if largest is not None else "no statistics"
            if reason:
                log.warning("not smoothed in place: %s: %s", key, reason)
            else:
                plan.append((weights, absorbs, own, largest))
        for weights, absorbs, own, largest in plan:
            _fold_one(tensors, weights, absorbs, own, largest)

    def _obstacle(
        self,
        key: str,
        places: list[Place],
        absorbed: bool,
        tensors: Mapping[str, torch.Tensor],
        storages: Counter[int],
    ) -> str:
        if not absorbed:
            return "nothing before it, as it is, can take up the scale"
        for name, _ in places:
            if name not in tensors:
                return f"{name} is not a parameter of this model"
            if self.uses.get(name) != [key]:
                return f"{name} is used elsewhere too"
            if storages[storage_of(tensors[name])] > 1:
                return f"{name} is tied to another parameter"
        return ""


def _tag(members: Mapping[Any, str], node: fx.Node, user: fx.Node) -> str:
    """The group for whose sake ``user`` reads ``node``, "" if it reads it for anything else."""
    places = [i for i, arg in enumerate(user.args) if arg is node]
    tags = {members.get((user, i), "") for i in places}
    return tags.pop() if len(tags) == 1 else ""


def _places(group: Group, names: Mapping[fx.Node, str]) -> tuple[list[Place], list[Place]]:
    """Parameters to multiply and to divide; nothing to divide where one is not there as it is."""
    linears = [_place(node.args[1], 1, names) for node in group.linears]
    absorbs = [_place(node.args[i], 0, names) for node, i in group.absorbs]
    if None in linears or None in absorbs:
        return [], []
    return list(dict.fromkeys(linears)), absorbs  # type: ignore[arg-type, return-value]


def _place(node: Any, dimension: int, names: Mapping[fx.Node, str]) -> Place | None:
    if node in names:
        return names[node], dimension
    if node.target in STORED and node.args[0] in names:
        return names[node.args[0]], 1 - dimension if node.target is aten.t.default else dimension
    return None


@torch.no_grad()
def _fold_one(
    tensors: Mapping[str, torch.Tensor],
    weights: list[Place],
    absorbs: list[Place],
    alpha: float,
    largest: torch.Tensor | None,
) -> None:
    assert largest is not None
    read = [tensors[name] if at == 1 else tensors[name].t() for name, at in weights]
    scale = smoothing_scale(largest.to(read[0].device), read, alpha)
    for places, factor in ((weights, scale), (absorbs, scale.reciprocal())):
        for name, at in places:
            tensor = tensors[name]
            shape = [1] * tensor.dim()
            shape[at] = -1
            tensor.copy_(tensor.float() * factor.to(tensor.device).view(shape))
