"""A graph that takes everything it needs as inputs: folded parameters and constants are lifted out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .graph import Layer, fetch, is_folded, parameters, replace
from .weights import Folded, Memo


@dataclass
class Rewritten:
    """A graph at the lowered stage, and how to feed it.

    kept: positions of the original inputs that it still takes, in order. folded: the memoized
    submodules with the positions of what each is called with, among the original inputs and, behind
    them, the constants; their outputs follow. constants: tensors that tracing or a pass made (a table of
    positions, say); they come last.
    """

    gm: fx.GraphModule
    kept: list[int]
    folded: list[tuple[Folded, list[int]]]
    constants: list[torch.Tensor]
    layers: dict[str, Layer]
    memo: Memo = field(default_factory=Memo)

    def extras(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """What the graph takes besides its original inputs, for a call with ``args``."""

        given = [*args, *self.constants]

        def fold() -> list[torch.Tensor]:
            return [t for module, where in self.folded for t in module(*[given[i] for i in where])]

        feeds = [given[i] for _, where in self.folded for i in where]
        return self.memo(feeds, fold) + self.constants


def lift(gm: fx.GraphModule, found: dict[str, Layer]) -> Rewritten:
    """Folded submodules and constants become inputs, and parameters that only they read are dropped."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in gm.graph.find_nodes(op="get_attr") if _tensor(gm, n) is not None]
    position = {node: i for i, node in enumerate([*placeholders, *tensors])}
    known = parameters(gm)
    folded: list[tuple[Folded, list[int]]] = []
    last = placeholders[-1]
    for node in gm.graph.find_nodes(op="call_module"):
        assert is_folded(gm, node)
        folded.append((fetch(gm, str(node.target)), [position[a] for a in node.args]))
        outputs = {user.args[1]: user for user in node.users}
        for i, val in enumerate(node.meta["val"]):
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"folded_{len(folded) - 1}_{i}")
            last.meta["val"] = val
            if i in outputs:
                outputs[i].replace_all_uses_with(last)
                gm.graph.erase_node(outputs[i])
        gm.graph.erase_node(node)
        gm.delete_submodule(str(node.target))
    constants = [_tensor(gm, node) for node in tensors]
    for i, node in enumerate(tensors):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"constant_{i + 1}")
        last.meta["val"] = node.meta["val"]
        replace(node, last)
    for name, _ in list(gm.named_buffers(recurse=False)):
        delattr(gm, name)  # or AOTAutograd would ask Dynamo where they come from
    kept = []
    for i, node in enumerate(placeholders):
        if node in known and not node.users:
            gm.graph.erase_node(node)
        else:
            kept.append(i)
    gm.graph.lint()
    gm.recompile()
    return Rewritten(gm, kept, folded, constants, found)


def _tensor(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The tensor behind a ``get_attr`` node; None for a submodule."""
    found = fetch(gm, str(node.target))
    return found if isinstance(found, torch.Tensor) else None


@lru_cache
def sources_hash() -> str:
    """Of every file of fxquant that decides what is compiled."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
