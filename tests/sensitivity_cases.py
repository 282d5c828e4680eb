"""What the tests of sensitivity() share: a short call, and a model with a bit of everything."""

from __future__ import annotations

import torch
from torch import nn

import fxquant


def measured(model, batches, schemes=("int8wo", "int4wo-32"), **kwargs):
    return fxquant.sensitivity(model, batches, schemes, progress=False, **kwargs)


class Reused(nn.Module):
    """One linear under two names, one never called, one whose width has no groups of 64."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = nn.ModuleList([self.first])
        self.never = nn.Linear(64, 64)
        self.odd = nn.Linear(64, 96)
        self.last = nn.Linear(96, 64)

    def forward(self, x):
        return self.last(self.odd(self.again[0](torch.tanh(self.first(x)))))
