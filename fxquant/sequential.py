"""Weight solvers on a whole model, in the order of its graph.

Each stage of linears is solved on inputs that carry the errors of all stages before it. A segment of
the graph at a time is run on every batch, once more for each of its stages, from values that wait on
the CPU or on disk; only one segment's weights and Hessians are on the device.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from tqdm import tqdm

from .capture import clean
from .errors import CaptureFailed, InvalidOption, NoCalibrationData, NothingObserved
from .graph import layer_of, memory_of, writes
from .inductor import Regions
from .modules import quantized_input
from .replay import Recording, Replay, Waiting, record
from .scheme import Scheme
from .segments import Segment, segments_of
from .solvers import Gram, Solution, Solver
from .unfinished import Unfinished, fingerprint
from .weights import RESIDENTS

log = logging.getLogger("fxquant.sequential")

KEEP = ("cpu", "disk", "device")
"""Where the batches' values may wait between two segments."""

Call = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """A linear to solve. weight: makes it, [N, K] in float, with whatever is folded into it; home: where
    its codes will lie. smoothing, qparams and group: what its QuantLinear will hold of its inputs."""

    weight: Callable[[], torch.Tensor]
    scheme: Scheme
    home: torch.device
    smoothing: torch.Tensor | None = None
    qparams: tuple[torch.Tensor, torch.Tensor | None] | None = None
    group: torch.Tensor | None = None


def solve_in_order(
    model: nn.Module,
    calls: Iterable[Call],
    targets: Mapping[str, Target],
    solver: Solver,
    prepare: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    device: torch.device,
    keep: str = "cpu",
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Solution]:
    """The solutions of ``targets``, by layer name. ``model`` stays as it is.

    calls: the arguments of each call of ``model``. prepare: what a parameter is in the model that is
    solved, given its name and value. keep: one of KEEP. folder: where each solved segment is written;
    a run that was interrupted goes on from there, if model, calls and settings are the same.

    Raises CaptureFailed (the model is not one graph, or calls differ in the layers they reach),
    NothingObserved, NoCalibrationData (a target that no call reaches), ResumeMismatch, and what
    the solver and Gram raise.
    """
    if keep not in KEEP:
        raise InvalidOption(name="keep", value=keep, expected=f"one of {', '.join(KEEP)}")
    with _waiting(keep, device) as waiting:
        graphs: list[Recording] = []
        for recording, values in record(model, calls):
            waiting.put(len(graphs), values)
            graphs.append(recording)
        if not graphs:
            raise NothingObserved(reason="there was no batch")
        run = _Run(graphs, waiting, targets, solver, prepare, device)
        known = Unfinished(
            folder, lambda: _fingerprint(model, targets, solver, prepare, graphs, waiting)
        )
        with tqdm(total=len(targets), desc="solve", unit="layer", disable=not progress) as bar:
            for index in range(run.count):
                found = known.read(index)
                if found is None:
                    found = run.solve(index, bar)
                    known.write(index, found)
                else:
                    bar.update(len(found))
                run.advance(index, found)
    return run.solved


@contextmanager
def _waiting(keep: str, device: torch.device) -> Iterator[Waiting]:
    if keep == "disk":
        with TemporaryDirectory(prefix="fxquant_batches_") as folder:
            yield Waiting(device, Path(folder))
    else:
        yield Waiting(device if keep == "device" else torch.device("cpu"))


def _fingerprint(
    model: nn.Module,
    targets: Mapping[str, Target],
    solver: Solver,
    prepare: Callable[[str, torch.Tensor], torch.Tensor],
    graphs: Sequence[Recording],
    waiting: Waiting,
) -> str:
    """Of all that the solutions depend on: the weights as they are folded, what the graphs compute (a
    number in a batch is part of its graph), and the inputs."""
    RESIDENTS.fill(model.buffers())
    held = (*model.named_parameters(), *model.named_buffers())
    weights = ((clean(name), prepare(clean(name), x.detach())) for name, x in held)
    plan = [(n, t.scheme.name, t.smoothing, t.qparams) for n, t in targets.items()]
    code = {graph: graph.gm.code for graph in dict.fromkeys(graphs)}
    calls = ((code[graph], list(waiting.get(i).values())) for i, graph in enumerate(graphs))
    settings = (solver.name, list(solver.options.items()))
    return fingerprint(itertools.chain(weights, plan, settings, calls))


class _Run:
    """The calls of a model, at the beginning of one of its segments. graphs: the recording of each."""

    def __init__(
        self,
        graphs: Sequence[Recording],
        waiting: Waiting,
        targets: Mapping[str, Target],
        solver: Solver,
        prepare: Callable[[str, torch.Tensor], torch.Tensor],
        device: torch.device,
    ):
        self.graphs = graphs
        self.waiting = waiting
        self.targets = targets
        self.solver = solver
        self.device = device
        self.solved: dict[str, Solution] = {}
        self._weights: dict[str, torch.Tensor] = {}
        distinct = list(dict.fromkeys(graphs))
        self.segments = _alike(distinct, targets)
        self.replays = {r: Replay(r, device, prepare, self._linear) for r in distinct}
        reached = {
            layer_of(n) for s in self.segments[graphs[0]] for stage in s.stages for n in stage
        }
        for name in targets:
            if name not in reached:
                choices = "rtn, mse, hqq, or keep it float by a rule of the recipe"
                raise NoCalibrationData(layer=name, solver=solver.name, choices=choices)

    @property
    def count(self) -> int:
        return len(self.segments[self.graphs[0]])

    def solve(self, index: int, bar: tqdm) -> dict[str, Solution]:
        """The solutions of one segment's layers, stage by stage."""
        found: dict[str, Solution] = {}
        for stage in range(len(self.segments[self.graphs[0]][index].stages)):
            grams = self._grams(index, stage)
            for name in list(grams):
                bar.set_postfix_str(name)
                solution = self._solution(name, grams.pop(name))
                home = self.targets[name].home
                solution = solution._replace(quantized=solution.quantized.to(home))
                found[name] = self.solved[name] = solution
                log.info("%s: %.3g of the outputs' energy, %.0f %% less than rtn", name,
                         solution.record.relative, 100 * solution.record.gain)  # fmt: skip
                bar.update()
        return found

    def advance(self, index: int, found: Mapping[str, Solution]) -> None:
        """Bring every call to the end of the segment, whose layers are ``found``."""
        self.solved.update(found)
        if index + 1 < self.count:
            for i, graph in enumerate(self.graphs):
                segment = self.segments[graph][index]
                values = self.replays[graph](segment.nodes, self.waiting.get(i), segment.leaves)
                self.waiting.put(i, values)
        self._weights.clear()
        for replay in self.replays.values():
            replay.forget()

    def _grams(self, index: int, stage: int) -> dict[str, Gram]:
        """By layer, the statistics of its inputs over all calls; layers that read one value share them."""
        grams: dict[frozenset[str], Gram] = {}
        owner: dict[str, frozenset[str]] = {}
        for i, graph in enumerate(self.graphs):
            segment = self.segments[graph][index]
            linears = segment.stages[stage]
            inputs: list[Any] = list(dict.fromkeys(n.args[0] for n in linears))
            values = self.replays[graph](_ahead(segment, linears), self.waiting.get(i), inputs)
            for x in inputs:
                names = [layer_of(n) for n in linears if n.args[0] is x]
                if (key := frozenset(names)) not in grams:
                    owner |= dict.fromkeys(names, key)
                    grams[key] = self._gram(names, values[x])
                grams[key].add(values[x])
        return {layer_of(n): grams[owner[layer_of(n)]] for n in linears}

    def _gram(self, names: Sequence[str], x: torch.Tensor) -> Gram:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return Gram(x.shape[-1], dtype=dtype, device=self.device, layer=", ".join(names))

    def _solution(self, name: str, gram: Gram) -> Solution:
        target = self.targets[name]
        if target.smoothing is not None:
            gram = gram.divided(target.smoothing)
        weight = target.weight().to(self.device)
        return self.solver(weight, target.scheme.weight, gram, layer=name)

    def _linear(self, node: fx.Node, x: torch.Tensor, bias: Any, compute: Any) -> Any:
        """A linear as the solved model computes it, the product in the dtype of its input."""
        name = layer_of(node)
        if name not in self.solved:
            return compute()
        target = self.targets[name]
        if name not in self._weights:
            codes = self.solved[name].quantized.to(self.device)
            self._weights[name] = target.scheme.weight.dequantize(codes, x.dtype)
        x = quantized_input(x, target.scheme, target.smoothing, target.qparams)
        return F.linear(x, self._weights[name], bias)


def _alike(
    recordings: Sequence[Recording], targets: Mapping[str, Target]
) -> dict[Recording, list[Segment]]:
    """The segments of each recording, cut alike. Raises CaptureFailed where that cannot be."""
    found: dict[Recording, list[Segment]] = {}
    shape: list[list[set[str]]] = []
    for recording in recordings:
        counts = [len(stages) for stages in shape] or None
        segments = segments_of(recording.gm, targets, counts)
        names = [[{layer_of(n) for n in stage} for stage in s.stages] for s in segments]
        shape = shape or names
        if names != shape:
            raise CaptureFailed(reason="batches of different shapes reach different layers")
        found[recording] = segments
    return found


def _ahead(segment: Segment, stage: Sequence[fx.Node]) -> list[fx.Node]:
    """What has to be computed for the inputs of the ``stage``'s linears."""
    needed: set[fx.Node] = {n.args[0] for n in stage}  # type: ignore[misc]
    memory = {m for n in needed for m in memory_of(n)}
    found = []
    for node in reversed(segment.nodes[: segment.nodes.index(stage[-1])]):
        written = {base for w in writes(node) for base in memory_of(w)}
        if node in needed or written & memory or Regions.marks(node):
            found.append(node)
            needed.update(node.all_input_nodes)
            memory.update(m for n in node.all_input_nodes for m in memory_of(n))
    return found[::-1]
