"""Sensitivity: what ``fxquant.sensitivity`` has measured, as a table, JSON, a plot and a recipe."""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .errors import InvalidOption, MissingPackage
from .recipe import Recipe, Rule
from .scheme import get_scheme

MEASURED = ("relative_error", "loss_change")
FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one scheme does to one layer, everything else in float.

    relative_error: squared error of the layer's outputs over their squared float values. loss_change:
    end loss less the float model's. Both are infinite where the scheme does not fit, for which
    ``reason`` is given, or where the result is no finite number. saved_bytes: of the float weight less
    codes and qparams; negative where another module keeps the weight. aliases: further names.
    """

    layer: str
    scheme: str
    relative_error: float = math.inf
    loss_change: float = math.inf
    saved_bytes: int = 0
    reason: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def error_db(self) -> float:
        """The relative error in dB, negative for small ones."""
        return 10 * math.log10(self.relative_error) if self.relative_error else -math.inf


@dataclass(frozen=True)
class Sensitivity:
    """Effects by layer, in the model's order, and scheme. ``str()`` is a table, the worst first.

    missed: linears that no batch has called. loss: the float model's, a mean over the batches; None
    where outputs were compared instead.
    """

    rows: tuple[Effect, ...]
    missed: tuple[str, ...]
    loss: float | None
    batches: int

    def __getitem__(self, key: tuple[str, str]) -> Effect:
        """``found["layers.0.q_proj", "int8dq"]``. Raises KeyError and UnknownScheme."""
        layer, scheme = key[0], get_scheme(key[1]).name
        for row in self.rows:
            if layer in (row.layer, *row.aliases) and row.scheme == scheme:
                return row
        raise KeyError(key)

    def ranked(self) -> list[Effect]:
        """What raises the end loss most comes first; what does not fit is last."""
        return sorted(self.rows, key=lambda row: (bool(row.reason), -row.loss_change))

    def recipe(self, limit: float) -> Recipe:
        """For each layer the smallest scheme whose own loss change is at most ``limit``, else float.

        A layer that no scheme makes smaller (its weight is tied) stays float. Changes were measured
        one layer at a time; all layers together change more.
        """
        best: dict[str, Effect] = {}
        for row in sorted(self.rows, key=lambda row: (row.saved_bytes, -row.loss_change)):
            if row.saved_bytes > 0 and row.loss_change <= limit:
                best[row.layer] = row
        layers = dict.fromkeys(row.layer for row in self.rows)
        rules = [Rule(name=_pattern(best[x]), scheme=best[x].scheme) for x in layers if x in best]
        return Recipe((*rules, Rule(scheme=None)))

    def to_json(self) -> str:
        """All of it; what is infinite is null."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row.update({k: None for k in MEASURED if math.isinf(row[k])})
        return json.dumps(asdict(self) | {"rows": rows}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """Inverse of ``to_json``. Raises InvalidOption for anything else."""
        try:
            found = json.loads(text)
            rows = tuple(_read(row) for row in found.pop("rows"))
            return Sensitivity(rows, tuple(found.pop("missed")), **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"what Sensitivity.to_json wrote ({error})"
            raise InvalidOption(name="text", value=text, expected=expected) from None

    def plot(self, path: str | Path) -> None:
        """Draw loss changes and output errors against layers, a line for each scheme.

        path ends in .svg, .png or .pdf. Raises InvalidOption; MissingPackage without matplotlib.
        """
        path = Path(path)
        if path.suffix not in FORMATS:
            expected = f"a file that ends in {', '.join(FORMATS)}"
            raise InvalidOption(name="path", value=str(path), expected=expected)
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingPackage(what="Sensitivity.plot", package="matplotlib") from None
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        figure = Figure(figsize=(max(8.0, 2 + 0.18 * len(layers)), 7), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axis, what, label in (
            (above, "loss_change", "loss change"),
            (below, "error_db", "output error, dB"),
        ):
            self._draw(axis, layers, what)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        above.axhline(0, color="#777777", linewidth=1)
        above.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        below.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text that can be searched
            figure.savefig(path)

    def _draw(self, axis: Any, layers: list[str], what: str) -> None:
        """What is infinite is a dotted line from top to bottom; an output without error has no dB."""
        for index, scheme in enumerate(dict.fromkeys(row.scheme for row in self.rows)):
            rows = [row for row in self.rows if row.scheme == scheme and not row.reason]
            places = [layers.index(row.layer) for row in rows]
            values = [getattr(row, what) for row in rows]
            marker, colour = "osD^v<>P"[index % 8], f"C{index % 10}"
            axis.plot(places, values, marker=marker, color=colour, markersize=4, label=scheme)
            for place, value in zip(places, values, strict=True):
                if value == math.inf:
                    axis.axvline(place, color=colour, linestyle=":")

    def __str__(self) -> str:
        rows = [_cells(row) for row in self.ranked()]
        sides = ("left",) * 2 + ("right",) * 4 + ("left",)
        table = tabulate(
            rows,
            headers=COLUMNS,
            disable_numparse=True,
            colalign=sides if rows else None,
            maxcolwidths=[None] * 6 + [60],
        )
        against = "outputs compared with float's" if self.loss is None else f"loss {self.loss:.6g}"
        lines = [table, f"float model: {against}, batches: {self.batches}"]
        if self.missed:
            lines.append(f"called by no batch: {', '.join(self.missed)}")
        return "\n".join(lines)


COLUMNS = (
    "layer",
    "scheme",
    "loss change",
    "error dB",
    "relative error",
    "saved MiB",
    "why not measured",
)


def _cells(row: Effect) -> tuple[str, ...]:
    if row.reason:
        return row.layer, row.scheme, "", "", "", "", row.reason
    return (
        row.layer,
        row.scheme,
        f"{row.loss_change:+.3e}",
        f"{row.error_db:.1f}",
        f"{row.relative_error:.2e}",
        f"{row.saved_bytes / 2**20:.3f}",
        "",
    )


def _pattern(row: Effect) -> str:
    """One rule for all names: a rule for an alias alone would count as unused."""
    if not row.aliases:
        return glob.escape(row.layer)
    return f"re:{'|'.join(re.escape(name) for name in (row.layer, *row.aliases))}"


def _read(row: Mapping[str, Any]) -> Effect:
    infinite = {k: math.inf for k in MEASURED if row[k] is None}
    return Effect(**{**row, **infinite, "aliases": tuple(row["aliases"])})
