"""Helpers over FX graphs: emit nodes with provenance and fake values, names, parameter values."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .inductor import FakeTensor, HigherOrderOperator, ambient, tree_leaves, tree_map

STAGES = ("captured", "float", "observed", "reference", "fused", "lowered")


@dataclass
class Layer:
    """What is known of one linear: where it is, what it became, and every reason on the way."""

    name: str
    module_type: str = ""
    in_features: int = 0
    out_features: int = 0
    dtype: str = ""
    uses: int = 1
    rows: str = ""
    scheme: str | None = None
    kernel: str | None = None
    merged: tuple[str, ...] = ()
    reason: str = ""
    slower: str = ""
    refused: dict[str, str] = field(default_factory=dict)


def stage(gm: fx.GraphModule) -> str:
    return gm.meta.get("fxquant_stage", "captured")


def layers(gm: fx.GraphModule) -> dict[str, Layer]:
    """Every linear of the graph by its name in the user's model."""
    return gm.meta.setdefault("fxquant_layers", {})


def value(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def note(node: fx.Node) -> dict[str, Any]:
    """fxquant's own notes on a node; they travel through AOTAutograd with ``meta["custom"]``."""
    return node.meta.setdefault("custom", {}).setdefault("fxquant", {})


def layer_of(node: fx.Node) -> str:
    """The name of the layer that ``node`` computes, or the node's own name."""
    return node.meta.get("custom", {}).get("fxquant", {}).get("layer", node.name)


def fake_mode(gm: fx.GraphModule):
    """The fake mode that the graph's values live in."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    return None


PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


def emit(graph: fx.Graph, like: fx.Node, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
    """Append ``target(*args)`` at the insertion point: fake value computed, provenance of ``like``."""
    node = _append(graph, like, target, args, kwargs)
    node.meta["val"] = evaluate(node)
    return node


def _append(graph: fx.Graph, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    for key in PROVENANCE:
        if key in like.meta:
            found = like.meta[key]
            node.meta[key] = copy.deepcopy(found) if key == "custom" else found
    node.meta["fxquant_emitted"] = True
    return node


_EVALUATED: ContextVar[dict[Any, Any] | None] = ContextVar("fxquant_evaluated", default=None)


@contextmanager
def evaluating_once() -> Iterator[None]:
    """Within, ``evaluate`` runs an op once for all inputs that look alike: equal layers are free."""
    token = _EVALUATED.set({})
    try:
        yield
    finally:
        _EVALUATED.reset(token)


def evaluate(node: fx.Node) -> Any:
    """The fake value of a ``call_function`` node from the fake values of its inputs."""
    known = _EVALUATED.get()
    if known is None or not _repeatable(node.target):
        return _evaluate(node)
    inputs = map_arg((node.args, node.kwargs), lambda n: _look(n.meta["val"]))
    key = (node.target, ambient(), repr(inputs))
    if key not in known:
        known[key] = _evaluate(node)
    return known[key]


def _repeatable(target: Any) -> bool:
    """Does equal input give an equal value? Not where it is written to, or a new symbol is made."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & {*target.tags}


def _look(value: Any) -> tuple[str, Any]:
    return describe(value), getattr(value, "device", None)


def describe(value: Any) -> str:
    """A value as text: dtype, shape and stride of tensors, one by one in a list."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    if not isinstance(value, torch.Tensor):
        return str(value)
    stride = tuple(value.stride()) if value.layout == torch.strided else "opaque"
    return f"{value.dtype}{list(value.shape)} stride {stride}"


def _evaluate(node: fx.Node) -> Any:
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    if node.target is operator.getitem:
        return args[0][args[1]]
    mode = next((v.fake_mode for v in _tensors((args, kwargs))), None)
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    args, kwargs = tree_map(lambda v: _fake(mode, v), (args, kwargs))
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake(mode: Any, value: Any) -> Any:
    """Constants that tracing made are real tensors: a fake of each."""
    real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if real else value


def _tensors(tree: Any) -> Iterator[Any]:
    leaves = tree_leaves(tree)
    return (v for v in leaves if isinstance(v, FakeTensor))


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let ``new`` take the place of ``node``."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def inline(graph: fx.Graph, like: fx.Node, body: fx.GraphModule, args: Sequence[Any]) -> Any:
    """Copy ``body``'s nodes to the insertion point, its placeholders bound to ``args``.

    ``body`` was traced in the graph's own fake mode, so its values hold here too.
    """
    env: dict[fx.Node, Any] = {}
    feed = iter(args)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "output":
            return map_arg(node.args[0], lambda n: env[n])
        else:
            assert node.op == "call_function", f"{node.op} {node.target} in a kernel"
            new_args = map_arg(node.args, lambda n: env[n])
            new_kwargs = map_arg(node.kwargs, lambda n: env[n])
            env[node] = _append(graph, like, node.target, new_args, new_kwargs)
            if "val" in node.meta:  # marks of autocast's regions have none
                env[node].meta["val"] = node.meta["val"]
    raise AssertionError("a graph without output")


def parameters(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes that stand for parameters and buffers, with their names in the user's model."""
    known = gm.meta.get("fxquant_parameters", {})
    found = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name in known:
            found[node] = known[node.name]
        elif node.op == "get_attr" and isinstance(fetch(gm, str(node.target)), torch.Tensor):
            found[node] = known.get(node.name, str(node.target))
    return found


def new_constant(gm: fx.GraphModule, prefix: str, tensor: torch.Tensor) -> fx.Node:
    """A ``get_attr`` node, at the insertion point, of ``tensor``, which becomes a buffer of ``gm``."""
    name = next(n for i in itertools.count() if not hasattr(gm, n := f"{prefix}_{i}"))
    gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    node.meta["val"] = fake_mode(gm).from_tensor(tensor, static_shapes=True)
    return node


def fetch(gm: torch.nn.Module, target: str) -> Any:
    """The attribute that a ``get_attr`` or ``call_module`` target names."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found


def constants(gm: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    """Nodes that depend on parameters alone, with the names of those; nothing in place, no effects.

    A parameter that the graph itself writes to (a running mean, a cache) is not constant, nor is
    anything computed from it.
    """
    params = parameters(gm)
    changed = written(gm)
    found = {n: frozenset([name]) for n, name in params.items() if n not in changed}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_module") or node in changed or node.is_impure():
            continue
        if node.op == "call_module" and not is_folded(gm, node):
            continue
        if isinstance(node.target, HigherOrderOperator) or _random(node):
            continue
        inputs = node.all_input_nodes
        if inputs and all(i in found for i in inputs):
            found[node] = frozenset().union(*(found[i] for i in inputs))
    return found


def is_folded(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Is this a call to a folded (memoized) submodule?"""
    return node.op == "call_module" and hasattr(fetch(gm, str(node.target)), "recipe")


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def written(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose memory an op of the graph writes to, followed back through views."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        for base in writes(node):
            while isinstance(base, fx.Node) and base not in found:
                found.add(base)
                base = base.args[0] if base.args else None
    return found


def writes(node: fx.Node) -> list[fx.Node]:
    """The inputs of ``node`` that it writes to."""
    schema = getattr(node.target, "_schema", None)
    if isinstance(node.target, HigherOrderOperator) or schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for argument, actual in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [actual] if isinstance(actual, fx.Node) else list(actual or ())  # type: ignore
    return found


def memory_of(node: fx.Node) -> set[fx.Node]:
    """``node`` and everything that it is a view of, or an in-place result of."""
    found = {node}
    while node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload):
        # a part of a split is what getitem picks from it
        view = node.target is operator.getitem or node.target.is_view
        if not (view or node.target._schema.is_mutable) or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
        found.add(node)
    return found


def move_before(anchor: fx.Node, node: fx.Node) -> None:
    """Bring ``node``, which depends on parameters alone, and its sources before ``anchor``."""
    if node.op in ("placeholder", "get_attr") or node < anchor:
        return
    for source in node.all_input_nodes:
        move_before(anchor, source)
    anchor.prepend(node)


def bodies_of(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The bodies of cond, loops and regions; each learns which of its inputs are parameters."""
    outer = parameters(gm)
    for node in gm.graph.nodes:
        for body, operands in calls_of(gm, node):
            known = body.meta.setdefault("fxquant_parameters", {})
            body.meta["fxquant_body"] = True
            for inner, actual in zip(
                body.graph.find_nodes(op="placeholder"), operands, strict=True
            ):
                if isinstance(actual, fx.Node) and actual in outer:
                    known[inner.name] = outer[actual]
            yield body


def calls_of(
    gm: fx.GraphModule, node: fx.Node
) -> Iterator[tuple[fx.GraphModule, list[fx.Node | None]]]:
    """The bodies that a higher-order op calls, with the operand behind each of their inputs.

    None stands for an input that is not the same at each call (what a loop carries).
    """
    if not isinstance(node.target, HigherOrderOperator):
        return
    split = OPERANDS.get(node.target.name())
    if split is None:
        return
    operands = split(node)
    for arg in node.args:
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = fetch(gm, str(arg.target))
            if isinstance(body, fx.GraphModule):
                yield body, operands


def _after_body(node: fx.Node) -> list[Any]:
    is_get_attr = (isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args)
    body = next(i for i, found in enumerate(is_get_attr) if found)  # operands may be get_attr too
    return list(node.args[body + 1 :])


OPERANDS: dict[str, Callable[[fx.Node], list[Any]]] = {
    "cond": lambda n: list(n.args[3]),  # type: ignore[arg-type]
    "while_loop": lambda n: [None] * len(n.args[2]) + list(n.args[3]),  # type: ignore[arg-type]
    "wrap_with_set_grad_enabled": _after_body,
    "wrap_with_autocast": _after_body,
}
"""What the inputs of a body are bound to, by higher-order op. Bodies of others stay as they are."""


def add_operand(node: fx.Node, operand: fx.Node) -> None:
    """Pass ``operand`` to the bodies of a higher-order op as their last input."""
    where = {"cond": 3, "while_loop": 3}.get(node.target.name())  # type: ignore[union-attr]
    if where is None:
        node.args = (*node.args, operand)
    else:
        node.update_arg(where, (*node.args[where], operand))  # type: ignore[misc]
