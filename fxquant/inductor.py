"""The only importer of private torch APIs (checked on 2.11, 2.13 and 2.15)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException as DynamoError
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass, list_mode_options
from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import Pointwise
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode
from torch._inductor.virtualized import ops as loop_ops
from torch._logging import trace_structured
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "DynamoError",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "Pointwise",
    "Regions",
    "ambient",
    "calling",
    "compile_graph",
    "emit_artifact",
    "example_values",
    "inductor_options",
    "is_persistent",
    "loop_ops",
    "lower_to_loops",
    "lowerings",
    "mode_options",
    "outside_autocast",
    "overlapping",
    "retrace",
    "source_name",
    "trace_decomposed",
    "trace_function",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]

_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)
_SchedulerPass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)
"""From 2.12 on Inductor's cache asks for a uuid; 2.11 hashes the pass itself."""


class Regions:
    """The autocast regions that a pre-dispatch graph records: running it node by node does not enter
    them (torch.autocast itself would be recorded again), this does, around each node."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, ...]] = []

    @staticmethod
    def record(graph: fx.Graph, regions: Iterable[tuple[str, Any, bool]]) -> list[fx.Node]:
        """Put ``regions`` (device, dtype, switch) around all of ``graph``. Returns the marks."""
        (last,) = graph.find_nodes(op="output")
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        marks: list[fx.Node] = []
        for device, dtype, enabled in regions:
            args = (device, dtype, enabled, torch.is_autocast_cache_enabled())
            with graph.inserting_before(first):
                marks.append(graph.call_function(_ENTER, args))
            with graph.inserting_before(last):
                last = graph.call_function(_EXIT, (marks[-1],))
            marks.append(last)
        return marks

    @contextmanager
    def around(self, node: fx.Node) -> Iterator[None]:
        if node.target is _EXIT:
            self._open.pop()
        with _autocast(self._open):
            yield
        if node.target is _ENTER:
            self._open.append(node.args)

    @staticmethod
    def marks(node: fx.Node) -> bool:
        """Whether ``node`` is the beginning or the end of one."""
        return node.target in (_ENTER, _EXIT)


_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast


def ambient() -> tuple[tuple[str, torch.dtype, bool], ...]:
    """The devices for which autocast is on here, as regions."""
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return tuple((d, torch.get_autocast_dtype(d), True) for d in on)


def outside_autocast() -> Any:
    """A context in which nothing is cast; unlike ``torch.autocast`` it leaves no mark in a trace."""
    return torch._C._DisableAutocast()


class _KeepMeta(fx.Interpreter):
    """Runs a graph so that the nodes traced from a node inherit its provenance, and have the dtypes of
    the autocast regions that they stand in."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.regions = Regions()

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n), self.regions.around(n):
            return super().run_node(n)


@contextmanager
def _autocast(regions: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """The devices, dtypes and switches of ``regions``, inner ones last."""
    if not regions:
        yield
        return
    devices = {device for device, *_ in regions}
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    for device, dtype, enabled in (region[:3] for region in regions):
        torch.set_autocast_enabled(device, enabled)
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.clear_autocast_cache()


def example_values(gm: fx.GraphModule) -> list[Any]:
    """The fake inputs that Dynamo traced ``gm`` with."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", node.meta.get("val")) for node in nodes]


def _mode_of(values: Sequence[Any]) -> Any:
    fakes = (v for v in tree_leaves(values) if isinstance(v, FakeTensor))
    return next((v.fake_mode for v in fakes), None)


def retrace(gm: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """``gm`` as pre-dispatch ATen ops, in which linear, conv and the norms are still whole."""
    mode = _mode_of(values) or FakeTensorMode()
    trace = make_fx(
        _KeepMeta(gm).run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
    )
    with mode, tracing(None), fx.traceback.preserve_node_meta():
        return trace(*values)


def trace_function(function: Callable, *values: Any) -> fx.GraphModule:
    """The ATen graph of ``function`` at these (fake) values; constants are not allowed in."""
    return _trace(function, values, pre_dispatch=True)


def trace_decomposed(function: Callable, *values: Any) -> fx.GraphModule:
    """The graph of ``function`` in the ops that Inductor lowers."""
    return _trace(function, values, decomposition_table=select_decomp_table())


def realize(node: fx.Node) -> None:
    """Inductor is to keep what ``node`` computes in a buffer, and not to write it into each use."""
    node.meta["inductor_realize_to_strides"] = True


def lower_to_loops(op: Any, lower: Callable[..., Any]) -> None:
    """Inductor is to lower ``op``, one of ours, to what ``lower`` makes of its arguments; where that is None,
    to a call, as without it. (The key of Inductor's cache has our sources in our own compiles alone.)"""
    call = fallback_handler(op, add_to_fallback_set=False)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        found = lower(*args, **kwargs)
        return call(*args, **kwargs) if found is None else found

    register_lowering(op, type_promotion_kind=None)(lowered)


def _trace(function: Callable, values: Sequence[Any], **settings: Any) -> fx.GraphModule:
    mode = _mode_of(values)
    assert mode is not None, "tracing needs fake values"
    with mode, tracing(None), torch.no_grad():
        trace = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True, **settings)
        return trace(*values)


def source_name(node: fx.Node) -> str:
    """Where Dynamo found a placeholder, as an expression: ``L['self']._modules['fc']...``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name  # a method until 2.9


def is_persistent(node: fx.Node, example: Any) -> bool:
    """Is this placeholder a parameter or a buffer (and not data of one call)?"""
    if isinstance(example, torch.nn.Parameter):
        return True
    tensor_dict = node.meta.get("tensor_dict") or {}
    if not isinstance(example, torch.Tensor) or "_dynamo_static_input_type" not in tensor_dict:
        return False
    return bool(re.search(r"\._(buffers|parameters)\[", source_name(node)))


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings behind ``torch.compile(mode=...)``."""
    if mode in (None, "default"):
        return {}
    return dict(list_mode_options(mode))


def inductor_options() -> frozenset[str]:
    """Every setting that ``options["inductor"]`` may name."""
    return frozenset(inductor_config.get_config_copy())


class _Expansion(_InferenceAware):
    """``expand``, where lowering asks for it, before Inductor fuses; then the user's own passes.

    Its uuid puts fxquant's sources and configuration into Inductor's cache key.
    """

    def __init__(self, expand: Any, tag: str, after: Any):
        self.expand = expand
        self.after = _listed(after)
        self.tag = tag

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        if self.expand is not None:
            self.expand(graph)
        for one in self.after:
            aware = _InferenceAware is not CustomGraphPass and isinstance(one, _InferenceAware)
            one(graph, is_inference) if aware else one(graph)

    def uuid(self) -> Any:
        return _uuid(self.tag, self.after)


def _listed(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, list | tuple) else [passes]


def _uuid(tag: str, passes: Sequence[Any]) -> Any:
    """None, which keeps the graph out of the cache, where a user's pass has no uuid."""
    theirs = [p.uuid() if hasattr(p, "uuid") else None for p in passes]
    return None if None in theirs else (tag, *theirs)


OVERLAP = "triton.enable_pdl"
"""Kernels start before the one ahead of them has ended: programmatic dependent launch, from Hopper on."""

FUSED = "_post_fusion_custom_pass"

HELD = "triton.persistent_reductions"

WIDEST_HELD = 8192
"""Values of a row that a kernel of Inductor's holds, and reads once. (Read with 4096, on an H200.)"""


class _Waiting(TritonKernel):
    """Lets the next kernel begin (and fetch weights), and waits for the one ahead before anything else.
    Inductor's own lets it after the last load: at the end, if a row is read twice. And holds the rows of
    which it makes codes."""

    def _handle_pdl_before_access(self, *args, **kwargs):
        pass

    def _handle_pdl_after_load(self, *args):
        pass

    def _filter_pdl(self, code):
        if self._enable_pdl_codegen():
            code._lines[:0] = [self.GDC_LAUNCH, self.GDC_WAIT]

    def should_use_persistent_reduction(self):
        return self._holds_rows() or super().should_use_persistent_reduction()

    def _holds_rows(self) -> bool:
        """Rows of which it makes codes: the norm, the scale and the codes each want all values."""
        features, width = self.features, self.features.reduction_numel
        strict = getattr(features, "strict_sum_rblock", lambda: None)()  # from 2.14 on
        if self.cooperative_reduction or not self.inside_reduction or strict is not None:
            return False
        if not inductor_config.triton.persistent_reductions:
            return False
        if not width.is_number or int(width) > WIDEST_HELD:
            return False
        made = (one.node for node in features.scheduler_nodes() for one in node.get_outputs())
        return any(
            one.get_dtype() in (torch.int8, torch.float8_e4m3fn)
            and one.get_numel() == features.numel * width  # of the rows, not of what they sum up to
            for one in made
        )


class _Overlap(_SchedulerPass):
    """Has kernels overlap by ``_Waiting``, but takes ``OVERLAP`` back where one is of another kind and might
    not wait: what follows would wait for the wrong kernel. With the setting off a kernel is launched as
    ever, after everything before it."""

    def __init__(self, tag: str, after: Any):
        self.after = after
        self.tag = tag

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if self.after is not None:
            nodes = self.after(nodes)
        own = [node for node in nodes if isinstance(node, SchedulerNode | FusedSchedulerNode)]
        waiting = all(map(_waits, own))
        devices = {device for node in own if (device := node.get_device()) is not None}
        for device in devices - {torch.device("meta")}:
            backend = own[0].scheduler.get_backend(device)
            backend = getattr(backend, "_triton_scheduling", backend)
            if isinstance(backend, TritonScheduling):
                backend.kernel_type = _Waiting  # in this graph alone
            elif device.type == "cuda":
                waiting = False
        if not waiting:
            inductor_config.triton.enable_pdl = False  # until the patches of this compile end
        return nodes

    def uuid(self) -> Any:
        return _uuid(self.tag, _listed(self.after))


def _waits(node: Any) -> bool:
    """Whether the kernel of a node waits before all else. A split scan has Inductor's own, which reads what
    the kernel just ahead has not written at once: it would find the one before that still at it."""
    return not any(part.is_split_scan() for part in node.get_nodes())


def overlapping(patches: dict[str, Any], tag: str) -> dict[str, Any]:
    """The settings with which kernels overlap; none where the user has decided, here or for the whole
    process, or where torch cannot be asked which kernels there are."""
    if OVERLAP in patches or not {OVERLAP, FUSED} <= inductor_options():
        return {}
    after = patches.get(FUSED)  # Inductor's cache would not ask for the uuid of one inside of ours
    if inductor_config.triton.enable_pdl or (after is not None and not hasattr(after, "uuid")):
        return {}
    return {OVERLAP: True, FUSED: _Overlap(tag, after)}


def compile_graph(
    gm: fx.GraphModule,
    origin: fx.GraphModule,
    inputs: Sequence[Any],
    packed: Sequence[torch.Tensor],
    patches: dict[str, Any],
    tag: str,
) -> Callable[..., Any]:
    """Compile ``gm`` with Inductor. Its last placeholders take ``packed``, marked as static.

    ``origin`` is the Dynamo graph that ``gm`` was made from: what AOTAutograd looks up on a graph
    from Dynamo is carried over.
    """
    hook, expand = "post_grad_custom_pre_pass", gm.meta.get("fxquant_expand")
    overlap = overlapping(patches, tag) if expand is not None else {}
    if expand is not None:
        holds = patches.get(HELD, inductor_config.triton.persistent_reductions)
        expand = partial(expand, held=bool(overlap) and holds)
    patches = {**patches, hook: _Expansion(expand, tag, patches.get(hook)), **overlap}
    gm.meta.update({k: copy.copy(v) for k, v in origin.meta.items() if k not in gm.meta})
    if hasattr(origin, "_param_name_to_source"):
        # every parameter is a placeholder; constants that tracing made inside of bodies are left
        sources = {name: ConstantSource(f"fxquant_{name}") for name, _ in gm.named_buffers()}
        gm._param_name_to_source = sources  # type: ignore[assignment]
    context = TracingContext.try_get()
    traced = [n.meta.get("val") for n in gm.graph.nodes]
    mode = getattr(context, "fake_mode", None) or _mode_of(traced)
    static = [mode.from_tensor(t, static_shapes=True) if mode else t for t in packed]
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")[len(inputs) :]):
        node._dynamo_source = ConstantSource(f"fxquant_packed_{i}")
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return compile_fx(gm, [*inputs, *static], config_patches=patches)  # type: ignore[return-value]


def emit_artifact(name: str, text: Callable[[], str]) -> None:
    """A named text in torch's structured trace (``TORCH_TRACE``), for tlparse."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


@contextmanager
def calling(
    module: torch.nn.Module, backend: Callable[..., Any], *, whole: bool = False
) -> Iterator[None]:
    """Within, calls of ``module`` run what ``backend`` makes of its graphs; with ``whole``, of the one
    graph of all of it, or torch says where it breaks."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Dynamo keeps what it compiled, and counts it, by code object: this one is used once
    call.__code__ = call.__code__.replace(co_name=f"call_{id(backend)}")
    before, config = module._compiled_call_impl, torch._dynamo.config
    module._compiled_call_impl = torch.compile(call, backend=backend, fullgraph=whole)
    try:
        with config.patch(recompile_limit=max(config.recompile_limit, 64)):
            yield
    finally:
        module._compiled_call_impl = before
