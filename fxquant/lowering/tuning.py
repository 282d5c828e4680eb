"""Measured tables: which kernel from which number of rows, and how its blocks are cut.

``tuned/<device>.json`` comes with the package; ``python -m fxquant tune`` writes the user's own, which
overrides it entry by entry::

    {"versions": {...},
     "kernels": {"int8dq 4096x14336": [["cuda_w8a8", 0], ["triton_w8a8", 65]]},
     "shapes": {"int8dq 4096x14336": [[1, [1, 8, 2, 1, 128, 4]], [9, [...]]]},
     "pipelines": {"int4wo-64 4096x14336": [[33, [4, 1, 64, 128, 4, 1, 1]]]},
     "widened": {"8da4w-32 4096x14336": [[65, [2, 1, 128, 128, 5, 1, 1]]]},
     "speeds": {"int8dq 4096x14336": [[1, 1.55], [2048, 1.56]]}}

Keys are ``<scheme> <n>x<k>``; each step is valid from its number of rows to the next one's. Speeds, over
bfloat16, are readings at one number of rows; what is shipped includes the activations' quantization.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..scheme import SCHEMES

SHIPPED = Path(__file__).parent / "tuned"
SECTIONS = ("kernels", "shapes", "pipelines", "widened", "speeds")

KIN = {"H100": "NVIDIA H200", "H200": "NVIDIA H200"}
"""In the name of a device that has no table: whose serves, the same chip's beside another memory (H100,
GH200) or in another form (H200 NVL)."""


_REMEMBERED: list[Any] = []


def remembered(function: Callable[..., Any]) -> Any:
    """``lru_cache`` for what is chosen by the tables, until ``forget``: a launch asks for it each time."""
    cached = lru_cache(maxsize=4096)(function)
    _REMEMBERED.append(cached)
    return cached


def forget() -> None:
    """Choose anew: measured tables have changed."""
    for cached in _REMEMBERED:
        cached.cache_clear()


def user_table(device: str) -> Path:
    """Where ``python -m fxquant tune`` keeps what it measured on ``device``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fxquant" / _file(device)


def _file(device: str) -> str:
    return f"{device.replace(' ', '_').replace('/', '_')}.json"


def shipped_table(device: str) -> Path:
    """The table that comes with the package for ``device``, or for its kin; it need not exist."""
    kin = (other for part, other in KIN.items() if part in device)
    own = SHIPPED / _file(device)
    return own if own.is_file() else SHIPPED / _file(next(kin, device))


@remembered
def tuned_table(device: str) -> dict[str, dict[str, list[Any]]]:
    """Both files as one; ``forget()`` has them read again."""
    merged: dict[str, dict[str, list[Any]]] = {section: {} for section in SECTIONS}
    for path in (shipped_table(device), user_table(device)):
        if path.is_file():
            content = json.loads(path.read_text())
            for section in SECTIONS:
                merged[section] |= content.get(section, {})
    return merged


def key(scheme: str, n: int, k: int) -> str:
    return f"{scheme} {n}x{k}"


def measured_shape(
    device: str, section: str, scheme: str, n: int, k: int, rows: int
) -> tuple[int, ...] | None:
    """The cut that was measured for this very layer at this many rows, if any."""
    steps = tuned_table(device)[section].get(key(scheme, n, k), [])
    return next((tuple(shape) for first, shape in reversed(steps) if rows >= first), None)


ALIKE = math.log(8)
"""How far the sizes of a layer may be from a measured one's for the same kernels: the sum over n and k
of the logarithms of their ratios."""


def tuned_kernels(device: str, scheme: str, family: str, n: int, k: int) -> list[tuple[str, int]]:
    """(kernel, first number of rows) of this layer, or of the likest one that was measured; nothing
    where none is near."""
    table = tuned_table(device)["kernels"]
    near = [e for e in _alike(table, scheme, family, n, k) if _distance(e, n, k) <= ALIKE]
    return [(name, first) for name, first in table[near[0]]] if near else []


LEAST = 0.95
"""Readings repeat within so much: what is nearer to bfloat16's speed is not called slower."""


def slower(device: str, scheme: str, family: str, n: int, k: int, rows: int | None) -> str:
    """At which numbers of rows the scheme is slower than bfloat16 on this layer, or the likest one measured,
    in words: at the one nearest to ``rows``, or at any. Empty where it is not, or where nobody knows."""
    table = tuned_table(device)["speeds"]
    near = _alike((e for e in table if e.partition(" ")[0] == scheme), scheme, family, n, k)
    if not near or _distance(near[0], n, k) > ALIKE:
        return ""
    readings = table[near[0]]
    if rows is not None:
        readings = [min(readings, key=lambda r: abs(math.log(r[0] / max(rows, 1))))]
    found = ", ".join(f"{speed:.2f}x at {count}" for count, speed in readings if speed < LEAST)
    there = near[0].partition(" ")[2]
    return f"slower than bfloat16 ({found} rows, measured on {there})" if found else ""


def _alike(table: Iterable[str], scheme: str, family: str, n: int, k: int) -> list[str]:
    """Entries of the scheme's family, by distance in n and k; of one layer those of the scheme itself first.
    (On five layers on an H200 a sibling's cut for the same layer was 5 % slower than the best one on
    average, the scheme's own for the nearest other layer 16 %.)"""
    found = [
        e for e in table if (known := SCHEMES.get(e.partition(" ")[0])) and known.family == family
    ]
    return sorted(found, key=lambda e: (_distance(e, n, k), e.partition(" ")[0] != scheme))


def _distance(entry: str, n: int, k: int) -> float:
    there = [int(s) for s in entry.partition(" ")[2].split("x")]
    return sum(abs(math.log(a / b)) for a, b in zip(there, (n, k), strict=True))


@remembered
def proven_shapes(device: str, section: str, family: str) -> tuple[tuple[int, ...], ...]:
    """Every cut that was the fastest somewhere, for some scheme of the family."""
    table = tuned_table(device)[section]
    entries = _alike(table, "", family, 1, 1)
    return tuple(sorted({tuple(shape) for entry in entries for _, shape in table[entry]}))


@remembered
def tuned_shapes(
    device: str, section: str, scheme: str, family: str, n: int, k: int, rows: int
) -> tuple[tuple[int, ...], ...]:
    """How a kernel may cut its blocks for this many rows, the likeliest first: what was measured for
    the layer itself, then for others of the family, by distance in n and k."""
    table = tuned_table(device)[section]
    found = []
    for entry in _alike(table, scheme, family, n, k):
        found += [shape for first, shape in reversed(table[entry]) if rows >= first][:1]
    return tuple(tuple(shape) for shape in found)
