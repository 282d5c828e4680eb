"""benchmarks/accuracy_data.py: what is learned from, what is held out, and what is drawn from it."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("accuracy_data")


def sources(count: int = 400) -> dict[str, bytes]:
    return {f"package.module_{i}": b"x = %d\n" % i * (i % 7 + 1) for i in range(count)}


def test_modules_are_held_out_whole_by_their_names_alone(data):
    given = sources()
    text = data.split(given)
    training, held_out = set(text.training), set(text.held_out)
    assert not training & held_out and training | held_out == set(given)
    assert 0.02 < len(held_out) / len(given) < 0.15
    assert all(found == given[name] for name, found in text.held_out.items())
    backwards = data.split(dict(reversed(given.items())))
    assert list(backwards.training) == list(text.training) and backwards.digest == text.digest
    name = next(iter(held_out))
    assert name in data.split({name: b"another text", "more": b"x"}).held_out


def test_copies_count_once_and_so_never_on_both_sides(data):
    names = [f"m{i}" for i in range(100)]
    assert {data.is_held_out(n) for n in names} == {False, True}
    text = data.split({n: b"the same\n" for n in names} | {"empty": b" \n"})
    assert [*text.training, *text.held_out] == ["m0"]


def test_the_digest_tells_texts_and_splits_apart(data):
    digests = {
        data.Text(*two).digest
        for two in (
            ({"a": b"x"}, {"b": b"y"}),
            ({"a": b"x", "b": b"y"}, {}),
            ({"b": b"y"}, {"a": b"x"}),
            ({"a": b"xb"}, {"b": b"y"}),
        )
    }
    assert len(digests) == 4


def test_the_standard_library_has_neither_tests_nor_packages_of_others(data):
    text = data.standard_library()
    names = [*text.training, *text.held_out]
    assert len(text.held_out) > 20 and {"json.decoder", "argparse"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split(".")) for name in names)
    assert not set(text.training.values()) & set(text.held_out.values())


def test_windows_lie_within_modules_and_every_module_keeps_its_share(data):
    given = {"a": bytes(range(1, 11)), "b": bytes(range(101, 141)), "short": b"12"}
    all_ = data.windows(given, 100, 4)
    assert all_.shape == (2 + 10, 4) and all_.dtype == torch.int64
    assert all_[:3].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [101, 102, 103, 104]]
    some = data.windows(given, 6, 4)
    assert some[:, 0].tolist() == [1, 101, 109, 117, 125, 133]


def test_drawn_windows_come_from_the_stream_and_repeat_with_the_seed(data):
    stream = data.stream({"a": b"abc", "b": b"defg"})
    assert bytes(stream.tolist()) == b"\0abc\0defg"
    draws = [data.draw(stream, 50, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert {bytes(w) for w in draws[0].tolist()} == {
        b"\0abc\0defg"[i : i + 3] for i in range(len(stream) - 2)
    }


def test_unigram_perplexity_of_four_even_letters(data):
    text = data.Text({"a": b"abcd" * 100000}, {"b": b"dcba"})
    # two separators among the bytes: one in 400001 and one in 5
    assert data.unigram_perplexity(text) == pytest.approx(
        math.exp((4 * math.log(4) + math.log(400257 / 2)) / 5), rel=1e-3
    )
