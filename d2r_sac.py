# SPDX-License-Identifier: MIT
"""Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World, in one file.

One policy for many tasks: a routing network picks, for every state and task, which of M base modules to use and how
to wire them, so that easy tasks can take few modules, and hard ones many. Paper: He et al., "Not All Tasks Are Equally
Difficult: Multi-Task Deep Reinforcement Learning with Dynamic Depth Routing", AAAI 2024, arXiv:2312.14472.

    concept              formula                                                            here
    routing network      z = router(h * e), h = encoder(state), e = encoder(task)           RoutingNetwork
    Top-K                the K sources with the largest logits z_ij of module i             top_k
    Sample-K             K draws without replacement from softmax_j(z_ij / temperature)     sample_k
    routing weights      w_ij = softmax of z_ij over the chosen sources j                   routing_weights
    depth                number of modules that the chosen edges connect to the head        used_modules
    routing granularity  the sources that a module may choose from                          allowed_sources
    base modules         f_i = relu(W_i x_i + b_i), o_i = f_i + x_i; o_0 = f_0(relu(h))     BaseModule, D2RNetwork
    wiring               x_i = sum_j w_ij o_j                                               MixSources
    ResRouting           over an unlikely edge o_j is read as stop_gradient(f_j) + x_j      gradient_kept, MixSources
    soft actor-critic    losses and alpha of each task                                      Agent.update
    route balancing      temperature of a task = T softmax(-log alpha)                      Agent.temperature

T tasks, M modules, H module width, K sources, B samples in a batch, n = B / T of each task, E environments of each
task; of the E T environments number i runs task i % T. Modules are 0 ... M-1, the head counts as module M. Logits
(B, M, M) and routes (B, M, K) have a row for each of the modules 1 ... M: row r belongs to module r + 1. Forbidden
edges have logit -inf.
`# NOTE:` marks where paper, authors' code and this file differ, or where the code settles what the paper leaves open.
"""

import copy
import ctypes
import fcntl
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
from dataclasses import asdict, dataclass
from datetime import timedelta
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

# torchrun starts several processes. Each steps its own copies of the tasks; they average their gradients.
RANK = int(os.environ.get("RANK") or 0)
RANKS = int(os.environ.get("WORLD_SIZE") or 1)


@dataclass
class Args:
    """Dynamic Depth Routing (D2R) with multi-task SAC. The defaults are the paper's."""

    env_id: str = "MT10"  # MT10, MT25, MT50, or Meta-World V3 tasks (reach-v3,drawer-close-v3)
    goals: Literal["random", "fixed"] = "random"  # a new goal each episode, of 50; fixed: one goal
    episode_length: int = 200  # time limit of an episode, in steps; at most 500
    envs_per_task: int = 1  # E, environments of each task; scale batch_size with it (README)
    # Budgets count environment steps or transitions, summed over tasks, environments and ranks.
    total_steps: int | None = None  # environment steps (MT10 15_000_000, MT50 50M, else 1.5M a task)
    buffer_size: int | None = None  # transitions, in whole steps (MT10 1M, MT50 10M, else 0.1M a task)
    batch_size: int | None = None  # samples of an update, equally many of each task (128 each)
    learning_starts: int | None = None  # environment steps before updates begin (4,000 per task)
    eval_every: int | None = None  # steps between evaluations (a 100th of the run, or more)
    eval_episodes: int = 32  # episodes of each task in an evaluation
    # Networks and routing
    num_modules: int = 16  # M, base modules of a network
    top_k: int = 2  # K, sources of a module; 0: all that it may choose (soft routing)
    routing: Literal["module", "layer", "model"] = "module"  # granularity; see allowed_sources
    parallel_modules: int = 4  # P, width of a layer, or number of chains; for layer or model
    module_width: int = 128  # H, width of a base module
    encoder_widths: tuple[int, ...] = (400, 400)  # of the state encoder; the task's has the last only
    router_widths: tuple[int, ...] = (256, 256)  # of the layers that follow, up to the logits
    resrouting: bool = True  # ResRouting; without it gradients reach all chosen modules
    route_balancing: bool = True  # without it every task samples routes at temperature 1
    sample_k: bool = True  # in acting and the critics' regression; without it Top-K
    # Soft actor-critic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics' Polyak averaging
    learning_rate: float = 3e-4  # Adam's, for the actor and the critics
    alpha_learning_rate: float = 1e-4  # Adam's, for each task's log alpha
    initial_alpha: float = 1.0  # entropy coefficient of every task at the start; at most 1
    target_entropy: float | None = None  # in nats (minus the size of an action)
    reward_scale: float = 0.1  # factor on the environments' rewards
    max_task_loss: float = 3e3  # a task whose losses sum to more is left out of the update
    max_grad_norm: float = 1.0  # of the actor, each critic and log alpha, each by itself
    # The run
    seed: int = 1  # of the networks, the sampling and the goals
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    compile: bool = False  # torch.compile the networks, on CUDA
    torch_deterministic: bool = False  # deterministic algorithms; float32, not TF32, on CUDA
    results_dir: str = "results"  # directory of the run directories
    run_name: str | None = None  # name of the run's directory (benchmark, goals, seed and time)
    resume: str | None = None  # a run's directory: go on with it; options override its own
    evaluate: str | None = None  # a run's directory, or an actor.pt: only evaluate
    log_every: int = 10_000  # environment steps between rows of progress.csv
    checkpoint_minutes: float = 10.0  # between checkpoints; one comes at the end or a signal
    tensorboard: bool = True  # write TensorBoard events, where it is installed
    track: bool = False  # send them to Weights & Biases, too (pip install wandb)


def check(condition, message: str) -> None:
    """Ends the program with exit code 2, as argparse does, where the user has made a mistake."""
    if not condition:
        print(f"error: {message}".splitlines()[0], file=sys.stderr)
        sys.exit(2)


def say(line: str, passing: bool = False) -> None:
    """Prints a line. A passing one: at most every 30 seconds; on a terminal every second, and the next replaces it.
    A run goes on where nobody reads it any more, as after `| head`. Only rank 0 speaks."""
    if RANK > 0 or (passing and time.monotonic() < getattr(say, "due", 0)):
        return
    terminal = sys.stdout is not None and sys.stdout.isatty()
    say.due = time.monotonic() + (1 if terminal else 30)
    erase = "\x1b[K" if terminal else ""
    try:
        print(erase + line, end="\r" if passing and terminal else "\n", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# ======================================================================================================================
# The method. To use it elsewhere, paste what stands between the double lines; README has the imports.
# ----------------------------------------------------------------------------------------------------- routing network
def init(layer: nn.Linear, head: bool = False) -> nn.Linear:
    # NOTE: the authors' helper takes out_features for the fan-in; in_features would be right.
    bound = 3e-3 if head else layer.out_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.constant_(layer.bias, 0.1)
    if head:
        nn.init.uniform_(layer.bias, -bound, bound)
    return layer


def mlp(widths) -> nn.Sequential:
    """Linear layers with ReLU between them and no activation at the end."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.ReLU(inplace=True), init(nn.Linear(width_in, width_out))]
    return nn.Sequential(*layers[1:])


class RoutingNetwork(nn.Module):
    """Embeds state and task, and computes the routing logits from both. allowed: as from allowed_sources."""

    def __init__(self, input_dim, num_tasks, allowed, encoder_widths, router_widths):
        super().__init__()
        self.M = len(allowed)
        self.obs_encoder = mlp((input_dim, *encoder_widths))
        self.task_encoder = init(nn.Linear(num_tasks, encoder_widths[-1]))
        # NOTE: the authors initialise the router's last layer as a hidden one, too.
        self.router = mlp((encoder_widths[-1], *router_widths, int(allowed.sum())))
        self.register_buffer("one_hot", torch.eye(num_tasks), persistent=False)
        self.register_buffer("edges", allowed.flatten().nonzero().squeeze(1), persistent=False)

    def forward(self, inputs: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (B, input_dim), task (B,) indices -> h (B, encoder_widths[-1]), logits (B, M, M)."""
        h = self.obs_encoder(inputs)
        e = self.task_encoder(self.one_hot[task])
        z = self.router(h * e)  # (B, number of allowed edges)
        logits = z.new_full((len(z), self.M * self.M), -torch.inf)
        logits.index_copy_(1, self.edges, z)
        return h, logits.view(-1, self.M, self.M)


def top_k(logits: Tensor, K: int) -> Tensor:
    """The K largest logits of each row: (B, M, M) -> routes (B, M, K). A row with fewer than K repeats the best."""
    values, routes = logits.topk(K, dim=-1)
    return torch.where(values == -torch.inf, routes[..., :1], routes)


def sample_k(logits: Tensor, K: int) -> Tensor:
    """K draws without replacement from the softmax of each row: (B, M, M) -> routes (B, M, K).
    An untrained router would otherwise always choose the same few sources, and never try the others."""
    uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)
    gumbel = -(-uniform.log()).log()
    return top_k(logits + gumbel, K)  # Gumbel top-k: Kool et al., ICML 2019


def routing_weights(logits: Tensor, routes: Tensor) -> Tensor:
    """Softmax of the logits over the chosen sources, each counted once: (B, M, M), (B, M, K) -> (B, M, K).
    The temperature of Sample-K has no part in it: it changes which sources are tried, not how they are mixed."""
    repeated = [(routes[..., :k] == routes[..., k, None]).any(-1) for k in range(routes.shape[-1])]
    z = logits.gather(-1, routes).masked_fill(torch.stack(repeated, dim=-1), -torch.inf)
    return z.movedim(-1, 0).softmax(0).movedim(0, -1)  # a CPU is slow over a short last dimension


def gradient_kept(logits: Tensor) -> Tensor:
    """ResRouting: true for the edges that today's routing finds likely, p_ij > 1 / (J_i + 1). (B, M, M) -> (B, M, M).
    p_i is the softmax of module i's logits, at temperature 1, over the J_i sources that it may choose from."""
    num_sources = (logits[:1] > -torch.inf).sum(-1, keepdim=True, dtype=logits.dtype)  # J_i
    return logits.softmax(-1) > 1 / (num_sources + 1)


def used_modules(routes: Tensor) -> Tensor:
    """The modules that the chosen edges connect to the head: (B, M, K) -> (B, M) bool. Their number is the depth."""
    B, M, _ = routes.shape
    chosen = torch.zeros(M, M, B, dtype=torch.bool, device=routes.device)
    chosen.scatter_(1, routes.permute(1, 2, 0).long(), True)
    used = chosen[-1]  # the head's sources
    for i in range(M - 1, 0, -1):
        used = used | (used[i] & chosen[i - 1])  # where module i is used, its sources are
    return used.T


def allowed_sources(M: int, routing: str, P: int) -> Tensor:
    """Routing granularity: (M, M) bool, row r: the sources that module r + 1 may choose from. Raises ValueError.
    module: all earlier ones. layer: all modules of the layer before, in layers of P. model: the module before in one
    of P chains; only the head chooses, among the ends of the chains. With M = 6 and P = 2:

        layer:  0   2   4            model:  0 - 2 - 4            Module 0 reads the state's embedding, and
                | X   X   > head             |         > head     is the source of modules 1 ... P-1.
                1   3   5                    1 - 3 - 5"""
    # NOTE: the paper compares these three; the authors' code has the first only, the others are our reading.
    if routing != "module" and not (1 <= P <= M and M % P == 0):
        raise ValueError(f"num_modules, {M}, must be a multiple of parallel_modules, {P}")
    i = torch.arange(1, M + 1)[:, None]
    j = torch.arange(M)
    if routing == "module":
        return j < i
    previous = j // P == i // P - 1 if routing == "layer" else j == i - P
    previous = torch.where(i == M, j >= M - P, previous)
    return torch.where(i < P, j == 0, previous)


# ------------------------------------------------------------------------------------------------------- base modules
class MixSources(torch.autograd.Function):
    """x_i = sum_j w_ij o_j with the gradients of ResRouting.
    The actor's replayed routes were chosen by an older policy, the critics' are drawn at a temperature: today's routing
    would hardly send some of these samples to module j, which should not learn from them. Where edge (i, j) is not kept
    (see gradient_kept), module i reads o_j = f_j + x_j as stop_gradient(f_j) + x_j: f_j is not trained, but the modules
    before it are. The shortcut, which adds x_i to f_i, is never blocked. With g_i the gradient of what module i reads,
    and s_i the gradient of its shortcut:

        grad f_j = sum_i w_ij (kept_ij g_i + s_i)      s_j = sum_i w_ij (g_i + s_i)

    All outputs lie in one tensor o (S, H), a slot for each module and sample. The tape (S, 2, H) runs through all
    mixings. Its values mean nothing; its gradient, on the way back, collects grad f_j in [:, 0] and s_j in [:, 1]."""

    @staticmethod
    def forward(ctx, tape, o, f, x, previous, w, w_fx, slots):
        """Stores o = f + x of module i - 1 in its slots `previous`; mixes the sources of module i, which B_i samples
        use. w, slots (B_i, K), w_fx (B_i, K, 2): w_ij kept_ij, the share of g_i for f_j, and w_ij, the share for x_j.
        Returns the tape and x_i (B_i, H) twice: for module i, which may work in place, and for the shortcut."""
        torch.add(f, x, out=o[previous])
        ctx.o = o  # not saved: later modules write into it, but not into these slots
        ctx.previous = previous
        ctx.save_for_backward(w, w_fx, slots)
        if torch.compiler.is_compiling():  # it fuses this, but not embedding_bag
            mixed = (F.embedding(slots, o) * w[..., None]).sum(1)
        else:
            mixed = F.embedding_bag(slots, o, mode="sum", per_sample_weights=w)
        return torch.empty_like(tape), mixed, mixed.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_tape, g, grad_shortcut):
        w, w_fx, slots = ctx.saved_tensors
        picked = F.embedding(slots, ctx.o)  # (B_i, K, H)
        grad_w = (picked * (g + grad_shortcut)[:, None]).sum(-1)
        grad_o = w_fx[..., None] * g[:, None, None]  # (B_i, K, 2, H)
        grad_o.addcmul_(w[..., None, None], grad_shortcut[:, None, None])
        # In place: it changes only slots of modules before i, whose gradients nobody has read yet.
        grad_tape.index_add_(0, slots.flatten(), grad_o.flatten(0, 1))
        grad_f, grad_x = grad_tape[ctx.previous].unbind(1)  # complete: all its readers are done
        return grad_tape, None, grad_f, grad_x, None, grad_w, None, None


class BaseModule(nn.Linear):
    """f = relu(W x + b). Any nn.Module from (., in_features) to (., out_features) can replace it if it treats each
    sample by itself and accepts an empty batch. Module 0 reads relu(h), and must not change it in place; the others
    read H features; all give H."""

    def reset_parameters(self):
        init(self)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class D2RNetwork(nn.Module):
    """A routing network and its base modules: an actor (output: mean and log std), a critic (output: Q), or any other.
    top_k 0: soft routing over all allowed sources. make_module(width_in, width_out): instead of BaseModule."""

    def __init__(self, input_dim, output_dim, num_tasks, num_modules=16, top_k=2, module_width=128,
                 encoder_widths=(400, 400), router_widths=(256, 256), resrouting=True, routing="module",
                 parallel_modules=4, make_module=None):  # fmt: skip
        super().__init__()
        if not 0 <= top_k <= num_modules:
            raise ValueError(f"top_k, {top_k}, must lie between 0 and num_modules, {num_modules}")
        self.K = top_k or num_modules
        self.resrouting = resrouting
        allowed = allowed_sources(num_modules, routing, parallel_modules)
        self.routing_network = RoutingNetwork(input_dim, num_tasks, allowed, encoder_widths, router_widths)
        widths = [encoder_widths[-1]] + [module_width] * num_modules
        modules = nn.ModuleList((make_module or BaseModule)(a, b) for a, b in pairwise(widths))
        head = init(nn.Linear(module_width, output_dim), head=True)
        self.base_modules = nn.ModuleDict({"module": modules, "head": head})

    def forward(self, inputs: Tensor, task: Tensor, routes=None, temperature=None):
        """inputs (B, input_dim), task (B,) indices -> output (B, output_dim), routes (B, M, K).
        Routes are those given, else Sample-K's if temperature (T,) is given, else Top-K's."""
        h, logits = self.routing_network(inputs, task)
        if routes is None and temperature is None:
            routes = top_k(logits, self.K)
        elif routes is None:
            routes = sample_k(logits / temperature[task, None, None], self.K)
        return self.run_modules(h, logits, routes), routes

    def run_modules(self, h: Tensor, logits: Tensor, routes: Tensor) -> Tensor:
        """h (B, encoder_widths[-1]), logits (B, M, M), routes (B, M, K) -> output. Forbidden edges: ValueError (CPU).
        A CPU computes a module only for the samples that use it; a GPU for all, since shapes must be static."""
        B, M, _ = routes.shape
        sources = routes.long()
        w = routing_weights(logits, sources)
        w_f = w
        if self.resrouting and torch.is_grad_enabled():
            w_f = w * gradient_kept(logits).gather(-1, sources)
        w_fx = torch.stack([w_f, w], dim=-1).detach()
        slots = sources * B + torch.arange(B, device=h.device)[:, None, None]  # j B + b
        counts = [B] * (M + 1)  # samples for which each module, and the head, is computed
        rows = slice(None)  # of the flattened (module, sample) pairs
        if h.is_cpu and not torch.compiler.is_compiling():
            if (logits.gather(-1, sources) == -torch.inf).any():
                raise ValueError("routes: a module takes a source that it may not choose")
            used = F.pad(used_modules(routes), (0, 1), value=True).T  # (M + 1, B)
            counts = used.sum(1).tolist()
            slots = (used.flatten().cumsum(0) - 1)[slots]  # only used outputs have a slot
            rows = used[1:].flatten().nonzero().squeeze(1)
        w, w_fx, slots = [t.transpose(0, 1).flatten(0, 1)[rows].split(counts[1:]) for t in (w, w_fx, slots)]
        first, *readers = [*self.base_modules.module, self.base_modules.head]
        f = first(F.relu(h))  # used by all
        x = torch.zeros_like(f)  # o_0 = f_0
        o = f.new_empty(sum(counts[:M]), f.shape[1])
        tape = f.new_empty(sum(counts[:M]), 2, f.shape[1])
        previous = slice(0, B)
        for reader, w_i, w_fx_i, slots_i in zip(readers, w, w_fx, slots, strict=True):
            tape, own, x = MixSources.apply(tape, o, f, x, previous, w_i, w_fx_i, slots_i)
            f = reader(own)
            previous = slice(previous.stop, previous.stop + len(own))
        return f


# -------------------------------------------------------------------------------------------------- soft actor-critic
def side_by_side(*functions) -> list:
    """The results of independent functions: one after the other, or on parallel streams within a CUDA graph."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [function() for function in functions]
    stream = torch.cuda.current_stream()
    branches = [torch.cuda.Stream() for _ in functions]
    results = []
    for branch, function in zip(branches, functions):
        branch.wait_stream(stream)
        with torch.cuda.stream(branch):  # its backward pass will run there, too
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


NETWORK = ["num_modules", "top_k", "module_width", "encoder_widths", "router_widths", "routing"]
NETWORK += ["parallel_modules", "resrouting"]  # options of Args and of D2RNetwork


class Agent(nn.Module):
    """Actor, critics, target critics, log alpha and their optimizer. args: Args, or any object with its attributes."""

    def __init__(self, obs_dim: int, action_dim: int, num_tasks: int, args, device="cpu"):
        super().__init__()
        options = {name: getattr(args, name) for name in NETWORK}
        self.args = args
        self.actor = D2RNetwork(obs_dim, 2 * action_dim, num_tasks, **options)
        critics = [D2RNetwork(obs_dim + action_dim, 1, num_tasks, **options) for _ in range(2)]
        self.critics = nn.ModuleList(critics)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((num_tasks,), math.log(args.initial_alpha)))
        self.register_buffer("task", torch.arange(num_tasks), persistent=False)
        self.register_buffer("left_out", torch.zeros(num_tasks), persistent=False)  # in updates
        self.target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.to(device)
        groups = [{"params": list(network.parameters())} for network in (self.actor, *critics)]
        groups += [{"params": [self.log_alpha], "lr": args.alpha_learning_rate}]
        on_gpu = self.task.is_cuda
        self.optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True, capturable=on_gpu)

    def task_weights(self) -> Tensor:
        """T softmax(-log alpha), (T,). A mastered task weighs less: its sharp policy makes SAC raise alpha."""
        return len(self.log_alpha) * (-self.log_alpha.detach()).softmax(0)

    def temperature(self) -> Tensor | None:
        """Route balancing: each task's temperature of Sample-K, (T,). None: Top-K.
        It is low for mastered tasks, whose routes settle, and high for the others, which go on exploring routes."""
        if not self.args.sample_k:
            return None
        weights = self.task_weights()
        return weights if self.args.route_balancing else torch.ones_like(weights)

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """obs (E * T, obs_dim) -> actions (E * T, A), routes (E * T, M, K). Deterministic: tanh(mean) and Top-K."""
        task = self.task.repeat(len(obs) // len(self.task))
        temperature = None if deterministic else self.temperature()
        output, routes = self.actor(obs, task, temperature=temperature)
        action = output.chunk(2, dim=-1)[0].tanh() if deterministic else sample_action(output)[0]
        return action, routes

    def q(self, critics, obs, action, task, temperature=None) -> Tensor:
        """The values of both critics, by task: (2, T, n)."""
        inputs = torch.cat([obs, action], dim=-1)
        passes = [lambda critic=critic: critic(inputs, task, temperature=temperature)[0] for critic in critics]
        return torch.stack(side_by_side(*passes)).view(2, len(self.task), -1)

    @torch.no_grad()
    def td_target(self, reward, next_obs, terminated, task) -> Tensor:
        """r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s')), by task: (T, n). Routes: Top-K."""
        # NOTE: the authors mark the time limit as terminal; here a truncation bootstraps.
        next_action, log_prob = sample_action(self.actor(next_obs, task)[0])
        next_q = self.q(self.target_critics, next_obs, next_action, task).amin(0)
        next_value = next_q - self.log_alpha.exp()[:, None] * log_prob.view_as(next_q)
        future = self.args.gamma * ~terminated * next_value.flatten()
        return (self.args.reward_scale * reward + future).view_as(next_q)

    def critic_loss(self, obs, action, reward, next_obs, terminated, task) -> Tensor:
        """sum_c (Q_c(s, a) - target)^2, mean of each task, (T,). Routes: Sample-K, from the critics' own logits."""
        target, q = side_by_side(
            lambda: self.td_target(reward, next_obs, terminated, task),
            lambda: self.q(self.critics, obs, action, task, self.temperature()),
        )
        return ((q - target) ** 2).mean(-1).sum(0)

    def actor_loss(self, obs, routes, task) -> tuple[Tensor, Tensor]:
        """alpha log pi(a|s) - min_c Q_c(s, a), mean of each task, (T,), and log pi(a|s), (T, n). Routes: the actor's
        are replayed, weighted by today's logits; the critics' are Top-K."""
        action, log_prob = sample_action(self.actor(obs, task, routes=routes)[0])
        trained = [p for p in self.critics.parameters() if p.requires_grad]
        for p in trained:  # the actor's loss does not train the critics
            p.requires_grad_(False)
        # NOTE: ResRouting also applies here, to the gradient of the action, as in the authors' code.
        q = self.q(self.critics, obs, action, task).amin(0)
        for p in trained:
            p.requires_grad_(True)
        log_prob = log_prob.view_as(q)
        alpha = self.log_alpha.detach().exp()[:, None]
        return (alpha * log_prob - q).mean(-1), log_prob

    def update(self, obs, action, reward, next_obs, terminated, routes) -> dict[str, Tensor]:
        """One step on all losses. Arguments (T * n, ...), task by task. Returns the tasks' losses, (T,) each."""
        task = self.task.repeat_interleave(len(obs) // len(self.task))  # (B,)
        critic_loss, (actor_loss, log_prob) = side_by_side(
            lambda: self.critic_loss(obs, action, reward, next_obs, terminated, task),
            lambda: self.actor_loss(obs, routes, task),
        )
        weight = self.task_weights()
        losses = {"critic_loss": weight * critic_loss, "actor_loss": weight * actor_loss}
        losses["alpha_loss"] = -self.log_alpha * (log_prob.detach() + self.target_entropy).mean(-1)
        # NOTE: only in the authors' code, as in PaCo: a task whose loss exceeds the limit is left out.
        total = sum(losses.values())
        left_out = total > self.args.max_task_loss
        self.left_out += left_out
        loss = torch.where(left_out, 0.0, total).mean()
        # One backward pass serves all three: no two of them have a parameter in common.
        self.optimizer.zero_grad()
        loss.backward()
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # torchrun
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            flat = nn.utils.parameters_to_vector(gradients)
            torch.distributed.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / torch.distributed.get_world_size(), gradients)
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log_alpha.clamp_(max=0)  # NOTE: only in the authors' code.
            critics = list(self.critics.parameters())
            torch._foreach_lerp_(list(self.target_critics.parameters()), critics, self.args.tau)
        return {name: loss.detach() for name, loss in losses.items()}


# ======================================================================================================================
# ------------------------------------------------------------------------------------------------------- replay buffer
class ReplayBuffer:
    """A ring of transitions in preallocated tensors. Row r is of task r % T; a step has E T rows."""

    def __init__(self, capacity, tasks, obs_dim, action_dim, M, K, device):
        self.tasks = tasks
        self.added = 0  # rows; where the ring is full, each replaces the oldest
        self.widths = obs_dim, action_dim, 1, obs_dim, 1  # of what add takes
        self.transitions = torch.empty(capacity, sum(self.widths), device=device)
        self.routes = torch.empty(capacity, M, K, dtype=torch.uint8, device=device)  # M <= 256

    def add(self, obs, action, reward, next_obs, terminated, routes) -> None:
        """Store a step of E T environments, (E * T, ...) each. next_obs: where an episode ended, its last one. Raises
        FloatingPointError if an environment's part is not finite."""
        step = torch.as_tensor(np.column_stack([obs, action, reward, next_obs, terminated])).float()
        for i, column in (~step.isfinite()).nonzero()[:1]:
            what = "reward" if column == sum(self.widths[:2]) else "observation"
            raise FloatingPointError(f"the {what} of {self.tasks[i % len(self.tasks)]} is not finite")
        start = self.added % len(self.routes)
        rows = slice(start, start + len(step))
        self.transitions[rows].copy_(step, non_blocking=True)
        self.routes[rows] = routes
        self.added += len(step)

    def sample(self, n: int) -> tuple[Tensor, ...]:
        """n transitions of each task, uniformly with replacement: as given to add, (T * n, ...), task by task."""
        T = len(self.tasks)
        stored = min(self.added, len(self.routes)) // T  # of each task
        steps = torch.randint(stored, (T, n), device=self.routes.device)
        rows = (steps * T + torch.arange(T, device=steps.device)[:, None]).flatten()
        obs, action, reward, next_obs, terminated = self.transitions[rows].split(self.widths, dim=1)
        return obs, action, reward[:, 0], next_obs, terminated[:, 0] > 0, self.routes[rows]


# -------------------------------------------------------------------------------------------------------- environments
# Environment steps of a run, and transitions of replay, for each task. Tasks that you name have those of MT10.
BUDGETS = {"MT10": (1_500_000, 100_000), "MT25": (1_500_000, 100_000), "MT50": (1_000_000, 200_000)}


def task_names(env_id: str) -> list[str]:
    """The tasks of --env-id, in the order of their indices."""
    if env_id in BUDGETS:
        return list(getattr(metaworld.env_dict, f"{env_id}_V3"))
    tasks = env_id.split(",")
    known = metaworld.env_dict.ALL_V3_ENVIRONMENTS
    for task in tasks:
        near = ", ".join(get_close_matches(task, [*BUDGETS, *known], cutoff=0))
        valid = task in known and tasks.count(task) == 1
        check(valid, f"--env-id: {task!r} is unknown, or named twice; the nearest: {near}")
    return tasks


def make_env(task: str, args: Args, seed: int) -> gym.Env:
    """The environment of a task. args.seed chooses its goals, seed which of them an episode gets."""
    env = metaworld.make_mt_envs(task, seed=args.seed, max_episode_steps=args.episode_length)
    env.unwrapped.seed(seed)  # Meta-World's reset ignores its seed
    if args.goals == "fixed":
        env.set_wrapper_attr("tasks", env.get_wrapper_attr("tasks")[:1])
    return env


class EpisodeSummary(gym.Wrapper):
    """info["summary"]: an episode's success at any step so far, nan where none is reported, and its return."""

    def reset(self, **options):
        self.summary = np.array([np.nan, 0.0])
        return self.env.reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        success = np.fmax(self.summary[0], info.get("success", np.nan))
        self.summary = np.array([success, self.summary[1] + reward])
        return obs, reward, terminated, truncated, {**info, "summary": self.summary}


@contextmanager
def make_envs(tasks: list[str], args: Args, seed: int):
    """AsyncVectorEnv of E T environments with actions in [-1, 1]. Raises ChildProcessError if one of them dies."""
    names = tasks * args.envs_per_task

    def make(i):  # each environment of a task draws its own goals
        if sys.platform == "linux" and multiprocessing.parent_process():  # in a worker
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with the learner
        env = make_env(names[i], args, seed + i // len(tasks))
        vectors = len(env.observation_space.shape) == len(env.action_space.shape) == 1
        if not (vectors and env.action_space.is_bounded()):
            raise ValueError(f"{names[i]}: observations and actions must be vectors, and actions bounded")
        return EpisodeSummary(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))

    envs = None
    try:
        workers = [partial(make, i) for i in range(len(names))]
        envs = gym.vector.AsyncVectorEnv(workers, autoreset_mode="SameStep")
        yield envs
    except Exception as error:
        check(envs, f"the environments cannot be made: {error!r}")
        time.sleep(1)  # the operating system knows a little later who died
        dead = [name for name, process in zip(names, envs.processes) if not process.is_alive()]
        if not dead or not isinstance(error, (EOFError, ConnectionError)):
            raise
        raise ChildProcessError(f"the process of {', '.join(dead)} died") from error
    finally:  # the workers ignore SIGTERM, and have nothing to clean up
        processes = envs.processes if envs else multiprocessing.active_children()
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if envs:
            envs.closed = True


# ----------------------------------------------------------------------------------------------- acting and evaluation
class CUDAGraph:
    """Runs a function of tensors of constant shapes; on CUDA, after three calls, as a graph with fixed outputs."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *inputs: Tensor):
        if not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.calls == 0:
            self.inputs = [tensor.clone() for tensor in inputs]
        torch._foreach_copy_(self.inputs, inputs)
        self.calls += 1
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


def finite(action: Tensor, obs: np.ndarray, tasks: list[str]) -> np.ndarray:
    """The action as environments take it. Raises FloatingPointError for nan: MuJoCo would warn endlessly."""
    if not action.isfinite().all():
        bad = np.flatnonzero(~torch.as_tensor(obs).float().isfinite().all(1))
        what = f"observation of {tasks[bad[0] % len(tasks)]}" if len(bad) else "policy's action"
        raise FloatingPointError(f"the {what} is not finite")
    return action.numpy()


def evaluate(agent: Agent, envs, tasks: list[str], episodes: int, stop: list) -> dict[str, np.ndarray]:
    """Run `episodes` episodes of each task, deterministically. Prints and returns, (T,) each: success, return, and
    modules used, a mean over all steps. Returns {} once a signal is in `stop`."""
    act = CUDAGraph(partial(agent.act, deterministic=True))
    T = len(tasks)
    obs, _ = envs.reset()
    E = len(obs) // T
    left = (episodes + E - 1 - np.arange(E * T) // T) // E  # of each environment, so that lengths do not count
    ended = [[] for _ in tasks]
    used = []
    while left.any():
        if stop:
            return {}
        say(f"evaluating: {sum(map(len, ended))} of {episodes * T} episodes", passing=True)
        action, routes = act(torch.as_tensor(obs, dtype=torch.float32).to(agent.task.device))
        used.append(used_modules(routes).sum(-1).cpu().numpy())
        obs, _, terminated, truncated, infos = envs.step(finite(action.cpu(), obs, tasks))
        for i in np.flatnonzero((terminated | truncated) & (left > 0)):
            left[i] -= 1
            ended[i % T].append(infos["final_info"]["summary"][i])
    success, total = np.mean(ended, axis=1).T  # of (T, episodes, 2)
    modules = np.reshape(used, (-1, T)).mean(0)
    for t, task in enumerate(tasks):
        say(f"{task}: success {success[t]:.2f}, return {total[t]:.1f}, modules used {modules[t]:.1f}")
    say(f"mean success {success.mean():.2f} of {episodes} episodes, modules used {modules.mean():.1f}")
    return {"success": success, "return": total, "modules_used": modules}


# ------------------------------------------------------------------------------------------------- log and checkpoints
# How far a run is: steps are summed over tasks, environments and ranks; evaluated_at: step of the last evaluation.
PROGRESS = {"global_step": 0, "updates": 0, "evaluated_at": 0, "seconds": 0.0}
METRICS = ["success", "return", "modules_used", "train_success", "train_return"]
METRICS += ["critic_loss", "actor_loss", "alpha_loss", "alpha", "temperature", "left_out"]


def write_file(path: Path, write) -> None:
    """Replace a file once it is written: a kill or a full disk leaves the last whole one. Raises OSError."""
    new = path.with_name(path.name + ".partial")
    try:
        write(new)
        new.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch has the latter for a full disk
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


class RunLog:
    """A run's directory, with args.json, progress.csv and TensorBoard events. Raises OSError."""

    def __init__(self, args: Args, tasks: list[str], run: SimpleNamespace, saved: dict | None):
        self.tasks = tasks
        self.args = args
        self.last = copy.copy(run)  # as of the row before
        self.warn = cache(say)  # each line once
        name = f"{args.env_id[:99]}-{args.goals}-seed{args.seed}-{int(time.time())}-{os.getpid()}"
        self.run_dir = Path(args.resume).parent if args.resume else Path(args.results_dir, args.run_name or name)
        self.path = self.run_dir / "progress.csv"
        vacant = args.resume or not (self.run_dir / "args.json").exists()
        check(vacant, f"--run-name: {self.run_dir} holds a run; choose another, or --resume")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.run_dir / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
        except BlockingIOError:
            check(False, f"another process uses {self.run_dir}")
        up_to_date = saved is None or saved["written"] == os.stat(args.resume).st_mtime
        check(up_to_date, f"another process has gone on with {self.run_dir} meanwhile; try again")
        versions = {name: version(name) for name in ("torch", "numpy", "metaworld", "mujoco", "gymnasium", "tyro")}
        facts = {"args": asdict(args), "tasks": tasks, "commit": ""}
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError):  # no git
            described = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
            facts["commit"] = described.stdout.strip()
        self.facts = json.dumps(facts | {"python": sys.version, "versions": versions}, indent=2)
        columns = [*vars(run), "steps_per_second", *METRICS]
        columns += [f"{name}/{task}" for name in METRICS for task in tasks]
        self.text = saved["log"] if saved else ",".join(columns) + "\n"  # as at the checkpoint
        write_file(self.path, lambda path: path.write_text(self.text))
        if args.track:
            import wandb

            wandb.init(name=self.run_dir.name, config=asdict(args), sync_tensorboard=True)
        self.tensorboard = None
        if args.tensorboard:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.run_dir, purge_step=run.global_step + 1)
                rows = "\n".join(f"|{option}|{value}|" for option, value in asdict(args).items())
                self.tensorboard.add_text("hyperparameters", "|option|value|\n|-|-|\n" + rows)
        say(f"{args.env_id}: step {run.global_step:,} of {args.total_steps:,}, in {self.run_dir}")

    def write(self, run: SimpleNamespace, metrics: dict) -> None:
        """A row of progress.csv, with each metric's values, (T,), and their mean; a line on the terminal."""
        speed = (run.global_step - self.last.global_step) / (run.seconds - self.last.seconds)
        record = vars(run) | {"steps_per_second": speed}
        for name, values in metrics.items():
            values = torch.as_tensor(values).expand(len(self.tasks)).tolist()
            record[name] = float(np.mean(values))
            record |= {f"{name}/{task}": value for task, value in zip(self.tasks, values)}
        header, *rows = self.text.splitlines()
        columns = list(dict.fromkeys(header.split(",")) | record)  # also of a loss that you add
        rows.append(",".join(f"{record[name]:.9g}" if name in record else "" for name in columns))
        self.text = "\n".join([",".join(columns), *rows, ""])
        write_file(self.path, lambda path: path.write_text(self.text))
        if self.tensorboard:
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, run.global_step)
        line = f"step {run.global_step:,}, {speed:,.1f} steps/s"
        if self.last.global_step >= self.args.learning_starts:  # only updates take long
            steps_left = max(self.args.total_steps - run.global_step, 0)
            line += f", {timedelta(seconds=round(steps_left / speed))} left"
        for name in ("train_success", "train_return"):
            line += f", {name} {record.get(name, math.nan):.2f}"
        say(line)
        for task in self.tasks:
            if record["left_out/" + task] == 1:
                self.warn(f"{task} is left out of all updates: its losses exceed --max-task-loss; see --reward-scale")
        self.last = copy.copy(run)


def save_run(log: RunLog | None, agent: Agent, replay: ReplayBuffer, run: SimpleNamespace) -> None:
    """All ranks call it; rank 0 writes checkpoint.pt, to go on from, and actor.pt, to evaluate."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise FloatingPointError("the weights are not finite")
    rings = replay.transitions, replay.routes
    rings = [ring[: replay.added].to("cpu", copy=True) for ring in rings]
    rings_of_ranks = [rings] * RANKS
    if RANKS > 1:
        torch.distributed.gather_object(rings, rings_of_ranks if log else None)
    if log:
        args = asdict(agent.args)
        weights = {name: value.cpu() for name, value in agent.actor.state_dict().items()}
        checkpoint = {"args": args, "progress": vars(run), "log": log.text, "agent": agent.state_dict()}
        checkpoint |= {"optimizer": agent.optimizer.state_dict()["state"], "rings": rings_of_ranks}
        write_file(log.run_dir / "checkpoint.pt", partial(torch.save, checkpoint))
        write_file(log.run_dir / "actor.pt", partial(torch.save, {"args": args, "actor": weights}))
        write_file(log.run_dir / "args.json", lambda path: path.write_text(log.facts))


def load_run(agent: Agent, replay: ReplayBuffer, run: SimpleNamespace) -> None:
    """Put the checkpoint into a fresh agent and replay. The learning rates stay those of the arguments."""
    saved = torch.load(agent.args.resume, map_location="cpu", weights_only=True, mmap=True)
    check(saved["progress"] == vars(run), f"another process has gone on with {agent.args.resume} meanwhile; try again")
    agent.load_state_dict(saved["agent"])
    state = copy.deepcopy(saved["optimizer"])  # the optimizer keeps what it is given
    agent.optimizer.load_state_dict(agent.optimizer.state_dict() | {"state": state})
    transitions, routes = saved["rings"][RANK]
    replay.added = saved["progress"]["global_step"] // RANKS
    replay.transitions[: len(routes)] = transitions
    replay.routes[: len(routes)] = routes


# ------------------------------------------------------------------------------------------------------- training loop
def make_agent(args: Args, envs, T: int) -> Agent:
    """The agent, on the device that args name. Joins torchrun's ranks."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_float32_matmul_precision("highest" if args.torch_deterministic else "high")
    if RANKS > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # Other ranks wait while rank 0 evaluates.
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    (obs_dim,) = envs.single_observation_space.shape
    (action_dim,) = envs.single_action_space.shape
    agent = Agent(obs_dim, action_dim, T, args, "cuda" if cuda else "cpu")
    if args.compile and cuda:  # on a CPU it gains nothing
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    size = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    say(f"{T} tasks, {size:,} parameters, on {agent.task.device} with {torch.get_num_threads()} threads")
    return agent


def train(args: Args, tasks: list[str], saved: dict | None, stop: list) -> None:
    """Train until --total-steps or a signal in `stop`; with --evaluate only evaluate. Raises what main catches."""
    run = SimpleNamespace(**(saved["progress"] if args.resume else PROGRESS))
    log = RunLog(args, tasks, run, saved) if RANK == 0 and not args.evaluate else None
    seed = args.seed + 10_000 * RANK + run.global_step  # after a resume other goals and noise
    with make_envs(tasks, args, seed) as envs:
        agent = make_agent(args, envs, len(tasks))  # only now: the workers hold nothing of CUDA
        device = agent.task.device
        obs, _ = envs.reset(seed=seed)
        if args.evaluate:
            agent.actor.load_state_dict(saved["actor"])
            evaluate(agent, envs, tasks, args.eval_episodes, stop)
            return
        N = len(obs)
        sizes = obs.shape[1], envs.action_space.shape[1], args.num_modules, agent.actor.K
        replay = ReplayBuffer(args.buffer_size // (N * RANKS) * N, tasks, *sizes, device)
        if args.resume:
            load_run(agent, replay, run)
        act = CUDAGraph(agent.act)
        update = CUDAGraph(agent.update)
        torch.manual_seed(seed + 1)
        n = args.batch_size // (len(tasks) * RANKS)
        losses = {}
        ended = [[] for _ in tasks]  # success and return of the episodes that ended
        saved_at = -math.inf  # the first step is saved, too, so that a run can always be resumed
        finished = run.evaluated_at >= args.total_steps
        while not finished:
            started = time.monotonic()
            action, routes = act(torch.as_tensor(obs, dtype=torch.float32).to(device, non_blocking=True))
            action = action.to("cpu", non_blocking=True)
            learning = run.global_step >= args.learning_starts
            if device.type == "cuda":  # queue the update behind acting, then wait for the action
                acted = torch.cuda.current_stream().record_event()
                losses = update(*replay.sample(n)) if learning else losses
                acted.synchronize()
            envs.step_async(finite(action, obs, tasks))
            if device.type == "cpu" and learning:  # while the workers step
                losses = update(*replay.sample(n))
            next_obs, reward, terminated, truncated, infos = envs.step_wait()
            last_obs = next_obs.copy()
            for i in np.flatnonzero(terminated | truncated):  # next_obs is the next episode's
                last_obs[i] = infos["final_obs"][i]
                ended[i % len(tasks)].append(infos["final_info"]["summary"][i])
            replay.add(obs, action, reward, last_obs, terminated, routes)
            obs = next_obs
            run.global_step += N * RANKS
            run.updates += learning
            run.seconds += time.monotonic() - started
            say(f"step {run.global_step:,}, {run.updates:,} updates (from {args.learning_starts:,} on)", passing=True)
            due = run.global_step // args.eval_every > run.evaluated_at // args.eval_every
            due |= run.global_step >= args.total_steps
            if log and (due or run.global_step % args.log_every < N * RANKS):
                metrics = losses | {"alpha": agent.log_alpha.detach().exp()}
                metrics |= {"temperature": agent.temperature()} if args.sample_k else {}
                metrics["left_out"] = agent.left_out / max(run.updates - log.last.updates, 1)
                agent.left_out.zero_()
                if all(ended):
                    means = np.array([np.mean(summaries, axis=0) for summaries in ended])
                    metrics |= {"train_success": means[:, 0], "train_return": means[:, 1]}
                    ended = [[] for _ in tasks]
                if due:
                    metrics |= (results := evaluate(agent, envs, tasks, args.eval_episodes, stop))
                    run.evaluated_at = run.global_step if results else run.evaluated_at
                    obs, _ = envs.reset()  # the evaluation left episodes of its own
                log.write(run, metrics)
            # All ranks save, and stop, after the same step.
            finished = len(stop) > 0 or run.evaluated_at >= args.total_steps
            save_due = finished or time.monotonic() - saved_at > 60 * args.checkpoint_minutes
            flags = torch.tensor([finished, save_due], dtype=torch.int)
            if RANKS > 1:
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            finished, save_due = flags.tolist()
            if save_due:
                save_run(log, agent, replay, run)
                saved_at = time.monotonic()
    if log and run.evaluated_at < args.total_steps:
        say(f"ended at step {run.global_step:,} of {args.total_steps:,}; to go on: --resume {log.run_dir}")


# --------------------------------------------------------------------------------------------------- the command line
# Limits of numbers, where positive is not enough; and the options that a resume must not change, beside the policy's.
LIMITS = {"gamma": (0, 1), "tau": (0, 1), "initial_alpha": (1e-9, 1), "target_entropy": (-1e9, 1e9)}
LIMITS |= {"episode_length": (1, 500), "envs_per_task": (1, 1000), "num_modules": (1, 256), "seed": (0, 2**31)}
RUN = ["goals", "episode_length", "envs_per_task", "seed", "buffer_size", "results_dir", "run_name"]


def load(args: Args, argv: list[str] | None) -> tuple[Args, dict]:
    """What --resume or --evaluate names, by its file or directory, and its arguments, which argv may override."""
    part = "actor" if args.evaluate else "rings"
    path = Path(args.evaluate or args.resume)
    if path.is_dir():
        path = path / ("actor.pt" if args.evaluate else "checkpoint.pt")
    check(path.is_file(), f"there is no {path}: a wrong path, or a run that had not begun or was kept without it")
    written = path.stat().st_mtime
    try:
        damaged = zipfile.ZipFile(path).testzip()
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if damaged or part not in saved:
            raise ValueError(damaged or f"it holds no {part}")
    except Exception as error:  # noqa: BLE001 (a damaged file fails in many ways)
        check(False, f"{path} is damaged or of another version: {error}")
    check(args.evaluate or len(saved[part]) == RANKS, f"--resume: start as many ranks as before, {len(saved[part])}")
    old = Args()
    vars(old).update(saved["args"], resume=None, evaluate=None)  # of any version
    if args.evaluate:  # without what only training needs
        vars(old).update(envs_per_task=1, eval_every=None, track=False, device="auto")
    args = tyro.cli(Args, args=argv, default=old)
    for name in ["env_id", *NETWORK] + (RUN if args.resume else []):
        was = getattr(old, name)
        check(getattr(args, name) == was, f"{path} was made with {name} {was}; do not change it")
    args.resume = args.resume and str(path)
    small = {name: saved[name] for name in ("actor", "progress", "log") if name in saved}
    return args, small | {"written": written}  # workers would keep the rest of the file mapped


def parse_arguments(argv: list[str] | None) -> tuple[Args, list[str], dict | None]:
    """The arguments, with every budget filled in; the tasks; what --resume or --evaluate names."""
    args = tyro.cli(Args, args=argv)
    saved = None
    check(0 <= RANK < RANKS and (RANKS == 1 or "MASTER_ADDR" in os.environ), "RANK, WORLD_SIZE: set them by torchrun")
    check("" not in (args.evaluate, args.resume), "--evaluate, --resume: the path is empty")
    check(not (args.evaluate and args.resume), "--evaluate or --resume, not both")
    check(not args.evaluate or RANKS == 1, "--evaluate: start it without torchrun")
    if args.evaluate or args.resume:
        args, saved = load(args, argv)
    tasks = task_names(args.env_id)
    T = len(tasks)
    steps, transitions = BUDGETS.get(args.env_id, BUDGETS["MT10"])
    budgets = {"total_steps": steps, "buffer_size": transitions, "batch_size": 128, "learning_starts": 4000}
    for name, per_task in budgets.items():
        if getattr(args, name) is None:
            setattr(args, name, per_task * T)
    one_episode = args.episode_length * args.envs_per_task * T * RANKS  # of every environment
    if args.eval_every is None:
        args.eval_every = max(args.total_steps // 100, args.eval_episodes * args.episode_length * T, one_episode)
    limits = LIMITS | {"top_k": (0, args.num_modules)}
    for name, value in asdict(args).items():
        low, high = limits.get(name, (1e-18, 1e18))
        wanted = f"lie between {low} and {high}" if name in limits else "be positive and finite"
        for number in value if isinstance(value, tuple) else (value,):
            valid = type(number) not in (int, float) or low <= number <= high
            check(valid, f"--{name.replace('_', '-')} is {number}; it must {wanted}")
    P = args.parallel_modules
    least = max(args.batch_size, args.envs_per_task * T * RANKS)
    check(args.eval_every >= one_episode, f"--eval-every must be at least {one_episode}: an episode of all")
    trackable = args.tensorboard and find_spec("tensorboard") and find_spec("wandb")
    check(trackable or not args.track, "--track needs TensorBoard, and pip install wandb")
    check(args.encoder_widths, "--encoder-widths needs at least one width")
    check(args.routing != "module" or P == Args.parallel_modules, "--parallel-modules is for --routing layer, model")
    check(args.routing == "module" or args.num_modules % P == 0, f"--num-modules must be a multiple of {P}")
    check(args.batch_size % (T * RANKS) == 0, f"--batch-size must be a multiple of {T * RANKS}: tasks times ranks")
    check(args.buffer_size >= least, f"--buffer-size must be at least {least}: a batch, and a step of all")
    check(args.device != "cuda" or torch.cuda.is_available(), "--device: PyTorch finds no cuda here")
    return args, tasks, saved


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit codes: 2 for a mistake in what was asked for, 1 for a failed run, 130 if interrupted."""
    stop = []  # when signals came; not an Event, since handlers may nest

    def handle(*_):  # workers inherit it, and go on
        stop.append(time.monotonic())
        if stop[-1] > stop[0] + 10:  # the run hangs
            stop.clear()  # further signals do not disturb the end
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup
            signal.signal(number, handle)
    try:
        args, tasks, saved = parse_arguments(argv)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.manual_seed(args.seed)
        train(args, tasks, saved, stop)
        if args.evaluate and stop:
            raise KeyboardInterrupt
    except (FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
