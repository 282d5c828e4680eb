"""A decoder of Llama's shape with random weights, and what each contender makes of its linears.

GQA, rotary positions, RMSNorm, SwiGLU and a static KV cache; one compiled function serves a prompt
(rows from position 0 on, causal) and one decoded token (attention over the cache, with a mask).
Weights are made part by part on the device and quantized at once, so that a quantized model never
lies beside its bfloat16 one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.measure import synchronize


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. ``theta``: base of the rotary frequencies."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    theta: float

    @property
    def head_size(self) -> int:
        return self.width // self.heads


SHAPES = {
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 5e5),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, 32000, 1e4),
    "tiny": Shape(2, 256, 512, 4, 2, 512, 1e4),
}


class Cache(nn.Module):
    """Keys and values of one block, each [batch, kv_heads, length, head_size], written in place."""

    def __init__(self, shape: Shape, batch: int, length: int, **factory: Any):
        super().__init__()
        size = (batch, shape.kv_heads, length, shape.head_size)
        self.register_buffer("k", torch.zeros(size, **factory))
        self.register_buffer("v", torch.zeros(size, **factory))

    def write(self, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [batch, kv_heads, T, head_size] at ``position`` [T], int64."""
        self.k.index_copy_(2, position, k)
        self.v.index_copy_(2, position, v)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions. x [batch, T, heads, size]; cos, sin [T, size / 2]; the halves are pairs."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention. ``plain``: decode with two products and a softmax, not SDPA."""

    def __init__(self, shape: Shape, merged: bool, plain: bool):
        super().__init__()
        self.size, self.kv_heads, self.plain = shape.head_size, shape.kv_heads, plain
        wide, narrow = shape.width, shape.kv_heads * shape.head_size
        self.parts = [wide, narrow, narrow]
        if merged:
            self.qkv_proj = nn.Linear(shape.width, sum(self.parts), bias=False)
        else:
            self.q_proj = nn.Linear(shape.width, wide, bias=False)
            self.k_proj = nn.Linear(shape.width, narrow, bias=False)
            self.v_proj = nn.Linear(shape.width, narrow, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.merged = merged

    def forward(self, x, cos, sin, position, mask, cache):
        """x [batch, T, width]; mask [length], added to the scores, or None for a whole prompt."""
        batch, rows, width = x.shape
        if self.merged:
            q, k, v = self.qkv_proj(x).split(self.parts, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.view(batch, rows, -1, self.size) for t in (q, k, v))
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        cache.write(position, k, v)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(y.transpose(1, 2).reshape(batch, rows, width))
        q = q.reshape(batch, self.kv_heads, -1, self.size)  # one row: a group's heads are its rows
        if self.plain:
            scores = (q @ cache.k.mT).float() * self.size**-0.5 + mask
            y = scores.softmax(dim=-1).to(x.dtype) @ cache.v
        else:
            y = F.scaled_dot_product_attention(
                q, cache.k, cache.v, attn_mask=mask.expand(1, 1, 1, -1)
            )
        return self.o_proj(y.reshape(batch, rows, width))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape, merged: bool):
        super().__init__()
        self.merged = merged
        if merged:
            self.gate_up_proj = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        else:
            self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
            self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Shape, merged: bool, plain: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape, merged, plain)
        self.feed_forward_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.feed_forward = FeedForward(shape, merged)

    def forward(self, x, cos, sin, position, mask, cache):
        x = x + self.attention(self.attention_norm(x), cos, sin, position, mask, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary, of the last row alone."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(x[:, -1]))


class Decoder(nn.Module):
    """Tokens to the logits of the last one. ``merged``: q/k/v and gate/up are one linear each."""

    def __init__(self, shape: Shape, merged: bool = False, plain: bool = False):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape, merged, plain) for _ in range(shape.layers))
        self.head = Head(shape)

    def forward(self, tokens, cos, sin, position, mask, caches: Sequence[Cache]) -> torch.Tensor:
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cos, sin, position, mask, cache)
        return self.head(x)


class Generator(nn.Module):
    """A decoder with its static cache for ``batch`` sequences of ``length``: what is compiled."""

    def __init__(self, model: Decoder, batch: int, length: int):
        super().__init__()
        self.model = model
        weight, shape = model.embedding.weight, model.shape
        where = {"device": weight.device}
        self.caches = nn.ModuleList(
            Cache(shape, batch, length, dtype=weight.dtype, **where) for _ in range(shape.layers)
        )
        exponent = torch.arange(0, shape.head_size, 2, **where) / shape.head_size
        angle = torch.outer(torch.arange(length, **where), shape.theta**-exponent)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("places", torch.arange(length, **where))

    def forward(
        self, tokens: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [batch, T], position [T], int64 both -> the next token [batch, 1], logits [batch, V].

        T > 1 is a prompt that starts at position 0.
        """
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        mask = None
        if tokens.shape[1] == 1:
            mask = torch.zeros_like(self.places, dtype=self.caches[0].k.dtype)
            mask = mask.masked_fill(self.places > position, float("-inf"))
        logits = self.model(tokens, cos, sin, position, mask, self.caches)
        return logits.argmax(dim=-1, keepdim=True), logits


Convert = Callable[[nn.Module], object]


def build(
    shape: Shape,
    convert: Convert,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    **layout: bool,
) -> tuple[Decoder, float]:
    """The decoder with seeded weights, each linear converted as soon as it is filled; seconds of that.

    So memory is what the conversion of a model needs whose float weights come from elsewhere, one by
    one. The weights depend on the seed and the kind of device alone, not on ``convert`` or ``layout``'s
    ``plain``. Activations stay near 1 in every layer.
    """
    with torch.device("meta"):
        model = Decoder(shape, **layout)
    seconds = 0.0
    for seed, part in enumerate([model.embedding, *model.blocks, model.head]):
        part.to(dtype).requires_grad_(False)
        random = torch.Generator(device).manual_seed(seed)
        for name, module in list(part.named_modules()):
            module.to_empty(device=device, recurse=False)
            for parameter in module.parameters(recurse=False):
                if "norm" in name:
                    parameter.normal_(1.0, 0.1, generator=random)
                elif part is model.embedding:
                    parameter.normal_(generator=random)
                else:
                    scale = (2 * shape.layers) ** -0.5 if name.endswith(ENDS) else 1.0
                    parameter.normal_(0.0, scale * parameter.shape[1] ** -0.5, generator=random)
            if isinstance(module, nn.Linear):
                seconds += _convert(part, name, convert)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what float weights have left behind serves nothing any more
    return model.eval().requires_grad_(False), seconds


ENDS = ("o_proj", "down_proj")
"""The linears whose outputs are added to the residual stream."""


def _convert(part: nn.Module, name: str, convert: Convert) -> float:
    """Convert one linear of ``part``, alone in a model of its own; the seconds it took."""
    parent, _, child = name.rpartition(".")
    holder = nn.ModuleDict({child: part.get_submodule(name)})
    synchronize()
    started = time.perf_counter()
    convert(holder)
    synchronize()
    seconds = time.perf_counter() - started
    setattr(part.get_submodule(parent), child, holder[child])
    return seconds


def conversion(contender: str) -> Convert:
    """What the contender does to the linears of a part of the model, lm_head included, in place."""
    if contender == "bf16":
        return lambda part: part
    if contender.startswith("torchao-"):
        return _torchao(contender.removeprefix("torchao-"))
    scheme = fxquant.scheme.get_scheme(contender).name
    return lambda part: fxquant.quantize(part, scheme)


TORCHAO = ("int4wo-64", "fp8dq", "int8wo", "int8dq", "fp8wo", "8da4w-32")
"""The schemes that torchao has a configuration for here."""


UNTUNED = "-untuned"
"""After a contender of torchao's: without its flags for Inductor, whose search (coordinate descent in all
directions, for each kernel when it is first run) had not ended after 300 s for int8 and float8 on an H200."""

KNOWN = {"bf16", *fxquant.SCHEMES, *(f"torchao-{s}{end}" for s in TORCHAO for end in ("", UNTUNED))}


def _torchao(name: str) -> Convert:
    """torchao's recommended settings, its process-wide flags for Inductor included, but for UNTUNED ones.

    int4 as tile_packed_to_4d: the only packing for CUDA that torch itself can run.
    """
    from torchao import quantization as ao

    scheme = name.removesuffix(UNTUNED)

    configs: dict[str, Callable[[], Any]] = {
        "int4wo-64": lambda: ao.Int4WeightOnlyConfig(
            group_size=64, int4_packing_format="tile_packed_to_4d"
        ),
        "int8wo": ao.Int8WeightOnlyConfig,
        "int8dq": ao.Int8DynamicActivationInt8WeightConfig,
        "fp8wo": ao.Float8WeightOnlyConfig,
        "fp8dq": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        "8da4w-32": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
        ),
    }
    config = configs[scheme]()
    config.set_inductor_config = not name.endswith(UNTUNED)
    return lambda part: ao.quantize_(part, config)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of codes and qparams; a tensor subclass is the sum of the tensors it holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def model_bytes(model: Decoder) -> int:
    """What one decoding step reads of the weights: everything but the table of embeddings."""
    held = [*model.blocks.parameters(), *model.blocks.buffers()]
    held += [*model.head.parameters(), *model.head.buffers()]
    return sum(nbytes(t) for t in held)
