"""Graphs, the diffs between them and a manifest, on disk and in torch's structured trace."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import fx

from .graph import fetch, is_folded, layers
from .inductor import emit_artifact

log = logging.getLogger("fxquant.dump")


class Dump:
    """``<dir>/graph_<n>/{00_captured,01_normalized,...}.py``, a diff a pass, ``manifest.json``.

    With ``directory=None`` nothing is written to disk; the structured trace gets the same texts.
    """

    def __init__(self, directory: str | None):
        self.folder = _new_folder(Path(directory)) if directory else None
        self.stages: list[tuple[str, str]] = []

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Record the graph as it is after the pass ``name``."""
        number = len(self.stages)
        label = f"{number:02d}_{name}"
        emit_artifact(f"fxquant_{label}", lambda: readable(gm))
        if self.folder is None:
            self.stages.append((label, ""))
            return
        text = readable(gm)
        (self.folder / f"{label}.py").write_text(text)
        if self.stages:
            before = self.stages[-1]
            diff = difflib.unified_diff(
                before[1].splitlines(True), text.splitlines(True), before[0], label
            )
            (self.folder / f"{label}.diff").write_text("".join(diff))
        self.stages.append((label, text))

    def manifest(self, gm: fx.GraphModule, settings: dict[str, object]) -> None:
        """Write what was decided for each layer, and why."""
        content = {
            "torch": torch.__version__,
            "stages": [label for label, _ in self.stages],
            "settings": settings,
            "layers": [asdict(layer) for layer in layers(gm).values()],
        }
        text = json.dumps(content, indent=1, default=str)
        emit_artifact("fxquant_manifest", lambda: text)
        if self.folder is not None:
            (self.folder / "manifest.json").write_text(text)
            _svg(gm, self.folder / "graph.svg")
            log.info("dumped to %s", self.folder)


def readable(gm: fx.GraphModule) -> str:
    """The graph as code with shapes, dtypes and strides, its folded expressions below it."""
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    for node in gm.graph.find_nodes(op="call_module"):
        if is_folded(gm, node):
            folded = fetch(gm, str(node.target))
            text += f"\n# {node.target}: {folded.layer}\n{folded.recipe.code.strip()}\n"
    return text


def _new_folder(base: Path) -> Path:
    """The first ``graph_<n>`` that does not exist yet, created."""
    for number in itertools.count():
        folder = base / f"graph_{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _svg(gm: fx.GraphModule, path: Path) -> None:
    """A drawing, where pydot and Graphviz are installed."""
    try:
        from torch.fx.passes.graph_drawer import FxGraphDrawer

        drawing = FxGraphDrawer(gm, "fxquant").get_dot_graph()
        drawing.write_svg(str(path))
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        log.debug("no drawing: %s", error)
