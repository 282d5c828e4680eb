"""int8 x int8 on the CPU by oneDNN's prepacked product on AMX tiles.

Without AMX, oneDNN has no fast product of two signed operands: 128 x 384 x 1536 took 2.1 s in its
reference implementation on an AVX512-VNNI machine (native/ computes it there).

oneDNN takes one scale for all activations, so the product comes out scaled by channel alone; the
scale of each row and the bias are ordinary nodes that Inductor fuses into what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..scheme import Quantized, Scheme
from .cost import roofline
from .kernel import Layout, Problem, activations_in, has_feature, kernel
from .native_linear import REAL

LIBRARY = torch.library.Library("fxquant", "FRAGMENT")
LIBRARY.define(
    "onednn_product(Tensor x, Tensor weight, Tensor scale, int n, ScalarType dtype) -> Tensor"
)
LIBRARY.define("onednn_prepack(Tensor codes) -> Tensor")


def _prepack(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(codes, None)


def _product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """``(x @ codes.T) * scale`` for x int8 [M, K], in ``dtype`` (float32 or bfloat16) [M, n]."""
    if x.shape[0] == 0:
        return x.new_empty(0, n, dtype=dtype)
    zeros = torch.zeros(n, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        x.contiguous(), 1.0, 0, weight, scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )


LIBRARY.impl("onednn_prepack", _prepack, "CPU")
for _key in ("CPU", "MkldnnCPU"):
    LIBRARY.impl("onednn_product", _product, _key)


@torch.library.register_fake("fxquant::onednn_prepack", lib=LIBRARY)
def _prepack_fake(codes):  # opaque to shapes: the product is told its n
    return codes.new_empty(codes.shape[1], codes.shape[0])


@torch.library.register_fake("fxquant::onednn_product", lib=LIBRARY)
def _product_fake(x, weight, scale, n, dtype):
    return x.new_empty(x.shape[0], n, dtype=dtype)


def _pack(scheme: Scheme, q: Quantized) -> list[torch.Tensor]:
    """[prepacked int8 [K, N], opaque; scale [N]]."""
    return [torch.ops.fxquant.onednn_prepack(q.codes), q.scale[:, 0].clone()]


def _unpack(scheme: Scheme, packed: Sequence[torch.Tensor], n: int, k: int) -> Quantized:
    return Quantized(packed[0].to_dense().t().contiguous(), packed[1].unsqueeze(1).clone(), None)


LAYOUT = Layout(name="onednn", pack=_pack, unpack=_unpack)


def _cost(problem: Problem):
    return roofline(
        problem,
        weight_bytes=problem.n * problem.k,
        operations="int8",
        launches=2,
    )


def _int32_suffices(problem: Problem) -> str | None:
    limit = 2**31 // (128 * 128)
    return None if problem.k < limit else f"k = {problem.k}: an int32 sum holds k below {limit}"


@kernel(
    families=("w8a8",),
    device="cpu",
    layout=LAYOUT,
    cost=_cost,
    needs=(has_feature("amx_int8"), activations_in(*REAL), _int32_suffices),  # it scales in float32
    faults=({"dtype": torch.float64}, {"k": 2**17}),
)
def onednn_int8(scheme, x, packed, bias, epilogue):
    """Quantize per token, multiply in integers, rescale by row; rounded once, at the end."""
    codes, scale, _ = scheme.input.quantize(x)
    n = packed[1].shape[0]
    y = torch.ops.fxquant.onednn_product(codes, packed[0], packed[1], n, torch.float32) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)
