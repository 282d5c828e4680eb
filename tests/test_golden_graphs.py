# ruff: noqa: E501  (the graphs are as wide as they are)
"""The graph of a small model at each stage, written out: what changes is seen in a review.

``EXPECTTEST_ACCEPT=1 pytest tests/test_golden_graphs.py`` writes the present graphs into this file.
"""

from __future__ import annotations

from fxquant import passes

from .golden import GoldenGraphs, Model


class TestGoldenGraphs(GoldenGraphs):
    def test_float(self):
        text = self.graph(Model(), "float", passes.normalize)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
linear: float32[2, 64](64, 1) = aten.linear(x, up_weight, up_bias)
gelu: float32[2, 64](64, 1) = aten.gelu(linear)
linear_1: float32[2, 32](32, 1) = aten.linear(gelu, down_weight, down_bias)
return linear_1""",
        )

    def test_observed(self):
        text = self.graph(Model(), "observed", passes.normalize, passes.insert_observers)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
observe_default: float32[2, 32](32, 1) = fxquant.observe(x, up:input)
linear: float32[2, 64](64, 1) = aten.linear(observe_default, up_weight, up_bias)
gelu: float32[2, 64](64, 1) = aten.gelu(linear)
observe_default_1: float32[2, 64](64, 1) = fxquant.observe(gelu, down:input)
linear_1: float32[2, 32](32, 1) = aten.linear(observe_default_1, down_weight, down_bias)
return linear_1""",
        )

    def test_reference(self):
        steps = (passes.normalize, passes.quantize_weights("int8dq"))
        text = self.graph(Model(), "reference", *steps)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
quantize_default: [int8[2, 32](32, 1), float32[2, 1](1, 1)] = fxquant.quantize(x, int8dq, input)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
dequantize_default: float32[2, 32](32, 1) = fxquant.dequantize(getitem, getitem_1, None, int8dq, input, float32)
quantize_default_1: [int8[64, 32](32, 1), float32[64, 1](1, 1)] = fxquant.quantize(up_weight, int8dq, weight)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
dequantize_default_1: float32[64, 32](32, 1) = fxquant.dequantize(getitem_2, getitem_3, None, int8dq, weight, float32)
linear: float32[2, 64](64, 1) = aten.linear(dequantize_default, dequantize_default_1, up_bias)
gelu: float32[2, 64](64, 1) = aten.gelu(linear)
quantize_default_2: [int8[2, 64](64, 1), float32[2, 1](1, 1)] = fxquant.quantize(gelu, int8dq, input)
getitem_4 = getitem(quantize_default_2, 0)
getitem_5 = getitem(quantize_default_2, 1)
dequantize_default_2: float32[2, 64](64, 1) = fxquant.dequantize(getitem_4, getitem_5, None, int8dq, input, float32)
quantize_default_3: [int8[32, 64](64, 1), float32[32, 1](1, 1)] = fxquant.quantize(down_weight, int8dq, weight)
getitem_6 = getitem(quantize_default_3, 0)
getitem_7 = getitem(quantize_default_3, 1)
dequantize_default_3: float32[32, 64](64, 1) = fxquant.dequantize(getitem_6, getitem_7, None, int8dq, weight, float32)
linear_1: float32[2, 32](32, 1) = aten.linear(dequantize_default_2, dequantize_default_3, down_bias)
return linear_1""",
        )

    def test_reference_folded(self):
        steps = (passes.normalize, passes.quantize_weights("8da4w-32"), passes.fold_qparams)
        text = self.graph(Model(), "reference", *steps)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
folded_0: [uint8[64, 16](16, 1), bfloat16[64, 1](1, 1)] = self.folded_0(up_weight)
folded_1: [uint8[32, 32](32, 1), bfloat16[32, 2](2, 1)] = self.folded_1(down_weight)
quantize_default: [int8[2, 32](32, 1), float32[2, 1](1, 1), int32[2, 1](1, 1)] = fxquant.quantize(x, 8da4w-32, input)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
getitem_2 = getitem(quantize_default, 2)
dequantize_default: float32[2, 32](32, 1) = fxquant.dequantize(getitem, getitem_1, getitem_2, 8da4w-32, input, float32)
getitem_3 = getitem(folded_0, 0)
getitem_4 = getitem(folded_0, 1)
dequantize_default_1: float32[64, 32](32, 1) = fxquant.dequantize(getitem_3, getitem_4, None, 8da4w-32, weight, float32)
linear: float32[2, 64](64, 1) = aten.linear(dequantize_default, dequantize_default_1, up_bias)
gelu: float32[2, 64](64, 1) = aten.gelu(linear)
quantize_default_2: [int8[2, 64](64, 1), float32[2, 1](1, 1), int32[2, 1](1, 1)] = fxquant.quantize(gelu, 8da4w-32, input)
getitem_5 = getitem(quantize_default_2, 0)
getitem_6 = getitem(quantize_default_2, 1)
getitem_7 = getitem(quantize_default_2, 2)
dequantize_default_2: float32[2, 64](64, 1) = fxquant.dequantize(getitem_5, getitem_6, getitem_7, 8da4w-32, input, float32)
getitem_8 = getitem(folded_1, 0)
getitem_9 = getitem(folded_1, 1)
dequantize_default_3: float32[32, 64](64, 1) = fxquant.dequantize(getitem_8, getitem_9, None, 8da4w-32, weight, float32)
linear_1: float32[2, 32](32, 1) = aten.linear(dequantize_default_2, dequantize_default_3, down_bias)
return linear_1
folded_0:
  quantize_default_1 = fxquant.quantize(p0, 8da4w-32, weight)
  return quantize_default_1
folded_1:
  quantize_default_3 = fxquant.quantize(p0, 8da4w-32, weight)
  return quantize_default_3""",
        )

    def test_fused(self):
        steps = (passes.normalize, passes.quantize_weights("int8dq"), passes.fuse)
        text = self.graph(Model(), "fused", *steps)
        self.assertExpectedInline(
            text,
            """\
up_weight = self.up.weight
up_bias = self.up.bias
down_weight = self.down.weight
down_bias = self.down.bias
input x: float32[2, 32](32, 1)
quantize_default_1: [int8[64, 32](32, 1), float32[64, 1](1, 1)] = fxquant.quantize(up_weight, int8dq, weight)
getitem_2 = getitem(quantize_default_1, 0)
getitem_3 = getitem(quantize_default_1, 1)
linear_default_2: float32[2, 64](64, 1) = fxquant.linear(x, getitem_2, getitem_3, None, up_bias, int8dq, gelu)
quantize_default_3: [int8[32, 64](64, 1), float32[32, 1](1, 1)] = fxquant.quantize(down_weight, int8dq, weight)
getitem_6 = getitem(quantize_default_3, 0)
getitem_7 = getitem(quantize_default_3, 1)
linear_default_1: float32[2, 32](32, 1) = fxquant.linear(linear_default_2, getitem_6, getitem_7, None, down_bias, int8dq, '')
return linear_default_1""",
        )
