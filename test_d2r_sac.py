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
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from torch import nn

import d2r_sac as d2r

pytestmark = pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # of workers, by Gymnasium
torch.set_num_threads(1)
SCRIPT = Path(d2r.__file__)
RESULTS = SCRIPT.parent / "results"
GOLDEN = json.loads((RESULTS / "golden.json").read_text())
TINY = {"num_modules": 4, "module_width": 16, "encoder_widths": (32, 32), "router_widths": (16,), "episode_length": 10}
SMALL = "--num-modules 4 --module-width 16 --encoder-widths 32 32 --router-widths 16 --episode-length 10"
SMALL += " --eval-every 1000000 --eval-episodes 1"


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
    return weights.new_zeros(*routes.shape[:2], routes.shape[1]).scatter_add(-1, routes.long(), weights)


network_args = partial(types.SimpleNamespace, resrouting=True, routing="module", parallel_modules=4)


def tiny_network(num_modules, top_k=2, **options):
    torch.manual_seed(0)
    sizes = {"module_width": 5, "encoder_widths": (7, 7), "router_widths": (6,)}
    return d2r.D2RNetwork(3, 2, 2, network_args(num_modules=num_modules, top_k=top_k, **sizes, **options))


@pytest.mark.parametrize("granularity", [("module", 4), ("layer", 4), ("layer", 2), ("model", 4), ("model", 1)])
@pytest.mark.parametrize(("M", "K"), [(4, 2), (8, 3), (8, 8), (16, 2), (1, 1), (7, 3)])
def test_gates(M, K, granularity):
    """A network has logits only for what may be chosen; weights are positive for the K chosen, and sum to 1."""
    routing, P = granularity
    if M % P and routing != "module":
        with pytest.raises(ValueError, match="--num-modules must be a multiple of --parallel-modules"):
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


# ------------------------------------------------------------------------------------------------------- ResRouting
def written_out(modules, head, h, w, kept):
    """The definition of ResRouting, a table of all edges, edge by edge.
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


def routed(M, K, H, B, routing="module", form=d2r.D2RNetwork):
    """A network with random parameters; leaves h and logits; routes; and w, kept as written_out takes them."""
    torch.manual_seed(1)
    sizes = {"num_modules": M, "top_k": K, "module_width": H, "encoder_widths": (7,), "router_widths": ()}
    network = form(3, 2, 2, network_args(**sizes, routing=routing)).double()
    for parameter in network.parameters():
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

    return network, h, logits, routes, table


SIZES = [(9, 3, 6, 4), (1, 1, 3, 2), (5, 2, 4, 3), (6, 6, 5, 3), (8, 2, 4, 3, "layer")]  # M, K, H, B


def check_gradients(name, size, monkeypatch, run=lambda network: network.run_modules, form=d2r.D2RNetwork):
    """Output and gradients of a form of the network are those of written_out."""
    monkeypatch.setattr(d2r, "BaseModule", MODULES[name])
    network, h, logits, routes, table = routed(*size, form=form)
    leaves = [h, logits, *network.base_modules.parameters(), *network.head.parameters()]
    expected = written_out(network.base_modules, network.head, h, *table())
    grad_output, options = torch.randn_like(expected), {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(expected, leaves, grad_output, **options)
    output = run(network)(h, logits, routes)
    close(output, expected)
    for gradient, reference in zip(torch.autograd.grad(output, leaves, grad_output, **options), gradients):
        close(gradient, reference)


@pytest.mark.parametrize(("name", "size"), [*itertools.product(MODULES, SIZES)], ids=str)
def test_resrouting_is_what_it_is_written_to_be(name, size, monkeypatch):
    check_gradients(name, size, monkeypatch)


# ------------------------------------------------------------------------------------------- parity with references
def close_rows(table, reference):
    for sample, expected in zip(table, reference, strict=True):
        for i, row in enumerate(expected):
            assert sample[i, : i + 1].tolist() == pytest.approx(row, abs=1e-10)


@pytest.mark.parametrize("resrouting", [True, False])
def test_golden_network(resrouting):
    sizes = {"num_modules": 4, "top_k": 2, "module_width": 4, "encoder_widths": (6, 6), "router_widths": (5,)}
    network, parameters = d2r.D2RNetwork(3, 2, 2, network_args(**sizes, resrouting=resrouting)).double(), {}
    own_names = {"obs_encoder.1": "obs_encoder.2", "router.1": "router.2"}  # the ReLUs between them count, too
    for p, (name, shape) in enumerate(GOLDEN["parameters"]):
        layer, leaf = name.rsplit(".", 1)
        part = "" if layer.startswith(("module", "head")) else "routing_network."
        own_name = own_names.get(layer, layer).replace("module.", "base_modules.")
        parameters[name] = network.get_parameter(f"{part}{own_name}.{leaf}")
        entries = [0.6 * math.sin(1.3 * p + 0.7 * k + 0.1) for k in range(math.prod(shape))]
        parameters[name].data.copy_(torch.tensor(entries, dtype=torch.float64).view(shape))
    assert len(parameters) == len(list(network.parameters()))
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


def small_agent(tasks=3, device="cpu", **changes):
    """An agent of tasks with observations of 5 numbers and actions of 4, and a batch of 8 samples of each."""
    args = tyro.cli(d2r.Args, args=["--env-id", "reach-v3", *SMALL.split()])
    vars(args).update(changes)
    torch.manual_seed(0)
    agent, B = d2r.Agent(5, 4, tasks, args, torch.device(device)), 8 * tasks
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
    assert agent.temperature() is None and torch.equal(agent.act(obs[:4])[1], agent.act(obs[:4])[1])
    assert not small_agent(resrouting=False)[0].actor.resrouting
    agent = small_agent(routing="model", parallel_modules=2)[0]
    for network, width in zip((agent.actor, *agent.critics), (5, 9, 9), strict=True):
        assert network(torch.randn(3, width), agent.tasks)[1][0, 1:3].tolist() == [[0, 0], [1, 1]]


def test_parameter_counts_and_initialisation():
    args = d2r.Args()
    budgets = (args.steps, args.buffer_size, args.batch_size, args.learning_starts, args.eval_every, args.log_every)
    assert budgets == (1_500_000, 100_000, 128, 4_000, 15_000, 1_000) and args.run_dir == "results/MT10-random-seed1"
    agent = d2r.Agent(39, 4, len(args.tasks), args)
    networks = (agent.actor, *agent.critics)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [684_240, 684_937, 684_937]
    heads = [network.head for network in networks]
    for layer in (layer for network in networks for layer in network.modules() if isinstance(layer, nn.Linear)):
        bound = 3e-3 if layer in heads else layer.out_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert (layer.bias.abs() <= 3e-3).all() if layer in heads else (layer.bias == 0.1).all()
    assert not torch.equal(heads[1].weight, heads[2].weight)
    pairs = zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True)
    assert all(torch.equal(critic, target) and not target.requires_grad for critic, target in pairs)


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


@pytest.mark.parametrize(("max_task_loss", "form"), [(3e3, "eager"), (None, "eager"), (None, "compiled")])
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

    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    for network in (agent.actor, *agent.critics, *agent.target_critics) if form == "compiled" else ():
        network.compile(backend="aot_eager", dynamic=False, fullgraph=True)  # without Inductor, which takes minutes
    frozen = agent.critics[0].base_modules[2].weight.requires_grad_(False)
    gradients.pop(frozen)
    torch.manual_seed(7)
    losses = agent.update(*batch)
    agent.act(obs)
    agent.act(obs, deterministic=True)
    # Next action, regression, actor's loss; target critics, critics in the actor's loss; acting. At most 8 compile.
    assert compiled["unique_graphs"] - graphs == (6 if form == "compiled" else 0)
    close(losses["alpha"], agent.log_alpha.detach().exp())
    assert losses["skipped"].tolist() == (1 - counted).tolist()
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
    agent, batch = small_agent(tau=0.25, alpha_learning_rate=0.5, max_grad_norm=0.01)
    agent.target_entropy = 10.0
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
    T, n = 3, 3000
    routes = torch.randint(0, 256, (7, T * E, 5, 2))
    replay = d2r.ReplayBuffer(4 * E, T, 2, 1, 5, 2)
    for t in range(7):
        tags = np.array([1000.0 * copy + 10 * t + task for task in range(T) for copy in range(E)])
        obs = np.stack([tags, -tags], -1)
        replay.add(obs, obs[:, :1], tags, obs + 0.5, tags % 2 == 0, routes[t])
    torch.manual_seed(0)
    obs, action, tags, next_obs, terminated, sampled = replay.sample(n)
    for task, of_task in enumerate(tags.view(T, n)):  # ordered by task, as many of each
        values, counts = of_task.unique(return_counts=True)
        assert values.tolist() == [1000 * copy + 10 * t + task for copy in range(E) for t in (3, 4, 5, 6)]
        expected = n / (4 * E)
        assert ((counts - expected) ** 2 / expected).sum() < chi_square
    environment = tags % 10 * E + tags // 1000
    assert torch.equal(sampled.long(), routes[(tags % 1000 // 10).long(), environment.long()])
    assert torch.equal(obs, torch.stack([tags, -tags], -1)) and torch.equal(next_obs, obs + 0.5)
    assert torch.equal(action[:, 0], tags) and torch.equal(terminated, tags % 2 == 0)


# -------------------------------------------------------------------------------------------------------- environments
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


scripted_args = partial(types.SimpleNamespace, tasks=["a"], envs_per_task=2, device="cpu")


def test_environments_as_the_policy_sees_them(monkeypatch):
    """Actions are rescaled, an episode ends also where the environment has no limit, and its last observation is not
    the next one's first, even if the environment reuses its array."""
    monkeypatch.setattr(d2r, "make_env", lambda task, args, seed: Scripted(10**9))
    with contextlib.closing(d2r.make_envs(scripted_args(episode_length=3), 0)) as envs:
        assert envs.single_action_space == gym.spaces.Box(-1, 1, (1,))
        seen = [envs.reset()[0][0, 0]]
        for _ in range(6):
            obs, _, _, truncated, infos = envs.step(np.ones((2, 1), np.float32))  # Scripted asserts that it gets a 4
            seen.append((obs[0, 0].item(), truncated[0] and infos["final_obs"][0][0].item()))
    assert seen == [0, (1, False), (2, False), (0, 3), (1, False), (2, False), (0, 3)]


def test_evaluation_by_hand(monkeypatch, capsys):
    """Four episodes of each task, rounded up to two in each of three environments, however long they are. Of a only the
    second environment is successful, in the middle of its episode; b does not report success."""
    lengths = {"a": (2, 9, 3), "b": (1, 1, 600)}
    monkeypatch.setattr(d2r, "make_env", lambda task, args, seed: Scripted(lengths[task][seed], task == "a"))
    args = scripted_args(envs_per_task=3, tasks=["a", "b"], eval_episodes=4, episode_length=6 + 3)
    routes = torch.tensor([[[0, 0], [0, i], [i, i]] for i in (0, 1, 1, 0, 0, 0)])  # modules used: 1, 2, 2, 1, 1, 1
    action = torch.ones(6, 1)
    with contextlib.closing(d2r.make_envs(args, 0)) as envs:
        results = d2r.evaluate(args, lambda obs: (action, routes), envs)
        action[3] = math.nan  # MuJoCo would warn for ever
        with pytest.raises(FloatingPointError, match="the action of b is not finite"):
            d2r.evaluate(args, lambda obs: (action, routes), envs)
    assert results["success"][0] == pytest.approx(1 / 3) and math.isnan(results["success"][1])
    assert results["return"].tolist() == pytest.approx([(2 + 9 + 3) / 3, (1 + 1 + 9) / 3])
    assert results["modules_used"].tolist() == pytest.approx([5 / 3, 1])
    out = capsys.readouterr().out
    assert "a: success 0.33, return 4.7, modules used 1.7\nb: success nan, return 3.7, modules used 1.0\n" in out
    assert out.endswith("mean (6 episodes each): success nan, return 4.2, modules used 1.3\n")


# -------------------------------------------------------------------------------------------------------- end to end
TWO_TASKS = f"--env-id 5,10 --learning-starts 20 --buffer-size 1000 --batch-size 8 {SMALL}"
ENDLESS = f"{TWO_TASKS} --steps 1000000 --log-every 10"


def snippet(title, number=0):
    section = (SCRIPT.parent / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[number]


@pytest.fixture
def pendulums(monkeypatch):
    monkeypatch.setattr(d2r, "task_names", lambda env_id: env_id.split(","))  # gravities
    monkeypatch.setattr(d2r, "make_env", lambda task, args, seed: gym.make("Pendulum-v1", g=float(task)))
    yield
    for process in multiprocessing.active_children():  # of a test that failed
        process.kill()


def main(*arguments, function=None):
    """The exit code, and what Python prints for it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["script", *map(str, arguments)]
    try:
        return (function or d2r.main)() or 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
            return 1
        return ending.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


run = lambda out, arguments, name="run": main(*arguments.split(), "--run-dir", out / name, "--device", "cpu")
checkpoint = lambda run_dir: torch.load(run_dir / "checkpoint.pt", weights_only=True)
progress = lambda run_dir: [*csv.DictReader((run_dir / "progress.csv").read_text().splitlines())]
steps = lambda run_dir: [int(record["global_step"]) for record in progress(run_dir)]
# What the replay holds: each column as (steps, T, ...), if there is one environment of each task
replayed = lambda run_dir: [column.transpose(0, 1) for column in checkpoint(run_dir)["replay"]]


def test_a_run_on_meta_world(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = TWO_TASKS.replace("5,10", "reach-v3,drawer-close-v3")
    assert run(tmp_path, f"{options} --steps 120 --eval-every 85 --log-every 30") == 0
    out = capsys.readouterr().out
    begin = (
        f"{run_dir}: a new run, with updates from step 20 of each task on\nstarting environments: 2\nstep 30 of each "
    )
    assert out.startswith(begin) and "nan" not in out
    shown = "train_success [01].*, train_return .*, critic_loss .*, actor_loss .*, alpha 0.99.*, skipped 0"
    assert re.search(rf"\nstep 60 of each task .*: {shown}\n", out)
    assert re.search(r"\nstep 90 [^:]*: critic_loss", out)  # no episode ended since the last row
    facts, records = json.loads((run_dir / "args.json").read_text()), progress(run_dir)
    assert facts["args"]["steps"] == 120 and facts["tasks"] == ["reach-v3", "drawer-close-v3"]
    assert steps(run_dir) == [60, 120, 170, 180, 240]
    assert [record["global_step"] for record in records if record["success"]] == ["170", "240"]
    assert [int(record["updates"]) for record in records] == [(step - 40) // 2 for step in steps(run_dir)]
    assert all(record[name] for record in records for name in ("seconds", "steps_per_second", "critic_loss"))
    assert 1 <= float(records[-1]["modules_used/reach-v3"]) <= 4 and all(records[-1].values())
    assert sum(float(records[-1][f"temperature/{task}"]) for task in facts["tasks"]) == pytest.approx(2, rel=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    logged = [[event.step for event in events.Scalars(name)] for name in ("return/reach-v3", "critic_loss")]
    assert logged == [[170, 240], steps(run_dir)]  # where nothing was measured it gets nothing, and no nan
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


@pytest.mark.parametrize("E", [1, 2])
def test_a_run_is_the_loop_written_out(tmp_path, pendulums, monkeypatch, E):
    """20 updates, to the bit: environments one after the other, their transitions in a list for each task."""
    options, losses, update = f"{TWO_TASKS} --envs-per-task {E} --steps {20 + 20 * E}", [], d2r.Agent.update
    monkeypatch.setattr(d2r.Agent, "update", lambda *arguments: losses.append(update(*arguments)) or losses[-1])
    assert run(tmp_path, options) == 0
    args = tyro.cli(d2r.Args, args=options.split())
    envs = [d2r.make_env(task, args, 0) for task in args.tasks for _ in range(E)]
    envs = [gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) for env in envs]
    torch.manual_seed(1)
    agent, stored, expected = d2r.Agent(3, 1, 2, args), {task: [] for task in args.tasks}, []
    obs = [env.reset(seed=1 + i)[0] for i, env in enumerate(envs)]
    for step in range(20 // E + 20):
        action, routes = agent.act(torch.tensor(np.stack(obs)))
        if step >= 20 // E:
            chosen = torch.randint(len(stored["5"]), (2, 8)).tolist()
            batch = zip(*(stored[task][j] for task, row in zip(args.tasks, chosen) for j in row))
            expected.append(update(agent, *(torch.tensor(np.array(column)) for column in batch)))
        for i, env in enumerate(envs):
            next_obs, reward, terminated, _, _ = env.step(action[i].numpy())
            transition = obs[i], action[i].numpy(), np.float32(reward), next_obs, terminated, routes[i].numpy()
            stored[args.tasks[i // E]].append(transition)
            obs[i] = env.reset()[0] if step % 10 == 9 else next_obs
    assert len(losses) == len(expected) == 20
    for loss, by_hand in zip(losses, expected):
        assert all(torch.equal(loss[name], by_hand[name]) for name in loss)


def test_the_same_command_continues(tmp_path, pendulums, monkeypatch, capsys):
    run_dir, options = tmp_path / "run", f"{TWO_TASKS} --buffer-size 110 --log-every 30"
    assert run(tmp_path, f"{options} --steps 120 --eval-every 100") == 0
    first, old = (run_dir / "progress.csv").read_text(), checkpoint(run_dir)
    with open(run_dir / "progress.csv", "a") as file:
        file.write("500,1,1,1,1\n900,1")  # what a kill leaves: rows from after the checkpoint, and one cut short
    (run_dir / "checkpoint.pt.partial").write_text("cut short")
    seen, update = [], d2r.Agent.update
    state = lambda agent: [*agent.state_dict().values()] + [m["exp_avg"] for m in agent.optimizer.state.values()]
    spied = lambda agent, *batch: seen.append([t.clone() for t in state(agent)]) or update(agent, *batch)
    monkeypatch.setattr(d2r.Agent, "update", spied)
    capsys.readouterr()
    assert run(tmp_path, f"{options} --steps 150 --log-every 15 --eval-every 1000") == 0  # what may change
    assert capsys.readouterr().out.startswith(f"{run_dir}: from step 120 of each task on; delete this ")
    new, text = checkpoint(run_dir), (run_dir / "progress.csv").read_text()
    assert len(seen) == 30
    saved = [*old["agent"].values()] + [moment["exp_avg"] for moment in old["optimizer"].values()]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], saved, strict=True))
    assert text.startswith(first) and steps(run_dir) == [60, 120, 180, 200, 240, 270, 300]
    seconds = [float(record["seconds"]) for record in progress(run_dir)]
    assert seconds == sorted(seconds) and seconds[4] <= old["seconds"] < seconds[5] < new["seconds"]
    assert old["step"] == 120 and new["step"] == 150 and new["updates"] == 130 == new["optimizer"][0]["step"]
    assert "capturable" not in str(new["optimizer"])  # so a run may continue on another device
    for before, after in zip(old["replay"], new["replay"], strict=True):
        assert before.shape[1] == after.shape[1] == 110  # of 120 and 150 steps, in a ring: 120 to 149 lie at 10 to 39
        same = (before == after).flatten(2).all(-1) if before.dim() > 2 else before == after
        assert same[:, :10].all() and same[:, 40:].all() and (before.dtype == torch.bool or not same[:, 10:40].all())
    # Finished: no environment starts, the exit code is 0.
    monkeypatch.setattr(d2r, "make_envs", None)
    assert (
        run(tmp_path, f"{options} --steps 150") == 0 == run(tmp_path, f"{options} --steps 150 --device cpu --compile")
    )
    assert capsys.readouterr().out.count("This run is finished.") == 2
    assert (run_dir / "progress.csv").read_text() == text
    changes = {"--top-k 1": "top_k 2", "--env-id 10,5": "env_id 5,10", "--goals fixed": "goals random"}
    changes |= {"--envs-per-task 2 --gamma 0.9": "envs_per_task 1, gamma 0.99", "--seed 2": "seed 1"}
    for change, old_values in changes.items():
        assert run(tmp_path, f"{options} --steps 200 {change}") == 1
        assert f"error: {run_dir}/checkpoint.pt was made with {old_values};" in capsys.readouterr().err
    (run_dir / "checkpoint.pt").unlink()
    policy = (run_dir / "actor.pt").read_bytes()
    assert run(tmp_path, f"{options} --steps 200") == 1
    assert "holds a policy, but no checkpoint" in capsys.readouterr().err
    assert (run_dir / "actor.pt").read_bytes() == policy and (run_dir / "progress.csv").read_text() == text


OPTIONS = ["no-resrouting", "no-route-balancing", "no-sample-k", "top-k=3", "goals=fixed", "compile"]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_run(tmp_path, pendulums, option, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # a run does without it
    compiled = set()  # without Inductor, which takes minutes
    monkeypatch.setattr(d2r.D2RNetwork, "compile", lambda self, **options: compiled.add(self))
    options = f"--env-id 10 --learning-starts 10 --batch-size 8 --buffer-size 50 {SMALL} --num-modules 3"
    assert run(tmp_path, f"{options} --steps 40 --{option}") == 0
    (record,) = progress(tmp_path / "run")
    assert record["updates"] == "30" and math.isfinite(float(record["critic_loss"])) and record["success"] == ""
    assert record.get("temperature/10") == (None if option == "no-sample-k" else "1")
    assert float(record["modules_used"]) == 3 if option == "top-k=3" else 1 <= float(record["modules_used"]) <= 3
    assert len(compiled) == (5 if option == "compile" else 0)


def test_a_metric_of_your_own_is_logged(tmp_path, pendulums, monkeypatch):
    """In a new run; one that continues with other metrics than before ends, instead of dropping them."""
    update, own = d2r.Agent.update, {"my_loss": torch.tensor([1.0, 2.0]), "scalar": torch.ones(())}
    assert run(tmp_path, f"{TWO_TASKS} --steps 30", "old") == 0
    monkeypatch.setattr(d2r.Agent, "update", lambda *batch: update(*batch) | own)
    assert run(tmp_path, f"{TWO_TASKS} --steps 30") == 0
    (row,) = progress(tmp_path / "run")
    assert (row["my_loss"], row["my_loss/10"], row["scalar/5"]) == ("1.5", "2", "1")
    with pytest.raises(ValueError, match="fields not in fieldnames: .*my_loss"):
        run(tmp_path, f"{TWO_TASKS} --steps 40", "old")


def test_a_task_whose_losses_are_too_large(tmp_path, pendulums, capsys):
    """An update skips it; the terminal and progress.csv say so, and no weight becomes infinite."""
    assert run(tmp_path, f"{TWO_TASKS} --steps 40 --log-every 10 --reward-scale 1000") == 0
    assert [record["skipped/10"] for record in progress(tmp_path / "run")] == ["1", "1"]
    assert re.search(r"step 30 .*, skipped 1\n", capsys.readouterr().out)
    agent, batch = small_agent()
    batch[2][:8] = 1e30
    losses = agent.update(*batch)
    assert losses["critic_loss"][0] == math.inf and losses["skipped"].tolist() == [1, 0, 0]
    assert all(parameter.isfinite().all() for parameter in agent.parameters())


# ------------------------------------------------------------------------------------------------------------ options
MISTAKES = """
--env-id ML10: 'ML10' is unknown or named twice
--env-id reach-v3,push-v3,reach-v3: 'reach-v3' is unknown or named twice
--initial-alpha 2: --initial-alpha must be positive, and at most 1
--learning-starts 50 --steps 50: --learning-starts must be at least 1, and smaller than --steps
--top-k 17: --top-k must be at least 1, and at most --num-modules
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_is_named_before_anything_is_built(tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr(d2r, "make_envs", None)
    monkeypatch.chdir(tmp_path)
    arguments, message = line.split(": ", 1)
    assert main(*arguments.split()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said and "Traceback" not in said and not [*tmp_path.iterdir()]


# -------------------------------------------------------------------------------------------------- kills and failures
def learner(log, arguments):
    """main in a process, and a process group, of its own."""

    def child():
        os.setsid()
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 2)
        sys.exit(main(*arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def workers_after(process, run_dir, records):
    """The learner's workers, once it has written so many rows."""
    deadline = time.monotonic() + 60
    while not (run_dir / "progress.csv").exists() or len(steps(run_dir)) < records:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def assert_ended(pids):
    deadline = time.monotonic() + 20
    for stat in (Path(f"/proc/{pid}/stat") for pid in pids):
        with contextlib.suppress(OSError):
            while stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
                assert time.monotonic() < deadline, f"{stat} outlives its learner"
                time.sleep(0.05)


def test_kills(tmp_path, pendulums):
    """Whatever ends a run, the same command continues it: every row once, replay and counters consistent."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*ENDLESS.split(), "--run-dir", run_dir, "--checkpoint-minutes", "0.001"]
    workers, rows = [], 3
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = learner(log, command)
        workers += workers_after(process, run_dir, rows)
        if number == signal.SIGINT:  # Ctrl-C reaches the whole group
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == -number and "Traceback" not in log.read_text()
        saved = checkpoint(run_dir)
        step = saved["step"]
        assert saved["updates"] == step - 20 and saved["added"] == step
        assert saved["log"].count("\n") == step // 10 - 1  # a header, and rows from step 30 on
        assert [column.shape[1] for column in saved["replay"]] == [min(step, 1000)] * 6
        rows = step // 10 + 1
    assert_ended(workers)
    assert run(tmp_path, f"{ENDLESS} --steps {step + 15}") == 0
    assert steps(run_dir) == sorted({*range(60, 2 * step + 30, 20), 2 * step + 30})


def test_a_dead_worker_ends_the_run(tmp_path, pendulums):
    process = learner(tmp_path / "log", [*ENDLESS.split(), "--run-dir", tmp_path / "run"])
    workers = workers_after(process, tmp_path / "run", 1)
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.join(30)
    assert_ended(workers)
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith(("EOFError", "ConnectionResetError", "BrokenPipeError"))


def test_no_worker_outlives_its_learner_beside_an_environment_that_hangs(tmp_path, pendulums, monkeypatch):
    def hang(reward):
        (tmp_path / f"{os.getpid()}.hangs").touch()
        time.sleep(1000)

    make_env = d2r.make_env
    monkeypatch.setattr(d2r, "make_env", lambda *options: gym.wrappers.TransformReward(make_env(*options), hang))
    process = learner(tmp_path / "log", [*ENDLESS.split(), "--run-dir", tmp_path / "run"])
    while len(workers := [*tmp_path.glob("*.hangs")]) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    assert_ended([process.pid, *(worker.stem for worker in workers)])


@pytest.mark.parametrize("what", ["weights", "action", "observation", "first observation", "reward"])
def test_what_is_not_finite_stops_the_run(tmp_path, pendulums, monkeypatch, what):
    """The second task's, in its 30th step or at its third reset; never does it reach a checkpoint."""
    make_env, update, updates = d2r.make_env, d2r.Agent.update, itertools.count(1)

    class Bad(gym.Wrapper):
        steps = 0

        def reset(self, **options):
            obs, info = self.env.reset(**options)
            return obs * (math.inf if what == "first observation" and self.steps == 20 else 1), info

        def step(self, action):
            self.steps += 1
            obs, reward, *rest = self.env.step(action)
            bad = self.steps == 30 and what
            return obs * (math.nan if bad == "observation" else 1), reward * (1e39 if bad == "reward" else 1), *rest

    def changed(agent, *batch):
        metrics = update(agent, *batch)
        if next(updates) == 9 and what in ("weights", "action"):
            (agent.actor if what == "action" else agent.critics[1]).head.weight.data[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(d2r.Agent, "update", changed)
    monkeypatch.setattr(
        d2r, "make_env", lambda task, *more: (Bad if task == "10" else gym.Wrapper)(make_env(task, *more))
    )
    minutes = 10 if what == "action" else 1e-7  # a checkpoint in every step sees weights before the next action does
    message = {"weights": "the weights are", "action": "action of (5|10) is"}.get(what, "observation.* of 10 is")
    with pytest.raises(FloatingPointError, match=f"{message} not finite"):
        run(tmp_path, f"{TWO_TASKS} --steps 400 --checkpoint-minutes {minutes}")
    if what != "action":
        kept = checkpoint(tmp_path / "run")
        assert kept["step"] == {"weights": 28, "first observation": 19}.get(what, 29)
        assert all(value.isfinite().all() for value in (*kept["agent"].values(), *kept["replay"]))


# ------------------------------------------------------------------------------------------------------ kept policies
# Of observations linspace(-1, 1): the mean action, and the number of used modules, at commit f98d1ce.
KEPT = {
    "three-tasks": ([-0.9888, 0.18703, 0.61505, -0.89071], 15),
    "MT10-gpu": ([0.07425, 0.82566, -0.98677, -0.44962], 61),
    "MT10-cpu": ([-0.01331, 0.7175, 0.23313, 0.48179], 66),
    "comparison/d2r-seed1": ([-0.54406, -0.04654, -0.70378, -0.08095], 46),
    "comparison/mt-sac-seed1": ([-0.0085, 0.48887, 0.03527, -0.40785], 30),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_policies_act_as_before(name):
    actor, tasks, args = d2r.load_policy(RESULTS / name / "actor.pt")
    action, used = KEPT[name]
    obs = torch.linspace(-1, 1, len(tasks) * (49 if "mt-sac" in name else 39)).view(len(tasks), -1)
    output, routes = actor(obs, torch.arange(len(tasks)))
    close(output.chunk(2, dim=-1)[0].tanh().mean(0), action, 1e-4)
    assert d2r.used_modules(routes).sum() == used
    assert json.loads((RESULTS / name / "args.json").read_text())["tasks"] == tasks == args.tasks
