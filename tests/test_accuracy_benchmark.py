"""benchmarks/accuracy*.py: the outliers, the bootstrap, the expectations; nothing is trained."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxquant

FOLDER = str(Path(__file__).parents[1] / "benchmarks")
PARTS = ("data", "model", "train", "contenders", "subjects", "expectations", "report")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors so small take longer with more, where others use the cores
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def parts():
    """The modules by the last part of their names, ``main`` for accuracy.py."""
    found = {part: importlib.import_module(f"accuracy_{part}") for part in PARTS}
    return type("Parts", (), found | {"main": importlib.import_module("accuracy")})


@pytest.fixture
def tiny(parts):
    """Two blocks, 128 wide, with seeded weights large enough that tokens matter."""
    shape = dataclasses.replace(
        parts.model.SIZES["small"].shape, layers=2, width=128, hidden=256, heads=2, kv_heads=1
    )
    model = parts.model.LanguageModel(shape, 32)
    parts.model.initialize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 5.0)
    return model.eval().requires_grad_(False)


class Uniform(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 256)


class Certain(nn.Module):
    """Knows that the next byte is this one and one more."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((tokens + 1) % 256, 256) * 100.0


def test_the_perplexity_of_a_uniform_model_is_the_vocabulary(parts):
    tokens = torch.randint(256, (5, 9))
    reference = parts.model.log_probabilities(Uniform(), tokens, 3)
    assert reference.shape == (5, 8, 256)
    losses, divergence = parts.model.sequence_losses(Uniform(), tokens, 2, reference)
    assert losses.shape == (5,) and losses.dtype == torch.float64
    assert losses.exp() == pytest.approx(256, rel=1e-6)
    assert divergence.tolist() == [0] * 5


def test_losses_are_of_the_next_token_sequence_by_sequence(parts):
    right = torch.arange(9).expand(2, 9)
    tokens = torch.cat([right, right.flip(1)])
    uniform = parts.model.log_probabilities(Uniform(), tokens, 4)
    losses, divergence = parts.model.sequence_losses(Certain(), tokens, 3, uniform)
    assert losses[:2].max() < 1e-6 and losses[2:].min() > 99
    # of 256 tokens that the uniform model deems alike, 255 are 100 nats away
    assert divergence.numpy() == pytest.approx(100 * 255 / 256 - math.log(256), rel=1e-6)


def test_the_model_reads_no_later_token_and_knows_positions(tiny):
    tokens = torch.randint(256, (1, 32))
    logits = tiny(tokens)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    after = tiny(changed)
    assert torch.equal(after[:, :20], logits[:, :20])
    assert not torch.allclose(after[:, 21:], logits[:, 21:], atol=1e-3)
    swapped = tokens.clone()
    swapped[0, [3, 9]] = tokens[0, [9, 3]]
    assert not torch.allclose(tiny(swapped)[:, -1], logits[:, -1], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_change_no_bit_of_the_float_model(parts, tiny, dtype):
    tokens = torch.randint(256, (2, 32))
    model = tiny.to(dtype)
    wanted, gains = model(tokens), model.blocks[1].attention_norm.weight.clone()
    parts.model.add_outliers(model, factor=64.0, share=0.02)
    assert torch.equal(model(tokens), wanted)
    assert (model.blocks[1].attention_norm.weight != gains).sum() == 3
    assert len(parts.model.readers(model)) == 5


def noise(parts, model, tokens: torch.Tensor, wanted: torch.Tensor, **options) -> float:
    """The mean squared error of int8dq's logits, with these options of a row."""
    data = parts.contenders.Calibration(model, tokens.split(4), parts.subjects.but_the_head)
    row = parts.contenders.Contender(name="", scheme="int8dq", **options)
    quantized = parts.contenders.convert(row, data)
    assert isinstance(quantized.lm_head, nn.Linear)
    assert isinstance(quantized.blocks[0].attention.q_proj, fxquant.QuantLinear)
    assert isinstance(model.blocks[0].attention.q_proj, nn.Linear)  # the subject stays float
    return float((quantized(tokens) - wanted).square().mean())


def test_int8_suffers_from_outliers(parts, tiny):
    tokens = torch.randint(256, (8, 32))
    wanted = tiny(tokens)
    before = noise(parts, tiny, tokens, wanted)
    parts.model.add_outliers(tiny, factor=64.0, share=0.02)
    assert noise(parts, tiny, tokens, wanted) > 20 * before


def test_smoothing_wins_back_what_the_outliers_cost(parts, tiny):
    tokens = torch.randint(256, (8, 32))
    wanted = tiny(tokens)
    before = noise(parts, tiny, tokens, wanted)
    parts.model.add_outliers(tiny, factor=64.0, share=0.02)
    assert noise(parts, tiny, tokens, wanted, smooth=0.5) < 2 * before


def losses_of(parts, **rows):
    return parts.expectations.Losses(
        {name: np.atleast_2d(np.asarray(v, dtype=float)) for name, v in rows.items()}, "base"
    )


def test_the_bootstrap_is_paired_and_has_the_width_of_theory(parts):
    random = np.random.default_rng(1)
    base = random.normal(2, 1, size=(1, 400))
    change = random.normal(0.1, 0.02, size=(1, 400))
    losses = losses_of(parts, base=base, row=base + change)
    figure = losses.delta("row")
    assert figure[0] == pytest.approx(change.mean())
    low, high = parts.expectations.interval(figure)
    # of the differences alone: unpaired, the spread of the base would make it fifty times as wide
    assert high - low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.1)
    assert low < change.mean() < high
    assert parts.expectations.interval(losses.delta("base")) == (0, 0)


def test_seeds_are_averaged_before_items_are_drawn(parts):
    losses = losses_of(parts, base=np.zeros((2, 3)), row=[[1, 2, 3], [3, 2, 1]])
    assert set(losses.delta("row")) == {2.0}


def test_rows_are_compared_on_the_seeds_that_both_have(parts):
    losses = losses_of(parts, base=np.ones((2, 2)), rtn=[[2, 2], [9, 9]], gptq=[[1.5, 1.5]])
    assert losses.delta("rtn")[0] == 4.5 and losses.delta("gptq")[0] == 0.5
    assert parts.expectations.recovered("gptq", "rtn")(losses)[0] == pytest.approx(50)
    assert parts.expectations.excess("rtn", "gptq")(losses)[0] == pytest.approx(500)


def test_figures_by_hand(parts):
    e = parts.expectations
    losses = losses_of(parts, base=[1, 1], rtn=[1.2, 1.2], gptq=[1.05, 1.05])
    assert e.recovered("gptq", "rtn")(losses)[0] == pytest.approx(75)
    assert e.excess("rtn", "gptq")(losses)[0] == pytest.approx(150)
    assert e.growth("gptq")(losses)[0] == pytest.approx(5.127, abs=1e-3)
    assert e.growth("gptq", 4)(losses)[0] == pytest.approx(22.14, abs=1e-2)
    assert e.worst_cosine("rtn")(losses_of(parts, base=[0, 0], rtn=[0.1, 0.3]))[0] == 0.7


@pytest.mark.parametrize(
    ("change", "bound", "verdict"),
    [
        ([0.1, 0.1], {"at_most": 11}, "met"),
        ([0.1, 0.1], {"at_most": 10}, "missed"),  # exp(0.1) is 10.5 % more
        ([0.1, 0.1], {"at_least": 10}, "met"),
        ([0.0, 0.2], {"at_most": 12}, "met, within noise"),
        ([0.0, 0.2], {"at_least": 12}, "missed, within noise"),
    ],
)
def test_an_expectation_is_met_or_missed_with_its_figure(parts, change, bound, verdict):
    e = parts.expectations
    losses = losses_of(parts, base=[1, 1], row=1 + np.array(change))
    found = e.Expectation("x", "plain", e.growth("row"), "%", **bound).check({"plain": losses})
    assert found["verdict"] == verdict and found["value"] == pytest.approx(10.517, abs=1e-3)


def test_an_expectation_without_its_row_or_subject_is_not_measured(parts):
    e = parts.expectations
    one = e.Expectation("x", "plain", e.excess("row", "gone"), "mnat", at_most=0)
    assert one.check({})["verdict"] == "not measured"
    found = one.check({"plain": losses_of(parts, base=[1, 1], row=[1, 1])})
    assert (found["verdict"], found["missing"]) == ("not measured", "gone")
    assert "needs gone" in parts.report.expectations_table([found])


def test_expectations_and_pairs_name_rows_that_exist(parts):
    """Each figure computes on losses of all contenders: a name with a typing error would raise."""
    measured = {}
    for subject, rows in parts.contenders.CONTENDERS.items():
        names = [row.name for row in rows]
        assert len(names) == len(set(names))
        losses = {name: np.full((3, 4), 1.0 + i) for i, name in enumerate(names)}
        measured[subject] = parts.expectations.Losses(losses, "float32")
    measured["plain divergence"] = measured["plain"]
    checked = [e.check(measured) for e in parts.expectations.EXPECTATIONS]
    assert {c["verdict"] for c in checked} <= {"met", "missed"}
    everything = {row.name for rows in parts.contenders.CONTENDERS.values() for row in rows}
    pairs = parts.expectations.PAIRS
    assert {*pairs, *pairs.values()} <= everything
    torchao = {
        r.scheme
        for rows in parts.contenders.CONTENDERS.values()
        for r in rows
        if r.library == "torchao"
    }
    assert torchao == set(parts.contenders.TORCHAO)


def test_rates_rise_to_one_and_fall(parts):
    rates = [parts.train.rate_at(step, 100) for step in range(100)]
    assert rates[4] == rates[5] == max(rates) == 1.0 and rates[0] == pytest.approx(0.2)
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0.05 <= rates[-1] < 0.06


@pytest.fixture
def untrained(parts, tiny, monkeypatch):
    """The script's own model is the tiny one, as if its training had been kept."""
    size = dataclasses.replace(
        parts.model.SIZES["small"],
        shape=tiny.shape, length=32, held_out=8, calibration=4, models=1,
    )  # fmt: skip
    monkeypatch.setitem(parts.model.SIZES, "small", size)
    monkeypatch.setattr(
        parts.subjects, "trained", lambda *args: (tiny, {"seed": args[3], "steps": 0})
    )
    yield
    parts.subjects._trained.cache_clear()


def test_a_row_that_fails_is_reported_and_the_others_run(
    parts, untrained, tmp_path, monkeypatch, capsys
):
    broken = parts.contenders.Contender(name="int5wo", scheme="int5wo")
    monkeypatch.setitem(
        parts.main.CONTENDERS,
        "plain",
        [*parts.contenders.FLOAT, broken, *parts.contenders.INT8[:2]],
    )
    parts.main.main(
        ["--subjects", "plain", "--seeds", "0", "5", "--size", "small", "--out", str(tmp_path),
         "--schemes", "int5*", "int8wo"]
    )  # fmt: skip
    report = json.loads((tmp_path / "accuracy_cpu.json").read_text())
    plain = report["subjects"]["plain"]
    assert [row["name"] for row in plain["rows"]] == ["float32", "bf16", "int8wo"]
    assert list(plain["failed"]) == ["int5wo"] and "unknown scheme" in plain["failed"]["int5wo"]
    row = plain["rows"][2]
    assert (
        len(row["delta_by_seed"]) == 2 and row["interval"][0] <= row["delta"] <= row["interval"][1]
    )
    assert row["delta"] == pytest.approx(np.mean(row["delta_by_seed"])) and row["delta"] != 0
    assert plain["rows"][0]["delta"] == plain["rows"][0]["divergence"] == 0
    assert 0 < row["divergence_interval"][0] <= row["divergence"] <= row["divergence_interval"][1]
    printed = capsys.readouterr().out
    assert "int5wo failed: UnknownScheme" in printed and "not measured" in printed
    assert (tmp_path / "accuracy_cpu.md").read_text() in printed


def test_without_time_the_float_rows_alone_are_measured(parts, untrained, tmp_path):
    words = "--subjects plain outliers --seeds 0 --size small --limit 0 --schemes int8wo --out"
    parts.main.main([*words.split(), str(tmp_path)])
    subjects = json.loads((tmp_path / "accuracy_cpu.json").read_text())["subjects"]
    for found in (subjects["plain"], subjects["outliers"]):
        assert [row["name"] for row in found["rows"]] == ["float32", "bf16"]
        assert found["failed"] == {"int8wo": "no time was left for it"}


def test_what_was_measured_is_saved_when_it_is_ended(parts, untrained, tmp_path, monkeypatch):
    """As ``timeout`` ends it: in the second of three rows."""
    plain = parts.main.convert

    def convert(row, calibration):
        if row.name == "int8dq":
            signal.raise_signal(signal.SIGTERM)
        return plain(row, calibration)

    monkeypatch.setattr(parts.main, "convert", convert)
    before = signal.getsignal(signal.SIGTERM)
    words = "--subjects plain --seeds 0 --size small --schemes int8wo int8dq fp8wo --out"
    parts.main.main([*words.split(), str(tmp_path)])
    assert signal.getsignal(signal.SIGTERM) == before
    found = json.loads((tmp_path / "accuracy_cpu.json").read_text())["subjects"]["plain"]
    assert [row["name"] for row in found["rows"]] == ["float32", "bf16", "int8wo"]
    late = "no time was left for it"
    assert found["failed"] == {"int8dq": late, "fp8wo": late} and not found["fewer_seeds"]


def test_a_row_keeps_the_seeds_that_it_had_time_for(parts, untrained, tmp_path, monkeypatch):
    """And what looks at no data is measured once for a model."""
    measured = []
    plain = parts.main.convert

    def convert(row, calibration):
        measured.append(row.name)
        if measured.count("int8dq smooth 0.5") == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(row, calibration)

    monkeypatch.setattr(parts.main, "convert", convert)
    words = (
        "--subjects plain --seeds 0 3 4 --size small --schemes int8wo int8dq*0.5 int8dq*0.6 --out"
    )
    parts.main.main([*words.split(), str(tmp_path)])
    found = json.loads((tmp_path / "accuracy_cpu.json").read_text())["subjects"]["plain"]
    seeds = {row["name"]: len(row["delta_by_seed"]) for row in found["rows"]}
    once = {"float32": 3, "bf16": 3, "int8wo": 3}
    assert seeds == once | {"int8dq smooth 0.5": 1, "int8dq smooth 0.6": 1}
    assert found["fewer_seeds"] == {"int8dq smooth 0.5": 1, "int8dq smooth 0.6": 1}
    assert [measured.count(name) for name in once] == [1, 1, 1] and not found["failed"]
    assert (
        "int8dq smooth 0.6: the first 1 of the seeds" in (tmp_path / "accuracy_cpu.md").read_text()
    )


@pytest.mark.parametrize("during", ["the base", "the subject"])
def test_a_seed_that_is_ended_before_it_has_a_base_does_not_count(
    during, parts, untrained, tmp_path, monkeypatch
):
    made, convert, outliers = [], parts.main.convert, parts.main.SUBJECTS["outliers"]

    def subject(args, seed):
        made.append(seed)
        if during == "the subject" and len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        return outliers(args, seed)

    def converted(row, calibration):
        if during == "the base" and len(made) == 3 and row.name == "float32":
            signal.raise_signal(signal.SIGTERM)
        return convert(row, calibration)

    monkeypatch.setitem(parts.main.SUBJECTS, "outliers", subject)
    monkeypatch.setattr(parts.main, "convert", converted)
    words = "--subjects outliers --size small --schemes int8wo --out"
    parts.main.main([*words.split(), str(tmp_path)])
    found = json.loads((tmp_path / "accuracy_cpu.json").read_text())["subjects"]["outliers"]
    assert {row["name"]: len(row["delta_by_seed"]) for row in found["rows"]} == {
        "float32": 2, "bf16": 2, "int8wo": 2
    }  # fmt: skip
    assert len(found["about"]) == 2 and not found["failed"]


def test_rows_for_cuda_are_left_out_without_it(parts):
    rows = parts.main.rows_for("plain", ["torchao int4*"])
    assert {row.library for row in rows} == {"float", "torchao"}
    assert not any(row.cuda for row in rows) and any("int4-64 hqq" in row.name for row in rows)


def test_training_repeats_and_is_read_back_as_it_was(parts, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(parts.train, "TIMED", 1)
    size = dataclasses.replace(
        parts.model.SIZES["small"], shape=tiny.shape, length=32, batch=2, minutes=5, epochs=0.2
    )
    text = parts.data.split({f"m{i}": b"def f(x): return x + %d\n" % i for i in range(60)})
    call = ("tiny", size, text, 0, torch.device("cpu"), tmp_path)
    made, about = parts.train.trained(*call)
    assert about["steps"] > 1 and about["training_loss"] < 5.6
    (kept,) = tmp_path.iterdir()
    read, again = parts.train.trained(*call)
    assert again == about and list(tmp_path.iterdir()) == [kept]
    for name, tensor in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    kept.unlink()
    anew, _ = parts.train.trained(*call)
    assert torch.equal(anew.lm_head.weight, made.lm_head.weight)
    other, _ = parts.train.trained(*call[:3], 1, *call[4:])
    assert not torch.equal(other.lm_head.weight, made.lm_head.weight)
