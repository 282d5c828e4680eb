"""The contract of a pass: the stage it takes, the stage it leaves, and what it must not change."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import SignatureChanged, StageMismatch
from ..graph import STAGES, bodies_of, describe, evaluating_once, layers, stage
from ..inductor import outside_autocast


class Pass:
    """A graph rewrite: ``Pass(gm) -> PassResult``, in place.

    ``requires`` lists the stages it takes; ``ensures`` is the stage it leaves, or None where it
    leaves the graph's own. The bodies of cond, loops and regions are rewritten first. Afterwards
    dead code is removed, the graph is linted, and inputs and outputs are as before in shape,
    dtype and stride. What a pass adds is computed outside of autocast. Works in ``torch.fx``'s PassManager.
    """

    def __init__(
        self,
        rewrite: Callable[[fx.GraphModule], bool],
        *,
        requires: tuple[str, ...],
        ensures: str | None = None,
        name: str | None = None,
    ):
        self.rewrite = rewrite
        self.requires = requires
        self.ensures = ensures
        self.name = name or rewrite.__name__
        self.__doc__ = rewrite.__doc__ or self.__doc__
        assert set(requires) <= set(STAGES)

    def __repr__(self) -> str:
        return f"<pass {self.name}: {'|'.join(self.requires)} -> {self.ensures or 'same'}>"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Raises StageMismatch, and SignatureChanged if the rewrite broke the contract."""
        if stage(gm) not in self.requires:
            expected = " or ".join(self.requires)
            raise StageMismatch(pass_name=self.name, required=expected, found=stage(gm))
        with evaluating_once(), outside_autocast():
            return PassResult(gm, self._run(gm))

    def _run(self, gm: fx.GraphModule) -> bool:
        before = signature(gm)
        changed = False
        for body in bodies_of(gm):
            body.meta["fxquant_layers"] = layers(gm)
            body.meta.setdefault("fxquant_stage", stage(gm))
            changed |= self._run(body)
        changed |= self.rewrite(gm)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
        if self.ensures:
            gm.meta["fxquant_stage"] = self.ensures
        after = signature(gm)
        for what, old in before.items():
            new = after[what]
            if old != new and not (what == "inputs" and gm.meta.get("fxquant_body")):
                raise SignatureChanged(pass_name=self.name, what=what, before=old, after=new)
        return changed


def rewrites(*requires: str, ensures: str | None = None) -> Callable[[Callable], Pass]:
    """Declare ``rewrite(gm) -> changed`` as a pass."""
    return lambda rewrite: Pass(rewrite, requires=requires, ensures=ensures)


def signature(gm: fx.GraphModule) -> dict[str, list[str]]:
    """Inputs and outputs of a graph as text: shape, dtype and stride."""
    inputs = [describe(n.meta.get("val")) for n in gm.graph.find_nodes(op="placeholder")]
    (output,) = gm.graph.find_nodes(op="output")
    outputs = [describe(n.meta.get("val")) for n in output.all_input_nodes]
    return {"inputs": inputs, "outputs": outputs}
