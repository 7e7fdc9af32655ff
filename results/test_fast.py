# SPDX-License-Identifier: MIT
"""fast.py computes what d2r_sac.py computes, and less of it."""

import math

import fast
import pytest
import torch

import d2r_sac as d2r
import test_d2r_sac as tests
from test_d2r_sac import close, main, small_agent

pendulums = tests.pendulums  # a fixture


@pytest.fixture
def swapped(monkeypatch):
    monkeypatch.setattr(d2r, "D2RNetwork", fast.FastNetwork)
    monkeypatch.setattr(d2r, "Agent", fast.FastAgent)


d2r_agent = fast.PLAIN[1]
FORMS = ["skipping", "static", "compiled"]
CASES = [(name, size, form) for name in tests.MODULES for size in tests.SIZES for form in FORMS[:2]]
CASES += [("as it is", size, "compiled") for size in tests.SIZES]
CASES += [(name, tests.SIZES[0], "compiled") for name in tests.MODULES]


@pytest.mark.parametrize(("name", "size", "form"), dict.fromkeys(CASES), ids=str)
def test_gradients_by_hand(name, size, form, monkeypatch):
    """Against the definition written out, in plain autograd."""
    monkeypatch.setattr(fast.FastNetwork, "static", form == "static")
    torch._dynamo.reset()
    compiled = lambda network: torch.compile(network.run_modules, backend="aot_eager", dynamic=False, fullgraph=True)
    plain = lambda network: network.run_modules
    tests.check_gradients(name, size, monkeypatch, compiled if form == "compiled" else plain, fast.FastNetwork)


SWITCHES = [{}, {"resrouting": False}, {"route_balancing": False}, {"sample_k": False}, {"top_k": 1}, {"top_k": 4}]
SWITCHES += [{"routing": routing, "parallel_modules": P} for routing, P in (("layer", 2), ("model", 2), ("model", 1))]


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_whole_updates(options, form, monkeypatch):
    monkeypatch.setattr(fast.FastNetwork, "static", form == "static")
    torch.set_default_dtype(torch.float64)
    try:
        plain, batch = small_agent(**options, max_task_loss=1e9)
        with monkeypatch.context() as patch:
            patch.setattr(d2r, "D2RNetwork", fast.FastNetwork)
            patch.setattr(d2r, "Agent", fast.FastAgent)
            other, _ = small_agent(**options, max_task_loss=1e9)
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        other.load_state_dict(plain.state_dict())
        routes = plain.actor(batch[0], plain.tasks.repeat_interleave(8), temperature=torch.full((3,), 3.0))[1]
        results = []
        for agent in (plain, other):
            torch.manual_seed(5)
            results.append([agent.update(*batch[:5], routes) for _ in range(6)])
        for expected, metrics in zip(*results):
            assert expected.keys() == metrics.keys() and not expected["skipped"].any()
            for name, values in expected.items():
                close(metrics[name], values, 1e-10 * (1 + values.abs().max()))
        for name, values in plain.state_dict().items():
            close(other.state_dict()[name], values)
    finally:
        torch.set_default_dtype(torch.float32)


def test_modules_are_computed_for_the_samples_that_use_them(swapped):
    """Forward hooks see each module called with as many rows as samples use it; what nobody uses may be broken."""
    network, inputs, task, rows = tests.tiny_network(8), torch.randn(40, 3), torch.zeros(40, dtype=torch.long), {}
    for i, module in enumerate(network.base_modules):
        module.register_forward_hook(lambda module, inputs, output, i=i: rows.update({i: len(inputs[0])}))
    _, routes = network(inputs, task, temperature=torch.full((2,), 5.0))
    assert rows == dict(enumerate(d2r.used_modules(routes).sum(0).tolist()))
    assert 0 < min(rows.values()) < max(rows.values()) == 40
    torch.compile(network, backend="eager", dynamic=False, fullgraph=True)(inputs, task, routes=routes)
    assert rows == dict.fromkeys(range(8), 40)
    output, routes = network(inputs[:1], task[:1])
    unused = (~d2r.used_modules(routes)[0]).nonzero().flatten().tolist()
    assert 0 < len(unused) < 8
    for i in unused:
        network.base_modules[i].weight.data.fill_(math.nan)
    close(network(inputs[:1], task[:1])[0], output, 1e-6)
    network(inputs[:1], task[:1])[0].sum().backward()
    for i, module in enumerate(network.base_modules):
        assert module.weight.grad.isfinite().all() and (module.weight.grad == 0).all() == (i in unused)


def test_it_refuses_to_train_what_was_changed_in_the_other_file_only(swapped, monkeypatch):
    def install():
        d2r.D2RNetwork, d2r.Agent = classes
        fast.install()

    without_resrouting = lambda f, x, w, kept: ((w[..., None] * (f + x)).sum(1),) * 2
    louder = lambda *options, loss=d2r_agent.critic_loss: 1.001 * loss(*options)
    other = type("Other", (d2r_agent,), {"critic_loss": louder})
    changes = [(d2r, "mix_sources", without_resrouting), (d2r_agent, "critic_loss", louder), (d2r, "Agent", other)]
    for owner, name, change in changes:
        classes = (fast.PLAIN[0], other if name == "Agent" else d2r_agent)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, change)
            with pytest.raises(SystemExit, match=r"results/fast.py and d2r_sac.py compute different losses or gradi"):
                install()
    classes = fast.PLAIN
    twice = lambda *options, loss=d2r_agent.actor_loss: [2 * value for value in loss(*options)]
    monkeypatch.setattr(d2r_agent, "actor_loss", twice)
    install()
    assert (d2r.D2RNetwork, d2r.Agent) == (fast.FastNetwork, fast.FastAgent)


def test_a_run_with_fast_networks(tmp_path, pendulums, swapped):
    """It may continue one of d2r_sac.py."""
    options = [*tests.TWO_TASKS.split(), "--run-dir", tmp_path / "run", "--device", "cpu"]
    assert main(*options, "--steps", 30, function=lambda: (fast.install(), d2r.main())[1]) == 0
    d2r.D2RNetwork, d2r.Agent = fast.PLAIN
    assert main(*options, "--steps", 40) == 0
    assert tests.checkpoint(tmp_path / "run")["updates"] == 20
