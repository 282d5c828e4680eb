# ruff: noqa: E501  (the graphs are as wide as they are)
"""The graph of a small model after whole pipelines, merged, static and lowered, written out.

``EXPECTTEST_ACCEPT=1 pytest tests/test_golden_pipelines.py`` writes the present graphs into this file.
"""

from __future__ import annotations

import torch

import fxquant
from fxquant import passes

from .golden import Attention, GoldenGraphs, Model


class TestGoldenPipelines(GoldenGraphs):
    def test_merged(self):
        text = self.graph(Attention(), "fused", *self.until_merge("int4wo-32"))
        self.assertExpectedInline(
            text,
            """\
q_weight = self.q.weight
q_bias = self.q.bias
k_weight = self.k.weight
input x: float32[2, 32](32, 1)
folded_0: [uint8[32, 16](16, 1), bfloat16[32, 1](1, 1), bfloat16[32, 1](1, 1)] = self.folded_0(q_weight)
folded_1: [uint8[32, 16](16, 1), bfloat16[32, 1](1, 1), bfloat16[32, 1](1, 1)] = self.folded_1(k_weight)
getitem = getitem(folded_0, 0)
getitem_1 = getitem(folded_0, 1)
getitem_2 = getitem(folded_0, 2)
getitem_3 = getitem(folded_1, 0)
getitem_4 = getitem(folded_1, 1)
getitem_5 = getitem(folded_1, 2)
cat_default: uint8[64, 16](16, 1) = aten.cat([getitem, getitem_3], 0)
cat_default_1: bfloat16[64, 1](1, 1) = aten.cat([getitem_1, getitem_4], 0)
cat_default_2: bfloat16[64, 1](1, 1) = aten.cat([getitem_2, getitem_5], 0)
new_zeros_default: float32[32](1,) = aten.new_zeros(q_bias, [32])
cat_default_3: float32[64](1,) = aten.cat([q_bias, new_zeros_default], 0)
linear_default_2: float32[2, 64](64, 1) = fxquant.linear(x, cat_default, cat_default_1, cat_default_2, cat_default_3, int4wo-32, '')
split_with_sizes_default: [float32[2, 32](64, 1), float32[2, 32](64, 1)] = aten.split_with_sizes(linear_default_2, [32, 32], -1)
getitem_6 = getitem(split_with_sizes_default, 0)
getitem_7 = getitem(split_with_sizes_default, 1)
view: float32[2, 4, 8](64, 8, 1) = aten.view(getitem_6, [2, 4, 8])
view_1: float32[2, 4, 8](64, 8, 1) = aten.view(getitem_7, [2, 4, 8])
mul: float32[2, 4, 8](32, 8, 1) = aten.mul.Tensor(view, view_1)
return mul
folded_0:
  quantize_default = fxquant.quantize(p0, int4wo-32, weight)
  return quantize_default
folded_1:
  quantize_default_1 = fxquant.quantize(p0, int4wo-32, weight)
  return quantize_default_1""",
        )

    def test_static(self):
        """Codes from the first linear to the second; nothing is dequantized."""
        model = Model()
        stats = fxquant.calibrate(model, [torch.ones(2, 32)], compiled=False, progress=False)
        text = self.graph(
            model, "fused", *self.until_merge("int8static", stats=stats, smooth=False)
        )
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
range_0 = self.range_0
folded_0: [float32[1](1,), int32[1](1,)] = self.folded_0(range_0)
folded_1: [int8[64, 32](32, 1), float32[64, 1](1, 1)] = self.folded_1(up_weight)
range_1 = self.range_1
folded_2: [float32[1](1,), int32[1](1,)] = self.folded_2(range_1)
folded_3: [int8[32, 64](64, 1), float32[32, 1](1, 1)] = self.folded_3(down_weight)
getitem = getitem(folded_0, 0)
getitem_1 = getitem(folded_0, 1)
quantize_static_default: int8[2, 32](32, 1) = fxquant.quantize_static(x, getitem, getitem_1, int8static)
getitem_2 = getitem(folded_1, 0)
getitem_3 = getitem(folded_1, 1)
linear_default_2: float32[2, 64](64, 1) = fxquant.linear(quantize_static_default, getitem_2, getitem_3, None, up_bias, int8static, gelu, getitem, getitem_1, float32)
getitem_4 = getitem(folded_2, 0)
getitem_5 = getitem(folded_2, 1)
quantize_static_default_1: int8[2, 64](64, 1) = fxquant.quantize_static(linear_default_2, getitem_4, getitem_5, int8static)
getitem_6 = getitem(folded_3, 0)
getitem_7 = getitem(folded_3, 1)
linear_default_1: float32[2, 32](32, 1) = fxquant.linear(quantize_static_default_1, getitem_6, getitem_7, None, down_bias, int8static, '', getitem_4, getitem_5, float32)
return linear_default_1
folded_0:
  static_qparams_default = fxquant.static_qparams(p0, None, int8static)
  return static_qparams_default
folded_1:
  quantize_default = fxquant.quantize(p0, int8static, weight)
  return quantize_default
folded_2:
  static_qparams_default_1 = fxquant.static_qparams(p0, None, int8static)
  return static_qparams_default_1
folded_3:
  quantize_default_1 = fxquant.quantize(p0, int8static, weight)
  return quantize_default_1""",
        )

    def test_lowered(self):
        steps = (*self.until_merge("int8wo"), passes.lower(), passes.verify)
        text = self.graph(Model(), "lowered", *steps)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
folded_2: [int8[64, 32](32, 1), float32[64, 1](1, 1)] = self.folded_2(up_weight)
folded_3: [int8[32, 64](64, 1), float32[32, 1](1, 1)] = self.folded_3(down_weight)
getitem_4 = getitem(folded_2, 0)
getitem_5 = getitem(folded_2, 1)
reshape_default: float32[2, 32](32, 1) = aten.reshape(x, [-1, 32])
to_dtype: float32[64, 32](32, 1) = aten.to.dtype(getitem_4, float32)
to_dtype_1: float32[64, 1](1, 1) = aten.to.dtype(getitem_5, float32)
mul_tensor: float32[64, 32](32, 1) = aten.mul.Tensor(to_dtype, to_dtype_1)
to_dtype_2: float32[64, 32](32, 1) = aten.to.dtype(mul_tensor, float32)
linear_default_3: float32[2, 64](64, 1) = aten.linear(reshape_default, to_dtype_2, up_bias)
gelu_default: float32[2, 64](64, 1) = aten.gelu(linear_default_3)
reshape_default_1: float32[2, 64](64, 1) = aten.reshape(gelu_default, [2, 64])
getitem_6 = getitem(folded_3, 0)
getitem_7 = getitem(folded_3, 1)
reshape_default_2: float32[2, 64](64, 1) = aten.reshape(reshape_default_1, [-1, 64])
to_dtype_3: float32[32, 64](64, 1) = aten.to.dtype(getitem_6, float32)
to_dtype_4: float32[32, 1](1, 1) = aten.to.dtype(getitem_7, float32)
mul_tensor_1: float32[32, 64](64, 1) = aten.mul.Tensor(to_dtype_3, to_dtype_4)
to_dtype_5: float32[32, 64](64, 1) = aten.to.dtype(mul_tensor_1, float32)
linear_default_4: float32[2, 32](32, 1) = aten.linear(reshape_default_2, to_dtype_5, down_bias)
reshape_default_3: float32[2, 32](32, 1) = aten.reshape(linear_default_4, [2, 32])
return reshape_default_3
folded_2:
  quantize_default = fxquant.quantize(p0, int8wo, weight)
  getitem = getitem(quantize_default, 0)
  getitem_1 = getitem(quantize_default, 1)
  pack_default = fxquant.pack(getitem, getitem_1, None, int8wo, canonical)
  return pack_default
folded_3:
  quantize_default_1 = fxquant.quantize(p0, int8wo, weight)
  getitem_2 = getitem(quantize_default_1, 0)
  getitem_3 = getitem(quantize_default_1, 1)
  pack_default_1 = fxquant.pack(getitem_2, getitem_3, None, int8wo, canonical)
  return pack_default_1""",
        )

    def test_lowered_and_merged(self):
        steps = (*self.until_merge("int8wo"), passes.lower(), passes.verify)
        text = self.graph(Attention(), "lowered", *steps)
        self.assertExpectedInline(
            text,
            """\
q_weight = self.q.weight
q_bias = self.q.bias
k_weight = self.k.weight
input x: float32[2, 32](32, 1)
folded_2: [float32[64](1,)] = self.folded_2(q_bias)
getitem_8 = getitem(folded_2, 0)
folded_3: [int8[64, 32](32, 1), float32[64, 1](1, 1)] = self.folded_3(q_weight, k_weight)
getitem_6 = getitem(folded_3, 0)
getitem_7 = getitem(folded_3, 1)
reshape_default: float32[2, 32](32, 1) = aten.reshape(x, [-1, 32])
to_dtype: float32[64, 32](32, 1) = aten.to.dtype(getitem_6, float32)
to_dtype_1: float32[64, 1](1, 1) = aten.to.dtype(getitem_7, float32)
mul_tensor: float32[64, 32](32, 1) = aten.mul.Tensor(to_dtype, to_dtype_1)
to_dtype_2: float32[64, 32](32, 1) = aten.to.dtype(mul_tensor, float32)
linear_default_3: float32[2, 64](64, 1) = aten.linear(reshape_default, to_dtype_2, getitem_8)
reshape_default_1: float32[2, 64](64, 1) = aten.reshape(linear_default_3, [2, 64])
split_with_sizes_default: [float32[2, 32](64, 1), float32[2, 32](64, 1)] = aten.split_with_sizes(reshape_default_1, [32, 32], -1)
getitem_4 = getitem(split_with_sizes_default, 0)
getitem_5 = getitem(split_with_sizes_default, 1)
view: float32[2, 4, 8](64, 8, 1) = aten.view(getitem_4, [2, 4, 8])
view_1: float32[2, 4, 8](64, 8, 1) = aten.view(getitem_5, [2, 4, 8])
mul: float32[2, 4, 8](32, 8, 1) = aten.mul.Tensor(view, view_1)
return mul
folded_2:
  new_zeros_default = aten.new_zeros(p0, [32])
  cat_default_2 = aten.cat([p0, new_zeros_default], 0)
  return cat_default_2
folded_3:
  quantize_default = fxquant.quantize(p0, int8wo, weight)
  getitem = getitem(quantize_default, 0)
  quantize_default_1 = fxquant.quantize(p1, int8wo, weight)
  getitem_2 = getitem(quantize_default_1, 0)
  cat_default = aten.cat([getitem, getitem_2], 0)
  getitem_1 = getitem(quantize_default, 1)
  getitem_3 = getitem(quantize_default_1, 1)
  cat_default_1 = aten.cat([getitem_1, getitem_3], 0)
  pack_default = fxquant.pack(cat_default, cat_default_1, None, int8wo, canonical)
  return pack_default""",
        )
