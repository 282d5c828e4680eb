"""A Dynamo graph, an exported program or a module becomes one canonical ATen GraphModule."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from .errors import CaptureFailed
from .graph import note, parameters
from .inductor import example_values, is_persistent, retrace, source_name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, what is seen is the model of inference: no dropout, no statistics of batches. By the flags
    alone: ``eval()`` of a model may do more, such as merge adapters."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Names:
    """Names in the user's model, by identity: of parameters and buffers, and of modules.

    Dynamo's names are relative to the frame it compiles; after a graph break, or with blocks
    compiled one by one, only identity leads back to the model.
    """

    def __init__(self) -> None:
        self._roots: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self._first: list[nn.Module] = []

    def add(self, root: nn.Module) -> None:
        if any(root is r or root in _descendants(r) for r in self._roots):
            return
        self._roots[root] = None

    def roots(self) -> list[nn.Module]:
        return [*self._first, *self._roots]

    @contextmanager
    def rooted(self, root: nn.Module) -> Iterator[None]:
        """Within, what ``root`` holds has its names in ``root``, whatever else holds it."""
        self._first.insert(0, root)
        try:
            yield
        finally:
            self._first.remove(root)

    def holding(self, module: nn.Module | None) -> list[nn.Module]:
        """The models that ``module`` is a part of; all of them, where it is not known."""
        if module is None:
            return self.roots()
        return [r for r in self._roots if r is module or module in _descendants(r)]

    def tensors(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for root in self.roots():
            for getter in (root.named_parameters, root.named_buffers):
                for name, tensor in getter(remove_duplicate=False):
                    found.setdefault(id(tensor), clean(name))
        return found

    def modules(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for root in self.roots():
            for name, module in root.named_modules():
                found.setdefault(id(module), clean(name))
        return found


def _descendants(root: nn.Module) -> set[nn.Module]:
    return set(root.modules())


NAMES = _Names()


def clean(name: str) -> str:
    """``name`` without the wrapper of a compiled module."""
    return re.sub(r"(^|\.)_orig_mod(\.|$)", lambda m: m[1] and m[2], name)


def _outermost_module(frame: FrameType | None) -> nn.Module | None:
    """The outermost module on the call stack: the model, whatever part of it is being compiled."""
    found = None
    while frame is not None:
        # reading f_locals keeps what a frame's names refer to alive: only methods are looked at
        is_method = frame.f_code.co_argcount > 0 and frame.f_code.co_varnames[0] == "self"
        owner = frame.f_locals.get("self") if is_method else None
        if isinstance(owner, nn.Module) and not isinstance(owner, fx.GraphModule):
            found = owner
        frame = frame.f_back
    return found


def learn_names() -> list[nn.Module]:
    """Remember the names of the model that is being called, and return the models that hold it."""
    root = _outermost_module(sys._getframe(1))
    root = getattr(root, "_orig_mod", root)
    if root is not None:
        NAMES.add(root)
    return NAMES.holding(root)


def from_dynamo(gm: fx.GraphModule, examples: Sequence[Any]) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend; placeholders keep their order and sources."""
    learn_names()
    try:
        canonical = retrace(gm, example_values(gm))
    except Exception as error:
        raise CaptureFailed(reason=f"{type(error).__name__}: {error}") from error
    tensors, known = NAMES.tensors(), {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for old, new, example in zip(
        placeholders, canonical.graph.find_nodes(op="placeholder"), examples, strict=True
    ):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
        for key in ("tensor_dict", "stack_trace", "grapharg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if is_persistent(old, example):
            known[new.name] = tensors.get(id(example)) or _relative_name(source_name(old))
    canonical.meta["fxquant_parameters"] = known
    return canonical


def _relative_name(source: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` as ``fc.weight``."""
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(parts) or source


def from_export(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program; parameters are ``get_attr`` nodes under their names."""
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            gm.graph.erase_node(node)
    gm.recompile()
    fakes = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    by_name = {
        fakes[n.name]: n.meta["val"]
        for n in program.graph.find_nodes(op="placeholder")
        if n.name in fakes
    }
    for node in gm.graph.find_nodes(op="get_attr"):
        if "val" not in node.meta and str(node.target) in by_name:
            node.meta["val"] = by_name[str(node.target)]
    gm.meta["fxquant_parameters"] = {
        n.name: str(n.target) for n in gm.graph.find_nodes(op="get_attr")
    }
    return gm


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The canonical ATen graph of a module (through torch.export) or of an exported program.

    The result is called like ``model``. Raises CaptureFailed where export refuses the model;
    ``torch.compile(model, backend="fxquant")`` serves such models, graph break by graph break.
    """
    if isinstance(model, nn.Module):
        try:
            with torch.no_grad():
                model = torch.export.export(
                    model, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False
                )
        except Exception as error:
            raise CaptureFailed(reason=f"{type(error).__name__}: {error}") from error
    return from_export(model)


def module_of(node: fx.Node, modules: dict[int, str]) -> tuple[str, str]:
    """(name, class) of the innermost module that ``node`` was traced from; ("", "") if none."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    key, (path, cls) = next(reversed(stack.items()))
    kind = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    identity = re.match(r"\d+", str(key))
    if identity and int(identity[0]) in modules:
        return modules[int(identity[0])], kind
    return _relative_path(path), kind


def _relative_path(path: str) -> str:
    """Dynamo's ``L['self'].blocks[0].fc`` as ``blocks.0.fc``; export's paths are names already."""
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\['?([^'\]]+)'?\]", lambda m: f".{m[1] or m[2]}", path)
    return clean(path.lstrip("."))


def name_layer(node: fx.Node, weight_parameters: frozenset[str], modules: dict[int, str]) -> str:
    """The name of the layer that ``node`` computes; ``modules``: NAMES.modules().

    The module that owns the weight gives its name; a weight that belongs to no linear-like module
    of its own (``x @ self.w``) is named after itself.
    """
    path, kind = module_of(node, modules)
    note(node)["type"] = kind
    names = sorted(weight_parameters)
    owned = [n for n in names if n.rpartition(".")[0] == path]
    if any(n.rpartition(".")[2] == "weight" for n in owned) or not names:
        return path or node.name
    if (
        path and not owned and kind.endswith("Linear")
    ):  # tied: the weight is named after its first user
        return path
    first = owned[0] if owned else names[0]
    return re.sub(r"\.(weight|_codes)$", "", first)


__all__ = [
    "NAMES",
    "from_dynamo",
    "from_export",
    "learn_names",
    "name_layer",
    "parameters",
    "trace",
]
