# SPDX-License-Identifier: MIT
"""Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World, in one file.

    python d2r_sac.py --env-id MT10

One policy for many tasks: for every state and task a routing network picks which of M base modules to use and how to
wire them, so that easy tasks can take few modules and hard ones many. Paper: He et al., "Not All Tasks Are Equally
Difficult: Multi-Task Deep Reinforcement Learning with Dynamic Depth Routing", AAAI 2024, arXiv:2312.14472.

    concept              formula                                                            here
    route                the K sources of each module, and of the head, for one sample      D2RNetwork
    routing network      z = router(h * e), h = encoder(state), e = encoder(task)           RoutingNetwork
    Top-K                the K sources with the largest logits z_ij of module i             top_k
    Sample-K             K draws without replacement from softmax_j(z_ij / temperature)     sample_k
    routing weights      w_ij = softmax of z_ij over the chosen sources j                   routing_weights
    depth                number of modules (not length of path) that lead to the head       used_modules
    routing granularity  the sources that a module may choose from                          allowed_sources
    base modules         f_i = relu(W_i x_i + b_i), o_i = f_i + x_i                         BaseModule, D2RNetwork
    wiring               x_i = sum_j w_ij o_j                                               MixSources
    ResRouting           if edge (i, j) is unlikely, i reads stop_gradient(f_j) + x_j       gradient_kept, MixSources
    soft actor-critic    losses and entropy coefficient alpha of each task                  Agent.update
    replayed routes      the actor's loss takes the routes with which its sample was chosen Agent.actor_loss
    task weights         T softmax(-log alpha), proportional to 1 / alpha; scale losses     Agent.task_weights
    route balancing      a task's temperature is its weight                                 Agent.temperature

    T  tasks
    E  environments of each task; of all E T, environment i runs task i % T
    B  samples in a batch; in an update task by task: B / T of task 0, then of task 1, and so on
    M  base modules, numbered 0 ... M-1; the head counts as module M
    K  sources of a module; edge (i, j) makes module j a source of module i
    H  width of a module

Logits (B, M, M) and routes (B, M, K) have a row for each of the modules 1 ... M: row r belongs to module r + 1.
Forbidden edges have logit -inf. `# NOTE:` marks where the paper, the authors' code and this file differ, or where the
code settles what the paper leaves open.
"""

import copy
import csv
import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
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

# torchrun starts several processes, the ranks. Each steps its own copies of the tasks; they average their gradients.
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) if RANKS > 1 else 0


@dataclass
class Args:
    """Dynamic Depth Routing (D2R) with multi-task SAC. The defaults are the paper's."""

    env_id: str = "MT10"  # MT10, MT25, MT50, or Meta-World V3 tasks (reach-v3,drawer-close-v3)
    goals: Literal["random", "fixed"] = "random"  # one of the task's 50 each episode, or always one
    episode_length: int = 200  # time limit of an episode, at most 500 steps
    envs_per_task: int = 1  # environments of each task (E); raise batch_size with it, E-fold
    # Budgets are summed over tasks, environments and ranks.
    total_steps: int | None = None  # environment steps; None: 1_500_000 per task (MT50: 1_000_000)
    buffer_size: int | None = None  # transitions kept; None: 100_000 per task (MT50: 200_000)
    batch_size: int | None = None  # samples of an update, equally from all tasks; None: 128 each
    learning_starts: int | None = None  # steps before updates; None: 4,000 per task, at most a tenth of the run
    eval_every: int | None = None  # steps between evaluations; None: a 100th of the run, or more
    eval_episodes: int = 32  # episodes of each task in an evaluation
    # Networks and routing
    num_modules: int = 16  # base modules of a network (M)
    top_k: int = 2  # sources of a module (K); 0: all that it may choose (soft routing)
    routing: Literal["module", "layer", "model"] = "module"  # granularity: which modules one may read (README)
    parallel_modules: int = 4  # modules in a layer, or number of chains (P), for layer and model
    module_width: int = 128  # width of a base module (H)
    encoder_widths: tuple[int, ...] = (400, 400)  # layers of the state encoder; the last is also the task encoder's
    router_widths: tuple[int, ...] = (256, 256)  # hidden layers of the router
    resrouting: bool = True  # ResRouting; without it gradients reach all chosen modules
    route_balancing: bool = True  # a temperature for each task; without it all have temperature 1
    sample_k: bool = True  # sample routes in acting and the critics' regression; else Top-K
    # Soft actor-critic
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics' Polyak averaging
    learning_rate: float = 3e-4  # learning rate of the actor and the critics
    alpha_learning_rate: float = 1e-4  # learning rate of each task's log alpha
    initial_alpha: float = 1.0  # entropy coefficient of every task at the start, at most 1
    target_entropy: float | None = None  # in nats; None: minus the size of an action
    reward_scale: float = 0.1  # factor on the environments' rewards
    max_task_loss: float = 3e3  # an update skips tasks whose losses, as logged, sum to more
    max_grad_norm: float = 1.0  # limit of gradients: of the actor, each critic, and log alpha
    # The run
    seed: int = 1  # seed of the networks, the sampling and the goals
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU, if any
    compile: bool = False  # torch.compile the networks; ignored on a CPU
    results_dir: str = "results"  # directory of the run directories
    run_name: str | None = None  # name of the run's directory; None: such as MT10-random-seed1
    resume: str | None = None  # a run's directory: continue it; options given override its own
    evaluate: str | None = None  # a run's directory, or an actor.pt: only evaluate its policy
    log_every: int = 10_000  # steps between rows of progress.csv; one more after 100 updates
    checkpoint_minutes: float = 10.0  # minutes between checkpoints; one is written at the end, too
    track: bool = False  # send TensorBoard's data to Weights & Biases (pip install wandb)

    def __post_init__(self):
        """Fill in what depends on the tasks. ValueError, which tyro prints: a mistake that would show late."""
        self.tasks = task_names(self.env_id)
        T = len(self.tasks)
        if self.total_steps is None:
            self.total_steps = (1_000_000 if self.env_id == "MT50" else 1_500_000) * T
        label = f"{T}-tasks" if "," in self.env_id else self.env_id
        label += f"-{self.goals}-seed{self.seed}"
        names = [label, *(f"{label}-{n}" for n in range(2, 10_000))]
        defaults = {
            "buffer_size": (200_000 if self.env_id == "MT50" else 100_000) * T,
            "batch_size": 128 * T,
            "learning_starts": min(4_000 * T, self.total_steps // 10),
            "eval_every": max(self.total_steps // 100, self.eval_episodes * self.episode_length * T),
            "run_name": next(name for name in names if not Path(self.results_dir, name).exists()),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.run_dir = Path(self.results_dir, self.run_name)
        for mistaken, message in self.mistakes():
            if mistaken:
                raise ValueError(message)
        with torch.random.fork_rng(devices=()):
            Agent(1, 1, T, self)  # built only for the errors of the networks and of Adam

    def mistakes(self):
        """What would otherwise show late, or not at all: pairs of a condition and a message."""
        T = len(self.tasks)
        counts = ["envs_per_task", "batch_size", "eval_every", "eval_episodes", "log_every", "num_modules"]
        for name in [*counts, "module_width", "encoder_widths", "router_widths"]:
            option = "--" + name.replace("_", "-")
            smallest = np.min(getattr(self, name), initial=1)  # initial: for an empty tuple
            yield smallest < 1, f"{option} must be at least 1"
        yield not self.encoder_widths, "--encoder-widths needs at least one"
        yield self.device == "cuda" and not torch.cuda.is_available(), "--device: PyTorch finds no GPU"
        yield not 1 <= self.episode_length <= 500, "--episode-length must lie between 1 and 500"
        if self.evaluate:
            return
        stride = self.envs_per_task * T * RANKS  # environment steps per iteration
        last = self.total_steps - stride
        yield self.run_dir.exists() and not self.resume, f"--run-name: {self.run_dir} exists; try --resume"
        yield not 0 < self.initial_alpha <= 1, "--initial-alpha must be positive, and at most 1"
        yield not 1 <= self.learning_starts <= last, f"--learning-starts: between 1 and {last}, a step before the end"
        yield self.batch_size % (T * RANKS), f"--batch-size must be a multiple of {T * RANKS}, tasks times ranks"
        yield self.buffer_size < max(self.batch_size, stride), "--buffer-size must hold a batch, and a step"


# ======================================================================================================================
# The method. To use it elsewhere, copy the code between the double lines. It needs copy, math, itertools.pairwise,
# torch, torch.nn as nn, and torch.nn.functional as F.
# ----------------------------------------------------------------------------------------------------- routing network
def init(layer, head=False):
    # NOTE: as in the authors' code; usual is the root of in_features, the fan-in.
    bound = 3e-3 if head else layer.out_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if head:
        nn.init.uniform_(layer.bias, -bound, bound)
    else:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def mlp(widths):
    """Linear layers of these widths, from the input's to the output's, with ReLU between them."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.ReLU(inplace=True), init(nn.Linear(width_in, width_out))]
    return nn.Sequential(*layers[1:])  # no ReLU before the first


class RoutingNetwork(nn.Module):
    """Embeds state and task, and computes the routing logits from both. allowed: as from allowed_sources."""

    def __init__(self, input_dim, num_tasks, allowed, encoder_widths, router_widths):
        super().__init__()
        self.M = len(allowed)
        self.obs_encoder = mlp((input_dim, *encoder_widths))
        self.task_encoder = init(nn.Linear(num_tasks, encoder_widths[-1]))
        # NOTE: the router's last layer is initialised like its hidden ones, as in the authors' code.
        self.router = mlp((encoder_widths[-1], *router_widths, int(allowed.sum())))
        self.register_buffer("one_hot", torch.eye(num_tasks), persistent=False)
        self.register_buffer("edges", allowed.flatten().nonzero().squeeze(1), persistent=False)

    def forward(self, inputs, task):
        """inputs (B, input_dim), task (B,) indices -> h (B, encoder_widths[-1]), logits (B, M, M).
        The embeddings have no activation, so that h * e keeps the signs of both; module 0 will read relu(h)."""
        h = self.obs_encoder(inputs)
        e = self.task_encoder(self.one_hot[task])
        z = self.router(h * e)  # (B, number of allowed edges)
        logits = z.new_full((len(z), self.M * self.M), -torch.inf)
        logits.index_copy_(1, self.edges, z)
        return h, logits.view(-1, self.M, self.M)


def top_k(logits, K):
    """The K largest logits of each row: (B, M, M) -> routes (B, M, K). A row that allows fewer repeats its best."""
    values, routes = logits.topk(K, dim=-1)
    return torch.where(values == -torch.inf, routes[..., :1], routes)


def sample_k(logits, K):
    """K draws without replacement from the softmax of each row: (B, M, M) -> routes (B, M, K).
    Otherwise an untrained router, whose logits differ little but always alike, would never try the other sources."""
    uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)
    gumbel = -(-uniform.log()).log()
    return top_k(logits + gumbel, K)  # Gumbel top-k: Kool et al., ICML 2019


def routing_weights(logits, routes):
    """Softmax of the logits over the chosen sources, repeated ones once: (B, M, M), (B, M, K) -> (B, M, K).
    Sample-K's temperature plays no part here: it changes which sources are tried, not how they are mixed."""
    repeated = [(routes[..., :k] == routes[..., k, None]).any(-1) for k in range(routes.shape[-1])]
    z = logits.gather(-1, routes).masked_fill(torch.stack(repeated, dim=-1), -torch.inf)
    return z.movedim(-1, 0).softmax(0).movedim(0, -1)  # on a CPU a short last dimension is slow


def gradient_kept(logits):
    """ResRouting: true for edges that the current router finds likely, p_ij > 1 / (J_i + 1). (B, M, M) -> (B, M, M).
    p_i is the softmax of module i's logits, at temperature 1, over the J_i sources that it may choose from. The
    threshold is below the uniform 1 / J_i, so an untrained router, which is nearly uniform, keeps most edges."""
    num_sources = (logits[:1] > -torch.inf).sum(-1, keepdim=True, dtype=logits.dtype)  # J_i, for every sample
    return logits.softmax(-1) > 1 / (num_sources + 1)


def used_modules(routes):
    """The modules that the chosen edges connect to the head: (B, M, K) -> (B, M) bool. Their number is the depth."""
    B, M, _ = routes.shape
    chosen = torch.zeros(M, M, B, dtype=torch.bool, device=routes.device)
    chosen.scatter_(1, routes.permute(1, 2, 0).long(), True)
    used = chosen[-1]  # the head's sources
    for i in range(M - 1, 0, -1):
        used = used | (used[i] & chosen[i - 1])  # if module i is used, so are its sources, row i - 1
    return used.T


def allowed_sources(M, routing, P):
    """Routing granularity: (M, M) bool, row r: the sources that module r + 1 may choose from. Raises ValueError.
    module: all earlier ones. layer: all modules of the layer before, in layers of P. model: the module before in one
    of P chains; only the head chooses, among the ends of the chains. With M = 6 and P = 2:

        layer:  0   2   4            model:  0 - 2 - 4            Module 0 reads the state's embedding, and
                | X   X   > head             |         > head     is the source of modules 1 ... P-1.
                1   3   5                    1 - 3 - 5"""
    # NOTE: the paper compares these three; the authors' code has only the first, the others are our reading.
    if routing != "module" and not (1 <= P <= M and M % P == 0):
        raise ValueError(f"num_modules, {M}, must be a multiple of parallel_modules, {P}")
    i = torch.arange(1, M + 1)[:, None]
    j = torch.arange(M)
    if routing == "module":
        return j < i
    previous = (j // P == i // P - 1) if routing == "layer" else (j == i - P)
    previous = torch.where(i == M, j >= M - P, previous)
    return torch.where(i < P, j == 0, previous)


# ------------------------------------------------------------------------------------------------------- base modules
class MixSources(torch.autograd.Function):
    """Wiring and ResRouting. With sums over the chosen sources j of module i, and kept as from gradient_kept:

        x_i    = sum_j w_ij (f_j + x_j)
        read_i = sum_j w_ij (where(kept_ij, f_j, stop_gradient(f_j)) + x_j)
        f_i    = module_i(read_i)

    Both sums have the same value, and w_ij always gets its gradient. Some edges (i, j) on a route are unlikely for the
    current router: the actor's routes are replayed from an older policy, the critics' are sampled at a temperature, and
    Top-K takes K sources even if one has nearly all the probability. Since the router would rarely send such a sample
    from j to i, module j should not be trained by what module i makes of it: the gradient of read_i skips f_j and
    reaches, through x_j, the modules before j. The shortcut, which adds x_i to f_i, is never blocked.

    Plain autograd would compute just these three lines, but copy all outputs at each module. Here they lie in one
    tensor o (S, H) of f_j + x_j, with S slots, one for each computed pair of module and sample. Autograd does not see
    the writes into o, so the gradients are by hand. x_i is used twice: module i reads it (gradient g_i, of read_i), and
    it is added to f_i (gradient s_i, which comes from the readers of module i):

        grad f_j = sum_i w_ij (kept_ij g_i + s_i)      s_j = sum_i w_ij (g_i + s_i)

    The tape (S, 2, H) is a dummy, passed from mixing to mixing. Only its gradient matters: an accumulator, to which each
    reader i adds its terms. [:, 0] collects grad f_j, [:, 1] s_j. The backward pass runs from the head to module 1, so
    all readers of module j have added theirs before its own turn. The accumulator starts as zeros, which autograd
    makes, since nobody reads the last tape. torch.func, vmap and second derivatives do not work through this
    function."""

    @staticmethod
    def forward(ctx, tape, o, f_prev, x_prev, slots_prev, w, w_fx, slots):
        """First stores o = f + x of module i - 1, which has just run, in its slots; then mixes the sources of module i,
        for B_i samples. w, slots (B_i, K); w_fx (B_i, K, 2): the shares of g_i for f_j, w_ij kept_ij, and for x_j, w_ij.
        Returns the tape and the sum (B_i, H) twice: read_i, on which module i may work in place, and x_i."""
        torch.add(f_prev, x_prev, out=o[slots_prev])
        ctx.o = o  # save_for_backward would object to the later writes, which go to other slots
        ctx.slots_prev = slots_prev
        ctx.save_for_backward(w, w_fx, slots)
        if torch.compiler.is_compiling():  # it fuses this, but not embedding_bag
            mixed = (F.embedding(slots, o) * w[..., None]).sum(1)
        else:
            mixed = F.embedding_bag(slots, o, mode="sum", per_sample_weights=w)
        return torch.empty_like(tape), mixed, mixed.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_tape, g, s):
        w, w_fx, slots = ctx.saved_tensors
        picked = F.embedding(slots, ctx.o)  # (B_i, K, H)
        grad_w = (picked * (g + s)[:, None]).sum(-1)
        grad_fx = w_fx[..., None] * g[:, None, None]  # (B_i, K, 2, H)
        grad_fx.addcmul_(w[..., None, None], s[:, None, None])
        # In place: it changes only slots of modules before i, whose gradients nobody has read yet.
        grad_tape.index_add_(0, slots.flatten(), grad_fx.flatten(0, 1))
        grad_f, grad_x = grad_tape[ctx.slots_prev].unbind(1)  # complete: all its readers are done
        return grad_tape, None, grad_f, grad_x, None, grad_w, None, None


class BaseModule(nn.Linear):
    """f = relu(W x + b). Any nn.Module from (., in_features) to (., out_features) can replace it if it treats each
    sample by itself and accepts an empty batch. Module 0 reads relu(h), and must not change it in place; the others
    read H features; all return H."""

    def reset_parameters(self):
        init(self)

    def forward(self, x):
        return super().forward(x).relu_()


class D2RNetwork(nn.Module):
    """A routing network and its base modules: an actor (output: mean and log std), a critic (output: Q), or any other.
    args: any object with num_modules, top_k, module_width, encoder_widths, router_widths, routing, parallel_modules and
    resrouting, as in Args. make_module(width_in, width_out): instead of BaseModule."""

    def __init__(self, input_dim, output_dim, num_tasks, args, make_module=None):
        super().__init__()
        M = args.num_modules
        if not 0 <= args.top_k <= M:
            raise ValueError(f"top_k, {args.top_k}, must lie between 0 and num_modules, {M}")
        self.K = args.top_k or M
        self.resrouting = args.resrouting
        allowed = allowed_sources(M, args.routing, args.parallel_modules)
        self.routing_network = RoutingNetwork(input_dim, num_tasks, allowed, args.encoder_widths, args.router_widths)
        widths = [args.encoder_widths[-1]] + [args.module_width] * M
        modules = nn.ModuleList((make_module or BaseModule)(a, b) for a, b in pairwise(widths))
        head = init(nn.Linear(args.module_width, output_dim), head=True)
        # In a dictionary, since older checkpoints have these names.
        self.base_modules = nn.ModuleDict({"module": modules, "head": head})

    def forward(self, inputs, task, routes=None, temperature=None):
        """inputs (B, input_dim), task (B,) indices -> output (B, output_dim), routes (B, M, K).
        Routes are those given, else Sample-K's if temperature (T,) is given, else Top-K's."""
        h, logits = self.routing_network(inputs, task)
        if routes is None and temperature is None:
            routes = top_k(logits, self.K)
        elif routes is None:
            routes = sample_k(logits / temperature[task, None, None], self.K)
        return self.run_modules(h, logits, routes), routes

    def run_modules(self, h, logits, routes):
        """h (B, encoder_widths[-1]), logits (B, M, M), routes (B, M, K), of allowed edges only -> output.
        A CPU computes a module only for the samples that use it; a GPU for all, since shapes must be static."""
        B, M, _ = routes.shape
        sources = routes.long()
        w = routing_weights(logits, sources)
        w_f = w
        if self.resrouting and torch.is_grad_enabled():
            w_f = w * gradient_kept(logits).gather(-1, sources)
        w_fx = torch.stack([w_f, w], dim=-1).detach()
        # The pairs of a module j and a sample b are numbered j B + b.
        pairs = sources * B + torch.arange(B, device=h.device)[:, None, None]
        if h.is_cpu and not torch.compiler.is_compiling():
            # A slot is the position of a pair among the used ones. Nobody reads the slots of the others.
            used = F.pad(used_modules(routes), (0, 1), value=True).T  # (M + 1, B)
            slots = (used.flatten().cumsum(0) - 1)[pairs]
            computed = used[1:].flatten().nonzero().squeeze(1)  # of the pairs of modules 1 ... M
            counts = used.sum(1).tolist()  # samples of each module, and the head
        else:
            slots = pairs
            computed = slice(None)
            counts = [B] * (M + 1)
        # From (B, M, ...) to a tensor for each of the modules 1 ... M, with a row for each sample that uses it.
        by_module = [t.transpose(0, 1).flatten(0, 1)[computed].split(counts[1:]) for t in (w, w_fx, slots)]
        readers = [*self.base_modules.module[1:], self.base_modules.head]
        f = self.base_modules.module[0](F.relu(h))  # used by all: every path begins there
        x = torch.zeros_like(f)  # o_0 = f_0
        o = f.new_empty(sum(counts[:M]), f.shape[1])
        tape = f.new_empty(sum(counts[:M]), 2, f.shape[1])
        slots_prev = slice(0, B)  # of module i - 1; i is the reader
        for reader, w_i, w_fx_i, slots_i in zip(readers, *by_module, strict=True):
            tape, read, x = MixSources.apply(tape, o, f, x, slots_prev, w_i, w_fx_i, slots_i)
            f = reader(read)
            slots_prev = slice(slots_prev.stop, slots_prev.stop + len(read))
        return f


# -------------------------------------------------------------------------------------------------- soft actor-critic
def side_by_side(*functions):
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
    """Actor, critics, target critics, log alpha and their optimizer. Each network has a routing network of its own.
    args: Args, or any object with what D2RNetwork needs, route_balancing, sample_k, and the options of Args that follow
    under soft actor-critic. make_module: as in D2RNetwork.

    On a GPU, train captures act and update as CUDA graphs. What you add to them must be tensor operations: no .item(),
    no branches on values, no random numbers of Python or NumPy, which would all be frozen at their first value."""

    def __init__(self, obs_dim, action_dim, num_tasks, args, device="cpu", make_module=None):
        super().__init__()
        self.args = args
        self.actor = D2RNetwork(obs_dim, 2 * action_dim, num_tasks, args, make_module)
        critics = [D2RNetwork(obs_dim + action_dim, 1, num_tasks, args, make_module) for _ in range(2)]
        self.critics = nn.ModuleList(critics)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((num_tasks,), math.log(args.initial_alpha)))
        self.register_buffer("tasks", torch.arange(num_tasks), persistent=False)
        self.target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.to(device)
        groups = [{"params": list(network.parameters())} for network in (self.actor, *self.critics)]
        groups += [{"params": [self.log_alpha], "lr": args.alpha_learning_rate}]
        self.optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True, capturable=self.tasks.is_cuda)

    def task_weights(self):
        """T softmax(-log alpha), (T,): proportional to 1 / alpha, with mean 1. They scale the critic and actor losses,
        whether or not routes are balanced. A mastered task weighs less: its policy is nearly deterministic, and an
        entropy below the target keeps its alpha high, while the others' fall."""
        return len(self.log_alpha) * (-self.log_alpha.detach()).softmax(0)

    def temperature(self):
        """Route balancing: each task's temperature of Sample-K, (T,). None: Top-K.
        It is low for mastered tasks, whose routes settle, and high for the others, which keep exploring routes."""
        if not self.args.sample_k:
            return None
        weights = self.task_weights()
        return weights if self.args.route_balancing else torch.ones_like(weights)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """obs (E * T, obs_dim), row i of task i % T -> actions (E * T, A), routes (E * T, M, K). Deterministic:
        tanh(mean) and Top-K."""
        task = torch.arange(len(obs), device=obs.device) % len(self.tasks)
        temperature = None if deterministic else self.temperature()
        output, routes = self.actor(obs, task, temperature=temperature)
        action = output.chunk(2, dim=-1)[0].tanh() if deterministic else sample_action(output)[0]
        return action, routes

    def q(self, critics, obs, action, task, temperature=None):
        """The values of both critics, by task: (2, T, B / T)."""
        inputs = torch.cat([obs, action], dim=-1)
        passes = [lambda critic=critic: critic(inputs, task, temperature=temperature)[0] for critic in critics]
        return torch.stack(side_by_side(*passes)).view(2, len(self.tasks), -1)

    @torch.no_grad()
    def td_target(self, reward, next_obs, terminated, task):
        """r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s')), by task: (T, B / T). Routes: Top-K."""
        # NOTE: the authors mark the time limit as terminal; here a truncation bootstraps.
        next_action, log_prob = sample_action(self.actor(next_obs, task)[0])
        next_q = self.q(self.target_critics, next_obs, next_action, task).amin(0)
        next_value = next_q - self.log_alpha.exp()[:, None] * log_prob.view_as(next_q)
        future = torch.where(terminated.view_as(next_q), 0.0, self.args.gamma * next_value)
        return self.args.reward_scale * reward.view_as(next_q) + future

    def critic_loss(self, obs, action, reward, next_obs, terminated, task):
        """sum_c (Q_c(s, a) - target)^2, mean of each task, (T,). Routes: Sample-K, from the critics' own logits."""
        target, q = side_by_side(
            lambda: self.td_target(reward, next_obs, terminated, task),
            lambda: self.q(self.critics, obs, action, task, self.temperature()),
        )
        return ((q - target) ** 2).mean(-1).sum(0)

    def actor_loss(self, obs, routes, task):
        """alpha log pi(a|s) - min_c Q_c(s, a), mean of each task, (T,), and log pi(a|s), (T, B / T). Routes: the
        actor's are replayed, to train what was explored, weighted by the current logits; the critics' are Top-K."""
        action, log_prob = sample_action(self.actor(obs, task, routes=routes)[0])
        # The gradient passes through the critics, but does not train them. Parameters that you froze stay frozen.
        trained = [p for p in self.critics.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        # NOTE: ResRouting also applies here, to the gradient of the action, as in the authors' code.
        q = self.q(self.critics, obs, action, task).amin(0)
        for p in trained:
            p.requires_grad_(True)
        log_prob = log_prob.view_as(q)
        alpha = self.log_alpha.detach().exp()[:, None]
        return (alpha * log_prob - q).mean(-1), log_prob

    def update(self, obs, action, reward, next_obs, terminated, routes):
        """One step on all losses. Arguments (B, ...), task by task, as from ReplayBuffer.sample: actions in [-1, 1];
        reward, terminated (bool) (B,). Returns the tasks' losses, (T,) each (actor's and critics' weighted), and
        left_out: 1 for a task that this update skipped."""
        task = self.tasks.repeat_interleave(len(obs) // len(self.tasks))  # (B,)
        critic_loss, (actor_loss, log_prob) = side_by_side(
            lambda: self.critic_loss(obs, action, reward, next_obs, terminated, task),
            lambda: self.actor_loss(obs, routes, task),
        )
        weight = self.task_weights()
        losses = {"critic_loss": weight * critic_loss, "actor_loss": weight * actor_loss}
        losses["alpha_loss"] = -self.log_alpha * (log_prob.detach() + self.target_entropy).mean(-1)
        # NOTE: only in the authors' code, as in PaCo (NeurIPS 2022): a task whose loss exceeds the limit is skipped.
        total = sum(losses.values())
        left_out = total > self.args.max_task_loss
        loss = torch.where(left_out, 0.0, total).mean()
        # One backward pass serves the three losses: no two of them train the same parameter. A new parameter of yours
        # belongs in a group of the optimizer.
        self.optimizer.zero_grad()
        loss.backward()
        if torch.distributed.is_initialized():  # torchrun
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
        return {name: value.detach() for name, value in losses.items()} | {"left_out": left_out.float()}


# ======================================================================================================================
# ------------------------------------------------------------------------------------------------------- replay buffer
class ReplayBuffer:
    """A ring of transitions. Row r is of task r % T; a step of all environments has E T rows."""

    def __init__(self, capacity, num_tasks, obs_dim, action_dim, M, K, device):
        self.capacity = capacity  # rows, a multiple of E T
        self.added = 0  # rows; once the ring is full, each replaces the oldest
        with torch.device(device):
            self.tasks = torch.arange(num_tasks)
            self.columns = [
                torch.empty(capacity, obs_dim),
                torch.empty(capacity, action_dim),
                torch.empty(capacity),  # reward
                torch.empty(capacity, obs_dim),  # next observation, of the same episode
                torch.empty(capacity, dtype=torch.bool),  # terminated
                torch.empty(capacity, M, K, dtype=torch.int16),  # routes
            ]

    def add(self, *step):
        """Store a step of all environments, or many in an empty ring: the values of each column, (E * T, ...)."""
        start = self.added % self.capacity
        for column, values in zip(self.columns, step, strict=True):
            column[start : start + len(values)].copy_(torch.as_tensor(values), non_blocking=True)
        self.added += len(values)

    def sample(self, n):
        """n transitions of each task, uniformly with replacement: all columns, (T * n, ...), task by task."""
        T = len(self.tasks)
        stored = min(self.added, self.capacity) // T  # of each task
        steps = torch.randint(stored, (T, n), device=self.tasks.device)
        rows = (steps * T + self.tasks[:, None]).flatten()
        return [column[rows] for column in self.columns]


# ----------------------------------------------------------------------------------------- environments and evaluation
# For environments of your own replace task_names and make_env. All need flat observations of one size, and bounded
# actions of one size.
def task_names(env_id):
    """The tasks of --env-id, in the order of their indices. Raises ValueError for an unknown or duplicate task."""
    if env_id in ("MT10", "MT25", "MT50"):
        return list(getattr(metaworld.env_dict, f"{env_id}_V3"))
    tasks = [task.strip() for task in env_id.split(",")]
    known = metaworld.env_dict.ALL_V3_ENVIRONMENTS
    for task in tasks:
        if task not in known:
            raise ValueError(f"--env-id: {task!r} is none of MT10, MT25, MT50, {', '.join(known)}")
        if tasks.count(task) > 1:
            raise ValueError(f"--env-id: {task!r} is named twice")
    return tasks


def make_env(task, args, seed):
    """The environment of a task. args.seed chooses its goals, seed which of them an episode gets."""
    env = metaworld.make_mt_envs(task, seed=args.seed, max_episode_steps=args.episode_length)
    env.unwrapped.seed(seed)  # Meta-World's reset ignores its seed
    if args.goals == "fixed":
        env.set_wrapper_attr("tasks", env.get_wrapper_attr("tasks")[:1])
    return env


class EpisodeSummary(gym.Wrapper):
    """info["summary"]: success at any step so far, return, and 1, so that sums over episodes also count them."""

    def reset(self, **options):
        self.summary = np.array([np.nan, 0, 1])  # nan: no success is reported
        return self.env.reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.summary[0] = np.fmax(self.summary[0], info.get("success", np.nan))
        self.summary[1] += reward
        # A copy, since some environments reuse their array: at an episode's end the next reset would overwrite it.
        return obs.copy(), reward, terminated, truncated, {**info, "summary": self.summary}


def make_envs(args, seed):
    """E environments of each task, each in a process of its own, with actions in [-1, 1]."""

    def make(task, env_seed):
        if sys.platform == "linux" and multiprocessing.parent_process():  # in a worker
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with the learner
        env = make_env(task, args, env_seed)
        return EpisodeSummary(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))

    if RANK == 0:
        print(f"starting environments: {args.envs_per_task * len(args.tasks)}", flush=True)
    makers = [partial(make, task, seed + e) for e in range(args.envs_per_task) for task in args.tasks]
    return gym.vector.AsyncVectorEnv(makers, autoreset_mode="SameStep")


def check_finite(tasks, **arrays):
    """Raises FloatingPointError, with the tasks' names, if rows of an array (E * T, ...) are nan or infinite."""
    for name, array in arrays.items():
        rows = torch.as_tensor(array, dtype=torch.float32).view(len(array), -1)
        bad = dict.fromkeys(tasks[i % len(tasks)] for i in (~rows.isfinite().all(1)).nonzero())
        if bad:
            raise FloatingPointError(f"the {name} of {', '.join(bad)} is not finite")


class CUDAGraph:
    """Runs a function of tensors of constant shapes; on CUDA, after three calls, as a graph with fixed outputs."""

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


def evaluate(args, agent, envs, stop):
    """Run --eval-episodes episodes of each task, deterministically. Prints and returns success, return, and modules
    used (a mean over all steps), (T,) each. Returns {} once a signal is in `stop`."""
    T = len(args.tasks)
    act = CUDAGraph(partial(agent.act, deterministic=True))
    sums = np.zeros((T, 3))
    depths = []
    E = args.envs_per_task
    # Episodes of each environment: a fixed share, else short episodes would count more often.
    left = np.repeat([len(range(e, args.eval_episodes, E)) for e in range(E)], T)
    obs, _ = envs.reset()
    while left.any():
        if stop:
            return {}
        action, routes = act(torch.as_tensor(obs, dtype=torch.float32).to(args.device))
        action = action.cpu().numpy()
        check_finite(args.tasks, observation=obs, action=action)
        depths.append(used_modules(routes).sum(-1).cpu().numpy())
        obs, _, terminated, truncated, infos = envs.step(action)
        for i in np.flatnonzero((terminated | truncated) & (left > 0)):
            left[i] -= 1
            sums[i % T] += infos["final_info"]["summary"][i]
    success, total, _ = sums.T / args.eval_episodes
    table = np.stack([success, total, np.reshape(depths, (-1, T)).mean(0)], axis=1)
    names = [*args.tasks, f"mean ({args.eval_episodes} episodes each)"]
    for name, row in zip(names, [*table, table.mean(0)]):
        text = "success {:.2f}, return {:.1f}, modules used {:.1f}".format(*row)
        print(f"{name}: {text.removeprefix('success nan, ')}", flush=True)
    return dict(zip(["success", "return", "modules_used"], table.T))


# ------------------------------------------------------------------------------------------------------- training loop
def train(args, envs, path, counters, seed, stop):
    """Train until --total-steps or a signal in `stop`, and end with a checkpoint. path, counters: as from
    parse_arguments. seed: of this session; a resumed run has other noise and goals."""
    global_step, updates, seconds, eval_due = counters
    T = len(args.tasks)
    cuda = args.device == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if RANKS > 1:
        torch.distributed.init_process_group(timeout=timedelta(days=1))  # the others wait while rank 0 evaluates
    obs, _ = envs.reset(seed=seed)
    sizes = (obs.shape[1], envs.action_space.shape[1])  # of an observation and an action
    torch.manual_seed(args.seed)  # all ranks start with the same weights
    agent = Agent(*sizes, T, args, args.device)
    if args.compile and cuda:  # a CPU gains nothing; random numbers stay those of eager mode
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    stride = len(obs) * RANKS  # environment steps per iteration
    capacity = args.buffer_size // stride * len(obs)  # whole steps
    try:
        replay = ReplayBuffer(capacity, T, *sizes, args.num_modules, agent.actor.K, args.device)
    except RuntimeError:
        raise MemoryError(f"--buffer-size {args.buffer_size:,} does not fit into memory") from None
    tensorboard = start_run(args, agent, replay, path, global_step)
    n = args.batch_size // (T * RANKS)  # samples of each task in an update
    finished = global_step >= args.total_steps and not eval_due
    started = time.time() - seconds
    saved_at = time.time()
    row_start = (global_step, time.time())
    losses = {}
    sums = torch.zeros(T, 3)  # successes, returns and number of the episodes since the last row
    act = CUDAGraph(agent.act)
    update = CUDAGraph(agent.update)
    torch.manual_seed(seed + 1)  # not the noise of the weights
    while not finished:
        # Act, before the first update with the untrained policy
        action, routes = act(torch.as_tensor(obs, dtype=torch.float32).to(args.device, non_blocking=True))
        action = action.to("cpu", non_blocking=True)
        learning = global_step >= args.learning_starts
        if not updates:  # speed is that with updates
            row_start = (global_step, time.time())
        if cuda:  # queue the update (Learn) behind acting, then wait for the action
            action_ready = torch.cuda.current_stream().record_event()
            losses = update(*replay.sample(n)) if learning else losses
            action_ready.synchronize()
        check_finite(args.tasks, observation=obs, action=action)
        envs.step_async(action.numpy())

        # Learn
        if learning and not cuda:  # the same update, while the environments step
            losses = update(*replay.sample(n))
        updates += learning

        # Store
        next_obs, reward, terminated, truncated, infos = envs.step_wait()
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):  # next_obs already is the next episode's
            last_obs[i] = infos["final_obs"][i]
            sums[i % T] += torch.as_tensor(infos["final_info"]["summary"][i])
        check_finite(args.tasks, reward=reward, observation=last_obs)
        replay.add(obs, action, reward, last_obs, terminated, routes)
        obs = next_obs
        global_step += stride

        # Evaluate and log
        speed = (global_step - row_start[0]) / (time.time() - row_start[1])
        hours = max(args.total_steps - global_step, 0) / speed / 3600
        status = f"step {global_step:,} ({speed:,.0f}/s, {hours:.1f} h left)"
        if RANK == 0 and sys.stdout.isatty():  # the next line overwrites it
            print(status if updates else f"step {global_step:,}", end="\x1b[K\r", flush=True)
        finished = global_step >= args.total_steps
        # A multiple of eval_every was crossed if the remainder is smaller than a step.
        eval_due |= learning and (finished or global_step % args.eval_every < stride)
        if RANK == 0 and (eval_due or updates == 100 or (learning and global_step % args.log_every < stride)):
            row = {"global_step": global_step, "updates": updates, "seconds": time.time() - started}
            row["steps_per_second"] = speed
            # nan unless evaluated; the first row decides which columns progress.csv has.
            metrics = dict.fromkeys(["success", "return", "modules_used"], math.nan)
            successes, returns, episodes = sums.T
            metrics |= {"train_success": successes / episodes, "train_return": returns / episodes}
            metrics["alpha"] = agent.log_alpha.detach().exp()
            if args.sample_k:
                metrics["temperature"] = agent.temperature()
            if eval_due:  # in the training environments, which begin new episodes
                results = evaluate(args, agent, envs, stop)
                metrics |= results
                eval_due = not results  # if a signal interrupts it, a resume repeats it
                obs, _ = envs.reset()
            text = write_row(args, tensorboard, row, metrics | losses)
            if not stop:  # Ctrl-C may have ended tee, which reads this
                print(f"{status}: {text}", flush=True)
            sums.zero_()
            row_start = (global_step, time.time())

        # Save, and end: all ranks after the same step
        finished |= len(stop) > 0
        saving = finished or time.time() - saved_at > 60 * args.checkpoint_minutes
        if RANKS > 1:
            flags = torch.tensor([finished, saving], dtype=torch.int)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            finished, saving = flags.tolist()
        if saving:
            save_run(args, agent, replay, (global_step, updates, time.time() - started, eval_due))
            saved_at = time.time()
    if RANK == 0:
        print(f"ended at step {global_step:,}; to continue: --resume {args.run_dir} [--total-steps N]")


# ------------------------------------------------------------------------------------------- log, checkpoints and main
def start_run(args, agent, replay, path, global_step):
    """Load the checkpoint of a resumed run, except for the learning rates. Rank 0 writes args.json, resets progress.csv
    to its state at the checkpoint, and returns a TensorBoard writer, if it is installed."""
    log = ""
    if args.resume:
        saved = torch.load(path, map_location="cpu", mmap=True)
        agent.load_state_dict(saved["agent"])
        state = copy.deepcopy(saved["optimizer"])  # else the optimizer would keep the file mapped
        agent.optimizer.load_state_dict(agent.optimizer.state_dict() | {"state": state})
        replay.add(*(column[-replay.capacity :] for column in saved["replays"][RANK]))
        log = saved["log"]
    if RANK > 0:
        return None
    args.run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
    versions = {name: version(name) for name in ("torch", "numpy", "metaworld", "mujoco", "gymnasium")}
    facts = json.dumps({"args": asdict(args), "tasks": args.tasks, "versions": versions}, indent=2)
    name = f"args-{global_step}.json" if args.resume else "args.json"
    (args.run_dir / name).write_text(facts)
    if args.track:
        import wandb

        started = int((args.run_dir / "args.json").stat().st_mtime)  # a resume continues the run of this id
        wandb.init(id=f"{args.run_name}-{started}", resume="allow", config=asdict(args), sync_tensorboard=True)
    (args.run_dir / "progress.csv").write_text(log)
    print(f"{args.run_dir}, from step {global_step:,}", flush=True)
    if global_step < args.learning_starts:
        print(f"collecting, updates begin at step {args.learning_starts:,}", flush=True)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(args.run_dir, purge_step=global_step + 1)


def write_row(args, tensorboard, row, metrics):
    """Append a row to progress.csv, and to TensorBoard: of each metric, (T,), the mean and the tasks' values. nan is
    left blank; the file keeps the columns that it was created with. Returns the main ones as a text."""
    for name, values in metrics.items():
        values = torch.as_tensor(values).expand(len(args.tasks)).tolist()
        row[name] = np.mean(values)
        row |= {f"{name}/{task}": value for task, value in zip(args.tasks, values)}
    known = {name: value for name, value in row.items() if not math.isnan(value)}
    with open(args.run_dir / "progress.csv", "a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        table = csv.DictWriter(file, header or row, extrasaction="ignore", lineterminator="\n")
        if not header:
            table.writeheader()
        table.writerow({name: f"{value:.9g}" for name, value in known.items()})
    if tensorboard:
        for name, value in known.items():
            tensorboard.add_scalar(name, value, row["global_step"])
        tensorboard.flush()
    shown = ["train_success", "train_return", "critic_loss", "actor_loss", "alpha"]
    return ", ".join(f"{name} {known[name]:.4g}" for name in shown if name in known)


def save_run(args, agent, replay, progress):
    """All ranks call it; rank 0 writes checkpoint.pt, to continue from, and actor.pt, to evaluate."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise FloatingPointError("the weights are not finite")
    oldest = max(replay.added - replay.capacity, 0)
    rows = torch.arange(oldest, replay.added) % replay.capacity
    columns = [column[rows].cpu() for column in replay.columns]
    replays = [columns] * RANKS  # of several ranks rank 0 will gather them
    if RANKS > 1:
        torch.distributed.gather_object(columns, replays if RANK == 0 else None)
    if RANK > 0:
        return
    checkpoint = {
        "args": asdict(args),
        "progress": progress,
        "log": (args.run_dir / "progress.csv").read_text(),
        "agent": agent.state_dict(),
        "optimizer": agent.optimizer.state_dict()["state"],
        "replays": replays,
    }
    actor = {"args": asdict(args), "actor": agent.actor.state_dict()}
    for name, content in {"checkpoint.pt": checkpoint, "actor.pt": actor}.items():
        unfinished = args.run_dir / f"{name}.partial"
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:  # a full disk
            unfinished.unlink(missing_ok=True)
            raise OSError(f"{unfinished} cannot be written: {error}") from error
        unfinished.replace(args.run_dir / name)  # if killed before, the last whole file stays


def load_saved(path, name):
    """A file, or the one of this name in a run's directory: its path, content, and arguments with the tasks."""
    path = Path(path, name) if Path(path).is_dir() else Path(path)
    args = Args.__new__(Args)  # without __post_init__; what it lacks has its default
    try:
        saved = torch.load(path, map_location="cpu", mmap=True)
        vars(args).update(saved["args"])
        saved["actor" if name == "actor.pt" else "agent"]  # KeyError: another kind of file
        args.tasks = task_names(args.env_id)  # ValueError: those of another script
    except Exception as error:  # torch.load raises many kinds
        raise OSError(f"{path} is missing, damaged, or no {name} of a run of tasks known here") from error
    return path, saved, args


def load_policy(path, device="cpu"):
    """The Agent of a run's directory, or of an actor.pt, with untrained critics; and the names of its tasks. What was
    swapped for the training (task_names, BaseModule) must be swapped here, too. OSError: it is missing or unusable."""
    _, saved, args = load_saved(path, "actor.pt")
    weights = saved["actor"]
    obs_dim = weights["routing_network.obs_encoder.0.weight"].shape[1]
    action_dim = len(weights["base_modules.head.bias"]) // 2
    agent = Agent(obs_dim, action_dim, len(args.tasks), args, device)
    agent.actor.load_state_dict(weights)
    return agent, args.tasks


def parse_arguments(argv=None):
    """The arguments, by default those of the run that --resume or --evaluate names; the path of its file; its counters:
    global step, updates, seconds, and whether an evaluation is due. OSError: no such run, or not with these options."""

    def find_run(resume: str | None = None, evaluate: str | None = None):
        return resume, evaluate

    # The first pass finds the run, the second has its options as defaults.
    (resume, evaluate), _ = tyro.cli(find_run, args=argv, return_unknown_args=True, add_help=False)
    start = (0, 0, 0.0, False)
    if resume is None and evaluate is None:
        return tyro.cli(Args, args=argv), None, start
    path, saved, defaults = load_saved(evaluate or resume, "actor.pt" if evaluate else "checkpoint.pt")
    vars(defaults).update(device=Args.device, resume=None, evaluate=None)
    vars(defaults).update(results_dir=str(path.parent.parent), run_name=path.parent.name)
    fixed = "env_id num_modules top_k routing parallel_modules module_width encoder_widths router_widths"
    if evaluate:
        defaults.envs_per_task = 1
    else:
        fixed += " goals seed envs_per_task results_dir run_name"
    args = tyro.cli(Args, args=argv, default=defaults)
    changed = [name for name in fixed.split() if getattr(args, name) != getattr(defaults, name)]
    if not evaluate and len(saved["replays"]) != RANKS:
        changed += ["number of ranks"]
    if changed:
        raise OSError(f"{path} was made with a different {', '.join(changed)}")
    return args, path, saved.get("progress", start)


def main(argv=None):
    """The command line. Exit codes: 2 if tyro refuses the options, 1 for any other failure, 128 + the number of a
    signal that ended the run."""
    stop = []  # signals that came
    handlers = {}
    envs = None

    def handle(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        if not multiprocessing.current_process().daemon:  # workers inherit this, and continue
            with suppress(OSError):  # Ctrl-C may have ended tee, which reads this
                os.write(2, b"ending; " if args.evaluate else b"ending with a checkpoint; ")
                os.write(2, b"once more ends at once\n")

    try:
        args, path, counters = parse_arguments(argv)
        handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        seed = args.seed + 10_000 * RANK + counters[0]  # after a resume other goals and noise
        envs = make_envs(args, seed)  # before CUDA starts
        if args.evaluate:
            torch.set_num_threads(1)  # more would compete with the environments
            envs.reset(seed=seed)  # an evaluation resets again, as in training
            evaluate(args, load_policy(path, args.device)[0], envs, stop)
        else:
            train(args, envs, path, counters, seed, stop)
    except (EOFError, ConnectionError) as error:
        sys.exit(f"error: an environment's process died, or nobody reads the output: {error!r}")
    except (FloatingPointError, ImportError, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        for worker in multiprocessing.active_children():  # SIGTERM would not stop them
            worker.kill()
        if envs:
            envs.closed = True  # else its destructor would talk to them
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    main()
