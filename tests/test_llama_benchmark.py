"""benchmarks/llama*.py on a tiny decoder: its arithmetic, its measuring, its tables and plots."""

from __future__ import annotations

import dataclasses
import importlib
import json
import operator
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
TINY = {"shape": "tiny", "layers": 2, "merged": False, "attention": "sdpa", "mode": "eager"}
CPU = torch.device("cpu")
PROJECTIONS = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch):
    """The scripts can be imported, and run on the CPU; torchao's settings of Inductor are undone."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = torch._inductor.config
    names = ("coordinate_descent_tuning", "coordinate_descent_check_all_directions")
    names += ("force_fuse_int_mm_with_mul", "fx_graph_cache", "triton.unique_kernel_names")
    with config.patch({name: operator.attrgetter(name)(config) for name in names}):
        yield


@pytest.fixture
def model():
    return importlib.import_module("llama_model")


@pytest.fixture
def report():
    return importlib.import_module("llama_report")


@pytest.fixture
def llama():
    return importlib.import_module("llama")


def naive(decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, T, vocab] in float64, written another way: loops, complex rotations."""
    shape, half = decoder.shape, decoder.shape.head_size // 2
    rows = tokens.shape[1]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x):
        angle = torch.outer(
            torch.arange(rows).double(), shape.theta ** (-torch.arange(half).double() / half)
        )
        z = torch.complex(x[..., :half], x[..., half:])
        z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([z.real, z.imag], -1)

    x = decoder.embedding.weight[tokens]
    for block in decoder.blocks:
        a, f = block.attention, block.feed_forward
        h = norm(x, block.attention_norm.weight)
        q, k, v = (
            (h @ p.weight.T).unflatten(-1, (-1, 2 * half)) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = turned(q), turned(k)
        heads = []
        for i in range(shape.heads):
            j = i // (shape.heads // shape.kv_heads)
            scores = q[:, :, i] @ k[:, :, j].mT / (2 * half) ** 0.5
            scores += torch.full((rows, rows), -torch.inf).triu(1)
            heads.append(scores.softmax(-1) @ v[:, :, j])
        x = x + torch.cat(heads, -1) @ a.o_proj.weight.T
        h = norm(x, block.feed_forward_norm.weight)
        gate = h @ f.gate_proj.weight.T
        x = x + (gate * gate.sigmoid() * (h @ f.up_proj.weight.T)) @ f.down_proj.weight.T
    return norm(x, decoder.head.norm.weight) @ decoder.head.lm_head.weight.T


def decoded(generator, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, T, vocab], a token at a time."""
    steps = [generator(t, torch.tensor([i])) for i, t in enumerate(tokens.split(1, dim=1))]
    return torch.stack([logits for _, logits in steps], dim=1)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("plain", [False, True])
@torch.no_grad()
def test_decoding_and_prefill_equal_a_naive_forward(model, kv_heads, plain):
    shape = dataclasses.replace(model.SHAPES["tiny"], kv_heads=kv_heads)
    decoder, _ = model.build(shape, lambda part: part, CPU, torch.float64, plain=plain)
    tokens = torch.randint(shape.vocab, (3, 11))
    wanted = naive(decoder, tokens)
    assert 0.5 < wanted.std() < 2
    generator = model.Generator(decoder, batch=3, length=16)
    torch.testing.assert_close(decoded(generator, tokens), wanted, rtol=0, atol=2e-5)
    whole = model.Generator(decoder, batch=3, length=11)
    chosen, logits = whole(tokens, torch.arange(11))
    torch.testing.assert_close(logits, wanted[:, -1], rtol=0, atol=2e-5)
    assert torch.equal(chosen, wanted[:, -1:].argmax(-1))
    for one, other in zip(generator.caches, whole.caches, strict=True):
        torch.testing.assert_close(one.k[:, :, :11], other.k, rtol=0, atol=2e-5)
        torch.testing.assert_close(one.v[:, :, :11], other.v, rtol=0, atol=2e-5)
        assert not one.k[:, :, 11:].any()


@torch.no_grad()
def test_a_second_run_does_not_see_what_lies_behind_its_position(model):
    decoder, _ = model.build(model.SHAPES["tiny"], lambda part: part, CPU, torch.float64)
    generator = model.Generator(decoder, batch=1, length=12)
    first = decoded(generator, torch.randint(512, (1, 12)))
    tokens = torch.randint(512, (1, 6))
    fresh = decoded(model.Generator(decoder, 1, 12), tokens)
    assert torch.equal(decoded(generator, tokens), fresh)
    assert not torch.equal(first[:, :6], fresh)


@torch.no_grad()
def test_merged_linears_decode_and_prefill_alike(model):
    decoder, _ = model.build(
        model.SHAPES["tiny"], lambda part: part, CPU, torch.float64, merged=True
    )
    assert decoder.blocks[0].attention.qkv_proj.weight.shape == (256 + 2 * 128, 256)
    tokens = torch.randint(512, (2, 5))
    _, logits = model.Generator(decoder, 2, 5)(tokens, torch.arange(5))
    found = decoded(model.Generator(decoder, 2, 8), tokens)[:, -1]
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)


def test_every_process_builds_the_same_weights(model):
    shape = model.SHAPES["tiny"]
    (one, _), (two, _) = (model.build(shape, lambda part: part, CPU) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.bfloat16 and not a.requires_grad
    assert not torch.equal(one.blocks[0].feed_forward.up_proj.weight, one.head.lm_head.weight)


LINEARS = 512 * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
ROWS = 512 + 2 * (2 * 256 + 2 * 128 + 2 * 512 + 256)
NORMS = 5 * 256 * 2


@pytest.mark.parametrize(
    ("contender", "wanted"),
    [
        ("bf16", 2 * LINEARS),
        ("int8wo", LINEARS + 4 * ROWS),
        ("int4wo-64", LINEARS // 2 + 2 * 2 * LINEARS // 64),
        ("torchao-int8wo", LINEARS + 5 * ROWS),
        ("torchao-int8wo-untuned", LINEARS + 5 * ROWS),
    ],
)
def test_bytes_and_lm_head_is_converted_too(model, contender, wanted):
    """Groups have bfloat16 scales and zeros, channels float32 scales; torchao an int8 zero too."""
    decoder, seconds = model.build(model.SHAPES["tiny"], model.conversion(contender), CPU)
    assert model.model_bytes(decoder) == wanted + NORMS
    assert seconds >= 0
    if not contender.startswith("torchao") and contender != "bf16":
        kinds = {type(m) for m in decoder.modules()}
        assert fxquant.QuantLinear in kinds and torch.nn.Linear not in kinds


def test_untuned_contenders_leave_inductors_settings_alone(model):
    config = torch._inductor.config
    for contender, tuned in (("torchao-int8wo-untuned", False), ("torchao-int8wo", True)):
        config.coordinate_descent_tuning = False
        model.conversion(contender)(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        assert config.coordinate_descent_tuning == tuned


def arguments(tmp_path: Path, *more: str) -> list[str]:
    short = "--shape tiny --mode eager --prefill-mode eager --prompt 3 --tokens 4 --length 8"
    folders = ["--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
    return [*short.split(), "--prefill", "8", "--batch", "1,2", *folders, *more]


def test_a_worker_measures_all_phases_and_reads_fxquants_decisions(llama, tmp_path, monkeypatch):
    backend = fxquant.backend.fxquant_backend
    monkeypatch.setattr(fxquant.backend, "compile_graph", lambda gm, *_: gm.forward)

    def compiled(generator, contender, mode):
        return torch.compile(generator, backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(llama, "compiled", compiled)
    args = llama.parse(arguments(tmp_path))
    args.scratch.mkdir()
    llama.work(args, "int8wo")
    lines = (args.scratch / "int8wo.lines").read_text().splitlines()
    readings = [json.loads(line) for line in lines]
    assert [(r["phase"], r["batch"], r["length"]) for r in readings] == [
        ("decode", 1, 8),
        ("decode", 2, 8),
        ("prefill", 1, 8),
    ]
    for r in readings:
        assert "failure" not in r and r["finite"] and r["graphs"] == 1
        assert set(r["kernels"]) == {*PROJECTIONS, "lm_head"}
        assert all("(int8wo)" in kernel for kind in r["kernels"].values() for kernel in kind)
        assert sum(r["kernels"]["q_proj"].values()) == 2
    assert readings[0]["deterministic"] and readings[0]["tokens"] == 4
    assert readings[2]["prefill_ms"] >= readings[2]["host_ms"] > 0
    # both read the same bytes a step, whatever the batch
    rates = [r["tokens_per_s"] / r["batch"] * r["model_gb"] for r in readings[:2]]
    assert rates == pytest.approx([r["gb_per_s"] for r in readings[:2]], rel=1e-4)
    logits = np.load(llama._logits_path(args, 2, "int8wo"))
    assert logits.shape == (2, 512) and logits.dtype == np.float32


def test_a_phase_that_fails_is_a_row_and_the_next_one_runs(llama, tmp_path, monkeypatch):
    whole = llama.decode

    def decode(model, args, contender, batch):
        if batch == 1:
            raise RuntimeError("one row is not served")
        return whole(model, args, contender, batch)

    monkeypatch.setattr(llama, "decode", decode)
    args = llama.parse(arguments(tmp_path))
    args.scratch.mkdir()
    llama.work(args, "bf16")
    first, second, third = map(json.loads, (args.scratch / "bf16.lines").read_text().splitlines())
    assert first["failure"] == "RuntimeError: one row is not served"
    assert second["tokens_per_s"] > 0 and third["prefill_ms"] > 0


def test_a_contender_without_time_is_a_row_that_says_so(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    llama.main(arguments(tmp_path, "--contenders", "bf16", "--limit", "0.2"))
    found = json.loads((tmp_path / "out" / "llama.json").read_text())
    assert [r["failure"] for r in found["readings"]] == ["no result within 0 s"] * 3
    assert found["machines"]["cpu"]["torch"] == torch.__version__
    assert (
        "bf16, prefill 8 (eager) failed: no result" in (tmp_path / "out" / "llama.md").read_text()
    )
    assert "no plot" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [["--contenders", "bf16,int5wo"], ["--length", "6"], ["--prefill", "1"], ["--tokens", "0"]],
)
def test_wrong_arguments_are_refused(llama, tmp_path, wrong):
    with pytest.raises(SystemExit):
        llama.parse(arguments(tmp_path, *wrong))


def reading(contender: str, **more) -> dict:
    """A decoding reading that was made up."""
    base = {"device": "H", "contender": contender, "phase": "decode", "batch": 1, "length": 256}
    base |= {"finite": True, "deterministic": True, "model_gb": 4.0, "date": "today"}
    return TINY | base | more


def test_merge_keeps_the_newest_of_each_key(report):
    old = [reading("bf16", tokens_per_s=1.0), reading("bf16", batch=16, tokens_per_s=2.0)]
    new = [reading("bf16", tokens_per_s=3.0), reading("bf16", tokens_per_s=4.0, mode="default")]
    found = report.merge(old, new)
    assert sorted(r["tokens_per_s"] for r in found) == [2.0, 3.0, 4.0]


def test_the_table_compares_with_bf16_and_with_torchaos_same_scheme(report):
    prefill = {"phase": "prefill", "length": 2048, "prefill_mode": "default"}
    graph = {"prefill_mode": "reduce-overhead"}
    readings = [
        reading("bf16", tokens_per_s=200.0, gb_per_s=3000.0, compile_s=20.0, peak_gb=16.5),
        reading("int4wo-64", tokens_per_s=500.0, compile_s=25.0, cosine=0.98765),
        reading("torchao-int4wo-64", tokens_per_s=250.0, deterministic=False),
        reading("torchao-int8wo", failure="no result\nwithin 90 s"),
        reading("torchao-int8wo-untuned", tokens_per_s=150.0),
        reading("int8wo", tokens_per_s=300.0, date="yesterday"),
        reading("bf16", prefill_ms=72.0, **prefill),
        reading("int4wo-64", prefill_ms=80.0, **prefill),
        reading("torchao-int4wo-64", failure="RuntimeError: slow", **prefill),
        reading("bf16", prefill_ms=70.0, **prefill | graph),
        reading("int4wo-64", prefill_ms=35.0, **prefill | graph | {"date": "yesterday"}),
        reading("bf16", prefill_ms=90.0, **prefill | {"prefill_mode": "eager"}),
        reading("bf16", batch=16, tokens_per_s=1.0),
    ]
    text = report.page({"machines": {"H": {"torch": "2"}}, "readings": readings})
    assert text.count("\n## tiny, 2 layers, batch") == 2
    rows = [[c.strip() for c in ln.split("|")[1:-1]] for ln in text.splitlines() if ln[:1] == "|"]
    by_name = {r[0]: dict(zip(rows[0][1:], r[1:], strict=True)) for r in rows[7:1:-1]}
    ours = by_name["int4wo-64"]
    assert (ours["tokens/s"], ours["x torchao"], ours["compile s"]) == ("500.0", "2.00", "25.0")
    assert ours["cosine"] == "0.9877" and ours["prefill ms"] == "80.0"
    places = [i for i, header in enumerate(rows[0]) if header == "x bf16"]
    assert [rows[3][i] for i in places] == ["2.50", "1.25", "0.90", "2.00 *"]
    assert ours["as a graph ms"] == "35.0"
    assert by_name["torchao-int4wo-64"]["repeats"] == "NO"
    assert by_name["torchao-int8wo"]["tokens/s"] == "-"
    assert by_name["int8wo *"]["tokens/s"] == "300.0"
    assert by_name["int8wo *"]["x torchao"] == "2.00 **", "of the one that there is, and marked"
    assert "torchao-int8wo, decode failed: no result within 90 s" in text
    assert "torchao-int4wo-64, prefill 2048 (default) failed: RuntimeError: slow" in text
    assert "bf16, prefill 2048 (eager): 90.0 ms" in text


def test_a_reading_that_failed_is_compared_with_nothing(report):
    readings = [
        reading("int8wo", failure="late"),
        reading("torchao-int8wo-untuned", tokens_per_s=2.0),
    ]
    text = report.page({"machines": {"H": {"torch": "2"}}, "readings": readings})
    assert "**" not in text.partition("\n## ")[2], "nor marked as if it were"


def test_cosines_to_bf16_where_both_were_computed(report, tmp_path):
    def path(batch: int, name: str) -> Path:
        return tmp_path / f"{batch}{name}.npy"

    np.save(path(2, "bf16"), np.array([[1.0, 0.0], [3.0, 4.0]], np.float32))
    np.save(path(2, "int8wo"), np.array([[2.0, 0.0], [4.0, 3.0]], np.float32))
    np.save(path(1, "int8wo"), np.ones((1, 2), np.float32))
    readings = [reading("int8wo", batch=2), reading("int8wo"), reading("fp8wo", batch=2)]
    readings.append(reading("int8wo", batch=2, mode="default"))
    report.compare(readings, reading("", date="today"), path)
    assert (readings[0]["cosine"], readings[0]["cosine_worst"]) == (0.98, 0.96)
    assert not any("cosine" in r for r in readings[1:])


def test_bars_leave_out_what_failed(report):
    readings = [reading("bf16", tokens_per_s=2.0), reading("int8wo", tokens_per_s=3.0)]
    readings.append(reading("fp8wo", failure="x"))
    (values,) = report.bars(readings).values()
    assert values == [("int8wo", 3.0), ("bf16", 2.0)]


def test_curves_are_geometric_means_of_the_fastest_kernels(report):
    base = {"scheme": "int8dq", "n": 8, "k": 8, "m": 16}
    records = [
        base | {"us": 10.0, "bf16_us": 10.0},
        base | {"us": 5.0, "bf16_us": 10.0},
        base | {"us": 1.0, "bf16_us": 8.0, "k": 16},
        base | {"us": 4.0, "bf16_us": 2.0, "m": 1},
        base | {"failure": "out of memory", "m": 64},
    ]
    assert report.curves(records) == {"int8dq": [(1, 0.5), (16, pytest.approx(4.0))]}


def test_readings_are_published_as_they_come_and_a_late_process_is_ended(
    llama, tmp_path, monkeypatch
):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "line = json.dumps({'phase': 'decode', 'batch': 1, 'tokens_per_s': 2.0})\n"
        f"pathlib.Path({str(tmp_path / 'bf16.lines')!r}).write_text(line + chr(10) + '{{\"half')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(llama, "__file__", str(script))
    args = llama.parse(["--batch", "1,2", "--prefill", "0", "--scratch", str(tmp_path)])
    args.limit, args.deadline, args.date, args.device = 3.0, time.time() + 60, "now", "cpu"
    published = []
    started = time.time()
    llama.launch(args, [], "bf16", published.append)
    assert time.time() - started < 20
    first, missing = published
    assert first[0]["tokens_per_s"] == 2.0 and first[0]["contender"] == "bf16"
    assert [r["batch"] for r in missing] == [2] and missing[0]["failure"] == "no result within 3 s"
    assert sys.modules["llama_process"].RUNNING[-1].wait(timeout=10) == -9


def test_the_conversion_of_a_model_on_the_cpu_is_measured(tmp_path):
    conversion = importlib.import_module("conversion")
    conversion.main(["--shape", "tiny", "--schemes", "int8wo,int4wo-64", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "conversion.json").read_text())["readings"]
    assert [r["scheme"] for r in found] == ["int8wo", "int4wo-64"]
    assert found[0]["model_gb"] > found[1]["model_gb"] > 0 and found[0]["quantize_s"] > 0
    assert "int4wo-64" in (tmp_path / "conversion.md").read_text()
