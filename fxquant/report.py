"""explain: per layer its scheme and kernel, or every reason for refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from .backend import Rewritten, linears_of, rewrite
from .capture import NAMES
from .config import Config
from .graph import Layer
from .modules import QuantLinear
from .scheme import get_scheme


@dataclass(frozen=True)
class Report:
    """What happens to each layer of a model. ``str()`` of it is the table; ``reasons`` has more."""

    layers: tuple[Layer, ...]
    graphs: int

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.scheme]

    @property
    def unquantized(self) -> list[Layer]:
        return [layer for layer in self.layers if not layer.scheme]

    @property
    def saved_bytes(self) -> float:
        """Bytes of float weights less bytes of codes (as kernels hold them) and qparams, a shared weight
        counted once."""
        return sum(_float_bytes(layer) - _bytes(layer) for layer in self.quantized)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def reasons(self, name: str) -> str:
        """Why the layer is float; or where it is slower than bfloat16, and why each kernel that is not used
        was refused."""
        layer = self[name]
        lines = [why for why in (layer.reason, layer.slower) if why]
        return "\n".join([*lines, *(f"{k}: {why}" for k, why in layer.refused.items())])

    def to_json(self) -> str:
        return json.dumps({"graphs": self.graphs, "layers": [asdict(x) for x in self.layers]})

    def __str__(self) -> str:
        rows = [_row(layer) for layer in self.layers]
        table = tabulate(rows, headers=COLUMNS, maxcolwidths=[None] * 6 + [60])
        before = sum(_float_bytes(layer) for layer in self.layers)
        after = sum(_bytes(layer) for layer in self.layers)
        total = (
            f"{len(self.quantized)} of {len(self.layers)} linears quantized, {self.graphs} graphs"
        )
        return f"{table}\n{total}, weights {before / 2**20:.1f} -> {after / 2**20:.1f} MiB"


COLUMNS = (
    "layer",
    "out x in",
    "rows",
    "uses",
    "scheme",
    "kernel",
    "why float, merged with, slower",
)


def _row(layer: Layer) -> tuple[Any, ...]:
    shape = f"{layer.out_features}x{layer.in_features}"
    merged = " + ".join(n for n in layer.merged if n != layer.name)
    note = "; ".join(what for what in (layer.reason, merged, layer.slower) if what)
    scheme, kernel = layer.scheme or "float", layer.kernel or ""
    return layer.name, shape, layer.rows, layer.uses, scheme, kernel, note


def _float_bytes(layer: Layer) -> float:
    itemsize = {"float64": 8, "bfloat16": 2, "float16": 2}.get(layer.dtype, 4)
    return layer.out_features * layer.in_features * itemsize


def _bytes(layer: Layer) -> float:
    if layer.scheme is None:
        return _float_bytes(layer)
    spec = get_scheme(layer.scheme).product.weight
    blocks = layer.in_features / spec.group_size if spec.group_size else 1
    qparams = blocks * spec.scale_dtype.itemsize * (2 if spec.zero_point_domain != "none" else 1)
    return layer.out_features * (layer.in_features * spec.bits / 8 + qparams)


def summary(model: nn.Module) -> str:
    """A table of the quantized layers that ``model`` holds: how each was solved, and how far off its
    outputs are on the data that it was solved with (round to nearest: on weights alone)."""
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        held = [what for what in ("smoothing", "input_scale") if getattr(module, what) is not None]
        cells: tuple[Any, ...] = ("", "", "", "")
        if (record := module.record) is not None:
            decibel = -10 * math.log10(record.relative) if record.relative else math.inf
            gain = f"{100 * record.gain:.0f} %"
            cells = record.solver, record.tokens, f"{decibel:.1f}", gain
        shape = f"{module.out_features}x{module.in_features}"
        rows.append((name, shape, module.scheme, " ".join(held), *cells))
    return tabulate(rows, headers=SUMMARY)


SUMMARY = (
    "layer",
    "out x in",
    "scheme",
    "holds",
    "solver",
    "tokens",
    "output SQNR dB",
    "less error than rtn",
)


def explain(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Run ``model(*args, **kwargs)`` once and say what fxquant would do with each linear.

    ``options`` as for the backend. The model's output is computed in float; nothing is compiled
    by Inductor and nothing is changed. Layers in no graph (code that TorchDynamo skipped, or that
    this call does not reach) are listed as such. ``print`` the result for a table.
    """
    config = Config.of(options)
    model = getattr(model, "_orig_mod", model)
    NAMES.add(model)
    found: dict[str, Layer] = {}
    graphs = 0

    def collect(gm: fx.GraphModule, inputs: list[Any]):
        nonlocal graphs
        graphs += 1
        rewritten: Rewritten | None = rewrite(gm, inputs, config, on_layers=found.update)
        del rewritten
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=collect, dynamic=dynamic)(*args, **kwargs)
    embeddings = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for layer in linears_of([model]):
        if layer.name not in found and layer.name not in embeddings:
            layer.reason = (
                "in no compiled graph: not reached by this call, or skipped by TorchDynamo"
            )
            found[layer.name] = layer
    return Report(tuple(found.values()), graphs)
