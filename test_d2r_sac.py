# SPDX-License-Identifier: MIT
"""Tests of d2r_sac.py: against reference values, computations that share no code with it, and the real Meta-World."""

import contextlib
import csv
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from metaworld.policies import ENV_POLICY_MAP

import d2r_sac as d2r

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
torch.set_num_threads(1)
SCRIPT = Path(d2r.__file__)
SMALL = (
    "--eval-every 1000000 --num-modules 4 --module-width 16 --encoder-widths 32 32 --router-widths 16 --batch-size 16"
)
TWO_TASKS = f"--env-id reach-v3,drawer-close-v3 --learning-starts 40 --buffer-size 2000 --eval-episodes 1 {SMALL}"


FORMS = pytest.mark.parametrize("form", ["skipping", "static", "compiled"])


def in_form(form, *networks):
    """skipping: as on a CPU, unused modules left out; static: as on a GPU; compiled: as on a GPU with --compile."""
    torch._dynamo.reset()
    for network in networks:
        network.base_modules.skip_unused = form == "skipping"
        if form == "compiled":
            network.routing_network.compile(dynamic=False, fullgraph=True)
            network.base_modules.compile(dynamic=False, fullgraph=True)


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def random_table(B, M, seed=0, dtype=torch.float64):
    """Random logits (B, M(M+1)/2) and their table (B, M, M)."""
    logits = torch.randn(B, M * (M + 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return logits, d2r.routing_table(logits, M)


# ------------------------------------------------------------------------------------- parity with reference values


def golden_network(resrouting):
    """The reference values' tiny network, and its parameters by the reference's names."""
    args = d2r.Args(num_modules=4, top_k=2, module_width=4, encoder_widths=(6, 6), router_widths=(5,))
    args.resrouting = resrouting
    network = d2r.D2RNetwork(3, 2, 2, args).double()
    routing, base = network.routing_network, network.base_modules
    layers = {
        "obs_encoder.0": routing.obs_encoder[0],
        "obs_encoder.1": routing.obs_encoder[2],
        "task_encoder": routing.task_encoder,
        "router.0": routing.router[0],
        "router.1": routing.router[2],
        **{f"module.{i}": base.module[i] for i in range(4)},
        "head": base.head,
    }
    parameters = {}
    for p, (name, shape) in enumerate(GOLDEN["parameters"]):
        layer, leaf = name.rsplit(".", 1)
        parameters[name] = getattr(layers[layer], leaf)
        assert list(parameters[name].shape) == shape
        entries = [0.6 * math.sin(1.3 * p + 0.7 * k + 0.1) for k in range(math.prod(shape))]
        parameters[name].data = torch.tensor(entries, dtype=torch.float64).view(shape)
    assert len(parameters) == len(list(network.parameters()))
    return network, parameters


def close(tensor, reference, tolerance=1e-10):
    reference = torch.as_tensor(reference, dtype=tensor.dtype)
    assert tensor.shape == reference.shape
    assert (tensor - reference).abs().max() <= tolerance


def rows(table):
    """(B, M, M) to nested lists without what lies above the diagonal, as the reference values have it."""
    return [[row[: i + 1].tolist() for i, row in enumerate(sample)] for sample in table]


def close_rows(table, reference):
    for row, expected in zip(itertools.chain(*rows(table)), itertools.chain(*reference), strict=True):
        assert row == pytest.approx(expected, abs=1e-10)


@FORMS
@pytest.mark.parametrize("resrouting", [True, False])
def test_golden_network(resrouting, form):
    network, parameters = golden_network(resrouting)
    in_form(form, network)
    graphs = compiled_graphs()
    obs, task = torch.tensor(GOLDEN["obs"], dtype=torch.float64), torch.tensor(GOLDEN["task"])
    _, table = network.routing_network(obs, task)
    close_rows(table, GOLDEN["routing_logits"])
    close_rows(table.softmax(-1), GOLDEN["target_probability"])
    assert rows(d2r.gradient_kept(table)) == GOLDEN["gradient_kept"]

    output, routes = network(obs, task)
    close(output, GOLDEN["top_k"]["output"])
    close_rows(d2r.routing_weights(table, routes), GOLDEN["top_k"]["routing_weights"])

    behavior = torch.tensor([[(row * 2)[:2] for row in sample] for sample in GOLDEN["behavior_routes"]])
    output, routes = network(obs, task, routes=behavior)
    assert routes is behavior
    close(output, GOLDEN["behavior"]["output"])
    close_rows(d2r.routing_weights(table, behavior), GOLDEN["behavior"]["routing_weights"])

    sum((2 * b + c + 1) * output[b, c] for b in range(4) for c in range(2)).backward()
    kind = "gradient_resrouting" if resrouting else "gradient_without_resrouting"
    for name, parameter in parameters.items():
        close(parameter.grad, GOLDEN["behavior"][kind][name])
    assert (compiled_graphs() > graphs) == (form == "compiled")


def test_golden_temperatures():
    log_alpha = torch.tensor(GOLDEN["route_temperature"]["log_alpha"], dtype=torch.float64)
    close(d2r.route_temperatures(log_alpha, d2r.Args()), GOLDEN["route_temperature"]["temperature"])
    close(d2r.route_temperatures(log_alpha, d2r.Args(route_balancing=False)), [1.0] * 4)
    assert d2r.route_temperatures(log_alpha, d2r.Args(sample_k=False)) is None


def test_parameter_counts_and_initialisation():
    args, tasks, _ = d2r.parse_arguments(["--env-id", "MT10"])
    agent = d2r.Agent(args, tasks, 39, 4, torch.device("cpu"))
    counts = [sum(p.numel() for p in network.parameters()) for network in (agent.actor, *agent.critics)]
    assert counts == [684_240, 684_937, 684_937]
    heads = [network.base_modules.head for network in (agent.actor, *agent.critics)]
    for layer in (m for m in (*agent.actor.modules(), *agent.critics.modules()) if isinstance(m, torch.nn.Linear)):
        bound = 3e-3 if layer in heads else layer.out_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert (layer.bias.abs() <= 3e-3).all() if layer in heads else (layer.bias == 0.1).all()


# ------------------------------------------------------------------------------------------------- routes and gates


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_k_draws_without_replacement(temperature):
    """Pairs of three sources, against the exact probabilities: chi-square with 2 degrees of freedom."""
    draws = 20_000
    logits = torch.tensor([0.0, 0.0, 0.0, *GOLDEN["sample_k"]["logits"]]).expand(draws, -1)
    torch.manual_seed(0)
    routes = d2r.sample_k(d2r.routing_table(logits, 3), 2, torch.full((draws,), temperature))
    pairs = ["".join(map(str, sorted(pair))) for pair in routes[:, 2].tolist()]
    expected = {pair: draws * p for pair, p in GOLDEN["sample_k"]["pair_probability"][str(temperature)].items()}
    assert set(pairs) == set(expected)
    chi_square = sum((pairs.count(pair) - e) ** 2 / e for pair, e in expected.items())
    assert chi_square < 13.82  # exceeded with probability 0.001


@pytest.mark.parametrize(("M", "K"), [(1, 1), (4, 2), (7, 3), (5, 5), (16, 2)])
def test_gates(M, K):
    logits, table = random_table(50, M)
    position = itertools.count()
    for i, j in itertools.product(range(M), range(M)):
        assert torch.equal(table[:, i, j], logits[:, next(position)]) if j <= i else (table[:, i, j] == -math.inf).all()
    sampled = d2r.sample_k(table, K, torch.linspace(0.1, 3, 50))
    for routes in (d2r.top_k(table, K), sampled):
        weights = d2r.routing_weights(table, routes)
        assert ((weights > 0).sum(-1) == torch.arange(1, M + 1).clamp(max=K)).all()
        close(weights.sum(-1), torch.ones(50, M), 1e-12)
        assert (weights.triu(1) == 0).all()
    for b, i in itertools.product(range(50), range(M)):
        row = logits[b, i * (i + 1) // 2 :][: i + 1]
        assert set(d2r.top_k(table, K)[b, i].tolist()) == set(np.argsort(row.numpy())[-K:].tolist())


def test_used_modules_against_every_path():
    M, K = 6, 2
    _, table = random_table(200, M)
    routes = d2r.sample_k(table, K, torch.ones(200))

    def modules_on_paths(route, row):
        return set().union(*({j} | (modules_on_paths(route, j - 1) if j else set()) for j in set(route[row])))

    for used, route in zip(d2r.used_modules(routes), routes.tolist()):
        assert set(used.nonzero().flatten().tolist()) == modules_on_paths(route, M - 1)


def test_unused_modules_are_not_computed():
    args = d2r.Args(num_modules=8, module_width=5, encoder_widths=(7, 7), router_widths=(6,))
    torch.manual_seed(0)
    network = d2r.D2RNetwork(3, 2, 1, args)
    inputs, task = torch.randn(1, 3), torch.zeros(1, dtype=torch.long)
    network.base_modules.skip_unused = False
    expected, routes = network(inputs, task)
    network.base_modules.skip_unused = True
    used = d2r.used_modules(routes)[0]
    assert 0 < used.sum() < 8
    for i in (~used).nonzero().flatten():
        network.base_modules.module[i].weight.data.fill_(math.nan)
    output, _ = network(inputs, task)
    close(output, expected, 1e-6)
    output.sum().backward()
    gradients = [network.base_modules.module[i].weight.grad for i in range(8)]
    assert all(
        gradient.isfinite().all() and (gradient == 0).all() == (not used[i]) for i, gradient in enumerate(gradients)
    )
    network.base_modules.module[used.nonzero()[-1]].weight.data.fill_(math.nan)
    assert network(inputs, task)[0].isnan().all()


def test_each_sample_skips_its_own_modules():
    """Products with a module's weights have as many rows as samples use it."""
    args = d2r.Args(num_modules=8, module_width=5, encoder_widths=(7, 7), router_widths=(6,))
    torch.manual_seed(0)
    network = d2r.D2RNetwork(3, 2, 1, args)
    inputs, task = torch.randn(40, 3), torch.zeros(40, dtype=torch.long)
    _, routes = network(inputs, task, temperature=torch.full((1,), 5.0))
    rows, linear = [], torch.nn.functional.linear

    def counted(x, weight, bias):
        rows.append(len(x))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        network.base_modules(torch.randn(40, 7), torch.randn(40, 8, 8), routes)
    assert rows[1:-1] == d2r.used_modules(routes).sum(0)[1:].tolist()  # without module 0 and the head
    assert 0 < min(rows[1:-1]) < 40


# ------------------------------------------------------------------------------------------------------- ResRouting


def base_modules_backward(weights, biases, head, h, w, kept, grad_output):
    """One sample's forward and ResRouting backward pass in NumPy, by hand. Returns output, and gradients of W, h, w.

    f_j reaches module i+1's own layer by kept edges only, and its residual shortcut by all; x_j is reached by all.
    """
    M = len(weights)
    x, f, o = [np.maximum(h, 0)], [], []
    for i in range(M):
        if i:
            x.append(sum(w[i - 1, j] * o[j] for j in range(i)))
        f.append(np.maximum(weights[i] @ x[i] + biases[i], 0))
        o.append(f[i] + (x[i] if i else 0))
    mixed = sum(w[M - 1, j] * o[j] for j in range(M))

    grad_w, grad_W = np.zeros_like(w), [np.zeros_like(weight) for weight in weights]
    grad_f, grad_x = [np.zeros_like(v) for v in f], [np.zeros_like(v) for v in f]

    def send(row, own, shortcut):
        for j in range(row + 1):
            grad_w[row, j] += (own + shortcut) @ o[j]
            grad_f[j] += w[row, j] * (own * kept[row, j] + shortcut)
            grad_x[j] += w[row, j] * (own + shortcut)

    send(M - 1, head.T @ grad_output, np.zeros_like(mixed))
    for i in reversed(range(M)):
        grad_z = grad_f[i] * (f[i] > 0)
        grad_W[i] += np.outer(grad_z, x[i])
        if i:
            send(i - 1, weights[i].T @ grad_z, grad_x[i])
    return head @ mixed, grad_W, (weights[0].T @ grad_z) * (h > 0), grad_w


@pytest.mark.parametrize("skip_unused", [True, False])
@pytest.mark.parametrize(("M", "K", "H", "B"), [(1, 1, 3, 2), (5, 2, 4, 3), (9, 3, 6, 4), (6, 6, 5, 3)])
def test_resrouting_against_a_backward_pass_by_hand(M, K, H, B, skip_unused):
    torch.manual_seed(1)
    base = d2r.BaseModules(7, 2, M, H, resrouting=True).double()
    base.skip_unused = skip_unused
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    _, table = random_table(B, M)
    table = (3 * table).requires_grad_()
    h = torch.randn(B, 7, dtype=torch.float64, requires_grad=True)
    routes = d2r.sample_k(table.detach(), K, torch.full((B,), 2.0))
    output = base(h, table, routes)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)

    w, kept = d2r.routing_weights(table.detach(), routes).numpy(), np.zeros((B, M, M))
    probability = table.detach().exp() / table.detach().exp().sum(-1, keepdim=True)
    for i in range(M):
        kept[:, i] = probability[:, i] > 1 / (i + 2)
    assert M == 1 or 0 < (kept * (w > 0)).sum() < (w > 0).sum(), "some chosen edges should be blocked, some not"
    total = [np.zeros_like(module.weight.detach().numpy()) for module in base.module]
    parameters = [module.weight.detach().numpy() for module in base.module]
    biases = [module.bias.detach().numpy() for module in base.module]
    for b in range(B):
        y, grad_W, grad_h, grad_w = base_modules_backward(
            parameters, biases, base.head.weight.detach().numpy(), h[b].detach().numpy(), w[b], kept[b],
            grad_output[b].numpy(),
        )  # fmt: skip
        close(output[b].detach() - base.head.bias.detach(), y)
        close(h.grad[b], grad_h)
        for i in range(M):  # softmax over the chosen sources
            close(table.grad[b, i], w[b, i] * (grad_w[i] - w[b, i] @ grad_w[i]))
        total = [t + g for t, g in zip(total, grad_W)]
    for module, expected in zip(base.module, total):
        close(module.weight.grad, expected)


# ------------------------------------------------------------------------------------------------------- SAC losses


def test_losses_by_hand():
    alpha = torch.tensor([0.5, 0.1])
    reward, terminated = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, True], [False, False]])
    next_q = torch.tensor([[[10.0, 20.0], [30.0, 40.0]], [[12.0, 18.0], [28.0, 44.0]]])
    log_prob = torch.tensor([[-1.0, 2.0], [-3.0, 1.0]])
    target = d2r.td_target(reward, terminated, next_q, log_prob, alpha, gamma=0.9)
    # 1 + 0.9 (10 + 0.5);  2, terminated;  3 + 0.9 (28 + 0.3);  4 + 0.9 (40 - 0.1)
    close(target, [[10.45, 2.0], [28.47, 39.91]], 1e-5)
    q = torch.tensor([[[10.0, 1.0], [28.0, 40.0]], [[11.0, 3.0], [29.0, 39.0]]])
    # (0.45^2 + 1 + 0.55^2 + 1) / 2;  (0.47^2 + 0.09^2 + 0.53^2 + 0.91^2) / 2
    close(d2r.critic_loss(q, target), [1.2525, 0.66900], 1e-4)
    # (0.5 * -1 - 10 + 0.5 * 2 - 1) / 2;  (0.1 * -3 - 28 + 0.1 * 1 - 39) / 2
    close(d2r.actor_loss(q, log_prob, alpha), [-5.25, -33.6], 1e-5)
    # -log 0.5 (0.5 - 4);  -log 0.1 (-1 - 4)
    close(d2r.alpha_loss(alpha.log(), log_prob, -4.0), [-2.42602, -11.51293], 1e-4)
    # T softmax(-log alpha) is proportional to 1 / alpha: 2 and 10
    close(d2r.task_weights(alpha.log()), [2 * 2 / 12, 2 * 10 / 12], 1e-6)
    losses = torch.tensor([5.0, 3000.5, 2999.5], requires_grad=True)
    mean = d2r.masked_mean(losses, 3e3)
    close(mean, (5 + 2999.5) / 3, 1e-3)
    mean.backward()
    close(losses.grad, [1 / 3, 0, 1 / 3], 1e-6)


def test_action_distribution():
    """Log-probabilities against PyTorch's own transformed distribution; the clamp of log std; and a known mean."""
    torch.manual_seed(0)
    output = torch.cat([torch.randn(1000, 4), torch.rand(1000, 4) * 3 - 2], -1).double()
    action, log_prob = d2r.sample_action(output)
    normal = torch.distributions.Normal(output[:, :4], output[:, 4:].exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    inside = (action.abs() < 1 - 1e-6).all(-1)
    assert inside.sum() > 500
    close(log_prob[inside], squashed.log_prob(action).sum(-1)[inside], 1e-6)
    narrow, _ = d2r.sample_action(torch.tensor([[0.5, -1.0, -50.0, -50.0]]))
    close(narrow, [[math.tanh(0.5), math.tanh(-1.0)]], 1e-6)
    wide, _ = d2r.sample_action(torch.cat([torch.zeros(10_000, 1), torch.full((10_000, 1), 9.0)], -1).double())
    assert wide.atanh()[wide.abs() < 0.99].std() < 2  # log std 9 would leave nearly nothing there, and 2 leaves 28 %
    assert 0.2 < (wide.abs() < 0.99).double().mean() < 0.4


def small_agent(seed=0, tasks=("reach-v3", "drawer-close-v3", "door-close-v3"), device="cpu", **changes):
    arguments = ["--env-id", ",".join(tasks), *SMALL.split()[:-2], "--batch-size", str(8 * len(tasks))]
    args, tasks, _ = d2r.parse_arguments(arguments)
    for name, value in changes.items():
        setattr(args, name, value)
    torch.manual_seed(seed)
    agent = d2r.Agent(args, tasks, 39, 4, torch.device(device))
    agent.log_alpha.data = torch.tensor([0.0, -0.7, -2.0], device=device)
    B = args.batch_size
    obs, next_obs, action = torch.randn(B, 39), torch.randn(B, 39), torch.rand(B, 4) * 2 - 1
    routes = d2r.sample_k(
        torch.randn(B, 4, 4).tril().masked_fill(torch.ones(4, 4).triu(1) > 0, -math.inf), 2, torch.ones(B)
    )
    batch = d2r.Transition(obs, action, 10 * torch.rand(B), next_obs, torch.rand(B) < 0.3, routes.to(torch.uint8))
    return agent, batch


@pytest.mark.parametrize(("max_task_loss", "form"), [(3e3, "skipping"), (None, "skipping"), (None, "compiled")])
def test_update_gradients_against_separate_losses(max_task_loss, form):
    """Each part's gradient is that of its own loss alone: so the critics get none from the actor's loss.

    With max_task_loss None, the limit lies such that one task is left out.
    """
    agent, batch = small_agent(sample_k=False, max_grad_norm=1e9)
    task = torch.tensor([0] * 8 + [1] * 8 + [2] * 8)
    alpha = agent.log_alpha.detach().exp()
    weight = 3 / alpha / (1 / alpha).sum()
    torch.manual_seed(7)
    with torch.no_grad():
        next_action, next_log_prob = d2r.sample_action(agent.actor(batch.next_obs, task)[0])
        next_inputs = torch.cat([batch.next_obs, next_action], -1)
        next_q = torch.min(*(critic(next_inputs, task)[0][:, 0] for critic in agent.target_critics))
        soft_value = next_q - alpha[task] * next_log_prob
        target = 0.1 * batch.reward + 0.99 * torch.where(batch.terminated, 0.0, soft_value)
    inputs = torch.cat([batch.obs, batch.action], -1)
    errors = [(critic(inputs, task)[0][:, 0] - target) ** 2 for critic in agent.critics]
    action, log_prob = d2r.sample_action(agent.actor(batch.obs, task, routes=batch.routes)[0])
    policy_q = [critic(torch.cat([batch.obs, action], -1), task)[0][:, 0] for critic in agent.critics]
    policy_loss = alpha[task] * log_prob - torch.min(*policy_q)
    temperature_loss = -agent.log_alpha[task] * (log_prob.detach() - 4)

    def per_task(values):
        return torch.stack([values[task == t].sum() / 8 for t in range(3)])

    critic_losses, actor_losses = weight * per_task(errors[0] + errors[1]), weight * per_task(policy_loss)
    alpha_losses = per_task(temperature_loss)
    summed = (critic_losses + actor_losses + alpha_losses).detach()
    agent.args.max_task_loss = max_task_loss or summed.sort().values[1:].mean().item()
    counted = (summed <= agent.args.max_task_loss).float()
    assert counted.sum() == (3 if max_task_loss else 2)
    expected = {}
    for loss, part in ((critic_losses, agent.critics), (actor_losses, agent.actor)):
        parameters = list(part.parameters())
        gradients = torch.autograd.grad((counted * loss).sum() / 3, parameters, retain_graph=True, allow_unused=True)
        expected |= {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)}
    (expected[agent.log_alpha],) = torch.autograd.grad((counted * alpha_losses).sum() / 3, [agent.log_alpha])

    in_form(form, agent.actor, *agent.critics, *agent.target_critics)
    graphs = compiled_graphs()
    torch.manual_seed(7)
    losses = agent.update(batch)
    assert (compiled_graphs() > graphs) == (form == "compiled")
    for parameter, gradient in expected.items():
        close(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, gradient, 1e-5)
    close(losses["critic_loss"], critic_losses.detach().mean(), 1e-5)
    close(losses["actor_loss"], actor_losses.detach().mean(), 1e-5)
    close(losses["alpha_loss"], alpha_losses.detach().mean(), 1e-5)


def test_update_clips_clamps_and_averages():
    agent, batch = small_agent(tau=0.25, alpha_learning_rate=0.5, max_grad_norm=0.01, target_entropy=10.0)
    before = [p.clone() for p in agent.target_critics.parameters()]
    for _ in range(5):
        agent.update(batch)
        after = list(agent.critics.parameters())
        for old, critic, target in zip(before, after, agent.target_critics.parameters(), strict=True):
            close(target, 0.75 * old + 0.25 * critic.detach(), 1e-6)
        before = [p.clone() for p in agent.target_critics.parameters()]
        for part in (agent.actor.parameters(), *(c.parameters() for c in agent.critics), [agent.log_alpha]):
            gradients = torch.cat([p.grad.flatten() for p in part if p.grad is not None])
            assert gradients.norm() == pytest.approx(0.01, rel=1e-3)
        assert (agent.log_alpha <= 0).all()
    assert (agent.log_alpha == 0).all()  # the policies lack entropy: without the clamp alpha would rise further


def test_learning_rates_are_those_asked_for():
    """Adam's first step is the learning rate, whatever the gradient."""
    agent, batch = small_agent(learning_rate=1e-3, alpha_learning_rate=1e-2)
    before = [agent.actor.base_modules.head.weight.clone(), agent.log_alpha.clone()]
    agent.update(batch)
    steps = (agent.actor.base_modules.head.weight - before[0]).abs(), (agent.log_alpha - before[1]).abs()
    assert steps[0].max().item() == pytest.approx(1e-3, rel=1e-2)
    assert steps[1].max().item() == pytest.approx(1e-2, rel=1e-2)


# ------------------------------------------------------------------------------------------------------------ speed


@pytest.mark.parametrize("form", ["skipping", "compiled"])
def test_compiled_and_eager_losses_agree(form):
    """Over 20 updates and actions, from the same seed: --compile as it is on a CPU, and with all that a GPU adds."""
    torch._dynamo.reset()
    losses, actions = {}, {}
    for compiled in (False, True):
        agent, batch = small_agent(compile=compiled, learning_rate=3e-3)
        if compiled and form == "compiled":
            in_form(form, agent.actor, *agent.critics, *agent.target_critics)
        graphs = compiled_graphs()
        torch.manual_seed(3)
        losses[compiled] = [list(agent.update(batch).values()) for _ in range(20)]
        actions[compiled] = [agent.act(batch.obs[:3])[0] for _ in range(20)]
        assert (compiled_graphs() > graphs) == compiled
    eager = torch.tensor(losses[False])
    assert ((torch.tensor(losses[True]) - eager).abs() <= 1e-4 * eager.abs()).all()
    assert (eager[1:, 0] != eager[:-1, 0]).all()  # they do learn
    assert np.allclose(actions[True], actions[False], atol=1e-4)


def test_bfloat16_is_for_the_networks_alone():
    """Losses near float32's, and everything that is kept is float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        agent, batch = small_agent(precision=precision, sample_k=False)
        torch.manual_seed(3)
        output, _ = agent.actor(batch.obs, agent.task.repeat_interleave(8), routes=batch.routes)
        assert output.dtype == torch.float32
        losses[precision] = [agent.update(batch)["critic_loss"].item() for _ in range(5)]
        state = [value for values in agent.optimizer.state.values() for value in values.values()]
        gradients = [parameter.grad for parameter in agent.parameters]
        kept = [*agent.parameters, *agent.target_critics.parameters(), agent.task_losses, *state, *gradients]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != pytest.approx(losses["float32"], rel=1e-6)


def test_on_a_gpu_nothing_waits_for_the_host(monkeypatch):
    """Acting, sampling and the update on the meta device: tensors without values, that mix with none on the host."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, fused: adam(groups))
    agent, batch = small_agent(device="meta")
    action, routes = agent.policy(batch.obs[:3].to("meta"))
    assert action.is_meta and routes.is_meta
    replay = d2r.ReplayBuffer(10, 3, 39, 4, 4, 2, device="meta")
    replay.size = 10
    losses = agent.update(replay.sample(8, torch.device("meta")))
    assert len(losses) == 3 and all(loss.is_meta for loss in losses.values())
    with pytest.raises(RuntimeError, match="meta"):
        agent.act(batch.obs[:3].numpy())  # the action goes to the host, to the environments
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        agent.check_losses()


def test_cuda_graph_copies_its_inputs_and_replays(monkeypatch):
    """With a stand-in for CUDA, whose graph repeats the captured call and overwrites its results."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")
            for output, value in zip(wrapped.outputs, double(wrapped.inputs)):
                output.copy_(value)

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(log.append("capture")))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def double(batch):
        tensors = (batch,) if isinstance(batch, torch.Tensor) else batch
        return [2 * tensor for tensor in tensors]

    for make in (lambda x: torch.full((2,), x), lambda x: d2r.Transition(*(torch.full((i,), x + i) for i in range(6)))):
        log.clear()
        wrapped = d2r.CUDAGraph(double)
        outputs = []
        for call in range(6):
            given = make(float(call))
            outputs.append(wrapped(given))
            assert all(torch.equal(a, b) for a, b in zip(outputs[-1], double(given), strict=True))
        assert outputs[3] is outputs[4] is outputs[5] and outputs[2] is not outputs[3]
        assert log == ["wait", "wait"] * 3 + ["capture", "replay", "replay", "replay"]


def test_replay_goes_where_it_fits(monkeypatch):
    placed, free = [], [0, 0]

    class Replay(d2r.ReplayBuffer):
        def __init__(self, *shape, device):
            placed.append(torch.device(device).type)
            super().__init__(*shape, device="meta")

    monkeypatch.setattr(d2r, "ReplayBuffer", Replay)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: tuple(free))
    args, _, _ = d2r.parse_arguments(["--env-id", "MT10"])
    for device, buffer_device, gigabytes, expected in (
        ("cpu", "auto", 80, "cpu"),
        ("cuda", "auto", 80, "cuda"),
        ("cuda", "auto", 0.4, "cpu"),  # the replay takes 0.365 GB
        ("cuda", "cuda", 0.4, "cuda"),
        ("cuda", "cpu", 80, "cpu"),
    ):
        args.buffer_device, free[0] = buffer_device, gigabytes * 1e9
        d2r.make_replay(args, 10, 39, 4, torch.device(device))
        assert placed[-1] == expected


def test_a_loss_that_nobody_waited_for_reaches_no_checkpoint(tmp_path):
    """On a GPU the losses are looked at now and then: before a checkpoint in any case."""
    agent, batch = small_agent()
    agent.task_losses = torch.tensor([0.0, math.nan, 1.0])
    with pytest.raises(d2r.RunError, match="the loss of drawer-close-v3 is nan"):
        d2r.save_run(tmp_path, agent.args, agent, d2r.ReplayBuffer(2, 3, 39, 4, 4, 2), d2r.Progress())
    agent.target_critics[1].base_modules.module[2].bias.data[3] = math.nan
    agent.task_losses.zero_()
    with pytest.raises(d2r.RunError, match="the weights are not finite"):
        d2r.save_run(tmp_path, agent.args, agent, d2r.ReplayBuffer(2, 3, 39, 4, 4, 2), d2r.Progress())
    assert not list(tmp_path.iterdir())
    agent.task_losses[1] = batch.obs[1] = math.nan
    with pytest.raises(d2r.RunError, match="the loss of drawer-close-v3 is nan"):
        agent.act(batch.obs[:3])


# ------------------------------------------------------------------------------------------------------------ ranks

RANK = """
import sys
import torch
import d2r_sac as d2r

directory, differ, *arguments = sys.argv[1:]
rank, _ = d2r.world()
average_gradients, save_run, gradients = d2r.average_gradients, d2r.save_run, []


def spied_average(parameters):
    gradients.append([parameter.grad.clone() for parameter in parameters])
    average_gradients(parameters)
    gradients.append([parameter.grad.clone() for parameter in parameters])


def spied_save(run_dir, args, agent, replay, progress):
    if differ == "differ":
        agent.log_alpha.data[0] -= 1e-6 * rank
    save_run(run_dir, args, agent, replay, progress)
    weights = [*agent.parameters, *agent.target_critics.parameters()]
    saved = {"weights": weights, "gradients": gradients[:2], "obs": replay.storage.obs[: replay.size].clone()}
    torch.save({**saved, "capacity": replay.capacity, "step": progress.global_step}, f"{directory}/rank{rank}.pt")


d2r.average_gradients, d2r.save_run = spied_average, spied_save
sys.exit(d2r.main(arguments))
"""


def torchrun(tmp_path, arguments, differ=False, ranks=2):
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [tmp_path / "rank.py", tmp_path, "differ" if differ else "same", *arguments.split(), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, launch + script)], env=environment, **pipes)


def test_two_ranks_learn_the_same_from_what_each_of_them_sees(tmp_path):
    options = f"--results-dir {tmp_path} --run-name run --no-tensorboard"
    process = torchrun(tmp_path, f"{TWO_TASKS} --total-steps 240 --log-every 40 {options}")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert one["step"] == two["step"] == 240 and one["capacity"] == 2000 // 4
    assert one["obs"].shape == (60, 2, 39)
    assert not (one["obs"] == two["obs"]).all(-1).any()  # other goals, and other actions
    for mine, others, mean in zip(one["gradients"][0], two["gradients"][0], one["gradients"][1], strict=True):
        close(mean, (mine + others) / 2, 1e-6)
    assert not torch.equal(one["gradients"][0][0], two["gradients"][0][0])

    rows = progress(tmp_path / "run")
    assert [int(row["global_step"]) for row in rows] == list(range(40, 241, 40))
    assert int(rows[-1]["updates"]) == (240 - 40) // 4 and rows[-1]["success"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    obs = checkpoint["replay"]["storage"][0]
    assert torch.equal(obs[0::2], one["obs"]) and torch.equal(obs[1::2], two["obs"])
    assert d2r.main(["--resume", str(tmp_path / "run"), "--total-steps", "300"]) == 0  # alone, with what both have seen
    resumed = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert torch.equal(resumed["replay"]["storage"][0][:120], obs) and resumed["progress"]["global_step"] == 300


def test_ranks_that_differ_end_the_run(tmp_path):
    options = f"--total-steps 60 --results-dir {tmp_path} --run-name run --no-tensorboard"
    process = torchrun(tmp_path, f"{TWO_TASKS} {options}", differ=True)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: step 60: the ranks' weights differ" in out
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_death_of_a_rank_ends_the_others(tmp_path):
    options = f"--total-steps 1000000 --log-every 100 --results-dir {tmp_path} --run-name run --no-tensorboard"
    process = torchrun(tmp_path, f"{TWO_TASKS} {options}")
    csv_path = tmp_path / "run" / "progress.csv"
    wait_for(lambda: csv_path.exists() and len(progress(tmp_path / "run")) > 1, process)
    ranks = {Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1][0]: pid for pid in children(process.pid)}
    workers = [worker for rank in ranks.values() for worker in children(rank)]
    os.kill(int(ranks["1"]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "another rank has ended or cannot be reached" in out
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in (*ranks.values(), *workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("steps", [3, 8])
def test_replay_is_shared_out_among_other_numbers_of_ranks(monkeypatch, steps):
    """Two ranks of capacity 5 save; one and five ranks load, and the newest steps are kept."""

    def replay_of(rank, ranks, capacity):
        monkeypatch.setattr(d2r, "world", lambda: (rank, ranks))
        return d2r.ReplayBuffer(capacity, 1, 1, 1, 2, 1)

    rings = {0: [], 1: []}

    def gather(ring, rank):
        rings[rank].append(ring)
        return [ring, rings[1][len(rings[0]) - 1]] if rank == 0 else []

    for rank in (1, 0):
        replay = replay_of(rank, 2, 5)
        for step in range(steps):
            tag = np.array([10.0 * step + rank])
            replay.add(d2r.Transition(tag, tag, tag, tag, tag > 0, np.zeros((1, 2, 1))))
        monkeypatch.setattr(d2r, "gather", lambda ring, rank=rank: gather(ring, rank))
        state = replay.state_dict()
    kept = range(max(0, steps - 5), steps)
    alone = replay_of(0, 1, 10)
    alone.load_state_dict(state)
    assert alone.storage.reward[: alone.size, 0].tolist() == [10.0 * step + rank for step in kept for rank in (0, 1)]
    assert (alone.size, alone.position) == (2 * len(kept), 2 * len(kept) % 10)
    of_five = []
    for rank in range(5):
        replay = replay_of(rank, 5, 2)
        replay.load_state_dict(state)
        assert replay.size == 2 * len(kept) // 5
        of_five += replay.storage.reward[: replay.size, 0].tolist()
    assert sorted(of_five) == alone.storage.reward[: alone.size, 0].tolist()[-len(of_five) :]


# ----------------------------------------------------------------------------------------------------------- replay


def test_replay_wraps_around_and_samples_tasks_equally():
    T, M, K = 3, 5, 2
    replay = d2r.ReplayBuffer(4, T, 2, 1, M, K)
    steps = []
    for t in range(7):
        routes = torch.randint(0, 256, (T, M, K))
        tags = np.array([10.0 * t + task for task in range(T)])
        obs = np.stack([tags, -tags], -1)
        steps.append(routes)
        replay.add(d2r.Transition(obs, obs[:, :1], tags, obs + 0.5, tags % 2 == 0, routes))
    assert (replay.size, replay.position) == (4, 3)
    batch = replay.sample(200, torch.device("cpu"))
    assert batch.routes.dtype == torch.uint8
    tags = batch.reward
    assert (tags.view(T, 200) % 10 == torch.arange(T)[:, None]).all()  # task by task, as many of each
    for task in range(T):
        assert set((tags.view(T, 200)[task] // 10).tolist()) == {3, 4, 5, 6}  # the newest four, all of them
    for b, tag in enumerate(tags.tolist()):
        t, task = divmod(int(tag), 10)
        assert torch.equal(batch.routes[b].long(), steps[t][task])
        assert batch.obs[b].tolist() == [tag, -tag] and batch.next_obs[b].tolist() == [tag + 0.5, -tag + 0.5]
        assert batch.action[b].item() == tag and batch.terminated[b] == (tag % 2 == 0)


def test_replay_of_mt10_is_small_and_untouched():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    replay = d2r.ReplayBuffer(100_000, 10, 39, 4, 16, 2)
    assert sum(ring.nbytes for ring in replay.storage) < 400e6
    assert resident() - before < 20e6


# ------------------------------------------------------------------------------------------------- real environment


class Expert(torch.nn.Module):
    """Stands in for the actor: Meta-World's scripted policies, or random actions."""

    def __init__(self, tasks, scripted=True):
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros(1))
        self.policies = [ENV_POLICY_MAP[task]() for task in tasks] if scripted else None
        self.rng = np.random.default_rng(0)

    def forward(self, obs, task):
        if self.policies:
            actions = [policy.get_action(o.astype(np.float64)) for policy, o in zip(self.policies, obs.numpy())]
        else:
            actions = self.rng.uniform(-1, 1, (len(obs), 4))
        mean = torch.atanh(torch.as_tensor(np.array(actions)).clamp(-1 + 1e-9, 1 - 1e-9))
        routes = torch.tensor([[0, 0], [0, 1], [0, 1], [2, 1]]).expand(len(obs), 4, 2)  # uses modules 0, 1 and 2
        return torch.cat([mean, torch.zeros_like(mean)], -1), routes


def evaluate(tasks, scripted, episodes):
    args, tasks, _ = d2r.parse_arguments(["--env-id", tasks])
    with d2r.worker_envs(tasks, args) as envs:
        return d2r.evaluate(Expert(tasks, scripted), envs, tasks, episodes, threading.Event())


@pytest.mark.filterwarnings("ignore:Constant")  # the experts' actions are clipped
def test_evaluation_knows_an_expert_from_chance():
    expert = evaluate("reach-v3,drawer-close-v3", scripted=True, episodes=20)
    assert expert["success/reach-v3"] >= 0.9 and expert["success/drawer-close-v3"] >= 0.9
    assert expert["success"] == (expert["success/reach-v3"] + expert["success/drawer-close-v3"]) / 2
    assert expert["modules_used/reach-v3"] == 3
    chance = evaluate("reach-v3", scripted=False, episodes=10)
    assert chance["success/reach-v3"] < 0.5
    assert 0 < chance["return/reach-v3"] == chance["return"]


def test_goals():
    goals = {}
    for kind in ("fixed", "random"):
        args, tasks, _ = d2r.parse_arguments(["--env-id", "reach-v3", "--goals", kind])
        with d2r.worker_envs(tasks, args) as envs:
            goals[kind] = {tuple(envs.reset()[0][0, -3:]) for _ in range(12)}
    assert len(goals["fixed"]) == 1 and len(goals["random"]) > 6


# ------------------------------------------------------------------------------------------------------- end to end


def run(tmp_path, arguments, name="run"):
    return d2r.main([*arguments.split(), "--results-dir", str(tmp_path), "--run-name", name, "--device", "cpu"])


def start(tmp_path, arguments, **options):
    """The script in a process of its own."""
    command = [sys.executable, str(SCRIPT), *arguments.split(), "--results-dir", str(tmp_path), "--run-name", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--device", "cpu"], env=environment, **pipes, **options)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def progress(run_dir):
    with open(run_dir / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(run_dir):
    agent = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    parts = {part: agent[part] for part in ("actor", "critics", "target_critics")}
    return {f"{part}.{name}": value for part in parts for name, value in parts[part].items()} | {
        "log_alpha": agent["log_alpha"]
    }


def test_run_resume_and_evaluate(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = f"{TWO_TASKS} --total-steps 480 --eval-every 200 --log-every 60 --episode-length 10"
    assert run(tmp_path, options) == 0
    shown = capsys.readouterr()
    assert "480 steps, replay 2,000, batch 16" in shown.out and "\r" not in shown.err
    assert {"args.json", "progress.csv", "checkpoint.pt", "actor.pt"} <= {path.name for path in run_dir.iterdir()}
    assert list(run_dir.glob("events.out.tfevents.*")) and not list(run_dir.glob("*.partial"))
    facts = json.loads((run_dir / "args.json").read_text())
    assert facts["args"]["total_steps"] == 480 and facts["args"]["learning_rate"] == 3e-4
    assert facts["versions"]["torch"] == torch.__version__ and facts["tasks"] == ["reach-v3", "drawer-close-v3"]

    rows = progress(run_dir)
    assert [int(row["global_step"]) for row in rows] == [60, 120, 180, 200, 240, 300, 360, 400, 420, 480]
    assert [row["global_step"] for row in rows if row["success"]] == ["200", "400", "480"]
    assert [int(row["updates"]) for row in rows] == [(int(row["global_step"]) - 40) // 2 for row in rows]
    per_task = ("success", "return", "modules_used", "alpha", "temperature")
    assert list(rows[0]) == [
        "global_step", "seconds", "steps_per_second", "updates", "update_ms", "success", "return", "modules_used",
        "critic_loss", "actor_loss", "alpha_loss", *(f"{name}/{task}" for name in per_task for task in facts["tasks"]),
    ]  # fmt: skip
    assert all(row[name] for row in rows for name in ("seconds", "steps_per_second", "update_ms", "critic_loss"))
    assert 1 <= float(rows[-1]["modules_used/reach-v3"]) <= 4
    taus = [float(rows[-1][f"temperature/{task}"]) for task in facts["tasks"]]
    assert sum(taus) == pytest.approx(2, rel=1e-4)
    assert all(rows[-1][name] for name in rows[-1])

    # What the replay holds is what the real environment did: also at the truncations, every tenth step.
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    replay = d2r.Transition(*checkpoint["replay"]["storage"])
    assert len(replay.reward) == 240
    # Meta-World's observation ends its first half with the hand and objects now, and has those of the step before
    # in its second: a reset's would not continue the episode.
    close(replay.next_obs[:, :, 18:36], replay.obs[:, :, :18], 1e-6)
    follows = (replay.next_obs[:-1] == replay.obs[1:]).all(-1).all(-1)
    evaluated = {100, 200}  # after these steps of each task an evaluation reset the environments
    ends = [t for t in range(239) if not follows[t]]
    assert set(ends) == set(range(9, 239, 10)) | {t - 1 for t in evaluated}
    assert not replay.terminated.any() and replay.routes.max() == 3 and (replay.reward > 0).any()

    # Resumed with nothing left to do: the same weights and rows. Resumed with more to do: it goes on.
    first, old_weights = (run_dir / "progress.csv").read_text(), weights(run_dir)
    resume = ["--resume", str(run_dir)]
    assert d2r.main(resume) == 0
    assert (run_dir / "progress.csv").read_text() == first
    assert all(torch.equal(value, old_weights[name]) for name, value in weights(run_dir).items())
    with open(run_dir / "progress.csv", "a") as file:
        file.write("500,1,1,1,1\n900,1")  # what a kill leaves: a row cut short
    assert d2r.main([*resume, "--total-steps", "600"]) == 0
    text = (run_dir / "progress.csv").read_text()
    assert text.startswith(first) and text.count("global_step") == 1
    assert [int(row["global_step"]) for row in progress(run_dir)[len(rows) :]] == [540, 600]
    assert float(progress(run_dir)[-1]["seconds"]) > float(rows[-1]["seconds"])
    assert not torch.equal(weights(run_dir)["log_alpha"], old_weights["log_alpha"])

    capsys.readouterr()
    assert d2r.main(["--evaluate", str(run_dir / "actor.pt"), "--eval-episodes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["task", "reach-v3", "drawer-close-v3"]
    words = lines[-1].replace(",", "").split()
    assert words[:2] + words[3:5] == ["mean", "success", "modules", "used"]
    assert 0 <= float(words[2]) <= 1 <= float(words[5]) <= 4

    for option, message in (
        (["--top-k", "1"], "was made with --top-k 2"),
        (["--env-id", "reach-v3"], "was made with --env-id reach-v3,drawer-close-v3"),
        (["--encoder-widths", "8"], "was made with --encoder-widths 32 32"),
    ):
        for how in (resume, ["--evaluate", str(run_dir / "actor.pt")]):
            assert d2r.main([*how, *option]) == 2
            assert message in capsys.readouterr().err
    assert run(tmp_path, options) == 2 and "holds a run already" in capsys.readouterr().err
    whole = (run_dir / "checkpoint.pt").read_bytes()
    for damaged in (whole[:-1000], whole[: len(whole) // 2] + b"\x55" * 99 + whole[len(whole) // 2 + 99 :], b""):
        (run_dir / "checkpoint.pt").write_bytes(damaged)
        assert d2r.main(resume) == 2
        assert "is damaged" in capsys.readouterr().err


def test_same_seed_same_losses(tmp_path):
    for name in ("one", "two"):
        assert (
            run(tmp_path, f"{TWO_TASKS} --total-steps 160 --log-every 20 --eval-every 100 --no-tensorboard", name) == 0
        )
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 160 --log-every 20 --seed 2 --no-tensorboard", "three") == 0
    one, two, three = (progress(tmp_path / name) for name in ("one", "two", "three"))
    timed = ("seconds", "steps_per_second", "update_ms")
    untimed = [[{name: row[name] for name in row if name not in timed} for row in rows] for rows in (one, two)]
    assert untimed[0] == untimed[1]
    assert one[-1]["critic_loss"] != three[-1]["critic_loss"]
    assert not list((tmp_path / "one").glob("events.*"))


@pytest.mark.parametrize(
    "ablation", ["--no-resrouting", "--no-route-balancing", "--no-sample-k", "--top-k 0", "--goals fixed"]
)
def test_ablations_run(tmp_path, ablation):
    options = f"--env-id reach-v3 --learning-starts 10 --eval-episodes 1 --episode-length 20 --buffer-size 50 {SMALL}"
    assert run(tmp_path, f"{options} --total-steps 60 --num-modules 3 {ablation} --no-tensorboard") == 0
    (row,) = progress(tmp_path / "run")
    assert int(row["updates"]) == 50 and math.isfinite(float(row["critic_loss"]))
    assert row["temperature/reach-v3"] == ("" if ablation == "--no-sample-k" else "1")
    assert float(row["modules_used"]) == 3 if ablation == "--top-k 0" else 1 <= float(row["modules_used"]) <= 3


def test_ablations_change_what_they_name():
    agent, batch = small_agent()
    task = agent.task.repeat_interleave(8)

    def routes_differ(**changes):
        for name, value in changes.items():
            setattr(agent.args, name, value)
        torch.manual_seed(0)
        _, one = agent.act(batch.obs[:3].numpy())
        torch.manual_seed(1)
        _, two = agent.act(batch.obs[:3].numpy())
        return not torch.equal(one, two)

    assert routes_differ()
    assert not routes_differ(sample_k=False)
    soft = d2r.D2RNetwork(39, 8, 3, d2r.Args(num_modules=4, top_k=0))
    _, table = soft.routing_network(batch.obs, task)
    _, routes = soft(batch.obs, task)
    close(d2r.routing_weights(table, routes), table.softmax(-1).detach(), 1e-6)


@pytest.mark.parametrize(
    ("env_id", "tasks", "total_steps", "buffer_size", "batch_size", "learning_starts"),
    [
        ("MT10", 10, 15_000_000, 1_000_000, 1280, 40_000),
        ("MT25", 25, 37_500_000, 2_500_000, 3200, 100_000),
        ("MT50", 50, 50_000_000, 10_000_000, 6400, 200_000),
        ("push-v3", 1, 1_500_000, 100_000, 128, 4_000),
    ],
)
def test_budgets_come_from_the_benchmark(env_id, tasks, total_steps, buffer_size, batch_size, learning_starts):
    args, names, _ = d2r.parse_arguments(["--env-id", env_id])
    assert len(names) == len(set(names)) == tasks
    assert (args.total_steps, args.buffer_size, args.batch_size) == (total_steps, buffer_size, batch_size)
    assert (args.learning_starts, args.eval_every) == (learning_starts, total_steps // 30)
    args, _, _ = d2r.parse_arguments(["--env-id", env_id, "--total-steps", "600", "--batch-size", str(2 * tasks)])
    assert (args.total_steps, args.eval_every, args.batch_size) == (600, 20, 2 * tasks)


# --------------------------------------------------------------------------------------------- signals and failures


def test_kill_and_signals(tmp_path):
    run_dir = tmp_path / "run"
    options = f"{TWO_TASKS} --total-steps 1000000 --eval-every 1000000 --log-every 100 --checkpoint-minutes 0.002"
    process = start(tmp_path, options)
    wait_for(lambda: len(progress(run_dir)) > 3 if (run_dir / "actor.pt").exists() else False, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    killed = torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["global_step"]
    torch.load(run_dir / "actor.pt", weights_only=True)
    assert killed > 0

    for number in (signal.SIGTERM, signal.SIGINT):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), "--resume", str(run_dir), "--checkpoint-minutes", "60"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        goal = killed + 300
        wait_for(lambda goal=goal: int(progress(run_dir)[-1]["global_step"]) > goal, process)
        workers += children(process.pid)
        os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "stopped at step" in out and "Traceback" not in err
        steps = [int(row["global_step"]) for row in progress(run_dir)]
        assert steps == sorted(set(steps)) == list(range(100, steps[-1] + 1, 100))
        stopped = torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"]["global_step"]
        assert stopped >= steps[-1] > killed
        killed = stopped

    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their learner"
        time.sleep(0.1)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_signal_during_an_evaluation(tmp_path, monkeypatch):
    """It ends the evaluation at once; the resumed run begins with that evaluation."""
    old_eval_action, calls = d2r.EvaluationAgent.eval_action, itertools.count(1)

    def eval_action(agent, observations):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return old_eval_action(agent, observations)

    monkeypatch.setattr(d2r.EvaluationAgent, "eval_action", eval_action)
    options = f"{TWO_TASKS} --total-steps 120 --eval-every 60 --log-every 20 --episode-length 20 --no-tensorboard"
    assert run(tmp_path, options) == 0
    assert [int(row["global_step"]) for row in progress(tmp_path / "run")] == [20, 40]
    assert next(calls) == 4
    assert d2r.main(["--resume", str(tmp_path / "run")]) == 0
    rows = progress(tmp_path / "run")
    assert [int(row["global_step"]) for row in rows] == [20, 40, 60, 80, 100, 120]
    assert [bool(row["success"]) for row in rows] == [False, False, True, False, False, True]


def test_a_dead_worker_ends_the_run(tmp_path):
    process = start(tmp_path, f"{TWO_TASKS} --total-steps 1000000 --eval-every 1000000 --log-every 100")
    wait_for(lambda: (tmp_path / "run" / "progress.csv").exists() and len(progress(tmp_path / "run")) > 1, process)
    os.kill(int(children(process.pid)[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: step" in err and "the worker process of drawer-close-v3 died" in err and "Traceback" not in err


@pytest.mark.parametrize("what", ["loss", "action"])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, what):
    """The second task's rewards, or its observation, turn NaN in the 30th step with an update."""
    old_update, old_act, updates, acts = d2r.Agent.update, d2r.Agent.act, itertools.count(1), itertools.count(1)

    def update(agent, batch):
        if what == "loss" and next(updates) == 30:
            batch.reward[8:] = math.nan
        return old_update(agent, batch)

    def act(agent, obs):
        if what == "action" and next(acts) == 20 + 30:
            obs[1] = math.nan
        return old_act(agent, obs)

    monkeypatch.setattr(d2r.Agent, "update", update)
    monkeypatch.setattr(d2r.Agent, "act", act)
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 400 --checkpoint-minutes 0.00001") == 1
    assert f"error: step 98: the {what} of drawer-close-v3 is " in capsys.readouterr().err
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["progress"]["global_step"] == 98
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@contextlib.contextmanager
def largest_file(size):
    """Writing more than size bytes to a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_leaves_the_last_args_whole(tmp_path):
    args, tasks, _ = d2r.parse_arguments(["--env-id", "reach-v3"])
    args.resume = str(tmp_path)
    facts = (d2r.make_run_dir(args, tasks) / "args.json").read_text()
    with largest_file(100), pytest.raises(d2r.UsageError, match="--resume: .* cannot be written"):
        d2r.make_run_dir(args, tasks)
    assert (tmp_path / "args.json").read_text() == facts


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    d2r.save({"value": torch.arange(1000)}, path)
    with largest_file(100_000), pytest.raises(d2r.RunError, match=r"checkpoint\.pt cannot be written"):
        d2r.save({"value": torch.arange(1_000_000)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["value"], torch.arange(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_while_logging_is_reported(tmp_path, monkeypatch, capsys):
    old_init = d2r.RunLog.__init__

    def init(log, *arguments):
        old_init(log, *arguments)
        log.path = Path("/dev/full")

    monkeypatch.setattr(d2r.RunLog, "__init__", init)
    options = f"{TWO_TASKS} --total-steps 400 --log-every 100 --checkpoint-minutes 0.00001"
    assert run(tmp_path, options) == 1
    assert "error: step 100: [Errno 28]" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["global_step"] > 0


def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 60") == 0
    assert "no TensorBoard events: the package tensorboard is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env-id MT11", "there is no task or benchmark 'MT11'; the nearest names are MT10"),
        ("--env-id mt50", "the nearest names are MT50"),
        ("--env-id reach", "the nearest names are reach-v3"),
        ("--env-id reach-v3,drawer-closed-v3", "'drawer-closed-v3'; the nearest names are drawer-close-v3"),
        ("--env-id reach-v3,push-v3,reach-v3", "reach-v3 is named twice"),
        ("--top-k 17", "--top-k is 17; it must lie between 0 and --num-modules, which is 16"),
        ("--top-k -1", "--top-k is -1"),
        ("--num-modules 300", "--num-modules is 300; at most 256"),
        ("--batch-size 1281", "--batch-size 1281 does not divide into 10 tasks"),
        ("--buffer-size 1000", "--buffer-size is 1000; it must be at least a batch, 1280"),
        ("--num-modules 0", "--num-modules is 0; it must be positive"),
        ("--encoder-widths 400 0", "--encoder-widths is (400, 0); it must be positive"),
        ("--learning-rate -1", "--learning-rate is -1.0; it must be positive"),
        ("--learning-rate nan", "--learning-rate is nan; it must be finite"),
        ("--total-steps 0", "--total-steps is 0; it must be positive"),
        ("--eval-every -5", "--eval-every is -5; it must be positive"),
        ("--gamma 1.5", "--gamma is 1.5; it must lie in [0, 1]"),
        ("--tau -0.1", "--tau is -0.1; it must lie in [0, 1]"),
        ("--initial-alpha 2", "--initial-alpha is 2.0; alpha is clamped to at most 1"),
        ("--episode-length 501", "Meta-World has at most 500 steps"),
        ("--learning-starts 3", "write at least 10"),
        ("--seed -1", "--seed is -1"),
        ("--device cuda", "--device is cuda, and PyTorch finds none here"),
        ("--buffer-device cuda", "--buffer-device is cuda, and the networks are on the CPU"),
        ("--compile", "--compile needs a C++ compiler"),
        (f"--results-dir {SCRIPT}", "cannot be written"),
        ("--resume no/such/run", "there is no file no/such/run/checkpoint.pt"),
        ("--evaluate no/such/actor.pt", "there is no file no/such/actor.pt"),
        (f"--evaluate {SCRIPT}", "is damaged or of another version"),
        ("--resume a --evaluate b", "exclude each other"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_built(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(d2r, "worker_envs", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(d2r.shutil, "which", lambda program: None)
    assert d2r.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_what_ranks_cannot_do_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(d2r, "worker_envs", None)
    assert run(tmp_path, f"{TWO_TASKS} --total-steps 4 --batch-size 18 --evaluate no/such") == 2
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setattr(d2r, "world", lambda: (0, 4))
    assert run(tmp_path, f"{TWO_TASKS} --batch-size 18") == 2
    assert "--batch-size 18 does not divide into 2 tasks on 4 ranks; write a multiple of 8" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- golden values
# Of one tiny network in float64. Parameter number p of the list (row-major, weight is [out, in]) has the entries
# 0.6 sin(1.3 p + 0.7 k + 0.1), k = 0, 1, ...; the loss is the sum over b, c of (2 b + c + 1) output[b][c].

GOLDEN = json.loads("""
{"num_modules":4,"num_sources":2,"num_tasks":2,"parameters":[["obs_encoder.0.weight",[6,3]],["obs_encoder.0.bias",[6]]
,["obs_encoder.1.weight",[6,6]],["obs_encoder.1.bias",[6]],["task_encoder.weight",[6,2]],["task_encoder.bias",[6]],[
"router.0.weight",[5,6]],["router.0.bias",[5]],["router.1.weight",[10,5]],["router.1.bias",[10]],["module.0.weight",[4
,6]],["module.0.bias",[4]],["module.1.weight",[4,4]],["module.1.bias",[4]],["module.2.weight",[4,4]],["module.2.bias",
[4]],["module.3.weight",[4,4]],["module.3.bias",[4]],["head.weight",[2,4]],["head.bias",[2]]],"obs":[[1.0,
0.8775825618903728,0.5403023058681398],[0.6216099682706644,0.16996714290024104,-0.32328956686350335],[
-0.2272020946930871,-0.6662760212798241,-0.9422223406686581],[-0.9040721420170612,-0.9982947757947531,
-0.848100031710408]],"task":[0,1,0,1],"routing_logits":[[[-0.8277486125149885],[0.39217816080365875,
-0.042167153260948165],[0.895550069591483,0.3492897721579926,0.2770291015003026],[-0.058172132827673625,
-0.755849242253938,-0.23526174995350385,-0.8300982239282192]],[[-0.613468804746919],[0.1824428767707765,
0.13636905755783674],[0.7709024965347443,0.4042076680263098,0.29882021288139077],[-0.15390289264862805,
-0.5983449332075024,-0.43452291709985114,-0.6144036279915226]],[[-0.8852670763177324],[0.4453657402805621,
-0.08426441842211807],[0.9212070210682427,0.3433337897473484,0.26252718913921114],[-0.025055324798931106,
-0.8033722425733294,-0.17937209508381285,-0.887251705715022]],[[-0.610249140948272],[0.1788172793916247,
0.13993982358145107],[0.7678403584707673,0.4063720213375335,0.2978287046814571],[-0.15421023699118863,
-0.5967777956777851,-0.4371506855965069,-0.6110491827585491]]],"top_k":{"routing_weights":[[[1.0],[0.6069108105335578,
0.3930891894664422],[0.6332675169941298,0.36673248300587036,0.0],[0.5441570647289493,0.0,0.45584293527105074,0.0]],[[
1.0],[0.5115164176240863,0.4884835823759137],[0.5906600917094311,0.40933990829056893,0.0],[0.5696982246346742,0.0,
0.43030177536532577,0.0]],[[1.0],[0.6293968482264686,0.37060315177353137],[0.64057789021067,0.3594221097893298,0.0],[
0.538502815116227,0.0,0.46149718488377295,0.0]],[[1.0],[0.5097181399378389,0.49028186006216123],[0.5893958305442542,
0.41060416945574585,0.0],[0.5702669661806374,0.0,0.4297330338193625,0.0]]],"output":[[-1.2601802899819665,
1.4619863667865718],[-1.1081279462698768,1.2885850015973794],[-1.1373164923653447,1.3516042148645813],[
-1.069461329281693,1.2988277872314749]]},"behavior_routes":[[[0],[0,1],[0,1],[0,1]],[[0],[0,1],[1,2],[1,2]],[[0],[0,1]
,[0,2],[2,3]],[[0],[0,1],[0,1],[0,3]]],"target_probability":[[[1.0],[0.6069108105335578,0.3930891894664422],[
0.47217649619867874,0.2734428250637061,0.25438067873761533],[0.3574534602475082,0.1779189417430703,0.2994404467084913,
0.16518715130093026]],[[1.0],[0.5115164176240863,0.4884835823759137],[0.4316441255029253,0.2991384879858289,
0.26921738651124577],[0.3303093696987034,0.21178839907993266,0.24948771482006654,0.20841451640129738]],[[1.0],[
0.6293968482264686,0.37060315177353137],[0.48108736742960656,0.26993350728617377,0.2489791252842197],[
0.3651750947880731,0.1676804412335087,0.31295524090804766,0.15418922307037045]],[[1.0],[0.5097181399378389,
0.49028186006216123],[0.43072858406610176,0.30006821113409937,0.2692032047997988],[0.3301166843042745,
0.21206198671023713,0.24876426774390517,0.20905706124158321]]],"gradient_kept":[[[true],[true,true],[true,true,true],[
true,false,true,false]],[[true],[true,true],[true,true,true],[true,true,true,true]],[[true],[true,true],[true,true,
false],[true,false,true,false]],[[true],[true,true],[true,true,true],[true,true,true,true]]],"behavior":{
"routing_weights":[[[1.0],[0.6069108105335578,0.3930891894664422],[0.6332675169941298,0.36673248300587036,0.0],[
0.6676725563709551,0.3323274436290448,0.0,0.0]],[[1.0],[0.5115164176240863,0.4884835823759137],[0.0,0.5263225056845411
,0.4736774943154588],[0.0,0.45913584661755674,0.5408641533824433,0.0]],[[1.0],[0.6293968482264686,0.37060315177353137]
,[0.658963768685361,0.0,0.3410362313146391],[0.0,0.0,0.6699324620970059,0.33006753790299426]],[[1.0],[
0.5097181399378389,0.49028186006216123],[0.5893958305442542,0.41060416945574585,0.0],[0.6122640188462171,0.0,0.0,
0.3877359811537829]]],"output":[[-1.0875218657605696,1.1588839254533412],[-1.1530155398044217,1.3605836719535334],[
-1.3505519877361294,1.6593495430168153],[-0.9272841837252708,1.0682014967854891]],"loss":
"sum over b, c of (2*b + c + 1) * output[b][c]","gradient_resrouting":{"obs_encoder.0.weight":[[0.24039299197825215,
0.1328795285101519,-0.007167477872804383],[0.12293486085201683,-0.1989828568272407,-0.47218263138544714],[
-0.45948352550570026,-0.6672159338252104,-0.7115906115751109],[0.07000358124298399,0.061433922168718735,
0.037823096364611904],[0.0,0.0,0.0],[0.1292074706105565,0.21038626176358186,0.24005515855948895]],
"obs_encoder.0.bias":[0.31906931086158363,1.0374886300926622,0.7963354576954965,0.07000358124298399,0.0,
-0.2649598458142353],"obs_encoder.1.weight":[[0.0016174650356977226,-0.007748438119507321,-0.019534052060197607,
9.518360406995072e-05,0.0,-0.004414598995125858],[0.004191059337717306,0.0017409785010323682,-0.07035068674106797,
-0.007872853133637876,0.0,-0.022585717108823906],[0.010205797357285273,0.021161341389265616,0.004581844862779403,
0.0007198710710775669,0.0,-0.00012830906856904222],[0.0014886147769257174,-0.004402800831956309,-0.012044181801454794,
0.00025942793388242604,0.0,-0.0027235863027124533],[0.728383200543907,1.4088556615140508,2.0271729064312307,
0.18187780731590725,0.0,0.7792233532906079],[0.008099635416503695,0.3120612642076431,1.2621837174674477,
-2.605158719880383e-05,0.0,0.5139155617374809]],"obs_encoder.1.bias":[-0.01600837755462814,-0.028487645134352528,
0.02385746907280192,-0.00948948786817911,2.463980786814196,0.9537289167787597],"task_encoder.weight":[[
-0.0619062905916758,-0.03714975094084094],[0.007552081026862588,0.012829207237920245],[-0.006106875466678298,
-0.019875755735269764],[0.023039287682725996,-0.00010762561339205598],[-0.05851501541175497,-0.12126347120709863],[
-0.02362539902049988,0.03278219703235828]],"task_encoder.bias":[-0.09905604153251674,0.020381288264782835,
-0.02598263120194806,0.02293166206933394,-0.1797784866188536,0.0091567980118584],"router.0.weight":[[
0.029674180525287714,0.04230925367207973,-0.3190296209767726,-0.024057196312957912,-0.15863702253354012,
-0.01460278534002335],[0.0,0.0,0.0,0.0,0.0,0.0],[-0.0004117429989661709,-0.0009669720467403519,0.0038365304875729706,
0.00022981726801131445,0.001920293687646232,-0.0005007497468114911],[0.001173933836204413,-0.00011428053174601205,
-0.0005383293674894973,-0.0009776279856378383,-0.001386584710860458,-0.00138254056405004],[0.0,0.0,0.0,0.0,0.0,0.0]],
"router.0.bias":[0.2925757829489242,0.0,-0.002206228755390529,0.002897778454805524,0.0],"router.1.weight":[[0.0,0.0,
0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0],[-0.12285151174951531,0.0,0.0,-0.028616036079085267,0.0],[0.0
,0.0,0.0,0.0,0.0],[0.12285151174951525,0.0,0.0,0.028616036079085257,0.0],[-0.024565550608490118,0.0,
-0.000172120716485892,-9.026246829070892e-05,0.0],[-0.12742452350369018,0.0,0.00017212071648589836,
9.026246829071225e-05,0.0],[0.25744907608065737,0.0,0.0,0.029973358439007988,0.0],[-0.10545900196847735,0.0,0.0,
-0.02997335843900807,0.0]],"router.1.bias":[0.0,0.0,0.0,-0.1369830543394362,0.0,0.13698305433943614,
-0.06500667690759183,-0.3425167207073901,0.4878736506162151,-0.08035025300123345],"module.0.weight":[[0.0,
0.5533892387021598,0.0,0.0,3.126490316407909,1.006550517243841],[0.0,0.7584313003222772,0.0,0.0,4.935973576040768,
1.9999602937846912],[0.0,0.0,0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0,0.0]],"module.0.bias":[2.90645025597395,
4.758185698528878,0.0,0.0],"module.1.weight":[[0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0]]
,"module.1.bias":[0.0,0.0,0.0,0.0],"module.2.weight":[[0.20435881509679876,0.4691545166544464,0.0,0.0],[
0.5267994102682473,1.2989915355018047,0.0,0.0],[0.0,0.0,0.0,0.0],[0.393272105298896,1.0229049619987165,0.0,0.0]],
"module.2.bias":[0.4698549431014227,1.2678982235968683,0.0,0.9801705359267294],"module.3.weight":[[
0.006850415951899884,0.1121725920376929,0.0,0.0],[0.0,0.0,0.0,0.0],[0.0504606570100035,0.8262713873844773,0.0,0.0],[
0.0,0.0,0.0,0.0]],"module.3.bias":[0.0862744262711942,0.0,0.6355036341403739,0.0],"head.weight":[[7.803658256677598,
23.200722251830477,0.9828528560158041,4.944330930488361],[10.170320700113193,28.619489046306033,1.1631705410564936,
6.12603189823448]],"head.bias":[16.0,20.0]},"gradient_without_resrouting":{"obs_encoder.0.weight":[[
0.25045821209735686,0.14171259016826632,-0.0017292162333817362],[0.12090854366560663,-0.23990423252342516,
-0.5419800856381091],[-0.4762361734863465,-0.7163435074839144,-0.7810649674961916],[0.07741526950444726,
0.06793829054114647,0.04182764862265633],[0.0,0.0,0.0],[0.14601965498766412,0.25968842744534437,0.30977641591387084]],
"obs_encoder.0.bias":[0.32913453098068834,1.1383490265713987,0.8700700242859867,0.07741526950444726,0.0,
-0.33895645398731633],"obs_encoder.1.weight":[[0.0016174650356977226,-0.005781383811656702,-0.015963536640398877,
9.518360406995072e-05,0.0,-0.003641233991441982],[0.05471988046606584,0.06303730089805758,-0.02593305039733449,
0.013314005086357088,0.0,-0.012964964512679993],[0.010205797357285273,0.020267189768561778,0.002958817915013242,
0.0007198710710775669,0.0,-0.0004798527797313266],[0.0014886147769257174,-0.003186185214578885,-0.009835831577225026,
0.00025942793388242604,0.0,-0.0022452629856287206],[0.7175776753421035,1.4568408240215733,2.128568283472034,
0.17734702418400566,0.0,0.8011853467058634],[0.008099635416503695,0.3111646568882686,1.2605562330372748,
-2.605158719880383e-05,0.0,0.5135630525464108]],"obs_encoder.1.bias":[-0.012509764458628916,0.05240164545752855,
0.022267126316367493,-0.007325608958092058,2.5553435844014114,0.9521342063038057],"task_encoder.weight":[[
-0.05012206837453749,-0.03714975094084094],[0.006163827853405955,0.012829207237920245],[-0.005268716666537932,
-0.019875755735269764],[0.018587499765706325,-0.00010762561339205598],[-0.04716867216292822,-0.12126347120709863],[
-0.019162245612427246,0.03278219703235828]],"task_encoder.bias":[-0.08727181931537843,0.018993035091326202,
-0.025144472401807696,0.018479874152314266,-0.16843214337002688,0.013619951419931036],"router.0.weight":[[
0.024227870883546315,0.04019833169237873,-0.3069655720461715,-0.01981817010118988,-0.14844341403894626,
-0.010773671711246057],[0.0,0.0,0.0,0.0,0.0,0.0],[-0.0004117429989661709,-0.0009669720467403519,0.0038365304875729706,
0.00022981726801131445,0.001920293687646232,-0.0005007497468114911],[0.0004759130023756752,-0.0003848247382533709,
0.001007847410516166,-0.0004343374264154078,-8.013106257962724e-05,-0.0008917860414831755],[0.0,0.0,0.0,0.0,0.0,0.0]],
"router.0.bias":[0.276011365553707,0.0,-0.002206228755390529,0.0007748164488480616,0.0],"router.1.weight":[[0.0,0.0,
0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0],[-0.16661522128775338,0.0,0.0,-0.03881000010334783,0.0],[0.0,
0.0,0.0,0.0,0.0],[0.1666152212877533,0.0,0.0,0.038810000103347814,0.0],[-0.024565550608490118,0.0,
-0.000172120716485892,-9.026246829070892e-05,0.0],[-0.12742452350369018,0.0,0.00017212071648589836,
9.026246829071225e-05,0.0],[0.25744907608065737,0.0,0.0,0.029973358439007988,0.0],[-0.10545900196847735,0.0,0.0,
-0.02997335843900807,0.0]],"router.1.bias":[0.0,0.0,0.0,-0.18578087958716188,0.0,0.1857808795871618,
-0.06500667690759183,-0.3425167207073901,0.4878736506162151,-0.08035025300123345],"module.0.weight":[[0.0,
0.6387818051958273,0.0,0.0,3.5201095124516604,1.1280774229000121],[0.0,0.7988150810101854,0.0,0.0,5.19010880109988,
2.104830109694868],[0.0,0.0,0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0,0.0,0.0]],"module.0.bias":[3.251917862657451,
4.999070553347379,0.0,0.0],"module.1.weight":[[0.0,0.0,0.0,0.0],[0.0,0.0,0.0,0.0],[0.12590753499494112,
0.15898949610205848,0.0,0.0],[0.0,0.0,0.0,0.0]],"module.1.bias":[0.0,0.0,0.17066455850925255,0.0],"module.2.weight":[[
0.24042586938228366,0.5829955578745305,0.0,0.0],[0.5560584043965806,1.391343806088047,0.0,0.0],[0.0,0.0,0.0,0.0],[
0.37730602532224744,0.9725100737897203,0.0,0.0]],"module.2.bias":[0.572421994873302,1.3511045964212114,0.0,
0.934766391230113],"module.3.weight":[[0.05780798309624545,0.2597408122800044,0.0,0.031862570533357296],[0.0,0.0,0.0,
0.0],[0.2538855653618212,1.415370384073217,0.0,0.1271968199000011],[0.0,0.0,0.0,0.0]],"module.3.bias":[
0.19077164248689915,0.0,1.0526612384562355,0.0],"head.weight":[[7.803658256677598,23.200722251830477,
0.9828528560158041,4.944330930488361],[10.170320700113193,28.619489046306033,1.1631705410564936,6.12603189823448]],
"head.bias":[16.0,20.0]}},"route_temperature":{"log_alpha":[0.0,-0.5,-1.2,-2.0],"temperature":[0.29944839451870736,
0.49370693751999645,0.9942036821278502,2.212640985833446]},"sample_k":{"logits":[1.0,0.0,-1.0],"k":2,
"pair_probability":{"0.5":{"01":0.8786871079922564,"02":0.11731042782619816,"12":0.004002464181543984},"1.0":{"01":
0.7018862297782673,"02":0.24472847105479753,"12":0.053385299166934554},"2.0":{"01":0.539841633057707,"02":
0.3071958857184984,"12":0.15296248122379458}}}}
""")
