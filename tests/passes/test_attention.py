"""Through an attention: what its output is divided by, its values can be, where the channels are the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.passes.equalization import equalize, groups_of

from .helpers import trace
from .test_equalization import observed, through

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    """``core`` makes [B, T, WIDTH] of what the three linears make of x."""

    def __init__(self, core, kv: int = WIDTH):
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv), nn.Linear(WIDTH, kv)
        self.core = core

    def forward(self, x):
        found = self.core(self.q(x), self.k(x), self.v(x))
        y, *more = found if isinstance(found, tuple) else (found,)
        return self.o(y), *more


def apart(x, heads=HEADS):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def together(y):
    return y.transpose(1, 2).reshape(*y.shape[::2][:1], y.shape[2], -1)


def heads(q, k, v):
    return together(attend(apart(q), apart(k), apart(v), is_causal=True))


def copied(q, k, v):
    y = attend(apart(q), apart(k).contiguous(), apart(v).contiguous())
    return y.transpose(1, 2).contiguous().view(q.shape)


def permuted(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for x in (q, k, v))
    return attend(q, k, v).permute(0, 2, 1, 3).flatten(2).reshape(-1, WIDTH)


def one_head(q, k, v):
    return attend(q, k, v)


def shared_heads(q, k, v):
    return together(attend(apart(q), apart(k, 2), apart(v, 2), enable_gqa=True))


def read_twice(q, k, v):
    y = attend(apart(q), apart(k), apart(v))
    return together(y), y.amax()


def values_read_twice(q, k, v):
    return together(attend(apart(q), apart(k), apart(v))), v.amax()


def values_as_keys(q, k, v):
    split = apart(v)
    return together(attend(apart(q), split, split))


def other_order(q, k, v):
    """Channel c of the values is not channel c of the output."""
    y = attend(apart(q), apart(k), v.view(*v.shape[:2], -1, HEADS).permute(0, 3, 1, 2))
    return together(y)


def other_heads(q, k, v):
    """Of what eight heads would be, two tokens stand beside each other."""
    y = attend(apart(q), apart(k), apart(v))
    return y.reshape(y.shape[0], y.shape[2], -1)


ABSORBED = [heads, copied, permuted, one_head]
LEFT_ALONE = [shared_heads, read_twice, values_read_twice, values_as_keys, other_order, other_heads]


@pytest.mark.parametrize("core", ABSORBED + LEFT_ALONE, ids=lambda core: core.__name__)
@torch.no_grad()
def test_values_take_up_what_the_output_is_divided_by(core):
    torch.manual_seed(0)
    model = Attention(core, kv=WIDTH // 2 if core is shared_heads else WIDTH)
    model = model.double().eval().requires_grad_(False)
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    gm = trace(model, x, to="float")
    groups = {tuple(group.names): group.absorbs for group in groups_of(gm)}
    taken = [str(node.target) for node, _ in groups[("o",)]]
    assert taken == ["aten.linear.default"] * 2 * (core in ABSORBED)
    expected = model(x)
    through(gm, equalize(observed(model, x), 0.7))
    for found, wanted in zip(gm(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
