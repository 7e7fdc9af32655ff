# SPDX-License-Identifier: MIT
"""Tests of d2r_sac.py: first the method, against its definitions, reference values and computations that share no code
with it; then the program, on the real Meta-World, on pendulums, and where it fails."""

import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import d2r_sac as d2r

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may have inherited another one
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
torch.set_num_threads(1)
SCRIPT = Path(d2r.__file__)
RESULTS = SCRIPT.parent / "results"
GOLDEN = json.loads((RESULTS / "golden.json").read_text())
TINY = {"num_modules": 4, "module_width": 16, "encoder_widths": (32, 32), "router_widths": (16,), "episode_length": 10}
SMALL = "--num-modules 4 --module-width 16 --encoder-widths 32 32 --router-widths 16 --episode-length 10"
SMALL += " --eval-every 1000000 --eval-episodes 1"
FORMS = pytest.mark.parametrize("form", ["skipping", "static"])
COMPILED = torch._dynamo.utils.counters["stats"]


def in_form(form, *networks):
    """skipping: as on a CPU, unused modules left out; static: compiled, with the shapes and code of a GPU."""
    torch._dynamo.reset()
    for network in networks if form == "static" else ():
        network.compile(backend="aot_eager", dynamic=False, fullgraph=True)


def close(tensor, reference, tolerance=1e-10):
    reference = torch.as_tensor(reference, dtype=tensor.dtype)
    assert tensor.shape == reference.shape and (tensor - reference).abs().max() <= tolerance


# ----------------------------------------------------------------------------------------------------- which sources
def sources_of(M, routing="module", P=4):
    """The sources among which modules 1 ... M-1 and the head may choose."""

    def sources(i):
        if routing == "module":
            return {*range(i)}
        if i < P:
            return {0}
        before = {*range((i // P - 1) * P, i // P * P)}
        return before if routing == "layer" or i == M else {i - P}

    return [sources(i) for i in range(1, M + 1)]


def random_table(B, M, *routing):
    table = torch.randn(B, M, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forbidden = [[j not in sources for j in range(M)] for sources in sources_of(M, *routing)]
    return table.masked_fill(torch.tensor(forbidden), -math.inf)


def dense(weights, routes):
    """Weights (B, M, K) of the routes as a table (B, M, M), 0 for what is not chosen."""
    B, M, _ = routes.shape
    return weights.new_zeros(B, M, M).scatter_add(-1, routes.long(), weights)


def network_args(**options):
    return types.SimpleNamespace(**{"resrouting": True, "routing": "module", "parallel_modules": 4, **options})


def tiny_network(num_modules, top_k=2, **options):
    torch.manual_seed(0)
    sizes = {"module_width": 5, "encoder_widths": (7, 7), "router_widths": (6,)}
    return d2r.D2RNetwork(3, 2, 2, network_args(num_modules=num_modules, top_k=top_k, **sizes, **options))


GRANULARITIES = [("module", 4), ("layer", 4), ("layer", 2), ("model", 4), ("model", 1)]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(4, 2), (8, 3), (8, 8), (16, 2), (1, 1), (7, 3)])
def test_gates(M, K, granularity):
    """A network has logits only for what may be chosen; weights are positive for the K chosen, and sum to 1."""
    routing, P = granularity
    if M % P and routing != "module":
        with pytest.raises(ValueError, match=rf"num_modules, {M}, must be a multiple of parallel_modules, {P}"):
            tiny_network(M, K, routing=routing, parallel_modules=P)
        return
    network = tiny_network(M, K, routing=routing, parallel_modules=P)
    _, logits = network.routing_network(torch.randn(50, 3), torch.zeros(50, dtype=torch.long))
    allowed = sources_of(M, routing, P)
    assert [{*row.nonzero().flatten().tolist()} for row in logits[7] > -math.inf] == allowed
    logits, number = random_table(50, M, routing, P), torch.tensor([len(sources) for sources in allowed])
    for routes in (d2r.top_k(logits, K), d2r.sample_k(logits / torch.linspace(0.1, 3, 50)[:, None, None], K)):
        table = dense(d2r.routing_weights(logits, routes), routes)
        assert ((table > 0).sum(-1) == number.clamp(max=K)).all()
        close(table.sum(-1), torch.ones(50, M), 1e-12)
        assert (table[logits == -math.inf] == 0).all()
    for b, i in itertools.product(range(50), range(M)):
        best = sorted(allowed[i], key=lambda j: logits[b, i, j])[-K:]
        assert {*d2r.top_k(logits, K)[b, i].tolist()} == {*best}
    likely = logits.exp() > (logits.exp().sum(-1) / (number + 1))[..., None]
    assert torch.equal(d2r.gradient_kept(logits), likely)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_k_draws_without_replacement(temperature):
    """Pairs of three sources, against the exact probabilities: chi-square with 2 degrees of freedom."""
    draws, logits = 20_000, random_table(1, 3)
    logits[0, 2] = torch.tensor(GOLDEN["sample_k"]["logits"])
    torch.manual_seed(0)
    routes = d2r.sample_k(logits.expand(draws, 3, 3) / temperature, 2)
    pairs = ["".join(map(str, sorted(pair))) for pair in routes[:, 2].tolist()]
    expected = {pair: draws * p for pair, p in GOLDEN["sample_k"]["pair_probability"][str(temperature)].items()}
    assert set(pairs) == set(expected)
    assert sum((pairs.count(pair) - e) ** 2 / e for pair, e in expected.items()) < 13.82  # probability 0.001


def test_each_task_samples_at_its_own_temperature():
    inputs, task = torch.randn(1, 3).expand(2000, 3), torch.arange(2).repeat(1000)
    network = tiny_network(4)
    (_, best), (_, routes) = network(inputs, task), network(inputs, task, temperature=torch.tensor([1e-6, 1e6]))
    assert (routes[task == 0].sort(-1).values == best[task == 0].sort(-1).values).all()
    counts = routes[task == 1][:, 3].sort(-1).values.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6 and (counts - 1000 / 6).abs().max() < 5 * math.sqrt(1000 / 6)


@pytest.mark.parametrize("granularity", [("module", 4), ("layer", 2), ("model", 3), ("model", 1)], ids=str)
def test_used_modules_against_every_path(granularity):
    routes = d2r.sample_k(random_table(200, 6, *granularity), 2)

    def on_paths(route, i):
        return set().union(*({j} | (on_paths(route, j) if j else set()) for j in route[i - 1]))

    for used, route in zip(d2r.used_modules(routes), routes.tolist()):
        assert set(used.nonzero().flatten().tolist()) == on_paths(route, 6)


def test_routes_from_outside():
    """A source named twice counts once; too few rows are an error, as is a K beyond M."""
    network, inputs, task = tiny_network(5), torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    twice = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 2], [2, 2, 0], [4, 4, 1]]).expand(6, 5, 3)
    close(d2r.routing_weights(random_table(6, 5), twice).sum(-1), torch.ones(6, 5), 1e-12)
    close(network(inputs, task, routes=twice)[0], network(inputs, task, routes=twice[..., 1:])[0], 1e-6)
    with pytest.raises(ValueError, match="shorter"):
        network(inputs, task, routes=twice[:, :2])
    with pytest.raises(ValueError, match=r"top_k, 6, must lie between 0 and num_modules, 5"):
        tiny_network(5, top_k=6)


# ------------------------------------------------------------------------------------------------------- ResRouting
def plain(modules, head, h, w, kept):
    """The definition of ResRouting in plain autograd, every module being computed for every sample: the oracle.

    w, kept (B, M, M): routing weights, 0 where not chosen, and whether an edge is kept."""
    f, x = [modules[0](h.relu())], [torch.zeros(())]
    for module, w_i, kept_i in zip([*modules[1:], head], w.unbind(1), kept.unbind(1)):
        own = shortcut = 0
        for f_j, x_j, w_ij, kept_ij in zip(f, x, w_i.T[..., None], kept_i.T[..., None]):
            own = own + w_ij * (torch.where(kept_ij, f_j, f_j.detach()) + x_j)
            shortcut = shortcut + w_ij * (f_j + x_j)
        f.append(module(own))
        x.append(shortcut)
    return f[-1]


MODULES = {
    "as it is": d2r.BaseModule,
    "SiLU": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.SiLU()),
    "LayerNorm": lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o), nn.ReLU()),
    "in place": lambda i, o: nn.Sequential(nn.ELU(inplace=i == o), nn.Linear(i, 7), nn.Tanh(), nn.Linear(7, o)),
}


def routed(M, K, H, B, make_module=d2r.BaseModule, routing="module"):
    """A network with random parameters; leaves h and logits; routes; and w, kept as the oracle takes them."""
    torch.manual_seed(1)
    sizes = {"num_modules": M, "top_k": K, "module_width": H, "encoder_widths": (7,), "router_widths": ()}
    network = d2r.D2RNetwork(3, 2, 2, network_args(**sizes, routing=routing), make_module).double()
    base = network.base_modules
    assert str(base.module[0]) == str(make_module(7, H))
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    logits = (3 * random_table(B, M, routing)).requires_grad_()
    h = torch.randn(B, 7, dtype=torch.float64, requires_grad=True)
    routes = d2r.sample_k(logits.detach() / 2, K)

    def table():
        chosen = torch.zeros(B, M, M, dtype=torch.bool).scatter(-1, routes, True)
        allowed = enumerate(sources_of(M, routing))
        kept = torch.stack([logits[:, row].softmax(-1) > 1 / (len(sources) + 1) for row, sources in allowed], 1)
        assert M == 1 or 0 < (kept & chosen).sum() < chosen.sum(), "some chosen edges should be blocked, some not"
        return logits.masked_fill(~chosen, -math.inf).softmax(-1), kept

    return network.run_modules, base, h, logits, routes, table


SIZES = [(9, 3, 6, 4), (1, 1, 3, 2), (5, 2, 4, 3), (6, 6, 5, 3), (8, 2, 4, 3, "layer")]  # M, K, H, B
CASES = [(name, size, "skipping") for name, size in itertools.product(MODULES, SIZES)]
CASES += [("as it is", size, "static") for size in SIZES] + [(name, SIZES[0], "static") for name in MODULES]


@pytest.mark.parametrize(("name", "size", "form"), dict.fromkeys(CASES), ids=str)
def test_resrouting_against_plain_autograd(name, size, form):
    M, K, H, B, routing = (*size, "module")[:5]
    run, base, h, logits, routes, table = routed(M, K, H, B, MODULES[name], routing)
    expected, leaves = plain(base.module, base.head, h, *table()), [h, logits, *base.parameters()]
    grad_output, options = torch.randn_like(expected), {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(expected, leaves, grad_output, **options)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", dynamic=False, fullgraph=True)
    output = (compiled if form == "static" else run)(h, logits, routes)
    close(output, expected)
    for gradient, reference in zip(torch.autograd.grad(output, leaves, grad_output, **options), gradients):
        close(gradient, reference)


def test_modules_are_computed_for_the_samples_that_use_them():
    """Forward hooks see each module called with as many rows as samples use it; what nobody uses may be broken."""
    network, inputs, task, rows = tiny_network(8), torch.randn(40, 3), torch.zeros(40, dtype=torch.long), {}
    modules = network.base_modules.module
    for i, module in enumerate(modules):
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
        modules[i].weight.data.fill_(math.nan)
    close(network(inputs[:1], task[:1])[0], output, 1e-6)
    network(inputs[:1], task[:1])[0].sum().backward()
    for i, module in enumerate(modules):
        assert module.weight.grad.isfinite().all() and (module.weight.grad == 0).all() == (i in unused)


# ------------------------------------------------------------------------------------------- parity with references
def close_rows(table, reference):
    for sample, expected in zip(table, reference, strict=True):
        for i, row in enumerate(expected):
            assert sample[i, : i + 1].tolist() == pytest.approx(row, abs=1e-10)


@FORMS
@pytest.mark.parametrize("resrouting", [True, False])
def test_golden_network(resrouting, form):
    sizes = {"num_modules": 4, "top_k": 2, "module_width": 4, "encoder_widths": (6, 6), "router_widths": (5,)}
    network, parameters = d2r.D2RNetwork(3, 2, 2, network_args(**sizes, resrouting=resrouting)).double(), {}
    own_names = {"obs_encoder.1": "obs_encoder.2", "router.1": "router.2"}  # the ReLUs between them count, too
    for p, (name, shape) in enumerate(GOLDEN["parameters"]):
        layer, leaf = name.rsplit(".", 1)
        part = "base_modules" if layer.startswith(("module", "head")) else "routing_network"
        parameters[name] = network.get_parameter(f"{part}.{own_names.get(layer, layer)}.{leaf}")
        entries = [0.6 * math.sin(1.3 * p + 0.7 * k + 0.1) for k in range(math.prod(shape))]
        parameters[name].data.copy_(torch.tensor(entries, dtype=torch.float64).view(shape))
    assert len(parameters) == len(list(network.parameters()))
    in_form(form, network)
    graphs = COMPILED["unique_graphs"]
    obs, task = torch.tensor(GOLDEN["obs"], dtype=torch.float64), torch.tensor(GOLDEN["task"])
    _, logits = network.routing_network(obs, task)
    close_rows(logits, GOLDEN["routing_logits"])
    close_rows(logits.softmax(-1), GOLDEN["target_probability"])
    close_rows(d2r.gradient_kept(logits), GOLDEN["gradient_kept"])
    behavior = torch.tensor([[(row * 2)[:2] for row in sample] for sample in GOLDEN["behavior_routes"]])
    for kind, given in (("top_k", None), ("behavior", behavior)):
        output, routes = network(obs, task, routes=given)
        assert given is None or routes is given
        close(output, GOLDEN[kind]["output"])
        close_rows(dense(d2r.routing_weights(logits, routes), routes), GOLDEN[kind]["routing_weights"])
    sum((2 * b + c + 1) * output[b, c] for b in range(4) for c in range(2)).backward()
    kind = "gradient_resrouting" if resrouting else "gradient_without_resrouting"
    for name, parameter in parameters.items():
        close(parameter.grad, GOLDEN["behavior"][kind][name])
    assert (COMPILED["unique_graphs"] > graphs) == (form == "static")


def small_agent(tasks=3, device="cpu", **changes):
    """An agent of tasks with observations of 5 numbers and actions of 4, and a batch of 8 samples of each."""
    args, *_ = d2r.parse_arguments(["--env-id", "reach-v3", *SMALL.split()])
    make_module = changes.pop("make_module", None)
    vars(args).update(changes)
    torch.manual_seed(0)
    agent, B = d2r.Agent(5, 4, tasks, args, torch.device(device), make_module), 8 * tasks
    agent.log_alpha.data = torch.linspace(-2, 0, tasks, device=device)
    obs, next_obs, action = torch.randn(B, 5), torch.randn(B, 5), torch.rand(B, 4) * 2 - 1
    routes = d2r.sample_k(random_table(B, 4), 2).to(torch.uint8)
    return agent, (obs, action, 10 * torch.rand(B), next_obs, torch.rand(B) < 0.3, routes)


def test_golden_temperatures_and_ablations():
    agent, (obs, *_) = small_agent(tasks=4)
    assert not torch.equal(agent.act(obs[:4])[1], agent.act(obs[:4])[1])
    agent.log_alpha.data = torch.tensor(GOLDEN["route_temperature"]["log_alpha"], dtype=torch.float64)
    close(agent.temperature(), GOLDEN["route_temperature"]["temperature"])
    agent.args.route_balancing = False
    close(agent.temperature(), [1.0] * 4)
    agent.args.sample_k = False
    assert agent.temperature() is None and torch.equal(agent.act(obs[:3])[1], agent.act(obs[:4])[1][:3])
    assert not small_agent(resrouting=False)[0].actor.resrouting
    agent = small_agent(routing="model", parallel_modules=2)[0]
    for network, width in zip((agent.actor, *agent.critics), (5, 9, 9), strict=True):
        assert network(torch.randn(3, width), agent.tasks)[1][0, 1:3].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("how", ["argument", "replaced"])
def test_a_module_of_ones_own_reaches_the_agent(monkeypatch, how):
    if how == "replaced":
        monkeypatch.setattr(d2r, "BaseModule", MODULES["SiLU"])
    agent, batch = small_agent(make_module=MODULES["SiLU"] if how == "argument" else None)
    for network in (agent.actor, *agent.critics, *agent.target_critics):
        assert all(str(module[1]) == "SiLU()" for module in network.base_modules.module)
    assert all(loss.isfinite().all() for loss in agent.update(*batch).values())


def test_parameter_counts_and_initialisation():
    agent = d2r.Agent(39, 4, 10, d2r.Args())
    networks = (agent.actor, *agent.critics)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [684_240, 684_937, 684_937]
    heads = [network.base_modules.head for network in networks]
    for layer in (layer for network in networks for layer in network.modules() if isinstance(layer, nn.Linear)):
        bound = 3e-3 if layer in heads else layer.out_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert (layer.bias.abs() <= 3e-3).all() if layer in heads else (layer.bias == 0.1).all()
    assert not torch.equal(heads[1].weight, heads[2].weight)
    pairs = zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True)
    assert all(torch.equal(critic, target) and not target.requires_grad for critic, target in pairs)
    assert agent.target_entropy == -4


# ------------------------------------------------------------------------------------------------- SAC and the update
def test_action_distribution():
    torch.manual_seed(0)
    output = torch.cat([torch.randn(1000, 4), torch.rand(1000, 4) * 3 - 2], -1).double()
    action, log_prob = d2r.sample_action(output)
    normal = torch.distributions.Normal(output[:, :4], output[:, 4:].exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    inside = (action.abs() < 1 - 1e-6).all(-1)
    close(log_prob[inside], squashed.log_prob(action).sum(-1)[inside], 1e-6)
    wide, _ = d2r.sample_action(torch.cat([torch.zeros(10_000, 1), torch.full((10_000, 1), 9.0)], -1).double())
    assert wide.atanh()[wide.abs() < 0.99].std() < 2  # log std 9 would leave nearly nothing there, and 2 leaves 28 %
    assert 0.2 < (wide.abs() < 0.99).double().mean() < 0.4 and inside.sum() > 500


@pytest.mark.parametrize(("max_task_loss", "form"), [(3e3, "skipping"), (None, "skipping"), (None, "static")])
def test_each_part_gets_the_gradient_of_its_own_loss_alone(max_task_loss, form):
    """So the critics get none from the actor's loss. max_task_loss None: a limit that one task exceeds."""
    agent, batch = small_agent(sample_k=False, max_grad_norm=1e9)
    for parameter in agent.target_critics.parameters():
        parameter.mul_(1.1)  # they begin as copies of the critics
    obs, action, reward, next_obs, terminated, routes = batch
    task, alpha = torch.arange(3).repeat_interleave(8), agent.log_alpha.detach().exp()

    def q(critics, obs, action):
        return [critic(torch.cat([obs, action], -1), task)[0][:, 0] for critic in critics]

    torch.manual_seed(7)
    with torch.no_grad():
        next_action, next_log_prob = d2r.sample_action(agent.actor(next_obs, task)[0])
        soft_value = torch.min(*q(agent.target_critics, next_obs, next_action)) - alpha[task] * next_log_prob
        target = 0.1 * reward + 0.99 * torch.where(terminated, 0.0, soft_value)
    own_action, log_prob = d2r.sample_action(agent.actor(obs, task, routes=routes)[0])
    losses = [sum((value - target) ** 2 for value in q(agent.critics, obs, action))]
    losses += [alpha[task] * log_prob - torch.min(*q(agent.critics, obs, own_action))]
    losses += [-agent.log_alpha[task] * (log_prob.detach() - 4)]
    weight = 3 / alpha / (1 / alpha).sum()
    expected = [loss.view(3, 8).mean(1) * w for loss, w in zip(losses, (weight, weight, 1))]
    summed = sum(expected).detach()
    agent.args.max_task_loss = max_task_loss or summed.sort().values[1:].mean().item()
    counted = (summed <= agent.args.max_task_loss).float()
    assert counted.sum() == (3 if max_task_loss else 2)
    gradients, options = {}, {"retain_graph": True, "materialize_grads": True}
    parts = [*agent.critics.parameters()], [*agent.actor.parameters()], [agent.log_alpha]
    for part, loss in zip(parts, expected):
        gradients |= dict(zip(part, torch.autograd.grad((counted * loss).sum() / 3, part, **options)))

    in_form(form, agent.actor, *agent.critics, *agent.target_critics)
    frozen = agent.critics[0].base_modules.module[2].weight.requires_grad_(False)
    gradients.pop(frozen)
    torch.manual_seed(7)
    losses = agent.update(*batch)
    assert losses["left_out"].tolist() == (1 - counted).tolist()
    assert frozen.grad is None and not frozen.requires_grad  # also what a user has frozen
    for parameter, gradient in gradients.items():
        close(parameter.grad, gradient, 1e-5)
    for name, loss in zip(("critic_loss", "actor_loss", "alpha_loss"), expected):
        close(losses[name], loss.detach(), 1e-5)


def test_the_routes_of_each_pass_of_an_update():
    """Next action, target critics, critics in the actor's loss: Top-K. Regression: Sample-K. Actor's loss: replayed."""
    agent, batch = small_agent()
    networks, passes = (agent.actor, *agent.critics, *agent.target_critics), []
    for network in networks:

        def seen(network, inputs, options, output):
            assert options.get("temperature") is None or torch.equal(options["temperature"], agent.temperature())
            kind = "top-k" if options.get("temperature") is None else "sample-k"
            passes.append((network, "replayed" if options.get("routes") is batch[-1] else kind))

        network.register_forward_hook(seen, with_kwargs=True)
    agent.update(*batch)
    kinds = [[kind for passed, kind in passes if passed is network] for network in networks]
    assert kinds == [["top-k", "replayed"], *2 * [["sample-k", "top-k"]], *2 * [["top-k"]]]


def test_update_clips_clamps_and_averages():
    agent, batch = small_agent(tau=0.25, alpha_learning_rate=0.5, max_grad_norm=0.01, target_entropy=10.0)
    for _ in range(5):
        before = [p.clone() for p in agent.target_critics.parameters()]
        agent.update(*batch)
        for old, critic, target in zip(before, agent.critics.parameters(), agent.target_critics.parameters()):
            close(target, 0.75 * old + 0.25 * critic.detach(), 1e-6)
        for part in (agent.actor.parameters(), *(c.parameters() for c in agent.critics), [agent.log_alpha]):
            gradients = torch.cat([p.grad.flatten() for p in part if p.grad is not None])
            assert gradients.norm() == pytest.approx(0.01, rel=1e-3)
        assert (agent.log_alpha <= 0).all()
    assert (agent.log_alpha == 0).all()  # the policies lack entropy: without the clamp alpha would rise further


# --------------------------------------------------------------------------------------- what a GPU runs, as far as
# -------------------------------------------------------------------------------------- that can be tested without one
def test_compiled_and_eager_losses_agree():
    """Compiled with static shapes, and the code that a GPU gets, as far as a CPU can: without Inductor."""
    torch._dynamo.reset()
    losses, actions = {}, {}
    for form in ("skipping", "static"):
        agent, batch = small_agent(learning_rate=3e-3)
        graphs = COMPILED["unique_graphs"]
        in_form(form, agent.actor, *agent.critics, *agent.target_critics)
        torch.manual_seed(3)
        losses[form] = torch.stack([torch.stack([*agent.update(*batch).values()]) for _ in range(20)])
        actions[form] = torch.stack([agent.act(batch[0][:3])[0] for _ in range(20)])
        # Acting; next action, regression, actor's loss; target critics, critics in the actor's loss. At most 8 compile.
        assert COMPILED["unique_graphs"] - graphs == (6 if form == "static" else 0)
    assert (losses["skipping"].diff(dim=0)[:, 0] != 0).all()  # they do learn
    torch.testing.assert_close((losses["static"], actions["static"]), (losses["skipping"], actions["skipping"]))


def test_what_is_compiled_can_be_fused():
    """embedding_bag cannot: with it a compiled forward pass has twice as many kernels."""
    graphs, network = [], tiny_network(5)
    backend = lambda graph, _: graphs.append(graph.print_readable(print_output=False)) or graph
    torch.compile(network, backend=backend, dynamic=False)(torch.randn(6, 3), torch.zeros(6, dtype=torch.long))
    assert graphs[0].count("functional.embedding(") == 10 and "embedding_bag" not in graphs[0]  # forward and backward


def test_nothing_waits_for_the_host(monkeypatch):
    """Acting, sampling and the update on the meta device: tensors without values, that mix with none on the host."""
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, *rate, adam=torch.optim.Adam, **options: adam(groups))
    agent, batch = small_agent(device="meta")
    assert all(tensor.is_meta for tensor in agent.act(batch[0][:3].to("meta")))
    replay = d2r.ReplayBuffer(30, 3, 5, 4, 4, 2, "meta")
    replay.added = 30
    losses = agent.update(*replay.sample(8))
    assert len(losses) == 4 and all(loss.is_meta and loss.shape == (3,) for loss in losses.values())


def test_cuda_graph_copies_its_inputs_and_replays(monkeypatch):
    """With a stand-in for CUDA, whose graph repeats the captured call and overwrites its results."""
    addresses = []

    def double(*tensors):
        addresses.append([(tensor.data_ptr(), tensor.stride()) for tensor in tensors])
        return [2 * tensor for tensor in tensors]

    class Graph:
        def replay(self):
            for output, value in zip(wrapped.outputs, double(*wrapped.inputs)):
                output.copy_(value)

    null = contextlib.nullcontext
    stand_in = {"CUDAGraph": Graph, "graph": null, "stream": null, "Stream": null, "synchronize": lambda: None}
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    wrapped, outputs = d2r.CUDAGraph(double), []
    for call in range(6):
        given = torch.full((5, 6), float(call)).split((1, 2, 3), dim=1)
        outputs.append(wrapped(*given))
        assert all(torch.equal(a, 2 * b) for a, b in zip(outputs[-1], given, strict=True))
    assert addresses == 7 * [addresses[0]]  # three calls, the capture, three replays: with the same inputs
    assert outputs[3] is outputs[4] is outputs[5] and outputs[2] is not outputs[3]


# ------------------------------------------------------------------------------------------------------------- replay
@pytest.mark.parametrize(("E", "chi_square"), [(1, 16.27), (3, 31.26)])
def test_replay_wraps_around_and_samples_equally(E, chi_square):
    """The newest four steps of each environment, tasks and their copies alike: 3 and 11 degrees of freedom, p 0.001."""
    T, n, routes = 3, 3000, torch.randint(0, 256, (7, E * 3, 5, 2))
    replay = d2r.ReplayBuffer(4 * E * T, T, 2, 1, 5, 2, "cpu")
    for t in range(7):
        tags = np.array([1000.0 * copy + 10 * t + task for copy in range(E) for task in range(T)])
        obs = np.stack([tags, -tags], -1)
        replay.add(obs, obs[:, :1], tags, obs + 0.5, tags % 2 == 0, routes[t])
    torch.manual_seed(0)
    obs, action, tags, next_obs, terminated, sampled = replay.sample(n)
    for task, of_task in enumerate(tags.view(T, n)):  # task by task, as many of each
        values, counts = of_task.unique(return_counts=True)
        assert values.tolist() == [1000 * copy + 10 * t + task for copy in range(E) for t in (3, 4, 5, 6)]
        expected = n / (4 * E)
        assert ((counts - expected) ** 2 / expected).sum() < chi_square
    environment = tags // 1000 * T + tags % 10
    assert torch.equal(sampled.long(), routes[(tags % 1000 // 10).long(), environment.long()])
    assert torch.equal(obs, torch.stack([tags, -tags], -1)) and torch.equal(next_obs, obs + 0.5)
    assert torch.equal(action[:, 0], tags) and torch.equal(terminated, tags % 2 == 0)


# ---------------------------------------------------------------------------------------- environments and evaluation
@pytest.mark.parametrize("goals", ["fixed", "random"])
def test_goals(goals):
    """fixed: one goal per task, in all its environments. random: each draws goals of its own, of the task's 50."""
    with contextlib.closing(d2r.make_envs(d2r.Args("reach-v3", goals, envs_per_task=2), seed=1)) as envs:
        known = [{tuple(pickle.loads(task.data)["rand_vec"][-3:]) for task in its} for its in envs.get_attr("tasks")]
        drawn = [{tuple(obs[-3:]) for obs in envs.reset()[0]} for _ in range(12)]
    assert known[0] == known[1] and len(known[0]) == (1 if goals == "fixed" else 50)
    assert set().union(*drawn) <= known[0]
    assert {*map(len, drawn)} == {1 if goals == "fixed" else 2}
    assert len(set().union(*drawn)) > 12 or goals == "fixed"


class Scripted(gym.Env):
    """Episodes of `length` steps with a reward of 1 each and a success in step 5 only; or no success to report. It
    observes its step, always in the same array."""

    observation_space = gym.spaces.Box(-9, 9, (5,))
    action_space = gym.spaces.Box(-2, 4, (1,))

    def __init__(self, length, knows_success=True):
        self.length, self.knows_success, self.obs = length, knows_success, np.zeros(5, np.float32)

    def reset(self, **options):
        super().reset(**options)
        self.obs[:] = self.t = 0
        return self.obs, {}

    def step(self, action):
        assert action == pytest.approx(4)  # 1, rescaled
        self.t += 1
        self.obs[:] = self.t
        info = {"success": float(self.t == 5)} if self.knows_success else {}
        return self.obs, 1.0, self.t == self.length, False, info


def test_the_last_observation_of_an_episode(monkeypatch):
    """Of an environment that reuses its array: not the next episode's first."""
    monkeypatch.setattr(d2r, "make_env", lambda task, args, seed: Scripted(3))
    with contextlib.closing(d2r.make_envs(types.SimpleNamespace(tasks=["a"], envs_per_task=2), 0)) as envs:
        seen = [envs.reset()[0][0, 0]]
        for _ in range(6):
            obs, _, terminated, _, infos = envs.step(np.ones((2, 1), np.float32))
            seen.append((obs[0, 0].item(), terminated[0] and infos["final_obs"][0][0].item()))
    assert seen == [0, (1, False), (2, False), (0, 3), (1, False), (2, False), (0, 3)]


def test_evaluation_by_hand(monkeypatch, capsys):
    """Four episodes of each task: two, one and one in its three environments, however long they are. Of a only the
    second environment is successful, in the middle of its episode; b does not report success."""
    lengths = {"a": (2, 9, 3), "b": (1, 1, 6)}
    monkeypatch.setattr(d2r, "make_env", lambda task, args, seed: Scripted(lengths[task][seed], task == "a"))
    args = types.SimpleNamespace(envs_per_task=3, tasks=["a", "b"], eval_episodes=4, device="cpu")
    routes = torch.tensor([[[0, 0], [0, i], [i, i]] for i in (0, 0, 1, 0, 1, 0)])  # modules used: 1, 1, 2, 1, 2, 1
    action = torch.ones(6, 1)
    agent = types.SimpleNamespace(act=lambda obs, deterministic: (action, routes))
    with contextlib.closing(d2r.make_envs(args, 0)) as envs:
        results = d2r.evaluate(args, agent, envs, [])
        action[3] = math.nan  # MuJoCo would warn for ever
        with pytest.raises(FloatingPointError, match="the action of b is not finite"):
            d2r.evaluate(args, agent, envs, [])
    assert results["success"][0] == pytest.approx(1 / 4) and math.isnan(results["success"][1])
    assert results["return"].tolist() == pytest.approx([(2 + 2 + 9 + 3) / 4, (1 + 1 + 1 + 6) / 4])
    assert results["modules_used"].tolist() == pytest.approx([5 / 3, 1])
    assert "a: success 0.25, return 4.0, modules used 1.7\nb: return 2.2" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- end to end
TWO_TASKS = f"--env-id 5,10 --learning-starts 40 --buffer-size 2000 --batch-size 16 {SMALL}"
ENDLESS = f"{TWO_TASKS} --total-steps 1000000 --log-every 20 --run-name run"


def snippet(title, number=0):
    section = (SCRIPT.parent / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[number]


@pytest.fixture
def pendulums(monkeypatch):
    for name in ("task_names", "make_env"):
        monkeypatch.setattr(d2r, name, getattr(d2r, name))  # put back what the example replaces
    exec(snippet("Change it"), {"__name__": "pendulums"})


def main(*arguments, function=d2r.main):
    """The exit code, and what Python prints for it."""
    try:
        return function([*map(str, arguments)]) or 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
            return 1
        return ending.code


def run(tmp_path, arguments, name="run"):
    return main(*arguments.split(), "--results-dir", tmp_path, "--run-name", name, "--device", "cpu")


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def progress(run_dir):
    return [*csv.DictReader((run_dir / "progress.csv").read_text().splitlines())]


def steps(run_dir):
    return [int(record["global_step"]) for record in progress(run_dir)]


def replayed(run_dir, N=2, rank=0):
    """What the replay holds: each column as (steps, N, ...)."""
    return [column.unflatten(0, (-1, N)) for column in checkpoint(run_dir)["replays"][rank]]


def test_a_run_on_meta_world(tmp_path, monkeypatch, capsys):
    run_dir, added, add = tmp_path / "run", [], d2r.ReplayBuffer.add
    monkeypatch.setattr(d2r.ReplayBuffer, "add", lambda *step: added.append(add(*step)))  # 3600 s each, then 36 s
    monkeypatch.setattr(d2r, "time", types.SimpleNamespace(time=lambda: 3600 * len(added[:20]) + 36 * len(added[20:])))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    options = TWO_TASKS.replace("5,10", "reach-v3,drawer-close-v3")
    assert run(tmp_path, f"{options} --total-steps 240 --eval-every 170 --log-every 60") == 0
    out, rewritten = re.subn(r"step \d+( \(0/s, [01]\.\d h left\))?\x1b\[K\r", "", capsys.readouterr().out)
    begin = f"starting environments: 2\n{run_dir}, from step 0\ncollecting, updates begin at step 40\nstep 60 (0/s, "
    assert out.startswith(f"{begin}0.9 h left): ") and "nan" not in out and rewritten == 120
    assert re.search(r"\nstep 120 .*: train_success [01].*, train_return .*, critic_loss .*, alpha 0.99", out)
    assert re.search(r"\nstep 180 .* left\): critic_loss", out)  # no episode ended since the last row
    assert out.endswith(f"\nended at step 240; to continue: --resume {run_dir} [--total-steps N]\n")
    facts, records = json.loads((run_dir / "args.json").read_text()), progress(run_dir)
    assert facts["args"]["total_steps"] == 240 and facts["versions"]["torch"] == version("torch")
    assert steps(run_dir) == [60, 120, 170, 180, 240]
    assert [record["global_step"] for record in records if record["success"]] == ["170", "240"]
    assert [int(record["updates"]) for record in records] == [(step - 40) // 2 for step in steps(run_dir)]
    assert all(record[name] for record in records for name in ("seconds", "steps_per_second", "critic_loss"))
    assert 1 <= float(records[-1]["modules_used/reach-v3"]) <= 4 and all(records[-1].values())
    assert sum(float(records[-1][f"temperature/{task}"]) for task in facts["tasks"]) == pytest.approx(2, rel=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    logged = [[event.step for event in events.Scalars(name)] for name in ("return/reach-v3", "critic_loss")]
    assert logged == [[170, 240], steps(run_dir)]  # where nothing was measured it gets nothing
    # What the replay holds is what the environment did: also at the truncations, every tenth step. Meta-World's
    # observation ends its first half with the hand and objects now, and has those of the step before in its second.
    obs, action, reward, next_obs, terminated, routes = replayed(run_dir)
    assert obs.shape == (120, 2, 39) and action.abs().max() <= 1
    close(next_obs[:, :, 18:36], obs[:, :, :18], 1e-6)
    follows = (next_obs[:-1] == obs[1:]).all(-1).all(-1)
    assert [t for t in range(119) if not follows[t]] == [*range(9, 80, 10), *range(84, 119, 10)]  # evaluated after 84
    assert not terminated.any() and routes.max() == 3 and (reward > 0).any()
    # Episodes of ten steps since the row before: first step, number of episodes. The evaluation began new ones.
    for record, (first, number) in zip(records, ((0, 3), (30, 3), (60, 2), (85, 0), (85, 3)), strict=True):
        means = reward[first : first + 10 * number].view(number, 10, 2).sum(1).mean(0)
        for task, mean in zip(facts["tasks"], means.tolist()):
            assert number == 0 or float(record[f"train_return/{task}"]) == pytest.approx(mean, rel=1e-4)
        assert number or not any(value for name, value in record.items() if "train" in name)
    assert main("--evaluate", run_dir / "actor.pt", "--eval-episodes", "2") == 0
    line = r": success [01]\.\d\d, return [0-9.]+, modules used [1-4]\.[0-9]\n"
    assert re.search(f"\nreach-v3{line}drawer-close-v3{line}mean \\(2 episodes each\\){line}$", capsys.readouterr().out)


@pytest.mark.parametrize("E", [1, 2])
def test_a_run_is_the_loop_written_out(tmp_path, pendulums, monkeypatch, E):
    """20 updates, to the bit: environments one after the other, their transitions in a list for each task."""
    options, losses, update = f"{TWO_TASKS} --envs-per-task {E} --total-steps {40 + 40 * E}", [], d2r.Agent.update
    monkeypatch.setattr(d2r.Agent, "update", lambda *arguments: losses.append(update(*arguments)) or losses[-1])
    assert run(tmp_path, options) == 0
    args, *_ = d2r.parse_arguments(options.split())
    envs = [d2r.make_env(task, args, 0) for _ in range(E) for task in args.tasks]
    envs = [gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) for env in envs]
    torch.manual_seed(1)
    agent, stored, expected = d2r.Agent(3, 1, 2, args), {task: [] for task in args.tasks}, []
    obs = [env.reset(seed=1 + i)[0] for i, env in enumerate(envs)]
    torch.manual_seed(2)
    for step in range(20 // E + 20):
        action, routes = agent.act(torch.tensor(np.stack(obs)))
        if step >= 20 // E:
            chosen = torch.randint(len(stored["5"]), (2, 8)).tolist()
            batch = zip(*(stored[task][j] for task, row in zip(args.tasks, chosen) for j in row))
            expected.append(update(agent, *(torch.tensor(np.array(column)) for column in batch)))
        for i, env in enumerate(envs):
            next_obs, reward, terminated, truncated, _ = env.step(action[i].numpy())
            transition = obs[i], action[i].numpy(), np.float32(reward), next_obs, terminated, routes[i].numpy()
            stored[args.tasks[i % 2]].append(transition)
            assert truncated == (step % 10 == 9)
            obs[i] = env.reset()[0] if truncated else next_obs
    assert len(losses) == len(expected) == 20
    for loss, by_hand in zip(losses, expected):
        assert all(torch.equal(loss[name], by_hand[name]) for name in loss)


def test_resume(tmp_path, pendulums, monkeypatch, capsys):
    maps, write_row = [], d2r.write_row

    def spied(*options):
        pids = ["self", *(worker.pid for worker in multiprocessing.active_children())]
        maps.append([Path(f"/proc/{pid}/maps").read_text() for pid in pids])
        return write_row(*options)

    monkeypatch.setattr(d2r, "write_row", spied)
    options, run_dir = f"{TWO_TASKS} --total-steps 240 --eval-every 200 --log-every 60", tmp_path / "run"
    resume = ["--resume", run_dir]
    assert run(tmp_path, options) == 0
    first, old = (run_dir / "progress.csv").read_text(), checkpoint(run_dir)
    facts = (run_dir / "args.json").read_text()
    assert main("--resume", run_dir / "checkpoint.pt") == 0  # there was nothing left to do
    new = checkpoint(run_dir)
    assert (run_dir / "progress.csv").read_text() == first
    assert all(torch.equal(new["agent"][name], value) for name, value in old["agent"].items())
    moments = [[state["exp_avg"] for state in saved["optimizer"].values()] for saved in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    with open(run_dir / "progress.csv", "a") as file:
        file.write("500,1,1,1,1\n900,1")  # what a kill leaves: rows from after the checkpoint, and one cut short
    assert main(*resume, "--total-steps", "300", "--learning-rate", "0.1", "--buffer-size", "280") == 0
    text, seconds = (run_dir / "progress.csv").read_text(), [float(r["seconds"]) for r in progress(run_dir)]
    assert text.startswith(first) and steps(run_dir)[-2:] == [240, 300] and seconds == sorted(seconds)
    newer = checkpoint(run_dir)
    for column, before in zip(newer["replays"][0], old["replays"][0], strict=True):
        assert len(before) == 240 and len(column) == 280 and torch.equal(column[:220], before[20:])  # oldest first
    moved = [(newer["agent"][name] - value).abs().max() for name, value in old["agent"].items() if "actor" in name]
    assert max(moved) > 0.2  # at the new learning rate
    assert newer["optimizer"][0]["step"] == newer["progress"][1] == 130  # Adam continues where it was
    assert {*map(len, maps)} == {3} and "checkpoint.pt" not in str(maps)  # neither learner nor workers keep it mapped
    assert (run_dir / "args.json").read_text() == facts
    assert json.loads((run_dir / "args-240.json").read_text())["args"]["total_steps"] == 300
    capsys.readouterr()
    changes = ["top-k=1", "env-id=10,5", "goals=fixed", "seed=2", "envs-per-task=2", "run-name=b", "module-width=8"]
    for change in changes:
        assert main(*resume, f"--{change}") == 1
        name = change.split("=")[0].replace("-", "_")
        assert capsys.readouterr().err == f"error: {run_dir}/checkpoint.pt was made with a different {name}\n"
    assert main("--evaluate", run_dir, "--env-id", "10,5") == 1
    assert main("--evaluate", run_dir, "--seed", "2", "--goals", "fixed") == 0
    assert main(*resume, "--batch-size", "15") == main(*resume, "--buffer-size", "5") == 2
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(d2r, "RANKS", 2)
        assert main(*resume) == 1 and "was made with a different number of ranks\n" in capsys.readouterr().err
    assert run(tmp_path, options) == 2 and "exists" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(*resume) == 1 and "no checkpoint.pt of a run of tasks known here\n" in capsys.readouterr().err


@pytest.mark.parametrize("ablation", ["no-resrouting", "no-route-balancing", "no-sample-k", "top-k=0", "goals=fixed"])
def test_ablations_run(tmp_path, pendulums, ablation, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # a run does without it
    options = f"--env-id 10 --learning-starts 10 --batch-size 8 --buffer-size 50 {SMALL} --num-modules 3"
    assert run(tmp_path, f"{options} --total-steps 120 --{ablation}") == 0
    first, record = progress(tmp_path / "run")
    assert [first["updates"], record["updates"]] == ["100", "110"] and math.isfinite(float(record["critic_loss"]))
    assert record.get("temperature/10") == (None if ablation == "no-sample-k" else "1") and record["success"] == ""
    assert float(record["modules_used"]) == 3 if ablation == "top-k=0" else 1 <= float(record["modules_used"]) <= 3


BUDGETS = [("MT10", 10, 15_000_000, 1_000_000, 1280, 40_000), ("MT50", 50, 50_000_000, 10_000_000, 6400, 200_000)]
BUDGETS += [("push-v3", 1, 1_500_000, 100_000, 128, 4000), ("reach-v3, push-v3", 2, 3_000_000, 200_000, 256, 8000)]


@pytest.mark.parametrize(("env_id", "T", "steps", "buffer", "batch", "start"), BUDGETS)
def test_budgets_come_from_the_benchmark(tmp_path, monkeypatch, env_id, T, steps, buffer, batch, start):
    state = torch.get_rng_state()
    args = d2r.Args(env_id=env_id)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(args.tasks) == len(set(args.tasks)) == T and args.eval_every == steps // 100
    assert (args.total_steps, args.buffer_size, args.batch_size, args.learning_starts) == (steps, buffer, batch, start)
    monkeypatch.chdir(tmp_path)
    names = {1: "push-v3", 2: "2-tasks"}.get(T, env_id) + "-random-seed1"
    for name in (names, f"{names}-2", f"{names}-3"):
        assert d2r.Args(env_id=env_id).run_name == name
        Path("results", name).mkdir(parents=True)
    args = d2r.Args(env_id=env_id, total_steps=600, batch_size=2 * T)
    # An evaluation of 32 episodes of 200 steps takes longer than a hundredth of that. A short run learns, too.
    assert (args.eval_every, args.batch_size, args.learning_starts) == (6400 * T, 2 * T, 60)


def test_a_loss_of_your_own_is_logged(tmp_path, pendulums, monkeypatch):
    update, own = d2r.Agent.update, {"my_loss": torch.tensor([1.0, 2.0]), "scalar": torch.ones(())}
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 60 --log-every 20") == 0
    monkeypatch.setattr(d2r.Agent, "update", lambda *batch: update(*batch) | own)
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 60 --log-every 20", "own") == 0
    (row,) = progress(tmp_path / "own")
    assert (row["my_loss"], row["my_loss/10"], row["scalar/5"]) == ("1.5", "2", "1")
    resume = ["--resume", tmp_path / "run", "--no-sample-k", "--total-steps", "80"]
    assert main(*resume) == 0  # the columns keep their places
    old, new = progress(tmp_path / "run")
    assert new.keys() == old.keys() and new["temperature"] == "" != old["temperature"]
    assert float(new["critic_loss"]) > 0 and new["left_out/10"] == "0"


def test_track(tmp_path, pendulums, monkeypatch):
    """Weights & Biases is started before TensorBoard's events are written; a resume continues the same run there."""
    calls = []
    init = lambda **options: calls.append((options, [*tmp_path.glob("run/events*")]))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 60 --track") == 0
    assert main("--resume", tmp_path / "run", "--total-steps", "80") == 0
    (first, events), (second, _) = calls
    assert first["sync_tensorboard"] and first["config"]["total_steps"] == 60 and not events
    assert first["id"] == second["id"] and first["id"].startswith("run-1") and second["resume"] == "allow"
    assert len([*tmp_path.glob("run/events*")]) == 2


# --------------------------------------------------------------------------------------------- signals and failures
def learner(log, arguments, **environment):  # main in a process, and a process group, of its own
    def child():
        os.setsid()
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 2)
        os.environ |= environment
        d2r.RANK = int(environment.get("RANK", 0))
        d2r.RANKS = int(environment.get("WORLD_SIZE", 1))
        sys.exit(main(*arguments, "--device", "cpu"))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def workers_after(process, run_dir, records):  # once it has written so many
    deadline = time.monotonic() + 60
    while not (run_dir / "progress.csv").exists() or len(steps(run_dir)) < records:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def ended(process, log):
    process.join(30)
    process.kill()
    return process.exitcode, log.read_text()


def assert_ended(pids):
    deadline = time.monotonic() + 20
    for stat in (Path(f"/proc/{pid}/stat") for pid in pids):
        with contextlib.suppress(OSError):
            while stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
                assert time.monotonic() < deadline, f"{stat} outlives its learner"
                time.sleep(0.05)


def test_kill_and_signals(tmp_path, pendulums):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = learner(log, [*ENDLESS.split(), "--results-dir", tmp_path, "--checkpoint-minutes", "0.001"])
    workers = workers_after(process, run_dir, 4)
    process.kill()
    process.join()
    done = checkpoint(run_dir)["progress"][0]
    assert done > 0 and len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT):
        process = learner(log, ["--resume", run_dir, "--checkpoint-minutes", "60"])
        workers += workers_after(process, run_dir, done // 20 + 3)
        os.killpg(process.pid, number)  # as from a terminal or a batch system: the workers get it, too
        code, said = ended(process, log)
        assert code == 128 + number and "Traceback" not in said
        assert said.count("ending with a checkpoint; once more ends at once\n") == 1 and "ended at step" in said
        assert steps(run_dir) == list(range(60, steps(run_dir)[-1] + 1, 20))
        before, done = done, checkpoint(run_dir)["progress"][0]
        assert done >= steps(run_dir)[-1] > before
    assert_ended(workers)


@pytest.mark.parametrize("total", [60, 120])
def test_a_signal_during_an_evaluation(tmp_path, pendulums, monkeypatch, total):
    """A resume makes up for it in its next step; at 60 nobody reads the output. Signal handlers are put back."""
    evaluate, handler, stdout = d2r.evaluate, signal.getsignal(signal.SIGTERM), sys.stdout

    def interrupted(args, agent, *arguments):
        monkeypatch.setattr(d2r, "evaluate", evaluate)  # the next one is not
        with agent.actor.register_forward_hook(lambda *_: None if arguments[-1] else os.kill(os.getpid(), 15)):
            assert evaluate(args, agent, *arguments) == {}
        sys.stdout = open("/dev/full", "w") if total == 60 else stdout  # noqa: SIM115
        return {}

    monkeypatch.setattr(d2r, "evaluate", interrupted)
    monkeypatch.setattr(os, "write", lambda *_: os.close(-1))  # an OSError, as if stderr were a pipe to a dead process
    assert run(tmp_path, f"{TWO_TASKS} --total-steps {total} --eval-every 60 --log-every 20") == 143
    sys.stdout = stdout
    monkeypatch.setattr(d2r, "evaluate", lambda *a: os.kill(os.getpid(), signal.SIGINT))
    assert main("--evaluate", tmp_path / "run") == 130
    monkeypatch.setattr(d2r, "evaluate", evaluate)
    assert main("--resume", tmp_path / "run") == 0
    rows = [(int(record["global_step"]), bool(record["return"])) for record in progress(tmp_path / "run")]
    assert rows == [(60, False), (62, True), *([(80, False), (100, False), (120, True)] if total == 120 else [])]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_task_whose_losses_are_too_large(tmp_path, pendulums):
    """An update skips it; progress.csv says so, and no weight becomes infinite."""
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 80 --log-every 20 --reward-scale 1000") == 0
    assert [record["left_out/10"] for record in progress(tmp_path / "run")] == ["1", "1"]
    agent, batch = small_agent()
    batch[2][:8] = 1e30
    losses = agent.update(*batch)
    assert losses["critic_loss"][0] == math.inf and losses["left_out"].tolist() == [1, 0, 0]
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


def test_a_dead_worker_and_a_failing_environment_end_the_run(tmp_path, pendulums, monkeypatch):
    process = learner(tmp_path / "log", [*ENDLESS.split(), "--results-dir", tmp_path])
    os.kill(int(workers_after(process, tmp_path / "run", 1)[-1]), signal.SIGKILL)
    code, said = ended(process, tmp_path / "log")
    assert code == 1 and said.splitlines()[-1].startswith("error: an environment's process died, or")
    make_env = d2r.make_env
    broken = lambda env: gym.wrappers.TransformReward(env, lambda reward: 1 / 0)
    monkeypatch.setattr(d2r, "make_env", lambda *options: broken(make_env(*options)))
    process = learner(tmp_path / "log", [*TWO_TASKS.split(), "--results-dir", tmp_path])
    code, said = ended(process, tmp_path / "log")
    assert code == 1 and said.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_environment_that_hangs(tmp_path, pendulums, monkeypatch, how):
    """The first Ctrl-C waits for it, the second ends the run. No worker lives on, nor after kill -9."""
    make_env = d2r.make_env

    def hang(reward):
        (tmp_path / f"{os.getpid()}.hangs").touch()
        time.sleep(1000)

    monkeypatch.setattr(d2r, "make_env", lambda *options: gym.wrappers.TransformReward(make_env(*options), hang))
    process = learner(tmp_path / "log", [*ENDLESS.split(), "--results-dir", tmp_path])
    while len(workers := [*tmp_path.glob("*.hangs")]) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    if how == signal.SIGINT:
        os.kill(process.pid, how)
        process.join(0.5)
        assert process.is_alive()
    os.kill(process.pid, how)
    process.join(10)
    assert process.exitcode == -how
    assert_ended(worker.stem for worker in workers)


@pytest.mark.parametrize("what", ["weights", "action", "observation", "first observation", "reward"])
def test_what_is_not_finite_stops_the_run(tmp_path, pendulums, monkeypatch, capsys, what):
    """The second task's, in its 30th step or at its third reset; never does it reach a checkpoint."""
    make_env, update, updates = d2r.make_env, d2r.Agent.update, itertools.count(1)

    class Bad(gym.Wrapper):
        resets = steps = 0

        def reset(self, **options):
            self.resets += 1
            obs, info = self.env.reset(**options)
            return obs * (math.inf if what == "first observation" and self.resets == 3 else 1), info

        def step(self, action):
            self.steps += 1
            obs, reward, *rest = self.env.step(action)
            bad = [what == name and self.steps == 30 for name in ("observation", "reward")]
            return obs * (math.nan if bad[0] else 1), reward * (1e39 if bad[1] else 1), *rest

    def changed(agent, *batch):
        losses, part = update(agent, *batch), {"weights": agent.critics[1], "action": agent.actor}.get(what)
        if part and next(updates) == 9:
            part.base_modules.head.weight.data[0, 0] = math.nan
        return losses

    monkeypatch.setattr(d2r.Agent, "update", changed)
    make = lambda task, *options: Bad(make_env(task, *options)) if task == "10" else make_env(task, *options)
    monkeypatch.setattr(d2r, "make_env", make)
    minutes = 10 if what == "action" else 1e-7  # a checkpoint in every step sees weights before the next action does
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 400 --checkpoint-minutes {minutes}") == 1
    message = {"weights": "weights are", "action": "action of 5, 10 is"}.get(what, f"{what.split()[-1]} of 10 is")
    assert capsys.readouterr().err == f"error: the {message} not finite\n"
    if what != "action":
        kept = checkpoint(tmp_path / "run")
        assert kept["progress"][0] == {"weights": 56, "first observation": 40}.get(what, 58)
        assert all(value.isfinite().all() for value in (*kept["agent"].values(), *kept["replays"][0]))


def test_a_full_disk_leaves_the_last_files_whole_and_a_full_memory_is_one_line(tmp_path, pendulums, capsys):
    """Writing more than so many bytes to a file fails."""
    assert run(tmp_path, f"{TWO_TASKS} --buffer-size 1{'0' * 12}", "huge") == 1
    assert capsys.readouterr().err == "error: --buffer-size 1,000,000,000,000 does not fit into memory\n"
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 60") == 0
    names = ["checkpoint.pt", "actor.pt", "args.json"]
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main("--resume", tmp_path / "run", "--total-steps", "120") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "checkpoint.pt.partial cannot be written" in capsys.readouterr().err
    assert before == [(tmp_path / "run" / name).read_bytes() for name in names]
    assert not [*tmp_path.glob("run/*.partial")]


MISTAKES = f"""
--env-id ML10: 'ML10' is none of MT10, MT25, MT50, assembly-v3, 
--env-id reach-v3,push-v3,reach-v3: 'reach-v3' is named twice
--batch-size 1281: --batch-size must be a multiple of 10, tasks times ranks
--buffer-size 100: --buffer-size must hold a batch, and a step
--log-every 0: --log-every must be at least 1
--router-widths 8 0: --router-widths must be at least 1
--episode-length 501: --episode-length must lie between 1 and 500
--initial-alpha 0: --initial-alpha must be positive, and at most 1
--learning-starts 0: --learning-starts: between 1 and 14999990, a step before the end
--device cuda: --device: PyTorch finds no GPU
--top-k 17: top_k, 17, must lie between 0 and num_modules, 16
--resume {RESULTS}/three-tasks: checkpoint.pt is missing, damaged, or no checkpoint.pt of a run
--evaluate {SCRIPT}: d2r_sac.py is missing, damaged, or no actor.pt of a run
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_is_named_before_anything_is_built(tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr(d2r, "make_envs", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    arguments, message = line.split(": ", 1)
    assert main("--device", "cpu", *arguments.split()) == (1 if message.endswith(" of a run") else 2)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said and "Traceback" not in said and not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------------------------ ranks
def two_ranks(tmp_path, arguments):  # as torchrun would start them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [learner(tmp_path / f"log{rank}", arguments, RANK=str(rank), **world) for rank in range(2)]


def test_two_ranks_learn_the_same_from_what_each_of_them_sees(tmp_path, pendulums, monkeypatch):
    save_run, all_reduce, seen = d2r.save_run, torch.distributed.all_reduce, {}

    def spied_all_reduce(tensor, *op):
        seen["mine"] = seen.get("mine") if op else tensor.clone()  # of the last update
        all_reduce(tensor, *op)

    def spied_save(args, agent, replay, progress):
        save_run(args, agent, replay, progress)
        seen["mean"] = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])
        columns = [column[: replay.added].clone() for column in replay.columns]
        torch.save({**seen, "agent": agent.state_dict(), "columns": columns}, tmp_path / f"rank{d2r.RANK}.pt")

    monkeypatch.setattr(torch.distributed, "all_reduce", spied_all_reduce)
    monkeypatch.setattr(d2r, "save_run", spied_save)
    options = f"{TWO_TASKS} --total-steps 240 --log-every 40 --eval-every 120 --max-grad-norm 1e9 --run-name run"
    options += " --envs-per-task 2"
    ranks = two_ranks(tmp_path, [*options.split(), "--results-dir", tmp_path])
    assert [ended(rank, tmp_path / "log0")[0] for rank in ranks] == [0, 0]
    assert (tmp_path / "log1").read_text() == ""
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, two["agent"][name]) for name, value in one["agent"].items())
    assert not torch.equal(one["mine"], two["mine"]) and torch.equal(one["mean"], two["mean"])
    close(one["mean"], (one["mine"] + two["mine"]) / 2, 1e-5)
    assert one["columns"][0].shape == (120, 3) and not (one["columns"][0] == two["columns"][0]).all(-1).any()
    assert steps(tmp_path / "run") == list(range(80, 241, 40))
    assert int(progress(tmp_path / "run")[-1]["updates"]) == 25
    saved = checkpoint(tmp_path / "run")["replays"]
    for columns, rank in zip(saved, (one, two), strict=True):
        assert all(torch.equal(column, own) for column, own in zip(columns, rank["columns"], strict=True))
    resume = ["--resume", str(tmp_path / "run"), "--total-steps", "320"]
    assert [ended(rank, tmp_path / "log0")[0] for rank in two_ranks(tmp_path, resume)] == [0, 0]
    for columns, old in zip(checkpoint(tmp_path / "run")["replays"], saved, strict=True):
        assert len(columns[0]) == 160 and all(torch.equal(now[:120], then) for now, then in zip(columns, old))


def test_torchrun(tmp_path):
    options = f"--env-id reach-v3 --learning-starts 40 --batch-size 16 --buffer-size 200 {SMALL} --total-steps 80"
    options += f" --results-dir {tmp_path} --run-name run --device cpu"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    subprocess.run([*launch, *options.split()], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    assert steps(tmp_path / "run") == [80] and len(checkpoint(tmp_path / "run")["replays"]) == 2
    alone = [sys.executable, "-c", "import d2r_sac; print(d2r_sac.RANK, d2r_sac.RANKS)"]  # a RANK without WORLD_SIZE
    said = subprocess.run(alone, env={**os.environ, "RANK": "3"}, cwd=SCRIPT.parent, capture_output=True, check=True)
    assert said.stdout == b"0 1\n"
