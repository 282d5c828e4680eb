"""Real architectures from transformers, small and with random weights: every linear is quantized.

Three oracles: the layers that are quantized are exactly the linears that a forward pass reaches;
the result is that of the float model with fake-quantized linears; and it is as near to the float
model as the scheme allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxquant
import fxquant.backend
from fxquant.graph import layers
from fxquant.scheme import Scheme, get_scheme

from .conftest import sqnr

FLOORS = {"int8wo": 39.2, "int8dq": 36.5, "int4wo-32": 17.7, "8da4w-32": 16.0}
"""dB against float: the lowest of all architectures, less half a decibel. The noise of each layer
adds up, so they are a few decibels below the floors of a single linear (fxquant.scheme)."""

FAITHFUL = {"int8wo": 115.0, "int8dq": 42.0, "int4wo-32": 115.0, "8da4w-32": 115.0}
"""dB against the fake-quantized model: float32 rounding. In int8dq the largest value of a token
lies halfway between two codes where it is negative, so that its last bit decides."""

VOCABULARY, WIDTH, HEADS, INNER = 96, 64, 4, 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SPECIAL = {k: v for k, v in SIZES.items() if k.endswith("token_id")}


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def bert():
    config = transformers.BertConfig(**SIZES)
    return transformers.BertForMaskedLM(config), {"input_ids": tokens()}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=HEADS, n_positions=32, **SPECIAL
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens()}


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens()}


def qwen2():
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(config), {"input_ids": tokens()}


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=1,
        num_heads=HEADS,
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5)}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit():
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=32,
        patch_size=8,
        num_labels=32,
    )
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(2, 3, 32, 32)
    }


def opt():
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        max_position_embeddings=32,
        **SPECIAL,
    )
    return transformers.OPTForCausalLM(config), {"input_ids": tokens()}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=20,
        max_target_positions=32,
        num_mel_bins=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        decoder_start_token_id=0,
        **SPECIAL,
    )
    inputs = {"input_features": torch.randn(2, 32, 40), "decoder_input_ids": tokens(length=5)}
    return transformers.WhisperForConditionalGeneration(config), inputs


def gemma():
    config = transformers.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=WIDTH // HEADS)
    return transformers.GemmaForCausalLM(config), {"input_ids": tokens()}


def gpt_neox():
    config = transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=32)
    return transformers.GPTNeoXForCausalLM(config), {"input_ids": tokens()}


def bloom():
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=HEADS, **SPECIAL
    )
    return transformers.BloomForCausalLM(config), {"input_ids": tokens()}


ARCHITECTURES = {
    bert: tuple(FLOORS),
    gpt2: ("int8wo", "8da4w-32"),
    llama: tuple(FLOORS),
    qwen2: ("int8dq", "int4wo-32"),
    t5: ("int8wo", "8da4w-32"),
    vit: ("int8dq", "int4wo-32"),
    opt: ("int8wo", "8da4w-32"),
    whisper: ("int8dq", "int4wo-32"),
    gemma: ("int8wo", "8da4w-32"),
    gpt_neox: ("int8dq", "int4wo-32"),
    bloom: ("int8wo", "8da4w-32"),
}
CASES = [(made, scheme) for made, schemes in ARCHITECTURES.items() for scheme in schemes]


def made(architecture: Callable[[], tuple[nn.Module, dict[str, Any]]]):
    """The frozen model and its inputs, the same at every call."""
    torch.manual_seed(0)
    model, inputs = architecture()
    return model.eval().requires_grad_(False), inputs


def reached(model: nn.Module, inputs: dict[str, Any]) -> tuple[set[str], torch.Tensor]:
    """Names of the linears that a forward pass runs, and its logits."""
    names: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return names, logits


def fake_quantized(model: nn.Module, scheme: Scheme) -> nn.Module:
    """The float model, its linears on quantized and dequantized weights and inputs."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            weight = module.weight.T if transposed else module.weight
            weight = scheme.weight.dequantize(scheme.weight.quantize(weight), weight.dtype)
            module.weight = nn.Parameter(weight.T if transposed else weight, requires_grad=False)
            if spec := scheme.input:
                module.register_forward_pre_hook(
                    lambda _, args, spec=spec: spec.dequantize(
                        spec.quantize(args[0]), args[0].dtype
                    )
                )
    return model


def assert_near(found: torch.Tensor, wanted: torch.Tensor, simulated: torch.Tensor, scheme: str):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert sqnr(found, wanted) > FLOORS[scheme]
    assert sqnr(found, simulated) > FAITHFUL[scheme]


@pytest.mark.parametrize(("architecture", "scheme"), CASES, ids=lambda v: getattr(v, "__name__", v))
@torch.no_grad()
def test_every_linear_is_quantized_in_one_graph(architecture, scheme, graphs):
    """The float models compile with fullgraph=True, all of them; strict allows no fallback."""
    model, inputs = made(architecture)
    names, wanted = reached(model, inputs)
    options = {"scheme": scheme, "strict": True}
    run = torch.compile(model, backend="fxquant", options=options, fullgraph=True)
    found = run(**inputs).logits
    (gm,) = graphs
    listed = layers(gm).values()
    assert {layer.name for layer in listed} == names
    assert {layer.scheme for layer in listed} == {scheme} and all(x.kernel for x in listed)
    simulated = fake_quantized(model, get_scheme(scheme))(**inputs).logits
    assert_near(found, wanted, simulated, scheme)


@pytest.mark.parametrize("architecture", [gpt2, opt, whisper], ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_report_names_no_float_layer(architecture):
    """A learned table of positions is an embedding too, though its class is not nn.Embedding."""
    model, inputs = made(architecture)
    names, _ = reached(model, inputs)
    report = fxquant.explain(model, **inputs, options={"scheme": "int8wo"})
    assert report.unquantized == [] and report.graphs == 1
    assert {layer.name for layer in report.quantized} == names
    types = {layer.module_type.rpartition(".")[2] for layer in report.layers}
    assert types == ({"Linear", "Conv1D"} if architecture is gpt2 else {"Linear"})


@pytest.fixture
def compilations(monkeypatch) -> list[int]:
    """One entry for each graph that Inductor really compiles."""
    found: list[int] = []
    compile_graph = fxquant.backend.compile_graph

    def counted(*args):
        found.append(len(found))
        return compile_graph(*args)

    monkeypatch.setattr(fxquant.backend, "compile_graph", counted)
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("architecture", "scheme"), [(bert, "int8dq"), (llama, "int4wo-32")])
@torch.no_grad()
def test_compiled_by_inductor(architecture, scheme, dynamic, compilations):
    model, _ = made(architecture)
    simulated = fake_quantized(model, get_scheme(scheme))
    options = {"scheme": scheme, "strict": True}
    run = torch.compile(model, backend="fxquant", options=options, fullgraph=True, dynamic=dynamic)
    for rows in (2, 3, 5) if dynamic else (2, 2):
        batch = {"input_ids": tokens(rows)}
        args = [m(**batch).logits for m in (model, simulated)]
        assert_near(run(**batch).logits, *args, scheme)
    assert len(compilations) <= (2 if dynamic else 1)
