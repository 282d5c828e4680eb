"""A language model of Llama's architecture, its sizes, and its twin whose activations have outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accuracy_data import VOCABULARY
from llama_model import Block, Shape
from torch import nn


@dataclass(frozen=True)
class Size:
    """A shape, what it is trained with, and what it is measured on.

    length: tokens of a sequence. batch: sequences of a training step. rate: the largest learning rate.
    minutes: of training, with at most ``epochs`` over the text. models: how many are trained; seeds
    beyond that draw other calibration data for the same models. held_out, calibration: numbers of
    sequences.
    """

    shape: Shape
    length: int
    batch: int
    rate: float
    minutes: float
    epochs: float
    models: int
    held_out: int
    calibration: int


SIZES = {
    "small": Size(
        shape=Shape(3, 256, 640, 4, 2, VOCABULARY, 1e4),
        length=256,
        batch=8,
        rate=3e-3,
        minutes=2.5,
        epochs=4,
        models=3,
        held_out=512,
        calibration=64,
    ),
    "large": Size(
        shape=Shape(16, 768, 2048, 12, 4, VOCABULARY, 1e4),
        length=1024,
        batch=64,
        rate=6e-4,
        minutes=5.5,
        epochs=6,
        models=1,
        held_out=512,
        calibration=128,
    ),
}


class NoCache:
    """Where a whole sequence is read at once nothing is kept."""

    def write(self, position: None, k: torch.Tensor, v: torch.Tensor) -> None:
        pass


class LanguageModel(nn.Module):
    """tokens [batch, T], int64 -> logits [batch, T, vocabulary]; grouped-query attention, rotary
    positions, RMSNorm, SwiGLU, the head not tied to the embedding."""

    def __init__(self, shape: Shape, length: int):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape, merged=False, plain=False) for _ in range(shape.layers)
        )
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        exponent = torch.arange(0, shape.head_size, 2) / shape.head_size
        angle = torch.outer(torch.arange(length), shape.theta**-exponent)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.cache = NoCache()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin, None, None, self.cache)
        return self.lm_head(self.norm(x))


def initialize(model: LanguageModel, seed: int) -> None:
    """Weights of standard deviation 0.02; those that end a branch less, by the number of branches. The
    same on every device."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * model.shape.layers) ** -0.5 if ends else 1.0
            values = torch.empty(parameter.shape)
            parameter.copy_(values.normal_(0.0, 0.02 * scale, generator=random))


def readers(model: LanguageModel) -> list[tuple[nn.RMSNorm, list[nn.Linear]]]:
    """Each norm with the linears that read it, and nothing else does."""
    found = []
    for block in model.blocks:
        attention, mlp = block.attention, block.feed_forward
        found += [
            (block.attention_norm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.feed_forward_norm, [mlp.gate_proj, mlp.up_proj]),
        ]
    return [*found, (model.norm, [model.lm_head])]


@torch.no_grad()
def add_outliers(model: LanguageModel, factor: float, share: float, seed: int = 0) -> None:
    """Enlarge a share of the channels of every norm by ``factor``, and divide the columns that read them.

    For a power of two both are exact, short of underflow, and so the model computes what it did.
    """
    random = torch.Generator().manual_seed(seed)
    for norm, linears in readers(model):
        width = norm.weight.shape[0]
        channels = torch.randperm(width, generator=random)[: max(round(share * width), 1)]
        channels = channels.to(norm.weight.device)
        norm.weight[channels] *= factor
        for linear in linears:
            linear.weight[:, channels] /= factor


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """Of every next token, float32 [count, T, vocabulary], after the first T of tokens [count, T + 1]."""
    return torch.cat([F.log_softmax(model(p[:, :-1]).float(), -1) for p in tokens.split(batch)])


@torch.no_grad()
def sequence_losses(
    model: nn.Module, tokens: torch.Tensor, batch: int, reference: torch.Tensor
) -> torch.Tensor:
    """Of each sequence the mean cross-entropy and the mean divergence from a reference: nats a token,
    float64 [2, count] on the CPU.

    tokens [count, T + 1], on the model's device: the first T are read, the last T are predicted.
    reference: log_probabilities of the float model. KL(float || model) does without the text's own
    luck: where rounding happens to help the cross-entropy, it still counts as a change.
    """
    found = []
    for part, wanted in zip(tokens.split(batch), reference.split(batch), strict=True):
        predicted = log_probabilities(model, part, batch)
        surprise = -predicted.gather(-1, part[:, 1:, None]).squeeze(-1)
        divergence = (wanted.exp() * (wanted - predicted)).sum(-1)
        found.append(torch.stack([surprise, divergence]).double().mean(-1).cpu())
    return torch.cat(found, 1)
