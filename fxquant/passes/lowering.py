"""lower: each ``fxquant.linear`` becomes the chosen kernel on packed weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import NoKernel
from ..graph import (
    Layer,
    constants,
    describe,
    emit,
    inline,
    layer_of,
    layers,
    note,
    replace,
    value,
)
from ..inductor import Regions, trace_function
from ..lowering.devices import device_row
from ..lowering.dispatch import prequantized, run_kernel, shaped_like
from ..lowering.kernel import Problem
from ..lowering.select import FALLBACK, Choice, select
from ..lowering.tuning import slower
from ..ops import LinearArguments, compute_dtype, outputs
from ..scheme import get_scheme
from .base import Pass
from .expansion import expand
from .folding import fold, folds
from .gates import gate_of, made_for_one

aten = torch.ops.aten
ops = torch.ops.fxquant


def lower(*, strict: bool = False) -> Pass:
    """The pass that picks kernels. With ``strict``, falling back to ``dequantize`` at every number
    of rows raises NoKernel, which lists why each kernel refused.
    """

    def rewrite(gm: fx.GraphModule) -> bool:
        constant = constants(gm)
        packed: dict[Any, list[fx.Node]] = {}
        bodies: dict[Any, fx.GraphModule] = {}
        nodes = gm.graph.find_nodes(op="call_function", target=ops.linear.default)
        gated = made_for_one(gm)
        for node in nodes:
            if node.args[1] in constant:
                _lower_one(gm, node, packed, bodies, strict, node in gated)
        gm.meta["fxquant_expand"] = expand
        fold(gm)
        return bool(nodes)

    return Pass(rewrite, requires=("fused",), ensures="lowered", name="lower")


def problem_of(node: fx.Node) -> Problem:
    """What has to be computed, from the values at a ``fxquant.linear`` node. A static scheme's product
    is that of a dynamic one: with a scale and, in the bias, a zero point that are known."""
    a = LinearArguments(*node.args)
    x = value(a.x)
    rows = x.numel() // x.shape[-1]
    return Problem(
        scheme=get_scheme(a.scheme).product,
        n=int(value(a.codes).shape[0]),
        k=int(x.shape[-1]),
        m=rows if isinstance(rows, int) else None,
        dtype=a.dtype or x.dtype,
        bias=a.bias is not None or a.x_zero is not None,
        device=device_row(x.device),
    )


def _lower_one(
    gm: fx.GraphModule,
    node: fx.Node,
    packed: dict[Any, list[fx.Node]],
    bodies: dict[Any, fx.GraphModule],
    strict: bool,
    gated: bool,
) -> None:
    a = LinearArguments(*node.args)
    problem = problem_of(node)
    choice = select(problem)
    _report(gm, node, problem, choice)
    if strict and {k.name for k, _ in choice.steps} == {FALLBACK}:
        reasons = "; ".join(f"{name}: {why}" for name, why in choice.refused.items())
        raise NoKernel(layer=layer_of(node), used=FALLBACK, reasons=reasons)
    graph = gm.graph
    with graph.inserting_before(node):
        # before the weight is packed: what is read of its codes here must not be undone for it
        bias = _with_zero(graph, node, a, bodies)
        key = (a.codes, choice.layout.name)
        if key not in packed:
            args = (a.codes, a.scale, a.zero, a.scheme, choice.layout.name)
            bundle = emit(graph, node, ops.pack.default, *args)
            packed[key] = [
                emit(graph, node, operator.getitem, bundle, i) for i in range(len(value(bundle)))
            ]
        own = a.x_scale is None and choice.at(problem.m or 0).quantizes(problem)
        source, gate = gate_of(a.x) if gated and not own else (a.x, "")  # type: ignore[misc]
        rows, codes = _codes(graph, node, problem, a, source, gate, own)
        args = (rows, codes, packed[key], bias, a.epilogue)
        result = _call(gm, node, choice, problem, bodies, *args)
        shape = [*_sizes(graph, node, source), outputs(problem.n, a.epilogue)]
        out = emit(graph, node, aten.reshape.default, result, shape)
    replace(node, out)


def _sizes(graph: fx.Graph, like: fx.Node, x: Any) -> list[Any]:
    """The leading sizes of ``x``; symbolic ones as nodes."""
    return [
        size if isinstance(size, int) else emit(graph, like, aten.sym_size.int, x, i)
        for i, size in enumerate(value(x).shape[:-1])
    ]


def _with_zero(graph: fx.Graph, node: fx.Node, a: LinearArguments, bodies: dict[Any, Any]) -> Any:
    """The bias, less what the zero point of a static input adds to the sum of the codes' products."""
    if a.x_zero is None:
        return a.bias
    args = [a.x_scale, a.x_zero, a.codes, a.scale]
    wide = compute_dtype(a.dtype)  # type: ignore[arg-type]
    key = (zero_in_sum, wide, *(describe(value(arg)) for arg in args))
    if key not in bodies:
        bodies[key] = trace_function(lambda *t: zero_in_sum(*t).to(wide), *map(value, args))
    found = folds(inline(graph, node, bodies[key], args))
    if a.bias is None:
        return folds(emit(graph, node, aten.neg.default, found))
    bias = emit(graph, node, aten.to.dtype, a.bias, wide)
    return folds(emit(graph, node, aten.sub.Tensor, bias, found))


def zero_in_sum(
    x_scale: torch.Tensor, x_zero: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """``x_scale * x_zero * scale[n] * sum_k codes[n, k]``, float64 [n], for codes [n, k] per channel."""
    sums = codes.sum(1, dtype=torch.float64)
    return x_scale.double() * x_zero * scale[:, 0].double() * sums


def _call(
    gm: fx.GraphModule,
    node: fx.Node,
    choice: Choice,
    problem: Problem,
    bodies: dict[Any, fx.GraphModule],
    x: fx.Node,
    codes: list[fx.Node],
    packed: list[fx.Node],
    bias: Any,
    epilogue: str,
) -> Any:
    """The kernel's own nodes where one is chosen, for Inductor to fuse; else ``dispatch``."""
    graph = gm.graph
    name, layout = problem.scheme.name, choice.layout.name
    coded = value(x).dtype != problem.dtype
    if problem.m is None and len(choice.steps) > 1:
        args = (x, codes, packed, bias, name, layout, choice.plan, epilogue, problem.n)
        more = (problem.dtype,) if coded else ()
        return emit(graph, node, ops.dispatch.default, *args, *more)
    kernel = choice.at(problem.m or 0)

    def compute(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        row = prequantized(problem.scheme, rest[: len(codes)]) if codes else problem.scheme
        weights, biases = rest[len(codes) :][: len(packed)], rest[len(codes) + len(packed) :]
        bias = biases[0] if biases else None
        x = shaped_like(x, problem.dtype) if coded else x
        return run_kernel(kernel.name, row, layout, x, weights, bias, epilogue, problem.n)

    args = [x, *codes, *packed] + ([bias] if bias is not None else [])
    key = (kernel.name, problem, epilogue, *(describe(value(arg)) for arg in args))
    if problem.m is None or key not in bodies:  # equal layers share a trace, unless M is symbolic
        bodies[key] = trace_function(compute, *(value(a) for a in args))
        product = any(n.target is aten.linear.default for n in bodies[key].graph.nodes)
        if product and (gm.meta.get("fxquant_body") or any(map(Regions.marks, graph.nodes))):
            # autocast may be on here: it must not round what the kernel says is float32
            Regions.record(bodies[key].graph, [(value(x).device.type, None, False)])
    return inline(graph, node, bodies[key], args)


def _codes(
    graph: fx.Graph,
    node: fx.Node,
    problem: Problem,
    a: LinearArguments,
    source: fx.Node,
    gate: str,
    own: bool,
) -> tuple[fx.Node, list[fx.Node]]:
    """The rows of ``a.x``, and they quantized, which ``expand`` writes out for Inductor; nothing where they
    stay float or the kernel quantizes them (``own``). What ``gate`` makes of ``source`` is quantized as it is
    made: the codes stand for the rows, as they do for those of a static input, whose one scale stands for
    that of every row."""
    width = 2 * problem.k if gate else problem.k
    rows = emit(graph, node, aten.reshape.default, source, [-1, width])
    if problem.scheme.input is None or own:
        return rows, []
    if a.x_scale is not None:
        shape = [*_sizes(graph, node, rows), 1]
        return rows, [rows, emit(graph, node, aten.expand.default, a.x_scale, shape)]
    found = emit(
        graph, node, ops.quantize.default, rows, problem.scheme.name, "input", *[gate] * bool(gate)
    )
    codes = [emit(graph, node, operator.getitem, found, i) for i in range(len(value(found)))]
    return (codes[0] if gate else rows), codes


def _report(gm: fx.GraphModule, node: fx.Node, problem: Problem, choice: Choice) -> None:
    name = layer_of(node)
    kernel = choice.plan if problem.m is None else choice.at(problem.m).name
    for member in note(node).get("members", (name,)):
        layer = layers(gm).setdefault(
            member, Layer(name=member, in_features=problem.k, out_features=problem.n)
        )
        layer.scheme = LinearArguments(*node.args).scheme
        layer.kernel = kernel
        layer.rows = str(problem.m if problem.m is not None else "dynamic")
        layer.refused = dict(choice.refused)
        layer.slower = _slower(problem, choice, get_scheme(layer.scheme).static)


def _slower(problem: Problem, choice: Choice, static: bool) -> str:
    """Readings are of the kernels that were measured, in bfloat16; a static input is quantized elsewhere."""
    if static or not choice.measured or problem.dtype != torch.bfloat16:
        return ""
    row, shape = problem.scheme, (problem.n, problem.k)
    return slower(problem.device.name, row.name, row.family, *shape, problem.m)
