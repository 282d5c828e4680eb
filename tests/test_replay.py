"""record and Replay: stretches of a graph, computed elsewhere; values that wait."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.replay import Replay, Waiting, record


class Positions(nn.Module):
    """Makes tensors of its own, where its parameters are."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(16, 8))

    def forward(self, x, scale=1.0):
        places = torch.arange(x.shape[0], device=x.device)
        y = self.fc(x + self.table[places]) * scale
        return y.masked_fill(torch.ones(x.shape[0], 8, dtype=torch.bool, device=x.device).tril(), 0)


def recorded(model, *calls):
    return list(record(model.eval().requires_grad_(False), calls))


def replay(recording, device="cpu", prepare=lambda name, x: x):
    return Replay(recording, torch.device(device), prepare, lambda node, x, bias, run: run())


def computed(recording):
    return [n for n in recording.gm.graph.nodes if n.op == "call_function"]


@torch.no_grad()
def test_a_recorded_call_is_not_run_and_replayed_is_what_it_would_have_been():
    model, x = Positions(), torch.randn(5, 8)
    ((recording, values),) = recorded(model, ((x,), {"scale": 2.0}))
    nodes = computed(recording)
    (last,) = recording.gm.graph.find_nodes(op="output")[0].all_input_nodes
    steps = [n for n in nodes if n not in recording.constant]
    found = replay(recording)(steps, values, [last])
    torch.testing.assert_close(found[last], model(x, scale=2.0))
    half = steps[: len(steps) // 2]
    wanted = [n for n in half if any(u not in half for u in n.users)]
    middle = replay(recording)(half, values, wanted)
    rest = replay(recording)(steps[len(half) :], values | middle, [last])
    assert torch.equal(rest[last], found[last])


def test_what_the_graph_makes_is_made_where_it_is_replayed():
    ((recording, values),) = recorded(Positions(), ((torch.randn(5, 8),), {}))
    (last,) = recording.gm.graph.find_nodes(op="output")[0].all_input_nodes
    steps = [n for n in computed(recording) if n not in recording.constant]
    found = replay(recording, "meta")(steps, values, [last])
    assert found[last].device.type == "meta" and found[last].shape == (5, 8)


def test_parameters_are_asked_for_by_name_once():
    model, asked = Positions(), []
    ((recording, values),) = recorded(model, ((torch.randn(5, 8),), {}))
    steps = [n for n in computed(recording) if n not in recording.constant]
    run = replay(recording, prepare=lambda name, x: asked.append(name) or x)
    run(steps, values)
    run(steps, values)
    assert sorted(asked) == ["fc.bias", "fc.weight", "table"]
    run.forget()
    run(steps, values)
    assert len(asked) == 6


def test_equal_calls_share_a_recording_and_it_is_the_models_own_parameters():
    model = Positions()
    found = recorded(model, *(((torch.randn(5, 8),), {}) for _ in range(3)))
    assert len({id(recording) for recording, _ in found}) == 1
    held = {id(p) for p in (*model.parameters(), *model.buffers())}
    assert {id(x) for x in found[0][0].fixed.values()} == held


@pytest.mark.parametrize("disk", [False, True])
def test_values_wait_as_they_are(tmp_path, disk):
    waiting = Waiting(torch.device("cpu"), tmp_path if disk else None)
    x = torch.randn(3, 4, 5).transpose(0, 2)
    values = {
        "a": x,
        "b": (x.bfloat16(), 7, None),
        "c": torch.tensor(3),
        "d": x[:1].expand(4, 4, 3),
    }
    waiting.put(0, {"a": 0})
    waiting.put(1, values)
    waiting.put(0, values)
    for i in (0, 1):
        found = waiting.get(i)
        assert torch.equal(found["a"], x) and found["a"].stride() == x.stride()
        assert torch.equal(found["b"][0], x.bfloat16()) and found["b"][1:] == (7, None)
        assert found["c"] == 3 and torch.equal(found["d"], values["d"])
    assert bool(list(tmp_path.iterdir())) == disk
