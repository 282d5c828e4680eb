"""Measured tables: which kernel from which number of rows, and how its blocks are cut.

``tuned/<device>.json`` comes with the package; ``python -m fxquant tune`` writes the user's own, which
overrides it entry by entry::

    {"versions": {...},
     "kernels": {"int8dq 4096x14336": [["cuda_w8a8", 0], ["triton_w8a8", 65]]},
     "shapes": {"int8dq 4096x14336": [[1, [1, 8, 2, 1, 128, 4]], [9, [...]]]}}

Keys are ``<scheme> <n>x<k>``; each step is valid from its number of rows to the next one's.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "tuned"
SECTIONS = ("kernels", "shapes")


def user_table(device: str) -> Path:
    """Where ``python -m fxquant tune`` keeps what it measured on ``device``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fxquant" / _file(device)


def _file(device: str) -> str:
    return f"{device.replace(' ', '_').replace('/', '_')}.json"


@lru_cache
def tuned_table(device: str) -> dict[str, dict[str, list[Any]]]:
    """Both tables as one; ``tuned_table.cache_clear()`` reads them again."""
    merged: dict[str, dict[str, list[Any]]] = {section: {} for section in SECTIONS}
    for path in (SHIPPED / _file(device), user_table(device)):
        if path.is_file():
            content = json.loads(path.read_text())
            for section in SECTIONS:
                merged[section] |= content.get(section, {})
    return merged


def key(scheme: str, n: int, k: int) -> str:
    return f"{scheme} {n}x{k}"


def tuned_kernels(device: str, scheme: str, n: int, k: int) -> list[tuple[str, int]]:
    """(kernel, first number of rows), or nothing."""
    return [(name, first) for name, first in tuned_table(device)["kernels"].get(key(scheme, n, k), [])]


def tuned_shape(device: str, scheme: str, n: int, k: int, rows: int) -> list[int] | None:
    """How ``cuda_stream`` cuts its blocks for this many rows, or None."""
    steps = tuned_table(device)["shapes"].get(key(scheme, n, k), [])
    return next((shape for first, shape in reversed(steps) if rows >= first), None)
