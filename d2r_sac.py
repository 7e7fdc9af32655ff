# SPDX-License-Identifier: MIT
"""Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World, in one file.

    pip install -r requirements.txt
    python d2r_sac.py --env-id MT10

One policy for many tasks. Its network has M base modules and a head. Each module reads the outputs of K earlier ones,
its sources. A routing network chooses the sources for every state and task. A module from which no path leads to the
head has no effect, so an easy task can use few modules, and a hard one many. Paper: He et al., "Not All Tasks Are
Equally Difficult: Multi-Task Deep Reinforcement Learning with Dynamic Depth Routing", AAAI 2024, arXiv:2312.14472. The
authors' code: github.com/DarkDawn233/D2R_MTRL.

    T  tasks                                 B  samples; in an update T * batch_size, ordered by task
    E  environments of each task             M  modules, numbered 0 ... M-1; the head counts as module M
    H  width of a module                     K  sources of a module; edge (i, j): module i reads module j

Module i reads x_i, a weighted sum of its sources' outputs. It computes f_i, and its output is o_i = f_i + x_i, as in a
residual network. Module 0 is the exception: it reads the embedding h of the state, which has another width, so that
there is no shortcut: x_0 = 0. An example with M = 3 and K = 2, for one sample:

    routes = [[0, 0],    row 0, of module 1: it can only read module 0; a source named twice counts once
              [1, 0],    row 1, of module 2: it reads modules 1 and 0
              [1, 0]]    row 2, of the head: it reads modules 1 and 0; module 2 has no effect, so the depth is 2

    x_0 = 0                        f_0 = relu(W_0 relu(h) + b_0)
    x_1 = o_0                      f_1 = relu(W_1 x_1 + b_1)
    x_2 = w_21 o_1 + w_20 o_0      f_2 = relu(W_2 x_2 + b_2)
    x_3 = w_31 o_1 + w_30 o_0      output = W_3 x_3 + b_3

In general, row r of logits (B, M, M) and routes (B, M, K) belongs to module r + 1, and a logit of -inf forbids an edge:

    concept              formula                                                           code
    routing network      z = router(h * e), h = encoder(inputs), e = encoder(task)         RoutingNetwork
    Top-K                module i reads the K sources j with the largest logits z_ij       top_k
    Sample-K             K draws without replacement from softmax_j(z_ij / temperature)    sample_k
    routing weights      w_ij = softmax of z_ij over the K chosen sources                  routing_weights
    probabilities        p_ij = softmax of z_ij over all sources that module i may choose  gradient_kept
    ResRouting           if p_ij is low, the gradient from f_i does not enter f_j          mix_sources
    wiring               x_i = sum_j w_ij o_j, f_i = relu(W_i x_i + b_i), o_i = f_i + x_i  D2RNetwork
    depth                the number of modules from which a path leads to the head         used_modules
    routing granularity  the sources that a module may choose from                         allowed_sources
    soft actor-critic    its losses; each task has an entropy coefficient alpha            Agent
    task weights         T softmax(-log alpha), with mean 1, multiply the tasks' losses    Agent.task_weights
    route balancing      a task's weight is also its temperature in Sample-K               Agent.temperature

Choosing is not differentiable: the router learns only through the weights of the sources that were chosen. Nothing
rewards a short route. That easy tasks end up with fewer modules is an empirical claim of the paper, which our runs do
not show. All modules are computed here; results/fast.py skips those without effect and takes half the time.

What to expect: train_return rises, alpha falls, skipped stays 0. The defaults are the paper's. They take hours on a GPU
and days on a CPU, and we have not run them to the end. For short runs add --learning-rate 1e-3 --initial-alpha 0.003
--alpha-learning-rate 1e-5 --learning-starts 1000 (which keeps the alphas nearly equal, and so the temperatures): MT10
reached a success rate of 0.5 after 50,000 steps of each task, four minutes of fast.py --compile on an H100. On a CPU
begin with README's three tasks. `# NOTE:` marks where this file, the paper and the authors' code differ.
"""

import copy
import csv
import ctypes
import json
import math
import multiprocessing
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn


@dataclass
class Args:
    """Dynamic Depth Routing (D2R) with multi-task SAC. The defaults are the paper's for MT10."""

    env_id: str = "MT10"  # MT10, MT25, MT50, or tasks of Meta-World V3, such as reach-v3,drawer-close-v3
    goals: Literal["random", "fixed"] = "random"  # in an episode one of 50, or always the same
    episode_length: int = 200  # time limit of an episode, in steps, at most 500
    envs_per_task: int = 1  # environments of each task (E); there is one update per step of all of them
    # Budgets of each task
    steps: int = 1_500_000  # environment steps of each task (the paper on MT50: 1_000_000)
    buffer_size: int = 100_000  # transitions of each task in the replay buffer (MT50: 200_000)
    batch_size: int = 128  # samples of each task in an update
    learning_starts: int = 4_000  # environment steps of each task before the first update
    # Networks and routing
    num_modules: int = 16  # base modules of a network (M)
    top_k: int = 2  # sources of a module (K); with 1 the router learns nothing; num_modules: all
    routing: Literal["module", "layer", "model"] = "module"  # see allowed_sources
    parallel_modules: int = 4  # modules in a layer, or number of chains (P), for layer and model
    module_width: int = 128  # width of a base module (H)
    encoder_widths: tuple[int, ...] = (400, 400)  # the last is the task encoder's, too
    router_widths: tuple[int, ...] = (256, 256)  # hidden layers of the router
    resrouting: bool = True  # ResRouting; without it gradients reach all chosen modules
    route_balancing: bool = True  # a temperature for each task; without it all are 1
    sample_k: bool = True  # Sample-K in acting and in the critics' loss; without it Top-K
    # Soft actor-critic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics' Polyak averaging
    learning_rate: float = 3e-4  # of the actor and the critics
    alpha_learning_rate: float = 1e-4  # of each task's log alpha
    initial_alpha: float = 1.0  # entropy coefficient of every task at the start, at most 1
    reward_scale: float = 0.1  # factor on the environments' rewards
    max_task_loss: float = 3e3  # an update skips tasks whose losses sum to more
    max_grad_norm: float = 1.0  # limit of gradients: of the actor, each critic, and log alpha
    # The run
    seed: int = 1  # seed of the networks, the sampling and the goals
    run_dir: str = ""  # directory of the results; by default such as results/MT10-random-seed1
    eval_every: int = 15_000  # steps of each task between evaluations
    eval_episodes: int = 32  # of each task; they add 43 % of steps, uncounted
    log_every: int = 1_000  # steps of each task between rows of progress.csv
    checkpoint_minutes: float = 5.0  # minutes between checkpoints (on MT10 0.4 GB, on MT50 4 GB)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    compile: bool = False  # torch.compile the networks: two minutes or more, then faster updates

    def __post_init__(self):
        self.tasks = task_names(self.env_id)
        if not 1 <= self.learning_starts < self.steps:
            raise ValueError("--learning-starts must be at least 1, and smaller than --steps")
        if not 1 <= self.top_k <= self.num_modules:
            raise ValueError("--top-k must be at least 1, and at most --num-modules")
        if not 0 < self.initial_alpha <= 1:
            raise ValueError("--initial-alpha must be positive, and at most 1, where alpha is clamped")
        self.run_dir = self.run_dir or f"results/{self.env_id}-{self.goals}-seed{self.seed}"


# ======================================================================================================================
# The method. To use it elsewhere, copy the code between the double lines. It needs copy, math, itertools.pairwise,
# torch, nn and F. args can be any object with the options from num_modules to resrouting (Agent: to max_grad_norm).
#     network = D2RNetwork(input_dim=39, output_dim=8, num_tasks=10, args=args)
#     output, routes = network(states, task)  # (B, 39), (B,) -> (B, 8), (B, M, K): Top-K
#     output, routes = network(states, task, temperature=torch.ones(10))  # Sample-K
# ----------------------------------------------------------------------------------------------------- routing network
def init(layer):
    bound = layer.out_features**-0.5  # NOTE: as in the authors' code; usual is in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.constant_(layer.bias, 0.1)
    return layer


def mlp(widths):
    """Linear layers of these widths, from the input's to the output's, with ReLU between them."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [init(nn.Linear(width_in, width_out)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no ReLU after the last


class RoutingNetwork(nn.Module):
    """Embeds the state and the task, and computes the routing logits from both. allowed is from allowed_sources."""

    def __init__(self, input_dim, num_tasks, allowed, encoder_widths, router_widths):
        super().__init__()
        self.M = len(allowed)
        self.obs_encoder = mlp((input_dim, *encoder_widths))
        self.task_encoder = init(nn.Linear(num_tasks, encoder_widths[-1]))
        self.router = mlp((encoder_widths[-1], *router_widths, int(allowed.sum())))
        self.register_buffer("one_hot", torch.eye(num_tasks), persistent=False)
        self.register_buffer("edges", allowed.flatten().nonzero().squeeze(1), persistent=False)  # row * M + j

    def forward(self, inputs, task):
        """inputs (B, input_dim), task (B,) indices -> h (B, encoder_widths[-1]), logits (B, M, M)."""
        h = self.obs_encoder(inputs)
        e = self.task_encoder(self.one_hot[task])
        z = self.router(h * e)  # (B, number of allowed edges)
        logits = z.new_full((len(z), self.M * self.M), -torch.inf)
        logits[:, self.edges] = z
        return h, logits.view(-1, self.M, self.M)


def top_k(logits, K):
    """The K largest logits of each row: (B, M, M) -> routes (B, M, K). A row with fewer choices repeats its best."""
    values, routes = logits.topk(K, dim=-1)
    return torch.where(values == -torch.inf, routes[..., :1], routes)


def sample_k(logits, K):
    """K draws without replacement from the softmax of each row: (B, M, M) -> routes (B, M, K).
    The K largest of logits plus Gumbel noise are such draws (Kool et al., ICML 2019). With Top-K an untrained router,
    whose logits hardly depend on the state, would choose the same sources everywhere, and never try the others."""
    uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)  # so that logs are finite
    gumbel = -(-uniform.log()).log()
    return top_k(logits + gumbel, K)


def routing_weights(logits, routes):
    """Softmax of the logits over the chosen sources: (B, M, M), (B, M, K) -> (B, M, K).
    Sample-K's temperature plays no part here: it changes which sources are tried, not how they are mixed."""
    named_before = [(routes[..., :k] == routes[..., k, None]).any(-1) for k in range(routes.shape[-1])]
    z = logits.gather(-1, routes).masked_fill(torch.stack(named_before, dim=-1), -torch.inf)
    return z.softmax(-1)


def allowed_sources(M, routing, P):
    """Routing granularity: (M, M) bool, the sources that each row's module, or the head, may choose from. module: all
    earlier modules. layer: the P modules of the layer before. model: there are P chains, and only the head chooses,
    among their ends. Modules 1 ... P-1 can only read module 0. With M = 6 and P = 2:

        reader          1     2       3          4             5                head
        module          0     0 1     0 1 2      0 1 2 3       0 1 2 3 4        0 1 2 3 4 5
        layer           0     0 1     0 1        2 3           2 3              4 5
        model           0     0       1          2             3                4 5"""
    # NOTE: the paper compares these three; the authors' code has only the first, the others are our reading.
    if routing != "module" and not (1 <= P <= M and M % P == 0):
        raise ValueError("--num-modules must be a multiple of --parallel-modules")
    i = torch.arange(1, M + 1)[:, None]  # the readers
    j = torch.arange(M)  # their sources
    if routing == "module":
        return j < i
    sources = j // P == i // P - 1  # the layer before
    if routing == "model":
        sources &= (j % P == i % P) | (i == M)  # only of the same chain; the head: of all
    return torch.where(i < P, j == 0, sources)


# ------------------------------------------------------------------------------------------------------- base modules
class BaseModule(nn.Linear):
    """f = relu(W x + b). For another module replace this class by any nn.Module that has the same arguments and shapes,
    (B, in_features) -> (B, out_features), and treats each sample by itself (no BatchNorm)."""

    def reset_parameters(self):  # nn.Linear calls it
        init(self)

    def forward(self, x):
        return super().forward(x).relu_()


def gradient_kept(logits):
    """ResRouting, part 1: the edges that the current router finds likely. (B, M, M) -> (B, M, M) bool.
    Edge (i, j) is likely if p_ij > 1 / (J + 1). p_ij is the softmax, at temperature 1, over all J sources that module i
    may choose, not only over the chosen ones. With p = 0.6, 0.3, 0.1 the first two are likely. An untrained router has
    about p = 1 / J, slightly above the threshold, so most edges are likely at first.
    NOTE: the threshold is that of the authors' code."""
    J = (logits > -torch.inf).sum(-1, keepdim=True, dtype=logits.dtype)
    return logits.softmax(-1) > 1 / (J + 1)


def mix_sources(f, x, w, kept):
    """ResRouting, part 2: mix the outputs f_j + x_j of module i's K sources. f, x (B, K, H); w, kept (B, K).
    Returns the weighted sum twice, (B, H): as the input from which module i computes f_i, and as its shortcut x_i.

    Forward, ResRouting changes nothing. Backward, the gradient from f_i does not enter f_j over an edge not kept:

        a gradient from     reaches w_ij    reaches x_j    reaches f_j
        f_i                 yes             yes            only if edge (i, j) is kept
        the shortcut x_i    yes             yes            yes

    Why: the actor learns on replayed routes, which an older policy chose. Suppose that module 9 read modules 3 and 5,
    and that the router has since learned to avoid both, with p = 0.01 each. The weights are a softmax over only these
    two, so they are about 0.5 each. Modules 3 and 5 would get full gradients from a reader that they will hardly ever
    serve again. Instead this gradient goes the residual way, hence the name: through x_3 and x_5 to their sources. (If
    only one were unlikely, its weight would be small anyway.) Routes sampled in the critics' loss have such edges, too.

    What remains: modules 3 and 5 still learn from their other readers, and also from the readers of module 9, whose
    output f_9 + x_9 contains theirs. NOTE: this is so in the authors' code. The head has no shortcut."""
    w = w[..., None]  # (B, K, 1)
    f_kept = torch.where(kept[..., None], f, f.detach())
    layer_input = (w * (f_kept + x)).sum(1)
    shortcut = (w * (f + x)).sum(1)
    return layer_input, shortcut


class D2RNetwork(nn.Module):
    """A routing network and its base modules: an actor (output: mean and log std), a critic (Q), or any other."""

    def __init__(self, input_dim, output_dim, num_tasks, args):
        super().__init__()
        M = args.num_modules
        self.K = args.top_k
        self.resrouting = args.resrouting
        allowed = allowed_sources(M, args.routing, args.parallel_modules)
        self.routing_network = RoutingNetwork(input_dim, num_tasks, allowed, args.encoder_widths, args.router_widths)
        widths = [args.encoder_widths[-1]] + [args.module_width] * M
        self.base_modules = nn.ModuleList(BaseModule(*pair) for pair in pairwise(widths))
        self.head = nn.Linear(args.module_width, output_dim)
        for parameter in self.head.parameters():
            nn.init.uniform_(parameter, -3e-3, 3e-3)

    def forward(self, inputs, task, routes=None, temperature=None):
        """inputs (B, input_dim), task (B,) indices -> output (B, output_dim), routes (B, M, K).
        Routes are those given, else Sample-K's if temperature (T,) is given, else Top-K's."""
        h, logits = self.routing_network(inputs, task)
        if routes is None:
            if temperature is None:
                routes = top_k(logits, self.K)
            else:
                routes = sample_k(logits / temperature[task, None, None], self.K)
        return self.run_modules(h, logits, routes.long()), routes  # the replay buffer stores int16

    def run_modules(self, h, logits, routes):
        """h (B, encoder_widths[-1]), logits (B, M, M), routes (B, M, K) of allowed edges -> output (B, output_dim)."""
        w = routing_weights(logits, routes)  # (B, M, K)
        kept = gradient_kept(logits).gather(-1, routes)
        if not self.resrouting:
            kept = torch.ones_like(kept)  # the ablation
        b = torch.arange(len(h), device=h.device)[:, None]  # (B, 1), the samples
        f = [self.base_modules[0](F.relu(h))]  # (B, H), of each module so far
        x = [torch.zeros_like(f[0])]
        for row, reader in enumerate([*self.base_modules[1:], self.head]):  # module row + 1
            j = routes[:, row]  # (B, K), the reader's sources
            f_j = torch.stack(f, dim=1)[b, j]  # (B, K, H)
            x_j = torch.stack(x, dim=1)[b, j]
            layer_input, shortcut = mix_sources(f_j, x_j, w[:, row], kept[:, row])
            f.append(reader(layer_input))
            x.append(shortcut)
        return f[-1]  # the head's


def used_modules(routes):
    """The modules that lead to the head, (B, M, K) -> (B, M) bool. Their number is the depth."""
    M = routes.shape[1]
    chosen = routes.new_zeros(len(routes), M, M, dtype=torch.bool).scatter_(-1, routes.long(), True)
    used = chosen[:, -1]  # the head's sources
    for row in reversed(range(M - 1)):  # if the module of a row is used, so are its sources
        used = used | (used[:, row + 1, None] & chosen[:, row])
    return used


# -------------------------------------------------------------------------------------------------- soft actor-critic
def sample_action(output):
    """The actor's output (B, 2A) -> an action (B, A) of the tanh-squashed Gaussian and its log-probability (B,)."""
    mean, log_std = output.chunk(2, dim=-1)
    log_std = log_std.clamp(-20, 2)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return u.tanh(), (log_prob - log_slope).sum(-1)


class Agent(nn.Module):
    """Actor, critics, target critics, log alpha and their optimizer. Each network has its own routing network, and
    chooses its own routes. Only the routes with which the actor acts are stored and replayed:

        pass                                      routes             because
        actor, acting in training                 Sample-K, stored   it also has to try what does not look best
        actor, its loss on replayed states        the stored ones    it learns about the routes that it has tried,
                                                                     with w from the current logits
        critics, their loss on replayed actions   Sample-K           they have to try routes of their own
        critics, within the actor's loss          Top-K              they judge as well as they can
        actor and target critics, for the target  Top-K              likewise, so the target has less noise
        actor, acting in an evaluation            Top-K              it acts as well as it can
    """

    def __init__(self, obs_dim, action_dim, num_tasks, args, device="cpu"):
        super().__init__()
        self.args = args
        self.actor = D2RNetwork(obs_dim, 2 * action_dim, num_tasks, args)
        self.critics = nn.ModuleList(D2RNetwork(obs_dim + action_dim, 1, num_tasks, args) for _ in range(2))
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((num_tasks,), math.log(args.initial_alpha)))
        self.register_buffer("tasks", torch.arange(num_tasks), persistent=False)
        self.target_entropy = -action_dim
        self.to(device)
        groups = [{"params": list(network.parameters())} for network in (self.actor, *self.critics)]
        groups += [{"params": [self.log_alpha], "lr": args.alpha_learning_rate}]
        self.optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True, capturable=self.tasks.is_cuda)

    def task_weights(self):
        """T softmax(-log alpha) = (1 / alpha) / mean(1 / alpha), (T,). They multiply the actor's and critics' losses.
        With alphas of 1 and 0.1 two tasks weigh 0.18 and 1.82. The paper's premise, if all alphas start equal:

            task        policy                  entropy            alpha           weight and temperature
            unsolved    random                  above the target   falls           rise: more training and exploration
            mastered    nearly deterministic    below the target   rises again     fall: its routes settle"""
        return len(self.log_alpha) * (-self.log_alpha.detach()).softmax(0)

    def temperature(self):
        """Route balancing: each task's temperature of Sample-K, (T,), is its weight. None stands for Top-K."""
        if not self.args.sample_k:
            return None
        weights = self.task_weights()
        return weights if self.args.route_balancing else torch.ones_like(weights)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (T * E, obs_dim), ordered by task -> actions (T * E, A), routes (T * E, M, K)."""
        task = self.tasks.repeat_interleave(len(obs) // len(self.tasks))
        temperature = None if deterministic else self.temperature()
        output, routes = self.actor(obs, task, temperature=temperature)
        if deterministic:
            return output.chunk(2, dim=-1)[0].tanh(), routes  # the mean
        return sample_action(output)[0], routes

    def q(self, critics, obs, action, task, temperature=None):
        """The values of both critics, by task: (2, T, B / T)."""
        inputs = torch.cat([obs, action], dim=-1)
        values = [critic(inputs, task, temperature=temperature)[0] for critic in critics]
        return torch.stack(values).view(2, len(self.tasks), -1)

    @torch.no_grad()
    def td_target(self, reward, next_obs, terminated, task):
        """r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s')), by task: (T, B / T)."""
        # NOTE: the authors mark the time limit as terminal; here a truncation bootstraps.
        next_action, log_prob = sample_action(self.actor(next_obs, task)[0])
        next_q = self.q(self.target_critics, next_obs, next_action, task).amin(0)
        next_value = next_q - self.log_alpha.exp()[:, None] * log_prob.view_as(next_q)
        future = torch.where(terminated.view_as(next_q), 0.0, self.args.gamma * next_value)
        return self.args.reward_scale * reward.view_as(next_q) + future

    def critic_loss(self, obs, action, reward, next_obs, terminated, task):
        """sum_c (Q_c(s, a) - target)^2, mean of each task, (T,)."""
        target = self.td_target(reward, next_obs, terminated, task)
        q = self.q(self.critics, obs, action, task, self.temperature())
        return ((q - target) ** 2).mean(-1).sum(0)

    def actor_loss(self, obs, routes, task):
        """alpha log pi(a|s) - min_c Q_c(s, a), mean of each task, (T,), and log pi(a|s), (T, B / T)."""
        action, log_prob = sample_action(self.actor(obs, task, routes=routes)[0])
        # The gradient passes through the critics, but does not train them. What was frozen before stays frozen.
        trained = [p for p in self.critics.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        # NOTE: ResRouting also applies in here, as in the authors' code, so it changes the gradient of the action.
        q = self.q(self.critics, obs, action, task).amin(0)
        for p in trained:
            p.requires_grad_(True)
        log_prob = log_prob.view_as(q)
        alpha = self.log_alpha.detach().exp()[:, None]
        return (alpha * log_prob - q).mean(-1), log_prob

    def update(self, obs, action, reward, next_obs, terminated, routes):
        """Take one step on all losses. Arguments (B, ...) as from ReplayBuffer.sample, actions in [-1, 1]. Returns (T,)
        losses (the actor's and the critics' weighted), skipped (1 or 0), alpha, temperature."""
        task = self.tasks.repeat_interleave(len(obs) // len(self.tasks))  # (B,)
        critic_loss = self.critic_loss(obs, action, reward, next_obs, terminated, task)
        actor_loss, log_prob = self.actor_loss(obs, routes, task)
        weight = self.task_weights()
        losses = {"critic_loss": weight * critic_loss, "actor_loss": weight * actor_loss}
        losses["alpha_loss"] = -self.log_alpha * (log_prob.detach() + self.target_entropy).mean(-1)
        total = sum(losses.values())
        skipped = total > self.args.max_task_loss  # NOTE: not in the paper, but in its code
        # Each loss trains its own parameters, so one backward pass serves all. NOTE: all step at once, as in the
        # authors' code; often the critics step first.
        self.optimizer.zero_grad()
        torch.where(skipped, 0.0, total).mean().backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log_alpha.clamp_(max=0)  # NOTE: not in the paper, but in its code
            targets = list(self.target_critics.parameters())
            torch._foreach_lerp_(targets, list(self.critics.parameters()), self.args.tau)
        metrics = losses | {"skipped": skipped.float(), "alpha": self.log_alpha.exp()}
        if self.args.sample_k:
            metrics["temperature"] = self.temperature()
        return {name: value.detach() for name, value in metrics.items()}


# ======================================================================================================================
class ReplayBuffer:
    """A ring of transitions for each task."""

    def __init__(self, capacity, num_tasks, obs_dim, action_dim, M, K, device="cpu"):
        self.capacity = capacity  # transitions of each task, a multiple of E
        self.added = 0  # of each task; once a ring is full, each replaces the oldest
        with torch.device(device):
            self.tasks = torch.arange(num_tasks)[:, None]
            self.columns = [
                torch.empty(num_tasks, capacity, obs_dim),
                torch.empty(num_tasks, capacity, action_dim),
                torch.empty(num_tasks, capacity),  # reward
                torch.empty(num_tasks, capacity, obs_dim),  # next observation, of the same episode
                torch.empty(num_tasks, capacity, dtype=torch.bool),  # terminated
                torch.empty(num_tasks, capacity, M, K, dtype=torch.int16),  # routes
            ]

    def add(self, *transitions):
        """Store transitions of each task: for each column its values (T * n, ...), ordered by task."""
        n = len(transitions[0]) // len(self.tasks)
        start = self.added % self.capacity
        for column, values in zip(self.columns, transitions, strict=True):
            column[:, start : start + n] = torch.as_tensor(values).unflatten(0, (-1, n))
        self.added += n

    def sample(self, n):
        """n transitions of each task, uniformly with replacement: all columns, (T * n, ...), ordered by task."""
        stored = min(self.added, self.capacity)
        chosen = torch.randint(stored, (len(self.tasks), n), device=self.tasks.device)
        return [column[self.tasks, chosen].flatten(0, 1) for column in self.columns]


# -------------------------------------------------------------------------------------------------------- environments
# To train on your own, replace task_names and make_env. All need flat observations of one size, and bounded actions.
def task_names(env_id):
    """The tasks of --env-id, in the order of their indices."""
    if env_id in ("MT10", "MT25", "MT50"):
        return list(getattr(metaworld.env_dict, f"{env_id}_V3"))
    tasks = env_id.split(",")
    for task in tasks:
        if task not in metaworld.env_dict.ALL_V3_ENVIRONMENTS or tasks.count(task) > 1:
            raise ValueError(f"--env-id: {task!r} is unknown or named twice; there are MT10, MT25, MT50 and V3 tasks")
    return tasks


def make_env(task, args, seed):
    """The environment of a task. args.seed decides on the task's 50 goals, seed on their order."""
    env = metaworld.make_mt_envs(task, seed=args.seed)
    env.unwrapped.seed(seed)  # Meta-World's reset ignores its seed
    if args.goals == "fixed":
        env.set_wrapper_attr("tasks", env.get_wrapper_attr("tasks")[:1])
    return env


class CheckedEpisode(gym.Wrapper):
    """Raises FloatingPointError if a number is not finite. Adds info["summary"] (3,): success of the episode so far (in
    any step; nan if none is reported), its return, and a 1: in a sum of summaries it counts the episodes."""

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.check("observation", obs)
        self.summary = np.array([np.nan, 0, 1])
        return obs, info

    def step(self, action):
        self.check("action", action)
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.check("observation or reward", [*obs, reward])
        self.summary[0] = np.fmax(self.summary[0], info.get("success", np.nan))
        self.summary[1] += reward
        # A copy, since some environments reuse their array: the reset at an episode's end would overwrite it.
        return obs.copy(), reward, terminated, truncated, {**info, "summary": self.summary}

    def check(self, what, numbers):
        if not np.isfinite(np.float32(numbers)).all():
            raise FloatingPointError(f"the {what} of {self.task} is not finite")


def make_policy_env(task, args, seed):
    """The environment as the policy sees it: with a time limit, and actions in [-1, 1]."""
    if multiprocessing.parent_process() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with a killed learner
    env = gym.wrappers.TimeLimit(make_env(task, args, seed), args.episode_length)
    env = CheckedEpisode(gym.wrappers.RescaleAction(env, -1, 1))
    env.task = task
    return env


def make_envs(args, seed):
    """E environments of each task, ordered by task, each in a process of its own."""
    makers = [partial(make_policy_env, task, args, seed + e) for task in args.tasks for e in range(args.envs_per_task)]
    print(f"starting environments: {len(makers)}", flush=True)
    return gym.vector.AsyncVectorEnv(makers, context="fork", autoreset_mode="SameStep")


def evaluate(args, act, envs):
    """Run --eval-episodes episodes of each task, equally many in each of its environments. act: obs -> actions, routes.
    Prints and returns, (T,) each: success, return, and modules_used, the mean depth over all steps."""
    T = len(args.tasks)
    E = args.envs_per_task
    share = math.ceil(args.eval_episodes / E)
    sums = np.zeros((T * E, 3))  # of the summaries
    depths = []
    obs, _ = envs.reset()
    while sums[:, 2].min() < share:
        action, routes = act(torch.as_tensor(obs, dtype=torch.float32, device=args.device))
        depths.append(used_modules(routes).sum(-1).cpu().numpy())
        obs, _, terminated, truncated, infos = envs.step(action.cpu().numpy())
        for i in np.flatnonzero((terminated | truncated) & (sums[:, 2] < share)):
            sums[i] += infos["final_info"]["summary"][i]
    success, returns, _ = (sums / share).reshape(T, E, 3).mean(1).T
    depth = np.mean(depths, axis=0).reshape(T, E).mean(1)
    table = np.stack([success, returns, depth], axis=1)
    for name, row in zip([*args.tasks, f"mean ({share * E} episodes each)"], [*table, table.mean(0)]):
        print("{}: success {:.2f}, return {:.1f}, modules used {:.1f}".format(name, *row))
    return {"success": success, "return": returns, "modules_used": depth}


# -------------------------------------------------------------------------------------------------- log and checkpoints
class Log:
    """args.json, progress.csv and, if it is installed, TensorBoard. progress.csv starts as it was at the checkpoint."""

    def __init__(self, args, saved):
        self.tasks = args.tasks
        self.sums = torch.zeros(len(args.tasks), 3)  # of the summaries since the last row
        self.step = saved["step"]  # of each task, at the last row
        self.seconds = saved["seconds"]  # of training until then, without breaks
        self.start = time.monotonic() - self.seconds
        run = Path(args.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        (run / "args.json").write_text(json.dumps({"args": asdict(args), "tasks": args.tasks}, indent=2))
        self.csv = run / "progress.csv"
        self.csv.write_text(saved["log"])
        self.columns = next(csv.reader(saved["log"].splitlines()), [])
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run, purge_step=self.step * len(self.sums) + 1)
        except ImportError:
            self.tensorboard = None

    def write(self, step, updates, metrics):
        """Add a row: of each metric, (T,) or a scalar, the mean and the tasks' values."""
        T = len(self.tasks)
        seconds = time.monotonic() - self.start
        speed = (step - self.step) * T / (seconds - self.seconds)
        self.step = step
        self.seconds = seconds
        row = {"global_step": step * T, "updates": updates, "seconds": seconds, "steps_per_second": speed}
        success, total, episodes = self.sums.T
        table = dict.fromkeys(["success", "return", "modules_used"], math.nan)  # if not evaluated
        table |= {"train_success": success / episodes, "train_return": total / episodes} | metrics
        self.sums.zero_()
        for name, values in table.items():
            values = torch.as_tensor(values).expand(T).tolist()
            row[name] = np.mean(values)
            row |= {f"{name}/{task}": value for task, value in zip(self.tasks, values)}
        self.columns = self.columns or [*row]
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        with open(self.csv, "a") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")  # raises if one is new
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({name: f"{value:.9g}" for name, value in row.items()})
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, step * T)
        shown = ["train_success", "train_return", "critic_loss", "actor_loss", "alpha", "skipped"]
        text = ", ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        print(f"step {step:,} of each task ({speed:.0f}/s in all): {text}", flush=True)


def save_checkpoint(args, agent, replay, log, step, updates):
    """Write checkpoint.pt, to continue, and actor.pt, to evaluate. A kill at any time leaves the last whole files."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise FloatingPointError("the weights are not finite")
    checkpoint = {"step": step, "updates": updates, "log": log.csv.read_text()}
    checkpoint["seconds"] = time.monotonic() - log.start
    checkpoint |= {"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()["state"]}
    checkpoint["added"] = replay.added
    checkpoint["replay"] = [column[:, : replay.added].clone() for column in replay.columns]
    for name, content in {"checkpoint.pt": checkpoint, "actor.pt": {"actor": agent.actor.state_dict()}}.items():
        unfinished = Path(args.run_dir, f"{name}.partial")
        torch.save({"args": asdict(args)} | content, unfinished)
        unfinished.replace(Path(args.run_dir, name))


def load_checkpoint(args):
    """What save_checkpoint wrote into the run's directory, or the start of a new run."""
    path = Path(args.run_dir, "checkpoint.pt")
    if not path.exists():
        if path.with_name("actor.pt").exists():
            sys.exit(f"error: {args.run_dir} holds a policy, but no checkpoint; choose another --run-dir")
        print(f"{args.run_dir}: a new run, with updates from step {args.learning_starts:,} of each task on")
        return {"step": 0, "updates": 0, "seconds": 0.0, "log": ""}
    saved = torch.load(path, map_location="cpu", mmap=True)
    may_change = "steps eval_every eval_episodes log_every checkpoint_minutes device compile run_dir"
    fixed = {name: value for name, value in saved["args"].items() if name not in may_change.split()}
    changed = [f"{name} {value}" for name, value in fixed.items() if value != getattr(args, name)]
    if changed:
        sys.exit(f"error: {path} was made with {', '.join(changed)}; choose another --run-dir")
    print(f"{args.run_dir}: from step {saved['step']:,} of each task on; delete this directory to start over")
    return saved


def load_policy(path):
    """A trained actor, the names of its tasks, and the Args of its run, from an actor.pt. See results/evaluate.py."""
    saved = torch.load(path, map_location="cpu")
    args = Args(**saved["args"])
    obs_dim = saved["actor"]["routing_network.obs_encoder.0.weight"].shape[1]
    actor = D2RNetwork(obs_dim, len(saved["actor"]["head.bias"]), len(args.tasks), args)
    actor.load_state_dict(saved["actor"])
    return actor, args.tasks, args


# ------------------------------------------------------------------------------------------------------- training loop
class CUDAGraph:
    """Calls a function of tensors of constant shapes. On a GPU launching small kernels takes most of the time, 90 ms
    for an update of MT10 on an H100; after three calls they are captured as a graph, which takes 5 ms. It overwrites
    its outputs at each call. What is no tensor operation, such as .item() or NumPy's random numbers, is frozen."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *inputs):
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.calls == 0:
            self.inputs = [tensor.clone() for tensor in inputs]
        torch._foreach_copy_(self.inputs, inputs)
        self.calls += 1
        if self.calls <= 3:  # to warm up, on a side stream, as CUDA graphs require
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                outputs = self.function(*self.inputs)
            torch.cuda.synchronize()
            return outputs
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        self.graph.replay()
        return self.outputs


def main():
    """Train. A run may be killed at any time. The same command continues it from its last checkpoint, which holds the
    networks, the optimizer, the replay buffer and progress.csv: about --checkpoint-minutes are lost (before the first
    checkpoint, everything). Episodes begin anew, with other goals and noise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C kills without tracebacks of all processes
    args = tyro.cli(Args)
    saved = load_checkpoint(args)
    step = saved["step"]  # environment steps of each task so far
    updates = saved["updates"]
    if step >= args.steps:
        print("This run is finished. More --steps continue it.")
        return
    T = len(args.tasks)
    E = args.envs_per_task
    seed = args.seed + step
    envs = make_envs(args, seed)
    obs, _ = envs.reset(seed=seed)
    sizes = (obs.shape[1], envs.action_space.shape[1])
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    agent = Agent(*sizes, T, args, args.device)
    capacity = args.buffer_size // E * E
    replay = ReplayBuffer(capacity, T, *sizes, args.num_modules, args.top_k, args.device)
    if step > 0:
        agent.load_state_dict(saved["agent"])
        agent.optimizer.load_state_dict(agent.optimizer.state_dict() | {"state": saved["optimizer"]})
        replay.add(*(column.flatten(0, 1) for column in saved["replay"]))
        replay.added = saved["added"]
    if args.compile:
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})  # same noise
    act = CUDAGraph(agent.act)
    act_deterministically = CUDAGraph(partial(agent.act, deterministic=True))
    update = CUDAGraph(agent.update)
    log = Log(args, saved)
    metrics = {}
    saved_at = time.monotonic()
    while step < args.steps:
        # Act. NOTE: before the first update with the untrained policy, as in the authors' code; others act uniformly.
        action, routes = act(torch.as_tensor(obs, dtype=torch.float32, device=args.device))
        action = action.cpu()
        envs.step_async(action.numpy())

        # Learn from the steps so far, while the environments take the next one
        if step >= args.learning_starts:
            metrics = update(*replay.sample(args.batch_size))
            updates += 1

        # Store
        next_obs, reward, terminated, truncated, infos = envs.step_wait()
        real_next_obs = next_obs.copy()  # next_obs may already be the next episode's
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            log.sums[i // E] += torch.as_tensor(infos["final_info"]["summary"][i])
        replay.add(obs, action, reward, real_next_obs, terminated, routes)
        obs = next_obs
        step += E

        # Evaluate and log: once per interval. Since step advances by E, the remainder is then below E.
        finished = step >= args.steps
        evaluating = finished or step % args.eval_every < E
        if evaluating:
            metrics = metrics | evaluate(args, act_deterministically, envs)
            obs, _ = envs.reset()  # begin new episodes
        if updates and (evaluating or step % args.log_every < E):
            log.write(step, updates, metrics)

        # Save
        if finished or time.monotonic() - saved_at > 60 * args.checkpoint_minutes:
            save_checkpoint(args, agent, replay, log, step, updates)
            saved_at = time.monotonic()
    envs.close()


if __name__ == "__main__":
    main()
