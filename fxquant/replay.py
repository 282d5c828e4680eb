"""Running a model's graph a stretch at a time, on batches whose values wait between the stretches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.fx.node import map_arg

from .capture import NAMES, evaluating, from_dynamo
from .errors import CaptureFailed, FxQuantError
from .graph import constants, fetch, parameters, written
from .inductor import DynamoError, Regions, calling, tree_flatten, tree_map, tree_unflatten
from .passes import normalize
from .weights import RESIDENTS

Values = dict[fx.Node, Any]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


class Recording:
    """A graph of a model at the float stage, with the parameters and buffers that it was called with.

    names: in the model, of the nodes that stand for them; fixed: their values, where they are inputs.
    """

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.names = parameters(gm)
        self.constant = constants(gm)
        self.changed = written(gm)
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.fixed: Values = {}

    @property
    def home(self) -> torch.device | None:
        """Where the parameters are; None for a graph without any."""
        tensors = (x for x in self.fixed.values() if isinstance(x, torch.Tensor))
        return next((x.device for x in tensors), None)


class _Recorded(Exception):
    """The call has been recorded, and is not needed any further."""


def record(
    model: nn.Module, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]
) -> Iterator[tuple[Recording, Values]]:
    """For each call of ``model`` its graph, and the values of those inputs that are no parameters.

    Nothing is computed; the graphs are those of eval mode. Calls whose graphs are one share a Recording.
    Raises CaptureFailed where the model is not one graph.
    """
    found: list[tuple[Recording, Values]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        canonical = from_dynamo(gm, inputs)
        normalize(canonical)
        recording = Recording(canonical)

        def call(*args: Any) -> Any:
            given = dict(zip(recording.inputs, args, strict=True))
            recording.fixed = {n: x for n, x in given.items() if n in recording.names}
            RESIDENTS.fill(recording.fixed.values())
            rest = {n: x for n, x in given.items() if n not in recording.names}
            # a loader may fill one tensor again and again
            found.append((recording, tree_map(lambda x: x.clone() if _is_tensor(x) else x, rest)))
            raise _Recorded

        return call

    observed = calling(model, backend, whole=True)
    with evaluating(model), observed, NAMES.rooted(model), torch.no_grad():
        for args, kwargs in calls:
            found.clear()
            try:
                model(*args, **kwargs)
            except _Recorded:
                yield found[0]
            except DynamoError as error:
                inner = getattr(error, "inner_exception", None)
                if isinstance(inner, FxQuantError):
                    raise inner from error
                reason = f'it is not one graph (statistics of the kind "gram" solve without one): {error}'
                raise CaptureFailed(reason=reason) from error
            else:
                raise CaptureFailed(reason="TorchDynamo finds nothing to capture in it")


class Replay:
    """Computes stretches of a recorded graph eagerly, node by node.

    device: where; parameters and values are brought there, and what the graph makes where the model's
    parameters are is made there. prepare: what a parameter is, given its
    name in the model and its value. linear: computes a linear, given its node, its input and bias, and
    a function that computes it in float.
    """

    def __init__(
        self,
        recording: Recording,
        device: torch.device,
        prepare: Callable[[str, Any], Any],
        linear: Callable[[fx.Node, torch.Tensor, Any, Callable[[], Any]], Any],
    ):
        self.recording = recording
        self.device = device
        self.prepare = prepare
        self.linear = linear
        self._known: Values = {}

    def forget(self) -> None:
        """Let go of parameters, and of what was computed from them alone."""
        self._known.clear()

    def __call__(
        self, nodes: Sequence[fx.Node], given: Values, wanted: Sequence[fx.Node] = ()
    ) -> Values:
        """Compute ``nodes`` from the values ``given``; the values of ``wanted`` among both."""
        changed = self.recording.changed
        values = {
            node: self._here(x).clone() if node in changed and _is_tensor(x) else self._here(x)
            for node, x in given.items()
        }
        for node in changed:
            self._known.pop(node, None)  # every call begins with what the model holds
        last = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
        kept, regions = set(wanted), Regions()
        for i, node in enumerate(nodes):
            with regions.around(node):
                values[node] = self._compute(node, values)
            for source in (*node.all_input_nodes, node):
                if last.get(source, i) <= i and source not in kept:
                    values.pop(source, None)
        return {node: values[node] for node in wanted}

    def _compute(self, node: fx.Node, values: Values) -> Any:
        if Regions.marks(node):
            return None

        def read(source: fx.Node) -> Any:
            return values[source] if source in values else self.constant(source)

        def compute() -> Any:
            return self._call(node, read)

        if node.target is torch.ops.aten.linear.default:
            x, bias = map_arg((node.args[0], (*node.args, None)[2]), read)
            return self.linear(node, x, bias, compute)  # type: ignore[arg-type]
        return compute()

    def constant(self, node: fx.Node) -> Any:
        """The value of a parameter, of what depends on parameters alone, or of a body."""
        if node not in self._known:
            recording = self.recording
            if node.op == "placeholder" or node in recording.names:
                fixed = recording.fixed
                value = fixed[node] if node in fixed else fetch(recording.gm, str(node.target))
                # running statistics, a cache: what is written to is the model's own
                own = node in recording.changed or not isinstance(value, nn.Parameter)
                value = self._here(self.prepare(recording.names[node], value))
                self._known[node] = value.clone() if own else value
            elif node.op == "get_attr":
                self._known[node] = fetch(recording.gm, str(node.target))
            else:
                self._known[node] = self._call(node, self.constant)
        return self._known[node]

    def _call(self, node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
        home = self.recording.home
        args, kwargs = map_arg((node.args, node.kwargs), read)
        if home != self.device:
            args, kwargs = tree_map(
                lambda x: self.device if isinstance(x, torch.device) and x == home else x,
                (args, kwargs),
            )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _here(self, value: Any) -> Any:
        return tree_map(lambda x: x.detach().to(self.device) if _is_tensor(x) else x, value)


class Waiting:
    """The values of each batch between two stretches: on ``device``, or in files of ``folder``."""

    def __init__(self, device: torch.device, folder: Path | None = None):
        self.device = torch.device("cpu") if folder else device
        self.folder = folder
        self._held: dict[int, tuple[list[Any], Any]] = {}

    def put(self, index: int, values: Values) -> None:
        """Let the values of batch ``index`` wait, in place of what it had."""
        leaves, spec = tree_flatten(values)
        leaves = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        if self.folder is not None:
            tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}
            flat = {str(i): x.contiguous().clone() for i, x in tensors.items()}
            save_file(flat, self._path(index))
            for i, x in tensors.items():
                laid = x.contiguous() if 0 in x.stride() else x  # an expanded one is written out
                leaves[i] = torch.empty_strided(x.shape, laid.stride(), device="meta")
        self._held[index] = leaves, spec

    def get(self, index: int) -> Values:
        leaves, spec = self._held[index]
        if self.folder is not None:
            leaves = list(leaves)
            for i, x in load_file(self._path(index)).items():
                laid = leaves[int(i)]  # strides matter to a view
                leaves[int(i)] = torch.empty_strided(x.shape, laid.stride(), dtype=x.dtype).copy_(x)
        return tree_unflatten(leaves, spec)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"batch_{index}.safetensors"
