"""Sequential solving done the slow way, to compare with."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.scheme import get_scheme
from fxquant.solvers import Gram, get_solver

QUIET = {"progress": False}


class FakeQuantized(nn.Module):
    """What the reference puts in the place of a solved linear."""

    def __init__(self, linear, scheme, codes):
        super().__init__()
        self.weight = scheme.weight.dequantize(codes, linear.weight.dtype)
        self.bias, self.input = linear.bias, scheme.input

    def forward(self, x):
        if self.input is not None:
            x = self.input.dequantize(self.input.quantize(x), x.dtype)
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def reference(model, batches, stages, scheme, solver):
    """Codes by layer: the whole model is run again for each stage, with hooks."""
    model, scheme, found = copy.deepcopy(model), get_scheme(scheme), {}
    for stage in stages:
        grams, hooks = {}, []
        for name in stage:
            module = model.get_submodule(name)
            grams[name] = Gram(module.in_features, dtype=module.weight.dtype)

            def count(_, args, gram=grams[name]):
                gram.add(args[0])

            hooks.append(module.register_forward_pre_hook(count))
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
        for hook in hooks:
            hook.remove()
        for name in stage:
            linear = model.get_submodule(name)
            found[name] = get_solver(solver)(linear.weight, scheme.weight, grams[name]).quantized
            parent, _, child = name.rpartition(".")
            quantized = FakeQuantized(linear, scheme, found[name])
            setattr(model.get_submodule(parent), child, quantized)
    return found


def stages_of(blocks, prefix=""):
    parts = (("q", "k", "v"), ("gate", "up"), ("down",))
    return [[f"{prefix}{i}.{n}" for n in stage] for i in range(blocks) for stage in parts]
