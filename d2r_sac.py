# SPDX-License-Identifier: MIT
"""Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World, in one file.

One policy for many tasks: a routing network picks, for every state and task, which of M base modules to use and how
to wire them, so that easy tasks take few modules and hard tasks many. Paper: He et al., "Not All Tasks Are Equally
Difficult: Multi-Task Deep Reinforcement Learning with Dynamic Depth Routing", AAAI 2024, arXiv:2312.14472.

    concept                  in symbols                                                  here
    routing network          z = router(h * e), h = encoder(s), e = encoder(task)        RoutingNetwork
    Top-K                    the K largest of module i's logits z_i                      top_k
    Sample-K                 K draws without replacement from softmax(z_i / temperature) sample_k
    routing weights          w_i = softmax(z_i) over the chosen sources only             routing_weights
    depth                    modules that the chosen edges connect to the head           used_modules
    routing granularity      the sources among which module i may choose                 allowed_sources
    base modules             f_i = relu(W_i x_i + b_i),  o_i = f_i + x_i                 BaseModule, BaseModules
    wiring                   x_i = sum_j w_ij o_j;  o_0 = f_0 = relu(W_0 relu(h) + b_0)  BaseModules, MixSources
    ResRouting               edge (i, j) sends its gradient to all of o_j, or x_j alone  MixSources, gradient_kept
    SAC losses               per task; alpha_task, task weights, extreme-loss mask       task_losses, Agent.update
    automatic route balance  temperature_task = T softmax(-log alpha)_task               Agent.temperature

Symbols: T tasks, M modules, H module width, K routing sources, P parallel modules (of routing by layer or model), B
samples in a batch, n = B / T samples of each task, E environments of each task. A step of all E T environments has E
rows of T: environment i is of task i % T.
Modules are 0 ... M-1, and the head is module M. Module i takes its sources from modules 0 ... i-1: "row i" of the
routing table has i entries and feeds module i, i = 1 ... M. A table (B, M, M) holds rows 1 ... M in this order, and so
do routes (B, M, K), the sources chosen in each. Edge (i, j): module i takes module j as a source. Where it may not, the
logit is -inf.
`# NOTE:` marks where paper, authors' code and this file differ, or where the code settles what the paper leaves open.
"""

import copy
import csv
import difflib
import importlib.metadata
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
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
from torch import Tensor, nn


@dataclass
class Args:
    """Dynamic Depth Routing (D2R) with multi-task SAC. The defaults are the paper's."""

    env_id: str = "MT10"
    """MT10, MT25, MT50, one Meta-World V3 task (reach-v3) or several (reach-v3,drawer-close-v3)"""
    goals: Literal["random", "fixed"] = "random"
    """random: a new goal each episode, of 50 per task; fixed: one goal per task for the whole run"""
    episode_length: int = 200
    """time limit of an episode, in steps of its task; at most 500"""
    envs_per_task: int = 1
    """E, environments of each task, each in its own process; E times the batch_size replays a step as often as E = 1"""
    total_steps: int | None = None
    """environment steps, over all environments and ranks (15M for MT10, 50M for MT50, 1.5M per task otherwise)"""
    buffer_size: int | None = None
    """transitions of replay, over all tasks and ranks (1M for MT10, 10M for MT50, 100,000 per task otherwise)"""
    batch_size: int | None = None
    """samples of an update, over all tasks and ranks, the same number of each (128 per task)"""
    learning_starts: int | None = None
    """environment steps with the untrained stochastic policy before the first update (4,000 per task)"""
    eval_every: int | None = None
    """environment steps between evaluations (a hundredth of the run, at least as many as its own episodes have)"""
    eval_episodes: int = 32
    """episodes of each task in an evaluation"""
    # Networks and routing
    num_modules: int = 16
    """M, base modules of a network"""
    top_k: int = 2
    """K, routing sources of a module; 0: soft routing over all that it may choose"""
    routing: Literal["module", "layer", "model"] = "module"
    """granularity: a module chooses among all earlier ones, or those of the layer before; or the head among chains"""
    parallel_modules: int = 4
    """P, modules of a layer, or number of chains; only for routing by layer or model"""
    module_width: int = 128
    """H, width of a base module"""
    encoder_widths: tuple[int, ...] = (400, 400)
    """widths of the observation encoder's layers; the last is also the task encoder's"""
    router_widths: tuple[int, ...] = (256, 256)
    """widths of the hidden layers between the encoders and the routing logits"""
    resrouting: bool = True
    """ResRouting; without it every gradient reaches every chosen module"""
    route_balancing: bool = True
    """automatic route balancing; without it every task samples its routes at temperature 1"""
    sample_k: bool = True
    """Sample-K while acting and in the critics' regression; without it Top-K there too"""
    # Soft actor-critic
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """rate of the target critics' Polyak averaging"""
    learning_rate: float = 3e-4
    """Adam's learning rate for the actor and the critics"""
    alpha_learning_rate: float = 1e-4
    """Adam's learning rate for each task's log alpha"""
    initial_alpha: float = 1.0
    """entropy coefficient of every task at the start; alpha never exceeds 1"""
    target_entropy: float | None = None
    """entropy that each task's alpha steers the policy towards, in nats (minus the size of an action)"""
    reward_scale: float = 0.1
    """factor on the environments' rewards"""
    max_task_loss: float = 3e3
    """a task whose summed loss exceeds this is left out of the update"""
    max_grad_norm: float = 1.0
    """gradient norm to which the actor, each critic and log alpha are clipped, each by itself"""
    # The run
    seed: int = 1
    """of the networks, the sampling and the goals"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks and the replay are; auto: cuda where there is one"""
    compile: bool = False
    """torch.compile for the networks, on CUDA"""
    torch_deterministic: bool = False
    """only deterministic algorithms; on CUDA also float32 products instead of TF32"""
    results_dir: str = "results"
    """directory of the run directories"""
    run_name: str | None = None
    """name of the run's directory (benchmark, goals, seed and time)"""
    resume: str | None = None
    """run directory to go on in, with the arguments it was started with where they are not given anew"""
    evaluate: str | None = None
    """path of an actor.pt: evaluate this policy on the tasks it was trained for, and train nothing"""
    log_every: int = 10_000
    """environment steps between rows of progress.csv"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints; there is one at the end and at SIGINT or SIGTERM in any case"""
    tensorboard: bool = True
    """write TensorBoard events, where the package tensorboard is installed"""


# ======================================================================================================================
# The method. To use it elsewhere, paste what stands between the double lines: it needs torch, copy, math and pairwise.
# ----------------------------------------------------------------------------------------------------- routing network
def init(layer: nn.Linear, head: bool = False) -> nn.Linear:
    # NOTE: the authors' helper takes out_features for the fan-in.
    bound = 3e-3 if head else layer.out_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound) if head else nn.init.constant_(layer.bias, 0.1)
    return layer


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them and no activation at the end."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.ReLU(), init(nn.Linear(width_in, width_out))]
    return nn.Sequential(*layers[1:])


class RoutingNetwork(nn.Module):
    """Embeds state and task, and from both gives the routing logits. allowed: as from allowed_sources."""

    def __init__(self, input_dim, num_tasks, allowed, encoder_widths, router_widths):
        super().__init__()
        self.M = len(allowed)
        self.obs_encoder = mlp(input_dim, *encoder_widths)
        self.task_encoder = init(nn.Linear(num_tasks, encoder_widths[-1]))
        # NOTE: the router's last layer is initialised as a hidden one; heads are the outputs of actor and critics.
        self.router = mlp(encoder_widths[-1], *router_widths, int(allowed.sum()))
        self.register_buffer("one_hot", torch.eye(num_tasks), persistent=False)
        self.register_buffer("row_and_column", allowed.nonzero().T.contiguous(), persistent=False)

    def forward(self, inputs: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (B, input_dim), task (B,) indices -> h (B, encoder_widths[-1]), table of logits (B, M, M)."""
        h = self.obs_encoder(inputs)
        e = self.task_encoder(self.one_hot[task])
        z = self.router(h * e)  # (B, number of allowed edges), row after row
        logits = z.new_full((len(z), self.M, self.M), -torch.inf)
        logits[:, *self.row_and_column] = z
        return h, logits


def top_k(logits: Tensor, K: int) -> Tensor:
    """The K largest logits of each row: (B, M, M) -> routes (B, M, K). A row with fewer than K repeats its largest."""
    values, routes = logits.topk(K, dim=-1)
    return torch.where(values == -torch.inf, routes[..., :1], routes)


def sample_k(logits: Tensor, K: int) -> Tensor:
    """K draws without replacement from the softmax of each row: (B, M, M) -> routes (B, M, K)."""
    uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)
    return top_k(logits - (-uniform.log()).log(), K)  # Gumbel noise: Kool et al., ICML 2019


def routing_weights(logits: Tensor, routes: Tensor) -> Tensor:
    """w: softmax of the untempered logits over the chosen sources, each once: (B, M, M), (B, M, K) -> (B, M, K)."""
    repeated = (routes[..., :, None] == routes[..., None, :]).tril(-1).any(-1)
    return logits.gather(-1, routes).masked_fill(repeated, -torch.inf).softmax(-1)


def gradient_kept(logits: Tensor) -> Tensor:
    """ResRouting: true where edge (i, j) is likely without Sample-K's temperature, p_ij > 1/(i+1). (B, M, M)."""
    num_sources = (logits > -torch.inf).sum(-1, keepdim=True, dtype=logits.dtype)  # among which i may choose; D2R: i
    return logits.softmax(-1) > 1 / (num_sources + 1)  # a sole source, p = 1, is kept


def used_modules(routes: Tensor) -> Tensor:
    """Which modules the chosen edges connect to the head: (B, M, K) -> (B, M) bool. Their number is the depth."""
    B, M, _ = routes.shape
    chosen = torch.zeros(B, M, M, dtype=torch.bool, device=routes.device)
    *rows, used = chosen.scatter_(-1, routes.long(), True).unbind(1)  # the last row is the head's
    for i, row in reversed([*enumerate(rows, start=1)]):
        used = used | (used[:, i : i + 1] & row)  # where module i is used, so are its sources
    return used


def allowed_sources(M: int, routing: str, P: int) -> Tensor:
    """Routing granularity: (M, M) bool, the sources among which each module may choose; the last row is the head's.

    module: all earlier ones. layer: of M/P layers of P modules, those of the layer before. model: of P chains of M/P
    modules, the one before in its chain; the head chooses among the chains' ends. In all three module 0 alone reads h,
    and is the source of the other P - 1 that come first. By layer or by model with P = 1 nothing is left to choose, and
    the task has no influence. Raises ValueError."""
    # NOTE: the paper compares these three; the authors' code has the first alone, and the others are our reading.
    if routing != "module" and not (1 <= P <= M and M % P == 0):
        raise ValueError(f"num_modules, {M}, must be a multiple of parallel_modules, {P}")
    i, source = torch.arange(1, M + 1)[:, None], torch.arange(M)
    if routing == "module":
        return source < i
    before = source == i - P if routing == "model" else source // P == i // P - 1
    return torch.where(i < P, source == 0, torch.where(i == M, source >= M - P, before))


# ------------------------------------------------------------------------------------------------------- base modules
class MixSources(torch.autograd.Function):
    """x_i = sum_j w_ij o_j over the sources of module i, o_j = f_j + x_j.

    ResRouting: what module i itself, or the head, reads sends its gradient to all of o_j where edge (i, j) is kept, and
    to x_j alone elsewhere; what module i's shortcut reads sends it to all of o_j. In plain autograd, every module being
    computed for every sample, w and kept (B, M, M), and w 0 where not chosen, the network from h to its output is

        def plain(modules, head, h, w, kept):
            f, x = [modules[0](h.relu())], [torch.zeros(())]
            for module, w_i, kept_i in zip([*modules[1:], head], w.unbind(1), kept.unbind(1)):
                own = shortcut = 0
                for f_j, x_j, w_ij, kept_ij in zip(f, x, w_i.T[..., None], kept_i.T[..., None]):
                    own = own + w_ij * (torch.where(kept_ij, f_j, f_j.detach()) + x_j)
                    shortcut = shortcut + w_ij * (f_j + x_j)
                f.append(module(own))
                x.append(shortcut)
            return f[-1]

    Here the outputs of all modules lie in one tensor o (S, H), a slot for each module and sample that uses it. The tape
    (S, 2, H) holds no data: it ties the mixings together, from the first to the last, and what flows back along it are
    the gradients of all f_j, [:, 0], and x_j, [:, 1]. So x_i is `own`; what `shortcut` gets comes along the tape."""

    @staticmethod
    def forward(ctx, tape, f, f_slots, x_slots, o, w, w_kept, slots):
        """Weighted sum over the sources of the B_i samples that use module i: w, slots (B_i, K) -> tape, x_i (B_i, H).

        w_kept (B_i, K, 2): w where f_j, and where x_j, gets what module i sends back, else 0. f_slots are the slots of
        f, which is of the module before, x_slots those of x_i."""
        picked = F.embedding(slots, o)  # (B_i, K, H)
        ctx.f_slots, ctx.x_slots = f_slots, x_slots
        ctx.save_for_backward(w, w_kept, slots, picked)
        return torch.empty_like(tape), (picked * w[..., None]).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_tape, grad_own):
        w, w_kept, slots, picked = ctx.saved_tensors
        grad_own, grad_shortcut = grad_own[:, None], grad_tape[ctx.x_slots, 1:]  # (B_i, 1, H)
        grad_w = (picked * (grad_own + grad_shortcut)).sum(-1)
        grad_o = w_kept[..., None] * grad_own[:, None]  # (B_i, K, 2, H)
        grad_o.addcmul_(w[..., None, None], grad_shortcut[:, None])
        # In place: only the mixing after this one made the tape's gradient, and only the one before reads it.
        grad_tape.index_add_(0, slots.flatten(), grad_o.flatten(0, 1))
        return grad_tape, grad_tape[ctx.f_slots, 0], None, None, None, grad_w, None, None


class BaseModule(nn.Linear):
    """f = relu(W x + b). In its place can stand any nn.Module from (., in_features) to (., out_features) that treats
    each sample by itself, and accepts an empty batch. Module 0 reads h, the others H features; all give H."""

    def reset_parameters(self):
        init(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class BaseModules(nn.Module):
    """M modules and a head, each fed by the sources that its row of the routing table chose.

    On a CPU a module is computed for the samples that use it, perhaps none; elsewhere, or compiled, for all of them."""

    def __init__(self, embedding_dim, output_dim, num_modules, width, resrouting, make_module):
        super().__init__()
        self.resrouting = resrouting
        widths = [embedding_dim] + [width] * num_modules
        self.module = nn.ModuleList(make_module(*pair) for pair in pairwise(widths))
        self.head = init(nn.Linear(width, output_dim), head=True)

    def forward(self, h: Tensor, logits: Tensor, routes: Tensor) -> Tensor:
        """h (B, embedding_dim), logits (B, M, M), routes (B, M, K) -> (B, output_dim). Raises ValueError."""
        B, M, _ = routes.shape
        # counts: of the samples for which modules 0 ... M-1 and the head are computed. used: which, from module 1 on.
        counts, used, H = [B] * (M + 1), ..., self.head.in_features
        sources = routes.transpose(0, 1).contiguous().long()  # (M, B, K)
        source_slots = torch.arange(B, device=h.device)[:, None].add(sources, alpha=B)
        if h.is_cpu and not torch.compiler.is_compiling():  # else static shapes, and no waiting
            if (logits.transpose(0, 1).gather(-1, sources) == -torch.inf).any():
                raise ValueError("routes: a module takes a source that it may not choose, as one that comes later")
            computed = F.pad(used_modules(routes), (0, 1), value=True).T.flatten()  # (i, b)
            counts = computed.view(M + 1, B).sum(1).tolist()
            source_slots = (computed.cumsum(0) - 1)[source_slots]  # where used
            used = computed[B:].nonzero().squeeze(1)
        w = routing_weights(logits.transpose(0, 1), sources)
        blocking = self.resrouting and torch.is_grad_enabled()  # it matters backwards alone
        kept = gradient_kept(logits).transpose(0, 1).gather(-1, sources) if blocking else 1
        w_kept = torch.stack([w * kept, w], dim=-1).detach()
        *mixes, last_mix = zip(*(t.flatten(0, 1)[used].split(counts[1:]) for t in (w, w_kept, source_slots)))
        first, *others = self.module
        f, f_slots = first(F.relu(h)), slice(0, B)  # all use module 0; it has no shortcut
        o, tape = f.new_empty(sum(counts), H), f.new_empty(sum(counts), 2, H)
        o[f_slots] = f.detach()
        for module, mix in zip(others, mixes, strict=True):
            x_slots = slice(f_slots.stop, f_slots.stop + len(mix[0]))
            tape, x = MixSources.apply(tape, f, f_slots, x_slots, o, *mix)
            o[x_slots] = x.detach()  # before the module, which may work in place
            f, f_slots = module(x), x_slots
            o[f_slots].add_(f.detach())
        _, x = MixSources.apply(tape, f, f_slots, slice(f_slots.stop, None), o, *last_mix)
        return self.head(x)


class D2RNetwork(nn.Module):
    """A routing network with its base modules: an actor (output: mean and log std), a critic (output: Q), or any other.

    top_k 0: soft routing over all that a module may choose. routing, parallel_modules: see allowed_sources.
    make_module(width_in, width_out) makes a base module."""

    def __init__(self, input_dim, output_dim, num_tasks, num_modules=16, top_k=2, module_width=128,
                 encoder_widths=(400, 400), router_widths=(256, 256), resrouting=True, routing="module",
                 parallel_modules=4, make_module=BaseModule):  # fmt: skip
        super().__init__()
        if not 0 <= top_k <= num_modules:
            raise ValueError(f"top_k, {top_k}, must lie between 0 and num_modules, {num_modules}")
        self.K, M = top_k or num_modules, num_modules
        allowed = allowed_sources(M, routing, parallel_modules)
        self.routing_network = RoutingNetwork(input_dim, num_tasks, allowed, encoder_widths, router_widths)
        self.base_modules = BaseModules(encoder_widths[-1], output_dim, M, module_width, resrouting, make_module)

    def forward(self, inputs: Tensor, task: Tensor, routes=None, temperature=None):
        """inputs (B, input_dim), task (B,) indices -> output (B, output_dim), routes (B, M, K).

        Routes: those given; else Sample-K's at each task's temperature (T,), where that is given; else Top-K's."""
        h, logits = self.routing_network(inputs, task)
        if routes is None and temperature is None:
            routes = top_k(logits, self.K)
        elif routes is None:
            routes = sample_k(logits / temperature[task, None, None], self.K)
        return self.base_modules(h, logits, routes), routes


# --------------------------------------------------------------------------- actor, critics, losses, route balancing
def side_by_side(*functions) -> list:
    """The results of functions that do not need each other's: one after the other, or in a CUDA graph side by side."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [function() for function in functions]
    stream, branches, results = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in functions], []
    for branch, function in zip(branches, functions):
        branch.wait_stream(stream)
        with torch.cuda.stream(branch):  # autograd goes back in the stream in which a function ran
            results.append(function())
    for branch in branches:
        stream.wait_stream(branch)
    return results


def sample_action(output: Tensor) -> tuple[Tensor, Tensor]:
    """The actor's output (B, 2A) -> an action (B, A) of the tanh-squashed Gaussian and its log-probability (B,)."""
    mean, log_std = output.chunk(2, dim=-1)
    log_std = log_std.clamp(-20, 2)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return u.tanh(), (log_prob - log_slope).sum(-1)


def task_weights(log_alpha: Tensor) -> Tensor:
    """T softmax(-log alpha), (T,), of mean 1. A mastered task's policy is narrow, so alpha rises: it weighs less."""
    return len(log_alpha) * (-log_alpha.detach()).softmax(0)


def td_target(reward, terminated, next_q, next_log_prob, log_alpha, gamma) -> Tensor:
    """r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s')): (T, n), next_q (2, T, n)."""
    # NOTE: the authors mark the time limit as terminal; here a truncation bootstraps.
    alpha = log_alpha.detach().exp()[:, None]
    return reward + gamma * ~terminated * (next_q.amin(0) - alpha * next_log_prob)


def task_losses(q, target, policy_q, log_prob, log_alpha, target_entropy) -> dict[str, Tensor]:
    """The losses of each task, (T,), means over n samples: q, policy_q (2, T, n), target, log_prob (T, n).

    Critics: sum_c (Q_c(s, a) - target)^2, weighted by task. Actor: alpha log pi(a|s) - min_c Q_c(s, a), weighted too.
    Alpha: -log alpha (log pi(a|s) + target entropy)."""
    weight, alpha = task_weights(log_alpha), log_alpha.detach().exp()[:, None]
    return {
        "critic_loss": weight * ((q - target) ** 2).mean(-1).sum(0),
        "actor_loss": weight * (alpha * log_prob - policy_q.amin(0)).mean(-1),
        "alpha_loss": -log_alpha * (log_prob.detach() + target_entropy).mean(-1),
    }


# -------------------------------------------------------------------------------------------------------------- agent
class Agent(nn.Module):
    """Actor, critics, target critics, log alpha and their optimizer. args: Args, or any object with its attributes."""

    def __init__(self, obs_dim: int, action_dim: int, num_tasks: int, args, device="cpu"):
        super().__init__()
        sizes = args.num_modules, args.top_k, args.module_width
        options = *sizes, args.encoder_widths, args.router_widths, args.resrouting, args.routing, args.parallel_modules
        self.actor = D2RNetwork(obs_dim, 2 * action_dim, num_tasks, *options)
        self.critics = nn.ModuleList(D2RNetwork(obs_dim + action_dim, 1, num_tasks, *options) for _ in range(2))
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((num_tasks,), math.log(args.initial_alpha)))
        self.register_buffer("task", torch.arange(num_tasks), persistent=False)
        self.to(device)
        self.args = args
        self.target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.parts = [[*network.parameters()] for network in (self.actor, *self.critics)] + [[self.log_alpha]]
        rates = 3 * [args.learning_rate] + [args.alpha_learning_rate]
        groups = [{"params": part, "lr": rate} for part, rate in zip(self.parts, rates)]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def temperature(self) -> Tensor | None:
        """Automatic route balancing: Sample-K's temperature of each task, (T,), low where mastered. None: Top-K."""
        balanced = task_weights(self.log_alpha) if self.args.route_balancing else torch.ones_like(self.log_alpha)
        return balanced if self.args.sample_k else None

    @torch.no_grad()
    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations of E T environments, (E * T, obs_dim) -> actions (E * T, A), sampled, and routes (., M, K)."""
        task = self.task.repeat(len(obs) // len(self.task))
        output, routes = self.actor(obs, task, temperature=self.temperature())
        return sample_action(output)[0], routes

    def update(self, obs, action, reward, next_obs, terminated, routes) -> dict[str, Tensor]:
        """One update of everything from (T * n, ...) of each, task by task. Returns each task's losses, (T,)."""
        args, T, n = self.args, len(self.task), len(reward) // len(self.task)
        task = self.task.repeat_interleave(n)  # (B,)
        # Next action: Top-K. Critics' regression: Sample-K. Actor's loss: replayed routes, weighted by today's logits.
        temperature, inputs = self.temperature(), torch.cat([obs, action], dim=-1)
        (next_action, next_log_prob), *q, (own_action, log_prob) = side_by_side(
            torch.no_grad()(lambda: sample_action(self.actor(next_obs, task)[0])),
            *(lambda critic=critic: critic(inputs, task, temperature=temperature)[0] for critic in self.critics),
            lambda: sample_action(self.actor(obs, task, routes=routes)[0]),
        )
        # Target critics, and critics inside the actor's loss: Top-K. No gradient reaches their weights.
        # NOTE: ResRouting also holds inside the latter, for the gradient to the action, as in the authors' code.
        next_inputs, own_inputs = torch.cat([next_obs, next_action], dim=-1), torch.cat([obs, own_action], dim=-1)
        learning = [p for p in self.critics.parameters() if p.requires_grad]  # some may be frozen
        for parameter in learning:
            parameter.requires_grad_(False)
        *next_q, policy_q_1, policy_q_2 = side_by_side(
            *(lambda critic=critic: critic(next_inputs, task)[0] for critic in self.target_critics),
            *(lambda critic=critic: critic(own_inputs, task)[0] for critic in self.critics),
        )
        for parameter in learning:
            parameter.requires_grad_(True)
        q, next_q, policy_q = [torch.stack(pair).view(2, T, n) for pair in (q, next_q, (policy_q_1, policy_q_2))]
        reward, terminated = args.reward_scale * reward.view(T, n), terminated.view(T, n)
        target = td_target(reward, terminated, next_q, next_log_prob.view(T, n), self.log_alpha, args.gamma)
        losses = task_losses(q, target, policy_q, log_prob.view(T, n), self.log_alpha, self.target_entropy)
        # NOTE: only in the authors' code, after PaCo: a task whose loss exceeds the limit is left out.
        summed = sum(losses.values())
        loss = torch.where(summed > args.max_task_loss, 0.0, summed).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # the mean over torchrun's ranks
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            total = nn.utils.parameters_to_vector(gradients)
            torch.distributed.all_reduce(total)
            nn.utils.vector_to_parameters(total / torch.distributed.get_world_size(), gradients)
        for part in self.parts:
            nn.utils.clip_grad_norm_(part, args.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log_alpha.clamp_(max=0)  # NOTE: only in the authors' code.
            torch._foreach_lerp_([*self.target_critics.parameters()], [*self.critics.parameters()], args.tau)
        return {name: loss.detach() for name, loss in losses.items()}


# ======================================================================================================================
# ------------------------------------------------------------------------------------------------------- replay buffer
class ReplayBuffer:
    """A ring per task, in preallocated tensors (capacity, T, ...), capacity a multiple of E. All environments step
    together, so the rings turn together, by E places."""

    def __init__(self, capacity, T, obs_dim, action_dim, M, K, device):
        self.capacity, self.T, self.size, self.position = capacity, T, 0, 0
        # Observation; action, in [-1, 1]; reward, as the environment gave it; next observation, at a truncation the
        # episode's true last one; 1 where terminated: a truncation is no termination.
        self.widths = obs_dim, action_dim, 1, obs_dim, 1
        self.transitions = torch.empty(capacity, T, sum(self.widths), device=device)
        self.routes = torch.empty(capacity, T, M, K, dtype=torch.uint8, device=device)  # M <= 256

    def add(self, obs, action, reward, next_obs, terminated, routes) -> None:
        """Store a step of E T environments, (E * T, ...) arrays and the behaviour policy's routes (E * T, M, K)."""
        step = np.concatenate([obs, action, reward[:, None], next_obs, terminated[:, None]], axis=1, dtype=np.float32)
        E = len(step) // self.T
        places = slice(self.position, self.position + E)
        self.transitions[places].copy_(torch.as_tensor(step).unflatten(0, (E, self.T)), non_blocking=True)
        self.routes[places] = routes.unflatten(0, (E, self.T))
        self.position = (self.position + E) % self.capacity
        self.size = min(self.size + E, self.capacity)

    def sample(self, n: int) -> tuple[Tensor, ...]:
        """n transitions of each task, uniformly with replacement: as given to add, (T * n, ...), task by task."""
        task = torch.arange(self.T, device=self.routes.device)[:, None]
        index = (torch.randint(self.size, (self.T, n), device=task.device) * self.T + task).flatten()
        transitions, routes = self.transitions.flatten(0, 1)[index], self.routes.flatten(0, 1)[index]
        obs, action, reward, next_obs, terminated = transitions.split(self.widths, dim=1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1) > 0, routes


# -------------------------------------------------------------------------------------------------------- environments
# Environment steps of a run, and transitions of replay, for each task. Tasks that you name have those of MT10.
BUDGETS = {"MT10": (1_500_000, 100_000), "MT25": (1_500_000, 100_000), "MT50": (1_000_000, 200_000)}


def task_names(env_id: str) -> list[str]:
    """The tasks of --env-id, in the order of their indices. Raises UsageError."""
    if env_id in BUDGETS:
        return list(getattr(metaworld.env_dict, f"{env_id}_V3"))
    tasks, known = env_id.split(","), [*metaworld.env_dict.ALL_V3_ENVIRONMENTS]
    for task in tasks:
        if task not in known or tasks.count(task) > 1:
            near = ", ".join(difflib.get_close_matches(task, [*BUDGETS, *known], cutoff=0))
            raise UsageError(f"--env-id: {task!r} is unknown, or named twice; the nearest: {near}")
    return tasks


def make_env(task: str, args: Args, seed: int) -> gym.Env:
    """The environment of a task. args.seed chooses its goals, seed their order."""
    env = metaworld.make_mt_envs(task, seed=args.seed, max_episode_steps=args.episode_length)
    env.unwrapped.seed(seed)  # Meta-World's reset ignores its seed
    if args.goals == "fixed":
        env.set_wrapper_attr("tasks", env.get_wrapper_attr("tasks")[:1])
    return env


@contextmanager
def make_envs(tasks: list[str], args: Args, seed: int):
    """AsyncVectorEnv, a process for each of E T environments: actions in [-1, 1], SameStep autoreset. Raises RunError
    if one dies."""

    def make(task, replica):  # each has an order of goals of its own
        return gym.wrappers.RescaleAction(make_env(task, args, seed + replica), np.float32(-1), np.float32(1))

    makers = [partial(make, task, replica) for replica in range(args.envs_per_task) for task in tasks]
    envs = gym.vector.AsyncVectorEnv(makers, autoreset_mode="SameStep")
    try:
        yield envs
    except (EOFError, ConnectionError) as error:
        time.sleep(1)  # the operating system knows a little later who it was
        owners = zip(tasks * args.envs_per_task, envs.processes)
        dead = [task for task, process in owners if not process.is_alive()]
        raise RunError(f"the process of {', '.join(dead)} died") from error
    finally:
        for process in envs.processes:  # they have nothing to clean up
            process.kill()
            process.join()
        envs.closed = True


# ---------------------------------------------------------------------------------------------------------- evaluation
class Episodes:
    """Of each environment the episodes that have ended: (success at any step, nan where none tells; return)."""

    def __init__(self, N: int):
        self.ended, self.success, self.total = [[] for _ in range(N)], np.full(N, np.nan), np.zeros(N)

    def add(self, reward, ended, infos) -> None:
        """One step of all environments, (N,) arrays, as they gave it."""
        last_infos = infos.get("final_info", {})
        success = np.where(ended, last_infos.get("success", np.nan), infos.get("success", np.nan))
        self.success, self.total = np.fmax(self.success, success), self.total + reward
        for index in np.flatnonzero(ended):
            self.ended[index].append((self.success[index], self.total[index]))
            self.success[index], self.total[index] = np.nan, 0

    def means(self, tasks: list[str], prefix: str = "") -> dict[str, float]:
        """success/reach-v3, return/reach-v3 and so on, of the tasks with an episode, and their means over these."""
        results, of_task = {}, {}
        for index, task in enumerate(tasks):
            of_task[task] = [episode for ended in self.ended[index :: len(tasks)] for episode in ended]
        for name, column in ((f"{prefix}success", 0), (f"{prefix}return", 1)):
            means = {f"{name}/{t}": float(np.mean(ended, axis=0)[column]) for t, ended in of_task.items() if ended}
            results |= means | ({name: float(np.mean([*means.values()]))} if means else {})
        return results


@torch.no_grad()
def evaluate(agent: Agent, envs, tasks: list[str], number: int, stop: list) -> dict[str, float]:
    """Run `number` episodes of each task with Top-K routes and tanh(mean). Returns {} once a signal is in `stop`.

    Prints and returns Episodes.means, and modules_used, of all steps, of each task and averaged."""
    obs, _ = envs.reset()
    T = len(tasks)
    E = len(obs) // T
    # Each environment runs a fixed share of the episodes. The first `number` to end would be the short ones.
    shares = [number // E + (i // T < number % E) for i in range(E * T)]
    episodes, used, steps = Episodes(E * T), 0, 0
    task = agent.task.repeat(E)

    @CUDAGraph
    def best_action(obs):
        output, routes = agent.actor(obs, task)
        return output.chunk(2, dim=-1)[0].tanh(), used_modules(routes).sum(-1)  # (E T, A), (E T,)

    while any(len(ended) < share for ended, share in zip(episodes.ended, shares)):
        if stop:
            return {}
        obs = torch.as_tensor(obs, dtype=torch.float32).to(agent.task.device, non_blocking=True)
        action, used_now = best_action(obs)
        used, steps = used + used_now, steps + 1
        action = action.cpu().numpy()
        if not np.isfinite(action).all():
            raise RunError("the policy's actions are not finite")
        obs, reward, terminated, truncated, infos = envs.step(action)
        episodes.add(reward, terminated | truncated, infos)
    episodes.ended = [ended[:share] for ended, share in zip(episodes.ended, shares)]
    results, used = episodes.means(tasks), (used / steps).view(E, T).mean(0)
    results |= {f"modules_used/{task}": modules for task, modules in zip(tasks, used.tolist())}
    results["modules_used"] = used.mean().item()
    for task in tasks:
        success, total, modules = (results[f"{name}/{task}"] for name in ("success", "return", "modules_used"))
        print(f"{task}: success {success:.2f}, return {total:.1f}, modules used {modules:.1f}")
    print(f"mean success {results['success']:.2f}, modules used {results['modules_used']:.1f}")
    return results


# ------------------------------------------------------------------------------------------------------- training loop
@dataclass
class Progress:
    """How far a run is; part of its checkpoint."""

    global_step: int = 0  # environment steps, summed over tasks, environments and ranks
    updates: int = 0
    evaluated_at: int = 0  # global_step of the last evaluation
    seconds: float = 0.0  # of training, without evaluations, over all resumptions


def train(args: Args, tasks: list[str], saved: dict | None, stop: list) -> None:
    """Train until --total-steps, or until a signal is in `stop`; or --evaluate. Raises UsageError, RunError, OSError."""
    T, (rank, ranks) = len(tasks), world()
    run = Progress(**saved["progress"]) if args.resume else Progress()
    log = RunLog(args, tasks, run, saved) if rank == 0 and not args.evaluate else None
    rank_args = replace(args, seed=args.seed + 10_000 * rank)
    seed = rank_args.seed + run.global_step  # a resumed run goes on with new goals and new noise
    with make_envs(tasks, rank_args, seed) as envs:
        # The workers are there by now: they hold nothing of CUDA, or of other ranks.
        device, cuda = torch.device("cpu"), args.device != "cpu" and torch.cuda.is_available()
        if cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("highest" if args.torch_deterministic else "high")  # high: TF32
        if ranks > 1:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        (obs_dim,), (action_dim,) = envs.observation_space.shape[1:], envs.action_space.shape[1:]
        agent = Agent(obs_dim, action_dim, T, args, device)
        obs, _ = envs.reset(seed=seed)
        if args.evaluate:
            agent.actor.load_state_dict(saved["actor"])
            evaluate(agent, envs, tasks, args.eval_episodes, stop)
            return
        N, n = len(obs), args.batch_size // (T * ranks)
        capacity = args.buffer_size // (N * ranks) * args.envs_per_task
        replay = ReplayBuffer(capacity, T, obs_dim, action_dim, args.num_modules, agent.actor.K, device)
        if args.resume:  # the learning rates remain those of the arguments, which may be new
            agent.load_state_dict(saved["agent"])
            agent.optimizer.load_state_dict(agent.optimizer.state_dict() | {"state": saved["optimizer"]})
            replay.position, (transitions, routes) = saved["position"], saved["buffers"][rank]
            replay.size = len(routes)
            replay.transitions[: replay.size], replay.routes[: replay.size] = transitions, routes
        act, update = accelerate(agent)
        torch.manual_seed(seed + 1)
        began, saved_at, last_row, losses = time.monotonic() - run.seconds, time.monotonic(), run.global_step, {}
        episodes = Episodes(N)
        while True:
            next_evaluation = min((run.evaluated_at // args.eval_every + 1) * args.eval_every, args.total_steps)
            evaluation_due = run.evaluated_at < next_evaluation <= run.global_step
            row_due = run.global_step // args.log_every > last_row // args.log_every
            if log and (row_due or evaluation_due):
                last_row = run.global_step
                record = {name: loss.mean().item() for name, loss in losses.items()}
                alpha = agent.log_alpha.detach().exp()  # a live autograd graph would spoil a CUDA graph's capture
                record |= {f"alpha/{t}": x for t, x in zip(tasks, alpha.tolist())}
                if (temperature := agent.temperature()) is not None:
                    record |= {f"temperature/{t}": x for t, x in zip(tasks, temperature.tolist())}
                record |= episodes.means(tasks, "train_")
                episodes.ended = [[] for _ in obs]
                if not evaluation_due:
                    log.write(run, record)
                elif results := evaluate(agent, envs, tasks, args.eval_episodes, stop):
                    run.evaluated_at = run.global_step
                    log.write(run, record | results)
                    began = time.monotonic() - run.seconds  # evaluations do not count
                    obs, _ = envs.reset()  # the evaluation left episodes of its own
                    episodes = Episodes(N)

            # All ranks stop, and save, in the same step.
            finished = len(stop) > 0 or run.global_step >= args.total_steps
            save_due = finished or time.monotonic() - saved_at > 60 * args.checkpoint_minutes
            flags = torch.tensor([finished, save_due], dtype=torch.int)
            if ranks > 1:
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            if flags[1]:
                save_run(log, agent, replay, run)
                saved_at = time.monotonic()
            if flags[0]:
                break

            # One step of all environments: the workers take it while the learner updates. On a GPU the update is queued
            # behind acting before the host waits for the action.
            action, routes = act(torch.as_tensor(obs, dtype=torch.float32).to(device, non_blocking=True))
            action, learning = action.to("cpu", non_blocking=True), run.global_step >= args.learning_starts
            if cuda:
                acted = torch.cuda.current_stream().record_event()
                losses = update(*replay.sample(n)) if learning else losses
                acted.synchronize()
            if not (action.isfinite().all() and (cuda or all(x.isfinite().all() for x in losses.values()))):
                wrong = [f"{k}/{t}" for k, loss in losses.items() for t, x in zip(tasks, loss) if not x.isfinite()]
                raise RunError(f"not finite: {', '.join(wrong) or 'actions'}")
            envs.step_async(action.numpy())
            if learning and not cuda:
                losses = update(*replay.sample(n))
            next_obs, reward, terminated, truncated, infos = envs.step_wait()
            ended = terminated | truncated
            if log:
                episodes.add(reward, ended, infos)
            last_obs = next_obs.copy()
            for index in np.flatnonzero(ended):  # next_obs is the next episode's
                last_obs[index] = infos["final_obs"][index]
            replay.add(obs, action, reward, last_obs, terminated, routes)
            obs = next_obs
            run.global_step += N * ranks
            run.updates += learning
            run.seconds = time.monotonic() - began
    if log:
        print(f"ended at step {run.global_step:,} of {args.total_steps:,}; to go on: --resume {log.run_dir}")


# ----------------------------------- what keeps it running: failures, ranks, CUDA graphs, checkpoints, log, arguments
class UsageError(Exception):
    """A mistake in what the user asked for; its message says what is wrong and what to write instead."""


class RunError(Exception):
    """Something that ends a run while it goes; its message says what."""


def world() -> tuple[int, int]:
    """This process's rank, and the number of ranks. Each steps its own copy of the tasks; they average gradients."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class CUDAGraph:
    """Calls a function of tensors of constant shapes: on CUDA, after three calls, by a graph with fixed outputs."""

    def __init__(self, function):
        self.function, self.calls, self.inputs = function, 0, None

    def __call__(self, *inputs: Tensor):
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        self.calls, self.inputs = self.calls + 1, self.inputs or [tensor.clone() for tensor in inputs]
        torch._foreach_copy_(self.inputs, inputs)
        if self.calls <= 3:  # not on the default stream, as capturing asks for
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


def accelerate(agent: Agent):
    """The agent's act and update, on CUDA as graphs, of compiled networks where args.compile says so."""
    for group in agent.optimizer.param_groups:
        group["capturable"] = agent.task.is_cuda
    if agent.args.compile and agent.task.is_cuda:  # on a CPU it gains nothing
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    return CUDAGraph(agent.act), CUDAGraph(agent.update)


@contextmanager
def whole_file(path: Path, mode: str = "w"):
    """A file that replaces `path` once it is written: a kill or a full disk leaves the last whole one."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, mode) as file:
            yield file
        partial_path.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch turns some of the first into the second
        partial_path.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def save_run(log, agent: Agent, replay: ReplayBuffer, run: Progress) -> None:
    """All ranks call it; rank 0 writes checkpoint.pt, to go on from, and actor.pt, to evaluate."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise RunError("the weights are not finite")
    filled = [ring[: replay.size].to("cpu", copy=True) for ring in (replay.transitions, replay.routes)]
    replays = [filled] * world()[1]
    if len(replays) > 1:
        torch.distributed.gather_object(filled, replays if log else None)
    if log:
        checkpoint = {"args": asdict(agent.args), "progress": asdict(run), "agent": agent.state_dict()}
        checkpoint |= {"optimizer": agent.optimizer.state_dict()["state"], "log": log.path.read_text()}
        checkpoint |= {"buffers": replays, "position": replay.position}
        with whole_file(log.run_dir / "checkpoint.pt", "wb") as file:
            torch.save(checkpoint, file)
        with whole_file(log.run_dir / "actor.pt", "wb") as file:
            torch.save({"args": asdict(agent.args), "actor": agent.actor.state_dict()}, file)


class RunLog:
    """A run's directory, with args.json, progress.csv and TensorBoard events; terminal lines. Raises UsageError."""

    def __init__(self, args: Args, tasks: list[str], run: Progress, checkpoint: dict | None):
        name = f"{args.env_id[:99]}-{args.goals}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(args.resume or Path(args.results_dir, args.run_name or name))
        if not args.resume and (self.run_dir / "args.json").exists():
            raise UsageError(f"--run-name: {self.run_dir} holds a run; choose another, or --resume it")
        packages = ("torch", "numpy", "metaworld", "mujoco", "gymnasium", "tyro")
        facts = {"args": asdict(args), "tasks": tasks, "python": sys.version}
        facts["versions"] = {name: importlib.metadata.version(name) for name in packages}
        facts["commit"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
        names = ("success", "return", "modules_used", "train_success", "train_return", "alpha", "temperature")
        self.columns = [*asdict(run), "steps_per_second", "critic_loss", "actor_loss", "alpha_loss"]
        self.columns += [*names[:5], *(f"{name}/{task}" for name in names for task in tasks)]
        text = checkpoint["log"] if checkpoint else ",".join(self.columns) + "\n"  # as it was at the checkpoint
        self.columns = text.partition("\n")[0].split(",")  # an older version's run goes on with the columns that it has
        self.args, self.last, self.path = args, replace(run), self.run_dir / "progress.csv"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with whole_file(self.run_dir / "args.json") as file:
                json.dump(facts, file, indent=2)
            with whole_file(self.path) as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"--results-dir: {error}") from error
        print(f"{args.env_id}: {args.total_steps:,} steps, in {self.run_dir}", flush=True)
        self.tensorboard = None

    def write(self, run: Progress, record: dict[str, float]) -> None:
        steps, seconds = run.global_step - self.last.global_step, run.seconds - self.last.seconds
        speed = steps / seconds if steps else math.nan  # no steps: resumed, then evaluated
        left = max(self.args.total_steps / run.global_step - 1, 0) * run.seconds / 3600
        shown = {name: record.get(name, math.nan) for name in ("train_success", "train_return")}
        learned = "".join(f", {name} {value:.2f}" for name, value in shown.items() if not math.isnan(value))
        print(f"step {run.global_step:,}, {speed:,.1f} steps/s, {left:.1f} hours left{learned}", flush=True)
        record = asdict(run) | {"steps_per_second": speed} | record
        with open(self.path, "a") as file:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()}
            csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n").writerow(cells)
        if self.args.tensorboard:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = self.tensorboard or SummaryWriter(self.run_dir, purge_step=run.global_step)
                for name, value in record.items():
                    self.tensorboard.add_scalar(name, value, run.global_step)
        self.last = replace(run)


def load(args: Args, argv: list[str] | None) -> tuple[dict, Args]:
    """What --resume or --evaluate names, and its arguments with those of argv given anew. Raises UsageError."""
    option, path, part = "--resume", f"{args.resume}/checkpoint.pt", "buffers"
    if args.evaluate:
        option, path, part = "--evaluate", args.evaluate, "actor"
    fixed = ["env_id", "num_modules", "top_k", "routing", "parallel_modules"]
    fixed += ["module_width", "encoder_widths", "router_widths"]
    fixed += [] if args.evaluate else ["goals", "episode_length", "envs_per_task", "seed", "buffer_size"]
    try:
        damaged = zipfile.ZipFile(path).testzip()
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if damaged or part not in saved:
            raise ValueError(damaged or f"it holds no {part}")
        known = {field.name for field in fields(Args)}
        old = Args(**{name: value for name, value in saved["args"].items() if name in known})
        old.envs_per_task = 1 if args.evaluate else old.envs_per_task  # no more processes than it takes
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{option}: {path} is missing, damaged or of another version: {reason}") from error
    args = tyro.cli(Args, args=argv, default=replace(old, resume=args.resume, evaluate=args.evaluate))
    for name in fixed:
        if getattr(args, name) != getattr(old, name):
            raise UsageError(f"{option}: {path} was made with {name} {getattr(old, name)}; do not change it")
    return saved, args


def parse_arguments(argv: list[str] | None) -> tuple[Args, list[str], dict | None]:
    """The arguments, with every budget filled in; the tasks; what --resume or --evaluate names. Raises UsageError."""
    args, saved, (_, ranks) = tyro.cli(Args, args=argv), None, world()
    if args.resume or args.evaluate:
        saved, args = load(args, argv)
        args.resume = None if args.evaluate else args.resume
    tasks = task_names(args.env_id)
    T, (steps, transitions) = len(tasks), BUDGETS.get(args.env_id, BUDGETS["MT10"])
    budgets = {"total_steps": steps, "buffer_size": transitions, "batch_size": 128, "learning_starts": 4000}
    for name, per_task in budgets.items():
        if getattr(args, name) is None:
            setattr(args, name, per_task * T)
    args.eval_every = args.eval_every or max(args.total_steps // 100, args.eval_episodes * args.episode_length * T)
    ranges = {"gamma": (0, 1), "tau": (0, 1), "initial_alpha": (1e-9, 1), "target_entropy": (-1e9, 1e9)}
    ranges |= {"num_modules": (1, 256), "top_k": (0, args.num_modules), "episode_length": (1, 500), "seed": (0, 2**31)}
    ranges["envs_per_task"] = (1, 1000)
    for name, value in asdict(args).items():
        low, high = ranges.get(name, (1e-18, 1e18))
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers or (0,):  # no width is as wrong as 0
            if type(number) in (int, float) and not low <= number <= high:
                wanted = f"lie between {low} and {high}" if name in ranges else "be positive and finite"
                raise UsageError(f"--{name.replace('_', '-')} is {number}; it must {wanted}")
    if args.routing == "module" and args.parallel_modules != Args.parallel_modules:
        raise UsageError("--parallel-modules is for --routing layer and model")
    if args.routing != "module" and args.num_modules % args.parallel_modules:
        raise UsageError(f"--num-modules must be a multiple of --parallel-modules, {args.parallel_modules}")
    if args.batch_size % (T * ranks):
        raise UsageError(f"--batch-size is {args.batch_size}; it must be a multiple of tasks times ranks, {T * ranks}")
    if args.buffer_size < (least := max(args.batch_size, args.envs_per_task * T * ranks)):
        raise UsageError(f"--buffer-size must hold a batch, and a step of all environments: at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, and PyTorch finds none here; write --device cpu")
    if args.resume and len(saved["buffers"]) != ranks:
        raise UsageError("--resume: start as many ranks as before, with torchrun")
    return args, tasks, saved


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a mistake in what was asked for, 1 for a run that failed."""
    stop = []  # the signals that came; no lock, for one may come while another is handled
    for number in (signal.SIGINT, signal.SIGTERM):  # workers inherit it, and so heed neither
        signal.signal(number, lambda number, _: stop.append(number))
    try:
        args, tasks, saved = parse_arguments(argv)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.manual_seed(args.seed)
        train(args, tasks, saved, stop)
        return 0
    except (UsageError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:  # workers of environments that do not fit together are left over, and ignore SIGTERM
        for process in multiprocessing.active_children():
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
