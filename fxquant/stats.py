"""Stats: the observers of a model by layer, port and kind; merged, saved, loaded and read.

In a file every observer's fields are tensors ``<layer>:<port>|<kind>|<field>``, the settings that layers
yet to come will start from ``<port>|<kind>|<field>``; the rest is JSON in the file's metadata.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate

from .errors import EmptyObserver, InvalidOption, NonFiniteStatistics
from .observers import Observer, observer_of, restored, state_of
from .passes.observation import PORTS
from .smoothing import Structure

KINDS: Mapping[str, Sequence[str | Observer]] = {"input": ("minmax", "channel")}
"""What is observed unless asked otherwise, by port: enough for static ranges and for SmoothQuant."""

CONSTANT = "weight"
"""The port that is the same in every batch. Its first value is counted and no other: a layer that is
used twice, or runs in many batches and processes, still has one weight."""

RANGES: Mapping[str, tuple[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = {
    "minmax": ("minmax", lambda found, **_: found.range()),
    "moving_average": ("moving_average", lambda found, **_: found.range()),
    "percentile": ("histogram", lambda found, percent, **_: found.percentile_range(percent)),
    "mse": ("histogram", lambda found, dtype, mapping, **_: found.mse_range(dtype, mapping)),
}
"""Ways to choose a range: the kind of observer that each reads, and how."""

FORMAT = "fxquant-stats-2"


class Stats(Mapping[str, dict[str, Observer]]):
    """Observers by ``<layer>:<port>``, then by kind.

    kinds: which to keep, by port ("input", "output", "weight"); each a name, or an observer whose
    settings are taken: ``{"input": ("channel", MovingAverage(momentum=0.9)), "weight": ("channel",)}``.
    ``stats["layers.0.q_proj:input"]["channel"].absmax`` is the running absolute maximum of each input
    channel. Observers take [..., channels]; a weight is turned for them, so that its channels are the
    output's, as its scales are. Raises InvalidOption for kinds that there are none of.
    """

    def __init__(self, kinds: Mapping[str, Sequence[str | Observer]] = KINDS):
        self.kinds = _observers_of(kinds)
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
        """The layers that have seen a value at every port."""
        seen: dict[str, bool] = {}
        for name, found in self._found.items():
            layer = name.rpartition(":")[0]
            here = any(observer.batches for observer in found.values())
            seen[layer] = here and seen.get(layer, True)
        return {layer for layer, everywhere in seen.items() if everywhere}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count the values of ``x`` under ``name``, if its port is observed; a weight's once. Raises
        NonFiniteStatistics (histograms)."""
        port = name.rpartition(":")[2]
        if port not in self.kinds or (port == CONSTANT and name in self._found):
            return
        x = x.t() if port == CONSTANT else x
        found = self._found.setdefault(name, copy.deepcopy(self.kinds[port]))
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

    def range(
        self,
        name: str,
        how: str = "minmax",
        *,
        percent: float = 99.99,
        dtype: torch.dtype = torch.int8,
        mapping: str = "symmetric",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) of all values under ``name``, ``<layer>:<port>``.

        how: "minmax", "moving_average", "percentile" (``percent`` of the values are within, from either
        end) or "mse" (the least squared error in codes of ``dtype``, by ``mapping``). Raises InvalidOption,
        which says what to calibrate with where statistics are missing, and EmptyObserver.
        """
        if how not in RANGES:
            raise InvalidOption(name="how", value=how, expected=f"one of {', '.join(RANGES)}")
        kind, read = RANGES[how]
        observer = self._found.get(name, {}).get(kind)
        if observer is None:
            kinds = {name.rpartition(":")[2]: (kind,)}
            expected = f"<layer>:<port> of a layer that was reached, calibrated with kinds={kinds}"
            raise InvalidOption(name=how, value=name, expected=expected)
        return read(observer, percent=percent, dtype=dtype, mapping=mapping)

    def merge(self, other: Stats) -> None:
        """Add what ``other`` (another process, say) has seen. Raises InvalidOption where the two observe
        differently and ShapeMismatch where a layer's width differs, with nothing added."""
        kinds = {port: dict(found) for port, found in self.kinds.items()}
        for port, theirs in other.kinds.items():
            mine = kinds.setdefault(port, {})
            for kind, observer in theirs.items():
                mine.setdefault(kind, observer).check_alike(observer)
        merged = {name: {k: copy.copy(o) for k, o in has.items()} for name, has in self.items()}
        for name, found in other.items():
            port, mine = name.rpartition(":")[2], merged.setdefault(name, {})
            for kind, observer in found.items():
                if port == CONSTANT and kind in mine:
                    continue
                mine.setdefault(kind, copy.copy(kinds[port][kind])).merge(observer)
        self.kinds, self._found = kinds, merged
        self.missed = sorted({*self.missed, *other.missed} - self.reached)
        self.structure.merge(other.structure)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors = {
            f"{name}|{kind}|{field}": tensor.detach().cpu().contiguous().clone()
            for name, found in (*self.kinds.items(), *self.items())
            for kind, observer in found.items()
            for field, tensor in state_of(observer)
        }
        about = {"kinds": _listed(self.kinds), "order": _listed(self), "missed": self.missed}
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
            states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, kind, field = key.rsplit("|", 2)
                states.setdefault((name, kind), {})[field] = file.get_tensor(key)
        found = {
            name: {kind: restored(kind, states[name, kind]) for kind in kinds}
            for name, kinds in (*about["kinds"].items(), *about["order"].items())
        }
        stats = Stats({port: [*found.pop(port).values()] for port in about["kinds"]})
        stats._found = found
        stats.missed = about["missed"]
        stats.structure = Structure.of(**about["structure"])
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


def _listed(observers: Mapping[str, Mapping[str, Observer]]) -> dict[str, list[str]]:
    return {name: list(found) for name, found in observers.items()}


def _observers_of(kinds: Any) -> dict[str, dict[str, Observer]]:
    """Empty observers by port and kind. Raises InvalidOption."""
    if not isinstance(kinds, Mapping) or not kinds or not set(kinds) <= set(PORTS):
        expected = f"a mapping from ports ({', '.join(PORTS)}) to lists of kinds"
        raise InvalidOption(name="kinds", value=kinds, expected=expected)
    found: dict[str, dict[str, Observer]] = {}
    for port, wanted in kinds.items():
        if isinstance(wanted, str) or not wanted:
            expected = "a list of names or observers"
            raise InvalidOption(name=f"kinds[{port!r}]", value=wanted, expected=expected)
        found[port] = {}
        for observer in map(observer_of, wanted):
            if observer.kind in found[port]:
                expected = "each kind once"
                raise InvalidOption(name=f"kinds[{port!r}]", value=wanted, expected=expected)
            found[port][observer.kind] = observer
    return found
