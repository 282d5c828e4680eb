"""The pack cache: parameters -> codes or packed weights, by identity, version and address.

A compiled graph takes packed weights as inputs. They are looked up here at each call, so an
in-place update, a swapped parameter, a tied weight and a second instance of the model all find
their own. Two graphs that want the same form of the same parameters share one copy.

What cannot be seen is a write through ``.data``, through NumPy, or to an inference tensor: call
``invalidate`` after one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from .errors import NonFiniteWeight
from .inductor import outside_autocast
from .lowering.kernel import LAYOUTS
from .scheme import get_scheme
from .storage import nbytes

ops = torch.ops.fxquant
Fingerprint = tuple[tuple[int, int], ...]


@dataclass
class Entry:
    """The folded form of one set of parameters."""

    fingerprint: Fingerprint
    tensors: tuple[torch.Tensor, ...]
    watchers: list[weakref.finalize] = field(default_factory=list)


_CACHE: dict[tuple[str, tuple[int, ...]], Entry] = {}
"""Folded tensors by recipe and by the identities of the parameters; entries die with them."""


class Memo:
    """What a sequence of folded expressions gave for the tensors it was last fed with.

    One pass over the tensors tells whether any was written to or swapped, and one number whether
    anything else happened here since (an eviction, a refill, ``invalidate``): a model of 32 layers asks
    for its 129 folds at every token. Results are held weakly; the cache above owns them.
    """

    changes = 0
    """Counts what happened to folded tensors anywhere."""

    def __init__(self) -> None:
        self._state: object = None
        self._results: list[weakref.ref[torch.Tensor]] = []

    def __call__(
        self, tensors: Sequence[torch.Tensor], compute: Callable[[], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """``compute()``, or what it gave last if nothing has changed."""
        seen = _snapshot(tensors)
        if (Memo.changes, seen) == self._state:
            results = [ref() for ref in self._results]
            if all(r is not None for r in results):
                return results  # type: ignore[return-value]
        found = compute()
        self._state = (Memo.changes, _snapshot(tensors))  # again: an eviction moves them
        self._results = [weakref.ref(t) for t in found]
        return found


def _snapshot(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int], list[int]]:
    try:
        versions = [t._version for t in tensors]
    except RuntimeError:  # an inference tensor among them
        versions = [_version(t) for t in tensors]
    return [id(t) for t in tensors], versions, [t.data_ptr() for t in tensors]


class Residents:
    """Tensors whose canonical form may be dropped once a packed form holds their content.

    ``evictable(t)`` declares one. Its storage is emptied after packing (shape, dtype and identity
    stay, so guards hold), and ``restore(t)`` refills it from the packed form.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._restore: dict[int, Callable[[], None]] = {}

    def evictable(self, tensor: torch.Tensor) -> None:
        key = id(tensor)
        if key not in self._known or self._known[key]() is not tensor:
            self._known[key] = weakref.ref(tensor)
            weakref.finalize(tensor, self._forget, key)

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._restore.pop(key, None)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def evict(self, tensors: Iterable[torch.Tensor], restore: Callable[[], None]) -> None:
        Memo.changes += 1
        for tensor in tensors:
            self._restore[id(tensor)] = restore
            tensor.untyped_storage().resize_(0)

    def restore(self, tensor: torch.Tensor) -> None:
        """Refill ``tensor`` if its storage was emptied."""
        if restore := self._restore.get(id(tensor)):
            restore()

    def fill(self, values: Iterable[object]) -> None:
        """``restore`` those of ``values`` that are tensors: a graph that packs nothing will read them."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self.restore(value)

    def restored(self, tensors: Iterable[torch.Tensor]) -> None:
        Memo.changes += 1
        for tensor in tensors:
            self._restore.pop(id(tensor), None)

    def is_evicted(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._restore


RESIDENTS = Residents()


class Folded(nn.Module):
    """A memoized expression of parameters: ``recipe`` runs once for each state of its inputs.

    Called with the parameters; returns the tuple of folded tensors. Holds no tensor itself.
    """

    def __init__(self, recipe: fx.GraphModule, layer: str):
        super().__init__()
        recipe.recompile()
        self.recipe = recipe
        self.layer = layer
        self.signature = recipe.code

    def forward(self, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raises NonFiniteWeight, naming the layer and the index."""
        key = (self.signature, tuple(map(id, parameters)))
        found = fingerprint(parameters)
        entry = _CACHE.get(key)
        if entry is None or entry.fingerprint != found:
            entry = self._compute(key, found, parameters)
        if parameters[0] in RESIDENTS and not RESIDENTS.is_evicted(parameters[0]):
            self._evict(parameters, entry)
        return entry.tensors

    def _compute(
        self,
        key: tuple[str, tuple[int, ...]],
        found: Fingerprint,
        parameters: Sequence[torch.Tensor],
    ) -> Entry:
        for parameter in parameters:
            RESIDENTS.restore(parameter)
            _refuse_non_finite(parameter, self.layer)
        with torch.no_grad(), outside_autocast():
            tensors = tuple(self.recipe(*(p.detach() for p in parameters)))
        old = _CACHE.pop(key, None)
        if old is not None:
            for watcher in old.watchers:
                watcher.detach()
        entry = Entry(found, tensors)
        entry.watchers = [weakref.finalize(p, _CACHE.pop, key, None) for p in set(parameters)]
        for watcher in entry.watchers:
            watcher.atexit = False
        _CACHE[key] = entry
        Memo.changes += 1
        return entry

    def _evict(self, parameters: Sequence[torch.Tensor], entry: Entry) -> None:
        """Keep one copy: empty the codes of a QuantLinear that ``entry`` now holds packed."""
        plan = _restore_plan(self.recipe, parameters)
        if plan is None:
            return
        tensors, refill = plan
        RESIDENTS.evict(tensors, lambda: refill(entry.tensors))

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}"


def fingerprint(parameters: Sequence[torch.Tensor]) -> Fingerprint:
    """What changes when a parameter is written to, or its data are swapped or moved."""
    return tuple((_version(p), 0 if p in RESIDENTS else p.data_ptr()) for p in parameters)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _refuse_non_finite(tensor: torch.Tensor, layer: str) -> None:
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.dtype.itemsize < 2:
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteWeight(layer=layer, value=float(tensor[index]), index=index)


def _restore_plan(
    recipe: fx.GraphModule, parameters: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], None]] | None:
    """For a plain ``pack`` of evictable tensors (merged by ``cat`` or not): how to get them back."""
    (output,) = recipe.graph.find_nodes(op="output")
    pack = output.args[0]
    if pack.target is not ops.pack.default or not all(p in RESIDENTS for p in parameters):
        return None
    feed = dict(zip(recipe.graph.find_nodes(op="placeholder"), parameters, strict=True))
    parts: list[list[torch.Tensor]] = []
    for arg in pack.args[:3]:
        if arg is None:
            parts.append([])
        elif arg in feed:
            parts.append([feed[arg]])
        elif arg.target is torch.ops.aten.cat.default and all(a in feed for a in arg.args[0]):
            parts.append([feed[a] for a in arg.args[0]])
        else:
            return None
    scheme, layout = get_scheme(pack.args[3]), LAYOUTS[pack.args[4]]
    codes = parts[0]
    n = sum(c.shape[0] for c in codes)
    k = scheme.weight.width(codes[0].shape[1])
    owned = [weakref.ref(t) for group in parts for t in group]

    def refill(packed: Sequence[torch.Tensor]) -> None:
        q = layout.unpack(scheme.product, packed, n, k)
        canonical = scheme.product.weight.recoded(q, scheme.weight)
        alive = iter(owned)
        for whole, group in zip(canonical, parts_sizes, strict=True):
            if whole is None:
                continue
            for piece in whole.split(group):
                tensor = next(alive)()
                if tensor is not None:  # a copy between storages leaves the version as it was
                    tensor.untyped_storage().resize_(piece.numel() * piece.element_size())
                    tensor.untyped_storage().copy_(piece.contiguous().clone().untyped_storage())
                    RESIDENTS.restored([tensor])

    parts_sizes = [[t.shape[0] for t in group] for group in parts]
    return [t for group in parts for t in group], refill


def invalidate(model: nn.Module | None = None) -> None:
    """Forget what was folded from ``model``'s parameters (from all, if None).

    Needed after a write that PyTorch does not count: through ``.data`` or NumPy.
    """
    Memo.changes += 1
    if model is None:
        _CACHE.clear()
        return
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        RESIDENTS.restore(tensor)
    ids = set(map(id, tensors))
    for key in [k for k in _CACHE if ids & set(k[1])]:
        del _CACHE[key]


def resident_bytes() -> int:
    """Bytes of everything folded that is alive."""
    tensors = {id(t): t for entry in _CACHE.values() for t in entry.tensors}
    return sum(nbytes(t) for t in tensors.values())
