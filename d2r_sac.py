# SPDX-License-Identifier: MIT
"""Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World, in one file.

One policy for many tasks: a routing network picks, for every state and task, which of M base modules to use and how
to wire them, so that easy tasks take few modules and hard tasks many. Paper: He et al., "Not All Tasks Are Equally
Difficult: Multi-Task Deep Reinforcement Learning with Dynamic Depth Routing", AAAI 2024, arXiv:2312.14472.

    concept                  in symbols                                                   here
    routing network          z = router(h * e), h = encoder(s), e = encoder(task)         RoutingNetwork
    base modules             x_i = sum_j w_{i-1,j} o_j,  o_i = relu(W_i x_i + b_i) + x_i  BaseModules, RoutedModules
    Top-K                    the K largest logits of each row                             top_k
    Sample-K                 K draws without replacement from softmax(z_i / tau_task)     sample_k
    routing weights          w_i = softmax(z_i) over the chosen sources only              routing_weights
    depth                    modules that the chosen edges connect to the head            used_modules
    ResRouting               edge (i, j) sends its gradient to all of o_j, or x_j alone   gradient_kept, RoutedModules
    SAC losses               per task; alpha_task, task weights, extreme-loss mask        "Losses", Agent.update
    automatic route balance  tau_task = T softmax(-log alpha)_task                        route_temperatures

Symbols: T tasks, M modules, H module width, K routing sources, B samples in a batch, n = B / T samples of each task.
Modules count from 0. Row i of the routing table, i = 0 ... M-1, weighs the outputs of modules 0 ... i that enter
module i+1; the last row feeds the head. `# NOTE:` marks where the authors' code settles or departs from the paper.

    python d2r_sac.py --env-id MT10                          train
    torchrun --nproc-per-node 4 d2r_sac.py --env-id MT10     train on four GPUs
    python d2r_sac.py --resume results/RUN                   go on after an interruption
    python d2r_sac.py --evaluate results/RUN/actor.pt        evaluate a saved policy
"""

from __future__ import annotations

import csv
import difflib
import importlib.metadata
import json
import math
import multiprocessing.connection
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from metaworld.evaluation import evaluation as metaworld_evaluation
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    """Dynamic Depth Routing (D2R) with multi-task SAC on Meta-World.

    The defaults are the paper's. Steps are environment steps, summed over tasks and ranks.
    """

    # Benchmark
    env_id: str = "MT10"
    """MT10, MT25, MT50, one Meta-World V3 task (reach-v3) or several (reach-v3,drawer-close-v3)"""
    goals: Literal["random", "fixed"] = "random"
    """random: a new goal each episode, of 50 per task; fixed: one goal per task for the whole run"""
    episode_length: int = 200
    """time limit of an episode, in steps of its task; at most 500"""

    # Budget; None: from --env-id
    total_steps: int | None = None
    """environment steps of the run (15M for MT10, 50M for MT50, 1.5M per task otherwise)"""
    buffer_size: int | None = None
    """transitions of replay, over all tasks and ranks (1M for MT10, 10M for MT50, 100,000 per task otherwise)"""
    batch_size: int | None = None
    """samples of an update, over all tasks and ranks, the same number of each (128 per task)"""
    learning_starts: int | None = None
    """environment steps with the untrained stochastic policy before the first update (4,000 per task)"""

    # Networks and routing
    num_modules: int = 16
    """M, base modules of a network"""
    top_k: int = 2
    """K, routing sources of a module; 0: soft routing over every earlier module"""
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
    target_entropy: float = -4.0
    """entropy that each task's alpha steers the policy towards, in nats: minus the size of an action"""
    reward_scale: float = 0.1
    """factor on the environments' rewards"""
    max_task_loss: float = 3e3
    """a task whose summed loss exceeds this is left out of the update"""
    max_grad_norm: float = 1.0
    """gradient norm to which the actor, each critic and log alpha are clipped, each by itself"""

    # Evaluation
    eval_every: int | None = None
    """environment steps between evaluations (a thirtieth of the run)"""
    eval_episodes: int = 50
    """episodes of each task in an evaluation (the paper: 32)"""
    evaluate: str | None = None
    """path of an actor.pt: evaluate this policy on the tasks it was trained for, and train nothing"""

    # The run
    seed: int = 1
    """of the networks, the sampling and the goals"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks are; auto: cuda where there is one"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay is; auto: with the networks, where it fits"""
    compile: bool = False
    """torch.compile for the networks; on CUDA acting and the whole update also become CUDA graphs"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the networks' matrix products; on CUDA float32 means TF32, unless --torch-deterministic"""
    torch_deterministic: bool = False
    """only deterministic algorithms, on CUDA too"""
    results_dir: str = "results"
    """directory of the run directories"""
    run_name: str | None = None
    """name of the run's directory (benchmark, goals, seed and time)"""
    resume: str | None = None
    """run directory to go on in, with the arguments it was started with where they are not given anew"""
    log_every: int = 10_000
    """environment steps between rows of progress.csv"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints; there is one at the end and at SIGINT or SIGTERM in any case"""
    tensorboard: bool = True
    """write TensorBoard events"""


BENCHMARKS = ("MT10", "MT25", "MT50")
# What a saved policy, and a run, were made with and cannot change.
POLICY_ARGS = ("env_id", "num_modules", "top_k", "module_width", "encoder_widths", "router_widths")
RUN_ARGS = (*POLICY_ARGS, "goals", "episode_length", "seed", "buffer_size")


class UsageError(Exception):
    """A mistake in what the user asked for; its message says what is wrong and what to write instead."""


class RunError(Exception):
    """Something that ends a run while it goes; its message says what, and where in the run."""


def task_names(env_id: str) -> list[str]:
    """The tasks of `--env-id`, in the order of their indices."""
    if env_id in BENCHMARKS:
        return list(getattr(metaworld.env_dict, f"{env_id}_V3"))
    tasks = env_id.split(",")
    known = {name.lower(): name for name in (*BENCHMARKS, *metaworld.env_dict.ALL_V3_ENVIRONMENTS)}
    for task in tasks:
        if task not in metaworld.env_dict.ALL_V3_ENVIRONMENTS:
            nearest = ", ".join(known[name] for name in difflib.get_close_matches(task.lower(), known, cutoff=0))
            raise UsageError(f"--env-id: there is no task or benchmark {task!r}; the nearest names are {nearest}")
        if tasks.count(task) > 1:
            raise UsageError(f"--env-id: {task} is named twice; name each task once")
    return tasks


def parse_arguments(argv: list[str] | None) -> tuple[Args, list[str], dict | None]:
    """Read and check the command line, before anything is built.

    Returns the arguments with every budget filled in, the tasks, and the contents of the file that --resume or
    --evaluate names. Raises UsageError.
    """
    args, saved = tyro.cli(Args, args=argv), None
    if args.resume and args.evaluate:
        raise UsageError("--resume and --evaluate exclude each other; give one of them")
    if args.resume or args.evaluate:
        option, same_args = ("--resume", RUN_ARGS) if args.resume else ("--evaluate", POLICY_ARGS)
        path = Path(args.resume, "checkpoint.pt") if args.resume else Path(args.evaluate)
        saved, saved_args = load(path, option)
        args = tyro.cli(Args, args=argv, default=replace(saved_args, resume=args.resume, evaluate=args.evaluate))
        for name in same_args:
            if getattr(args, name) != getattr(saved_args, name):
                flag, value = "--" + name.replace("_", "-"), getattr(saved_args, name)
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"{option}: {path} was made with {flag} {value}; write that, or leave {flag} out")

    tasks = task_names(args.env_id)
    T = len(tasks)
    steps, replay = {"MT50": (1_000_000, 200_000)}.get(args.env_id, (1_500_000, 100_000))  # per task
    args.total_steps = args.total_steps if args.total_steps is not None else steps * T
    args.buffer_size = args.buffer_size if args.buffer_size is not None else replay * T
    args.batch_size = args.batch_size if args.batch_size is not None else 128 * T
    args.learning_starts = args.learning_starts if args.learning_starts is not None else 4_000 * T
    args.eval_every = args.eval_every if args.eval_every is not None else max(args.total_steps // 30, 1)

    for name, value in asdict(args).items():
        numbers = [x for x in (value if isinstance(value, tuple) else [value]) if type(x) in (int, float)]
        flag = "--" + name.replace("_", "-")
        if not all(map(math.isfinite, numbers)):
            raise UsageError(f"{flag} is {value}; it must be finite")
        if name in ("gamma", "tau") and not 0 <= value <= 1:
            raise UsageError(f"{flag} is {value}; it must lie in [0, 1]")
        if name not in ("gamma", "tau", "seed", "top_k", "target_entropy") and any(x <= 0 for x in numbers):
            raise UsageError(f"{flag} is {value}; it must be positive")
    M, K, batch, (_, ranks) = args.num_modules, args.top_k, args.batch_size, world()
    cuda, on_ranks = args.device != "cpu" and torch.cuda.is_available(), f" on {ranks} ranks" * (ranks > 1)
    for wrong, message in (
        (not args.encoder_widths or not args.router_widths, "--encoder-widths and --router-widths need a width each"),
        (M > 256, f"--num-modules is {M}; at most 256 are possible, since routes are stored in bytes"),
        (not 0 <= K <= M, f"--top-k is {K}; it must lie between 0 and --num-modules, which is {M}"),
        (
            batch % (T * ranks),
            f"--batch-size {batch} does not divide into {T} tasks{on_ranks}; write a multiple of {T * ranks}",
        ),
        (args.buffer_size < batch, f"--buffer-size is {args.buffer_size}; it must be at least a batch, {batch}"),
        (args.learning_starts < T, f"--learning-starts is {args.learning_starts}; write at least {T}, a step per task"),
        (args.episode_length > 500, f"--episode-length is {args.episode_length}; Meta-World has at most 500 steps"),
        (args.initial_alpha > 1, f"--initial-alpha is {args.initial_alpha}; alpha is clamped to at most 1"),
        (not 0 <= args.seed < 2**31, f"--seed is {args.seed}; it must lie in [0, 2^31)"),
        (args.device == "cuda" and not cuda, "--device is cuda, and PyTorch finds none here; write --device cpu"),
        (
            args.buffer_device == "cuda" and not cuda,
            "--buffer-device is cuda, and the networks are on the CPU; leave it out",
        ),
        (
            args.compile and not shutil.which(os.environ.get("CXX", "g++")),
            "--compile needs a C++ compiler, and there is no g++ here; install it, or leave --compile out",
        ),
        (args.evaluate and ranks > 1, "--evaluate takes a single process; run it without torchrun"),
    ):
        if wrong:
            raise UsageError(message)
    return args, tasks, saved


# ---------------------------------------------------------------------------------------------------- environments


@contextmanager
def worker_envs(tasks: list[str], args: Args) -> Iterator[gym.vector.AsyncVectorEnv]:
    """One worker process per task; episodes end by truncation, and reset in the same step.

    Observations are the 39 numbers of the task alone; a task is its index in the vector. Raises RunError where a
    worker dies.
    """
    # A worker builds its own task, beside the others. It does not see Ctrl-C, nor a SIGTERM to the whole process
    # group, so that the learner can still write a checkpoint; it ends with the learner, however that ends.
    make_env = partial(metaworld.make_mt_envs, seed=args.seed, max_episode_steps=args.episode_length)
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        envs = gym.vector.AsyncVectorEnv(
            [partial(make_env, task) for task in tasks], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    try:
        if args.goals == "fixed":
            envs.set_attr("tasks", [goals[:1] for goals in envs.get_attr("tasks")])
        yield envs
    except (EOFError, ConnectionError) as error:
        ended = multiprocessing.connection.wait([process.sentinel for process in envs.processes], timeout=10)
        dead = [task for task, process in zip(tasks, envs.processes) if process.sentinel in ended]
        raise RunError(f"the worker process of {', '.join(dead)} died") from error
    finally:
        for process in envs.processes:  # they hold nothing that needs a goodbye
            process.kill()
            process.join()
        envs.closed = True


# --------------------------------------------------------------------------------------------------- data parallel
# Under torchrun each rank, a process, steps its own copy of the tasks and samples from its own replay. The gradients
# are averaged, so all ranks keep the same weights. Without torchrun there is rank 0 alone.


def world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if dist.is_torchelastic_launched() else (0, 1)


def collective(function, *arguments) -> None:
    """Call a function of torch.distributed, on all ranks. Raises RunError where another rank has ended."""
    try:
        function(*arguments)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise RunError(f"another rank has ended or cannot be reached ({reason})") from error


def all_reduce(tensor: Tensor, op: dist.ReduceOp) -> Tensor:
    """The sum, minimum or maximum over all ranks, in place."""
    if world()[1] > 1:
        collective(dist.all_reduce, tensor, op)
    return tensor


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks, of equal shapes, on rank 0; nothing on the others."""
    rank, ranks = world()
    if ranks == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(ranks)] if rank == 0 else None
    collective(dist.gather, tensor, tensors)
    return tensors or []


def average_gradients(parameters: list[Tensor]) -> None:
    """Each gradient becomes its mean over all ranks."""
    if world()[1] > 1:
        gradients = [parameter.grad for parameter in parameters]
        total = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), dist.ReduceOp.SUM)
        means = (total / world()[1]).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(gradient) for mean, gradient in zip(means, gradients)])


def check_weights(parameters: list[Tensor]) -> None:
    """Raises RunError unless the parameters are finite, and the same to the bit on all ranks."""
    weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
    if not weights.isfinite().all():
        raise RunError("the weights are not finite")
    least, greatest = (all_reduce(weights.clone(), op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if not torch.equal(least, greatest):
        raise RunError("the ranks' weights differ")


# --------------------------------------------------------------------------------------------------- replay buffer


class Transition(NamedTuple):
    """One step of every task, (T, ...), or a batch of steps, task by task, (T * n, ...)."""

    obs: Tensor  # (., 39) float32
    action: Tensor  # (., 4) float32, in [-1, 1]
    reward: Tensor  # (.,) float32, as the environment gave it
    next_obs: Tensor  # (., 39) float32; at a truncation the episode's true last observation
    terminated: Tensor  # (.,) bool; a truncation is no termination
    routes: Tensor  # (., M, K) uint8, the sources that the behaviour policy chose


class ReplayBuffer:
    """A ring per task, in preallocated tensors (capacity, T, ...). The tasks step together, so the rings turn together.

    capacity: transitions of each task. On a CPU memory is taken only as it fills.
    """

    def __init__(self, capacity: int, T: int, obs_dim: int, action_dim: int, M: int, K: int, device: str = "cpu"):
        self.capacity, self.T, self.size, self.position = capacity, T, 0, 0
        self.storage = Transition(
            obs=torch.empty(capacity, T, obs_dim, device=device),
            action=torch.empty(capacity, T, action_dim, device=device),
            reward=torch.empty(capacity, T, device=device),
            next_obs=torch.empty(capacity, T, obs_dim, device=device),
            terminated=torch.empty(capacity, T, dtype=torch.bool, device=device),
            routes=torch.empty(capacity, T, M, K, dtype=torch.uint8, device=device),
        )

    def add(self, transition: Transition) -> None:
        """Store one step of every task over the oldest one."""
        for ring, value in zip(self.storage, transition):
            ring[self.position] = torch.as_tensor(value)
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, n: int, device: torch.device) -> Transition:
        """n transitions of each task, uniformly with replacement: (T * n, ...), task by task."""
        columns = torch.arange(self.T, device=self.storage.reward.device)[:, None]
        rows = torch.randint(self.size, (self.T, n), device=columns.device)
        return Transition(*(ring[rows, columns].flatten(0, 1).to(device) for ring in self.storage))

    def state_dict(self) -> dict:
        """The rings of all ranks as one, in which they take turns; they all turn together. Empty but on rank 0."""
        _, ranks = world()
        filled = [gather(ring[: self.size].clone().cpu()) for ring in self.storage]
        storage = [torch.stack(rings, 1).flatten(0, 1) if ranks > 1 else rings[0] for rings in filled if rings]
        return {"storage": storage, "size": ranks * self.size, "position": ranks * self.position}

    def load_state_dict(self, state: dict) -> None:
        """This rank's share of a replay, also of one that another number of ranks has saved."""
        rank, ranks = world()
        self.size = min(state["size"] // ranks, self.capacity)
        self.position = self.size % self.capacity
        for ring, filled in zip(self.storage, state["storage"]):
            oldest_first = filled.roll(-state["position"], 0)
            ring[: self.size] = oldest_first[len(filled) - ranks * self.size + rank :: ranks]


def make_replay(args: Args, T: int, obs_dim: int, action_dim: int, device: torch.device) -> ReplayBuffer:
    """This rank's replay, on --buffer-device."""
    capacity = args.buffer_size // (T * world()[1])
    shape = (capacity, T, obs_dim, action_dim, args.num_modules, args.top_k or args.num_modules)
    on_cuda = device.type == "cuda" and args.buffer_device != "cpu"
    if on_cuda and args.buffer_device == "auto":
        needed = sum(ring.nbytes for ring in ReplayBuffer(*shape, device="meta").storage)
        on_cuda = needed < 0.8 * torch.cuda.mem_get_info(device)[0]
    return ReplayBuffer(*shape, device=device if on_cuda else "cpu")


# ------------------------------------------------------------------------------------------------- routing network


def init_hidden(layer: nn.Linear) -> nn.Linear:
    # NOTE: the authors' helper takes the first axis, out_features, for the fan-in.
    nn.init.uniform_(layer.weight, -(layer.out_features**-0.5), layer.out_features**-0.5)
    nn.init.constant_(layer.bias, 0.1)
    return layer


def init_head(layer: nn.Linear) -> nn.Linear:
    nn.init.uniform_(layer.weight, -3e-3, 3e-3)
    nn.init.uniform_(layer.bias, -3e-3, 3e-3)
    return layer


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them and no activation at the end."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.ReLU(), init_hidden(nn.Linear(width_in, width_out))]
    return nn.Sequential(*layers[1:])


class RoutingNetwork(nn.Module):
    """State and task to the embedding h and the routing logits z."""

    def __init__(self, input_dim, T, M, encoder_widths, router_widths):
        super().__init__()
        self.T, self.M = T, M
        self.obs_encoder = mlp(input_dim, *encoder_widths)
        self.task_encoder = init_hidden(nn.Linear(T, encoder_widths[-1]))
        # NOTE: the router's last layer is initialised as a hidden one; heads are the outputs of actor and critics.
        self.router = mlp(encoder_widths[-1], *router_widths, M * (M + 1) // 2)

    def forward(self, inputs: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (B, input_dim), task (B,) indices -> h (B, encoder_widths[-1]), table of logits (B, M, M)."""
        h = self.obs_encoder(inputs)
        e = self.task_encoder(F.one_hot(task, self.T).to(h.dtype))
        return h, routing_table(self.router(h * e).to(inputs.dtype), self.M)


def routing_table(logits: Tensor, M: int) -> Tensor:
    """(B, M(M+1)/2) logits, row after row, to a table (B, M, M) whose row i has i+1 of them, and -inf behind."""
    row, column = torch.tril_indices(M, M, device=logits.device)
    table = logits.new_full((len(logits), M, M), -torch.inf)
    table[:, row, column] = logits
    return table


def top_k(table: Tensor, K: int) -> Tensor:
    """The K largest logits of each row: (B, M, M) -> routes (B, M, K). A row with fewer than K repeats its largest."""
    values, routes = table.topk(K, dim=-1)
    return torch.where(values == -torch.inf, routes[..., :1], routes)


def sample_k(table: Tensor, K: int, temperature: Tensor) -> Tensor:
    """K draws without replacement from softmax(row / temperature), for each row: (B, M, M), (B,) -> (B, M, K).

    The K largest of logits with Gumbel noise are such draws (Kool et al., ICML 2019).
    """
    uniform = torch.rand_like(table).clamp_(min=torch.finfo(table.dtype).tiny)
    gumbel = -(-uniform.log()).log()
    return top_k(table / temperature[:, None, None] + gumbel, K)


def chosen_sources(routes: Tensor) -> Tensor:
    """Routes (B, M, K) -> (B, M, M), true where row i takes module j as a source."""
    B, M, _ = routes.shape
    return torch.zeros(B, M, M, dtype=torch.bool, device=routes.device).scatter_(-1, routes.long(), True)


def routing_weights(table: Tensor, routes: Tensor) -> Tensor:
    """Softmax of the untempered logits over the chosen sources, 0 elsewhere: (B, M, M)."""
    return table.masked_fill(~chosen_sources(routes), -torch.inf).softmax(-1)


def used_modules(routes: Tensor) -> Tensor:
    """Which modules the chosen edges connect to the head: (B, M, K) -> (B, M) bool. Their number is the depth."""
    chosen = chosen_sources(routes).unbind(1)
    used = chosen[-1].clone()
    for i in range(len(chosen) - 1, 0, -1):  # module i takes its sources from row i-1
        used |= used[:, i : i + 1] & chosen[i - 1]
    return used


def gradient_kept(table: Tensor) -> Tensor:
    """ResRouting: true where the target policy is likely enough to take edge (i, j), p_ij > 1/(i+2). (B, M, M)."""
    threshold = 1 / torch.arange(2, table.shape[1] + 2, dtype=table.dtype, device=table.device)
    return table.softmax(-1) > threshold[:, None]


# ---------------------------------------------------------------------------------------------------- base modules


class RoutedModules(torch.autograd.Function):
    """Modules 1 ... M-1, from the output of module 0 to the input of the head, with ResRouting as their backward pass.

    Forward: x_i = sum_j w_{i-1,j} o_j over the chosen sources, f_i = relu(W_i x_i + b_i), o_i = f_i + x_i; -> x_M.
    Backward: a gradient that comes to x_i through module i's own layer, or through the head, goes on along each edge to
    all of o_j = f_j + x_j where the edge is kept, to x_j alone elsewhere; through module i's shortcut, to all of o_j.

    The outputs of all modules lie in one tensor o, module after module, a row for each sample that uses the module.
    """

    @staticmethod
    def forward(ctx, o_0, w, w_kept, sources, counts, *parameters):
        """o_0 (B, H) -> (B, H).

        counts: M+1 numbers, of the samples in modules 0 ... M-1 and in the head
        w, w_kept, sources: (E, K); weight, weight or 0 where the edge is not kept, and row in o of each source, for the
            samples in modules 1, 2, ... M-1 and in the head
        parameters: W_1 ... W_{M-1}, (H, H), and b_1 ... b_{M-1}, (H,)
        """
        M = len(counts) - 1
        W, b = (None, *parameters[: M - 1]), (None, *parameters[M - 1 :])
        o = w.new_empty(sum(counts[:-1]), o_0.shape[1])
        outputs = o.split(counts[:-1])
        outputs[0].copy_(o_0)
        x, f = [None], [None]
        for i, w_i, sources_i in zip(range(1, M + 1), w.split(counts[1:]), sources.split(counts[1:])):
            x.append(F.embedding_bag(sources_i, o, per_sample_weights=w_i, mode="sum"))
            if i < M:
                f.append(F.linear(x[i], W[i], b[i]).relu_())
                torch.add(f[i], x[i], out=outputs[i])
        ctx.counts = counts
        ctx.save_for_backward(w, w_kept, sources, o, *W[1:], *x[1:M], *f[1:])
        return x[M]

    @staticmethod
    def backward(ctx, grad_output):
        counts, M = ctx.counts, len(ctx.counts) - 1
        w, w_kept, sources, o, *saved = ctx.saved_tensors
        W, x, f = ([None, *saved[n * (M - 1) : (n + 1) * (M - 1)]] for n in range(3))
        grad_w, grad_W, grad_b = torch.empty_like(w), [None] * M, [None] * M
        grad_f, grad_x = torch.zeros_like(o), torch.zeros_like(o)
        grad_f_of, grad_x_of = grad_f.split(counts[:-1]), grad_x.split(counts[:-1])
        edges = [None, *zip(*(t.split(counts[1:]) for t in (w, w_kept, sources, grad_w)))]
        own, shortcut = grad_output, torch.zeros_like(grad_output)  # what comes to x_i through its layer, its shortcut
        for i in range(M, 0, -1):
            if i < M:
                grad_z = (grad_f_of[i] * (f[i] > 0)).to(f[i].dtype)
                if ctx.needs_input_grad[5]:
                    grad_W[i], grad_b[i] = grad_z.T @ x[i].to(f[i].dtype), grad_z.sum(0)
                own, shortcut = grad_z @ W[i].to(f[i].dtype), grad_x_of[i]
            w_i, w_kept_i, sources_i, grad_w_i = (t.unsqueeze(-1) for t in edges[i])  # (n, K, 1)
            rows, own, shortcut = sources_i.flatten(), own[:, None], shortcut[:, None]
            both = own + shortcut
            torch.sum(o.index_select(0, rows).unflatten(0, w_i.shape[:2]) * both, -1, keepdim=True, out=grad_w_i)
            grad_f.index_add_(0, rows, (w_kept_i * own + w_i * shortcut).flatten(0, 1))
            grad_x.index_add_(0, rows, (w_i * both).flatten(0, 1))
        return grad_f_of[0], grad_w, None, None, None, *grad_W[1:], *grad_b[1:]


class BaseModules(nn.Module):
    """M modules, each fed by the sources that its row of the routing table chose, and a head fed by the last row.

    skip_unused: compute a module for the samples that use it; else for all, so that shapes stay static, as CUDA graphs
    need them, and the host need not know who uses what.
    """

    def __init__(self, embedding_dim, output_dim, M, module_width, resrouting):
        super().__init__()
        self.resrouting, self.skip_unused = resrouting, True
        input_dims = [embedding_dim] + [module_width] * (M - 1)
        self.module = nn.ModuleList(init_hidden(nn.Linear(input_dim, module_width)) for input_dim in input_dims)
        self.head = init_head(nn.Linear(module_width, output_dim))

    def forward(self, h: Tensor, table: Tensor, routes: Tensor) -> Tensor:
        """h (B, embedding_dim), logits (B, M, M), routes (B, M, K) -> (B, output_dim)."""
        B, M, K = routes.shape
        routes = routes.long()
        w = routing_weights(table, routes).gather(-1, routes).tril()  # row i has i+1 sources, and then repetitions
        w_kept = w.detach() * gradient_kept(table).gather(-1, routes) if self.resrouting else w.detach()
        # Which modules are computed for which samples, and the row of RoutedModules' o that holds the output.
        if self.skip_unused:
            computed = F.pad(used_modules(routes), (0, 1), value=True).T  # (M + 1, B), the head last
            counts, row = computed.sum(1).tolist(), computed.flatten().cumsum(0).view(M + 1, B) - 1
            edges = computed[1:].flatten().nonzero().squeeze(1)  # row i of the routing table feeds module i+1
        else:
            counts, row = [B] * (M + 1), torch.arange((M + 1) * B, device=h.device).view(M + 1, B)
            edges = slice(None)
        sources = row.T.gather(1, routes.flatten(1)).view(B, M, K)
        w, w_kept, sources = (t.transpose(0, 1).flatten(0, 1)[edges] for t in (w, w_kept, sources))  # (E, K)
        o_0 = F.relu(self.module[0](F.relu(h)))
        parameters = [layer.weight for layer in self.module[1:]] + [layer.bias for layer in self.module[1:]]
        return self.head(RoutedModules.apply(o_0, w, w_kept, sources, counts, *parameters))


# ------------------------------------------------------------------------------------------------ actor and critic


class D2RNetwork(nn.Module):
    """A routing network with its base modules: an actor (output: mean and log std) or a critic (output: Q)."""

    def __init__(self, input_dim: int, output_dim: int, T: int, args: Args):
        super().__init__()
        self.K, self.bfloat16 = args.top_k or args.num_modules, args.precision == "bfloat16"
        self.routing_network = RoutingNetwork(input_dim, T, args.num_modules, args.encoder_widths, args.router_widths)
        self.base_modules = BaseModules(
            args.encoder_widths[-1], output_dim, args.num_modules, args.module_width, args.resrouting
        )

    def forward(
        self, inputs: Tensor, task: Tensor, routes: Tensor | None = None, temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, input_dim), task (B,) indices -> output (B, output_dim), routes (B, M, K).

        The routes are those given; else Sample-K's at each task's temperature (T,), where that is given; else Top-K's.
        """
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            h, table = self.routing_network(inputs, task)
            if routes is None:
                routes = top_k(table, self.K) if temperature is None else sample_k(table, self.K, temperature[task])
            return self.base_modules(h, table, routes).to(inputs.dtype), routes


class Critics(nn.ModuleList):
    """The two critics, which share nothing."""

    def forward(self, obs: Tensor, action: Tensor, task: Tensor, temperature: Tensor | None = None) -> Tensor:
        """-> Q (2, B)."""
        inputs = torch.cat([obs, action], dim=-1)
        return torch.stack([critic(inputs, task, temperature=temperature)[0].squeeze(-1) for critic in self])


def sample_action(output: Tensor) -> tuple[Tensor, Tensor]:
    """The actor's output (B, 2A) -> an action (B, A) of the tanh-squashed Gaussian and its log-probability (B,)."""
    mean, log_std = output.chunk(2, dim=-1)
    log_std = log_std.clamp(-20, 2)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # minus log(1 - tanh(u)^2)
    return u.tanh(), log_prob.sum(-1)


# ---------------------------------------------------------------------------------------------------------- losses
# Tensors are (T, n), n samples of each task, and losses (T,).


def td_target(reward, terminated, next_q, next_log_prob, alpha, gamma) -> Tensor:
    """r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log pi(a'|s')); next_q (2, T, n), alpha (T,)."""
    # NOTE: the authors mark the time limit as terminal; here a truncation bootstraps.
    return reward + gamma * ~terminated * (next_q.amin(0) - alpha[:, None] * next_log_prob)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over the critics: q (2, T, n), target (T, n) -> (T,)."""
    return ((q - target) ** 2).mean(-1).sum(0)


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """alpha log pi(a|s) - min_c Q_c(s, a): q (2, T, n), log_prob (T, n), alpha (T,) -> (T,)."""
    return (alpha[:, None] * log_prob - q.amin(0)).mean(-1)


def alpha_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-log alpha (log pi(a|s) + target entropy): log_alpha (T,), log_prob (T, n) -> (T,)."""
    return -log_alpha * (log_prob.detach() + target_entropy).mean(-1)


def task_weights(log_alpha: Tensor) -> Tensor:
    """T softmax(-log alpha), (T,), of mean 1: large for a task whose alpha is low, that is, not yet mastered."""
    return len(log_alpha) * (-log_alpha.detach()).softmax(0)


def masked_mean(losses: Tensor, max_task_loss: float) -> Tensor:
    """Mean over tasks, (T,) -> (); a task whose loss exceeds max_task_loss counts as 0."""
    # NOTE: only in the authors' code, after PaCo.
    return torch.where(losses.detach() > max_task_loss, 0.0, losses).mean()


# ----------------------------------------------------------------------------------------- automatic route balancing


def route_temperatures(log_alpha: Tensor, args: Args) -> Tensor | None:
    """tau of each task, (T,), for Sample-K; None where the ablation without Sample-K wants Top-K instead.

    A mastered task's alpha stays high, its tau low: its routes settle. An unmastered task goes on exploring routes.
    """
    if not args.sample_k:
        return None
    return task_weights(log_alpha) if args.route_balancing else torch.ones_like(log_alpha)


# ----------------------------------------------------------------------------------------------------------- agent


class CUDAGraph:
    """A function whose kernels are replayed as one CUDA graph, after three calls that run as they are.

    It takes a tensor or a tuple of tensors, of the same shapes every time, and returns the same tensors every time,
    which the next call overwrites. Whatever else it changes, it must change in place.
    """

    def __init__(self, function):
        self.function, self.graph, self.calls = function, None, 0

    def __call__(self, inputs):
        self.calls += 1
        if self.calls <= 3:  # not on the default stream, as capturing asks for
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if self.graph is None:
            self.inputs = inputs.clone() if isinstance(inputs, Tensor) else type(inputs)(*(t.clone() for t in inputs))
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(self.inputs)
        torch._foreach_copy_(*([t] if isinstance(t, Tensor) else list(t) for t in (self.inputs, inputs)))
        self.graph.replay()
        return self.outputs


class Agent:
    """Actor, critics, target critics, log alpha and their optimizer."""

    def __init__(self, args: Args, tasks: list[str], obs_dim: int, action_dim: int, device: torch.device):
        self.args, self.tasks, T = args, tasks, len(tasks)
        self.task = torch.arange(T, device=device)
        self.actor = D2RNetwork(obs_dim, 2 * action_dim, T, args).to(device)
        self.critics = Critics(D2RNetwork(obs_dim + action_dim, 1, T, args) for _ in range(2)).to(device)
        self.target_critics = Critics(D2RNetwork(obs_dim + action_dim, 1, T, args) for _ in range(2)).to(device)
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.target_critics.requires_grad_(False)
        self.log_alpha = torch.full((T,), math.log(args.initial_alpha), device=device, requires_grad=True)
        self.clipped = [[*network.parameters()] for network in (self.actor, *self.critics)] + [[self.log_alpha]]
        self.parameters = [parameter for part in self.clipped for parameter in part]
        groups = [{"params": self.parameters[:-1]}, {"params": [self.log_alpha]}]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.set_optimizer_options()
        self.task_losses = torch.zeros(T, device=device)  # of the last update

        for network in (self.actor, *self.critics, *self.target_critics):
            network.base_modules.skip_unused = self.task.is_cpu
            if args.compile:
                network.routing_network.compile(dynamic=False)
                if not network.base_modules.skip_unused:
                    network.base_modules.compile(dynamic=False)
        if args.compile and device.type == "cuda":
            self.policy, self.update = CUDAGraph(self.policy), CUDAGraph(self.update)

    def set_optimizer_options(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, (self.args.learning_rate, self.args.alpha_learning_rate)):
            group["lr"], group["capturable"] = rate, self.task.is_cuda

    @torch.no_grad()
    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """One observation of each task (T, 39) -> actions (T, 4), routes (T, M, K); both sampled."""
        output, routes = self.actor(obs, self.task, temperature=route_temperatures(self.log_alpha, self.args))
        return sample_action(output)[0], routes

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """policy, for observations and actions on the host. Raises RunError where an action is not finite."""
        action, routes = self.policy(torch.as_tensor(obs, dtype=torch.float32, device=self.task.device))
        action = action.cpu().numpy()
        for index in np.flatnonzero(~np.isfinite(action).all(-1)):
            self.check_losses()
            raise RunError(f"the action of {self.tasks[index]} is not finite")
        return action, routes

    def check_losses(self) -> None:
        """Raises RunError where a task's loss was not finite in the last update."""
        for index in (~self.task_losses.isfinite()).nonzero():
            raise RunError(f"the loss of {self.tasks[index]} is {self.task_losses[index].item()}")

    def update(self, batch: Transition) -> dict[str, Tensor]:
        """One update of everything, from n samples of each task. Returns the mean of each loss over tasks.

        On a CPU it raises RunError, with nothing changed, where a task's loss is not finite. On a GPU nobody waits for
        the losses; check_losses tells.
        """
        args, T = self.args, len(self.task)
        n = len(batch.reward) // T
        task = self.task.repeat_interleave(n)  # (B,)
        alpha, weight = self.log_alpha.detach().exp(), task_weights(self.log_alpha)  # (T,)
        temperature = route_temperatures(self.log_alpha, args)

        # Critics: Top-K for the next action and the target critics, Sample-K for the regression.
        with torch.no_grad():
            next_action, next_log_prob = sample_action(self.actor(batch.next_obs, task)[0])
            next_q = self.target_critics(batch.next_obs, next_action, task)
            reward, terminated = args.reward_scale * batch.reward.view(T, n), batch.terminated.view(T, n)
            target = td_target(reward, terminated, next_q.view(2, T, n), next_log_prob.view(T, n), alpha, args.gamma)
        q = self.critics(batch.obs, batch.action, task, temperature=temperature)
        critic_losses = weight * critic_loss(q.view(2, T, n), target)

        # Actor: the replayed routes, weighted by today's logits. The critics judge with Top-K and learn nothing.
        # NOTE: ResRouting also holds inside these critics, for the gradient to the action, as in the authors' code.
        action, log_prob = sample_action(self.actor(batch.obs, task, routes=batch.routes)[0])
        self.critics.requires_grad_(False)
        q = self.critics(batch.obs, action, task)
        self.critics.requires_grad_(True)
        log_prob = log_prob.view(T, n)
        actor_losses = weight * actor_loss(q.view(2, T, n), log_prob, alpha)
        alpha_losses = alpha_loss(self.log_alpha, log_prob, args.target_entropy)

        losses = critic_losses + actor_losses + alpha_losses
        self.task_losses = losses.detach()
        if self.task.is_cpu:
            self.check_losses()
        self.optimizer.zero_grad()
        masked_mean(losses, args.max_task_loss).backward()
        average_gradients(self.parameters)
        for part in self.clipped:
            nn.utils.clip_grad_norm_(part, args.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log_alpha.clamp_(max=0)  # NOTE: only in the authors' code.
            torch._foreach_lerp_([*self.target_critics.parameters()], [*self.critics.parameters()], args.tau)
        losses = {"critic_loss": critic_losses, "actor_loss": actor_losses, "alpha_loss": alpha_losses}
        return {name: loss.detach().mean() for name, loss in losses.items()}

    def log_values(self) -> dict[str, float]:
        """alpha and route temperature of each task, by the columns of progress.csv."""
        temperature = route_temperatures(self.log_alpha, self.args)
        values = {"alpha": self.log_alpha.exp(), **({} if temperature is None else {"temperature": temperature})}
        return {f"{name}/{task}": x for name in values for task, x in zip(self.tasks, values[name].tolist())}

    def state_dict(self) -> dict:
        parts = {"actor": self.actor, "critics": self.critics, "target_critics": self.target_critics}
        state = {name: part.state_dict() for name, part in {**parts, "optimizer": self.optimizer}.items()}
        return {**state, "log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("actor", "critics", "target_critics", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.set_optimizer_options()


# ------------------------------------------------------------------------------------------------------ evaluation


class Interrupted(Exception):
    """SIGINT or SIGTERM came in the middle of an evaluation."""


class EvaluationAgent:
    """The policy as metaworld.evaluation takes it: Top-K routes and tanh(mean). It counts the modules it uses."""

    def __init__(self, actor: D2RNetwork, tasks: list[str], stop: threading.Event):
        self.actor, self.stop = actor, stop
        self.task = torch.arange(len(tasks), device=next(actor.parameters()).device)
        self.steps, self.used = 0, torch.zeros(len(tasks))

    @torch.no_grad()
    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        """One observation of each task (T, 39) -> actions (T, 4)."""
        if self.stop.is_set():
            raise Interrupted
        obs = torch.as_tensor(observations, dtype=torch.float32, device=self.task.device)
        output, routes = self.actor(obs, self.task)
        self.used += used_modules(routes).sum(-1).cpu()
        self.steps += 1
        return output.chunk(2, dim=-1)[0].tanh().cpu().numpy()

    def reset(self, env_mask: np.ndarray) -> None:
        """Nothing to forget at the end of an episode."""


def evaluate(
    actor: D2RNetwork, envs: gym.vector.AsyncVectorEnv, tasks: list[str], episodes: int, stop: threading.Event
) -> dict[str, float]:
    """Meta-World's own evaluation: a success ends its episode.

    Returns success (a rate), return and modules_used, of each task (success/reach-v3) and averaged (success).
    """
    agent = EvaluationAgent(actor, tasks, stop)
    _, _, successes, returns = metaworld_evaluation(agent, envs, episodes)
    results = {}
    for index, task in enumerate(tasks):
        results[f"success/{task}"] = successes[task]
        results[f"return/{task}"] = float(np.mean(returns[task]))
        results[f"modules_used/{task}"] = agent.used[index].item() / agent.steps
    for name in ("success", "return", "modules_used"):
        results[name] = float(np.mean([results[f"{name}/{task}"] for task in tasks]))
    return results


def evaluate_saved(args: Args, tasks: list[str], saved: dict, device: torch.device) -> None:
    """Evaluate the actor of an actor.pt and print a table of tasks, and the means as the last line."""
    with worker_envs(tasks, args) as envs:
        obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        actor = D2RNetwork(obs_dim, 2 * action_dim, len(tasks), args).to(device)
        actor.load_state_dict(saved["actor"])
        results = evaluate(actor, envs, tasks, args.eval_episodes, threading.Event())
    width = max(map(len, tasks))
    print(f"{'task':{width}}  success    return  modules used")
    for task in tasks:
        success, mean_return, used = (results[f"{name}/{task}"] for name in ("success", "return", "modules_used"))
        print(f"{task:{width}}  {success:7.2f}  {mean_return:8.1f}  {used:12.1f}")
    print(f"mean success {results['success']:.2f}, modules used {results['modules_used']:.1f}")


# ---------------------------------------------------------------------------------------- checkpoints and the log


@dataclass
class Progress:
    """How far a run is; part of its checkpoint."""

    global_step: int = 0  # environment steps, summed over tasks
    updates: int = 0
    evaluated_at: int = 0  # global_step of the last evaluation
    seconds: float = 0.0  # over all resumptions
    update_seconds: float = 0.0  # of these, in updates; on a GPU, in asking for them


def save(contents: dict, path: Path) -> None:
    """torch.save by way of a second file, so that a kill or a full disk leaves the last whole one. Raises RunError."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch turns some of the first into the second
        partial_path.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error}") from error


def save_run(run_dir: Path, args: Args, agent: Agent, replay: ReplayBuffer, progress: Progress) -> None:
    """Write checkpoint.pt, with everything to go on, and actor.pt, with what it takes to evaluate the policy.

    All ranks call it; rank 0 writes. Raises RunError.
    """
    agent.check_losses()
    check_weights([*agent.parameters, *agent.target_critics.parameters()])
    checkpoint = {
        "args": asdict(args),
        "agent": agent.state_dict(),
        "replay": replay.state_dict(),
        "progress": asdict(progress),
        "rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if agent.task.is_cuda else None,
    }
    if world()[0] == 0:
        save(checkpoint, run_dir / "checkpoint.pt")
        save({"args": asdict(args), "actor": agent.actor.state_dict()}, run_dir / "actor.pt")


def load(path: Path, option: str) -> tuple[dict, Args]:
    """The contents of the checkpoint.pt or actor.pt that an option names, and its arguments. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}; --resume takes a run's directory, --evaluate an actor.pt")
    needed = {"--resume": {"args", "agent", "replay", "progress"}, "--evaluate": {"args", "actor"}}[option]
    try:
        if (changed := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"{changed} is not as it was written")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if missing := needed - contents.keys():
            raise ValueError(f"it holds no {' and no '.join(sorted(missing))}")
        return contents, Args(**contents["args"])
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{option}: {path} is damaged or of another version ({reason}); give another") from error


class RunLog:
    """What a run shows: rows in progress.csv and TensorBoard; on the terminal a progress line and a table."""

    def __init__(self, run_dir: Path, tasks: list[str], progress: Progress, tensorboard: bool):
        self.tasks, self.results, self.header_shown = tasks, {}, False
        self.on_terminal, self.shown_at = sys.stderr.isatty(), -math.inf
        self.start_window(progress)

        names = ("success", "return", "modules_used", "alpha", "temperature")
        self.columns = ["global_step", "seconds", "steps_per_second", "updates", "update_ms", *names[:3]]
        self.columns += ["critic_loss", "actor_loss", "alpha_loss"]
        self.columns += [f"{name}/{task}" for name in names for task in tasks]
        self.path, rows = run_dir / "progress.csv", []
        if self.path.exists():  # a killed run may have left half a row, and rows from after its checkpoint: drop them
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
        partial_path = run_dir / "progress.csv.partial"
        with open(partial_path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["global_step"]) <= progress.global_step)
        partial_path.replace(self.path)

        self.tensorboard = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(run_dir, purge_step=progress.global_step + 1)
            except ImportError:
                print("no TensorBoard events: the package tensorboard is not installed", flush=True)

    def start_window(self, progress: Progress) -> None:
        """Speeds are measured from here."""
        self.window = replace(progress)

    def speeds(self, progress: Progress) -> dict[str, float]:
        steps, updates = progress.global_step - self.window.global_step, progress.updates - self.window.updates
        seconds = progress.seconds - self.window.seconds
        speeds = {"global_step": progress.global_step, "seconds": progress.seconds, "updates": progress.updates}
        speeds |= {"steps_per_second": steps / seconds} if steps else {}
        update_seconds = progress.update_seconds - self.window.update_seconds
        return speeds | ({"update_ms": 1e3 * update_seconds / updates} if updates else {})

    def row_due(self, progress: Progress, log_every: int) -> bool:
        return progress.global_step // log_every > self.window.global_step // log_every

    def row(self, values: dict[str, float]) -> None:
        cells = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in values.items()}
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(cells)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, values["global_step"])

    def evaluation(self, global_step: int, results: dict[str, float]) -> None:
        """One line of a table whose columns are the tasks: success rate/modules used."""
        self.results = results
        titles = ["mean", *(task.removesuffix("-v3") for task in self.tasks)]
        cells = [
            f"{results['success' + end]:.2f}/{results['modules_used' + end]:.1f}"
            for end in ("", *(f"/{task}" for task in self.tasks))
        ]
        if not self.header_shown:
            self.print("evaluation: success rate/modules used")
            self.print(f"{'step':>12}  " + "  ".join(f"{title:>9}" for title in titles))
            self.header_shown = True
        self.print(f"{global_step:>12,}  " + "  ".join(f"{c:>{max(9, len(t))}}" for c, t in zip(cells, titles)))

    def print(self, line: str) -> None:
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # clear the progress line
        print(line, flush=True)

    def progress_line(self, progress: Progress, total_steps: int) -> None:
        """Twice a second on a terminal, in place; once a minute in a log file."""
        if time.monotonic() - self.shown_at < (0.5 if self.on_terminal else 60):
            return
        self.shown_at = time.monotonic()
        seconds = progress.seconds - self.window.seconds
        rate = (progress.global_step - self.window.global_step) / seconds
        left = timedelta(seconds=int((total_steps - progress.global_step) / rate))
        line = (
            f"step {progress.global_step:,} of {total_steps:,}, {rate:,.0f} steps/s, "
            f"{(progress.updates - self.window.updates) / seconds:.1f} updates/s, {left} left"
        )
        if self.results:
            line += f", success {self.results['success']:.2f}, modules used {self.results['modules_used']:.1f}"
        start, end = ("\r\033[K", "") if self.on_terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()


def make_run_dir(args: Args, tasks: list[str]) -> Path:
    """The run's directory, with args.json. Raises UsageError where it cannot be written or holds another run."""
    benchmark = args.env_id if len(tasks) == 1 or args.env_id in BENCHMARKS else f"{tasks[0]}+{len(tasks) - 1}"
    default_name = f"{benchmark}-{args.goals}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume) if args.resume else Path(args.results_dir, args.run_name or default_name)
    if not args.resume and (run_dir / "args.json").exists():
        raise UsageError(f"--run-name: {run_dir} holds a run already; choose another name, or --resume {run_dir}")
    packages = ("torch", "numpy", "metaworld", "mujoco", "gymnasium", "tyro")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        facts = {"args": asdict(args), "tasks": tasks, "versions": versions, "commit": commit}
        partial_path = run_dir / "args.json.partial"
        partial_path.write_text(json.dumps(facts, indent=2) + "\n")
        partial_path.replace(run_dir / "args.json")
    except OSError as error:
        option = "--resume" if args.resume else "--results-dir"
        raise UsageError(f"{option}: {run_dir} cannot be written ({error.strerror}); choose another") from error
    return run_dir


# --------------------------------------------------------------------------------------------------- training loop


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of what they do otherwise."""
    stop = threading.Event()
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(args: Args, tasks: list[str], checkpoint: dict | None, device: torch.device) -> None:
    """Train until --total-steps, SIGINT or SIGTERM. Raises UsageError or RunError."""
    (rank, ranks), T = world(), len(tasks)
    run_dir = make_run_dir(args, tasks) if rank == 0 else None
    progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()
    rank_seed = args.seed + 10_000 * rank
    if rank == 0:
        print(
            f"{args.env_id}: {T} task{'s' * (T > 1)} with {args.goals} goals, {args.total_steps:,} steps, "
            f"replay {args.buffer_size:,}, batch {args.batch_size:,}, learning starts at {args.learning_starts:,}, "
            f"evaluation every {args.eval_every:,}, on {device}{f' and {ranks} ranks' * (ranks > 1)}, in {run_dir}",
            flush=True,
        )
    try:
        with stop_signals() as stop, worker_envs(tasks, replace(args, seed=rank_seed)) as envs:
            if ranks > 1:  # after the workers: they should not hold the ranks' connections
                collective(dist.init_process_group, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
            agent = Agent(args, tasks, obs_dim, action_dim, device)
            replay = make_replay(args, T, obs_dim, action_dim, device)
            if checkpoint:
                agent.load_state_dict(checkpoint["agent"])
                replay.load_state_dict(checkpoint["replay"])
                torch.set_rng_state(checkpoint["rng_state"])
                if device.type == "cuda" and checkpoint["cuda_rng_state"] is not None:
                    torch.cuda.set_rng_state(checkpoint["cuda_rng_state"])
            if rank > 0:
                torch.manual_seed(rank_seed + progress.global_step)
            log, losses = RunLog(run_dir, tasks, progress, args.tensorboard) if rank == 0 else None, {}
            envs.call("seed", rank_seed + progress.global_step)  # a resumed run goes on with new goals
            obs, _ = envs.reset()
            checkpointed_at = time.monotonic()
            began = checkpointed_at - progress.seconds

            while True:
                evaluation_at = min((progress.evaluated_at // args.eval_every + 1) * args.eval_every, args.total_steps)
                evaluation_due = progress.evaluated_at < evaluation_at <= progress.global_step
                if log and (evaluation_due or log.row_due(progress, args.log_every)):
                    agent.check_losses()
                    row = log.speeds(progress) | agent.log_values()
                    row |= {name: loss.item() for name, loss in losses.items()}
                    try:
                        if evaluation_due:
                            row |= (results := evaluate(agent.actor, envs, tasks, args.eval_episodes, stop))
                            log.evaluation(progress.global_step, results)
                            progress.evaluated_at = progress.global_step
                            progress.seconds = time.monotonic() - began
                            obs, _ = envs.reset()
                        log.row(row)
                        log.start_window(progress)
                    except Interrupted:
                        pass  # a resumed run begins with this evaluation
                # All ranks stop, and save, in the same step.
                checkpoint_due = time.monotonic() - checkpointed_at > 60 * args.checkpoint_minutes
                agreed = all_reduce(torch.tensor([stop.is_set(), checkpoint_due], dtype=torch.int), dist.ReduceOp.MAX)
                stopped, checkpoint_due = agreed.tolist()
                if stopped or progress.global_step >= args.total_steps:
                    break
                if checkpoint_due:
                    save_run(run_dir, args, agent, replay, progress)
                    checkpointed_at = time.monotonic()

                # One step of every task: the workers step their environments while the learner updates.
                action, routes = agent.act(obs)
                envs.step_async(action)
                if progress.global_step >= args.learning_starts:
                    update_start = time.monotonic()
                    losses = agent.update(replay.sample(args.batch_size // (T * ranks), device))
                    progress.update_seconds += time.monotonic() - update_start
                    progress.updates += 1
                next_obs, reward, terminated, truncated, infos = envs.step_wait()
                last_obs = next_obs.copy()
                for index in np.flatnonzero(terminated | truncated):  # there next_obs is the next episode's first
                    last_obs[index] = infos["final_obs"][index]
                replay.add(Transition(obs, action, reward, last_obs, terminated, routes))
                obs = next_obs
                progress.global_step += T * ranks
                progress.seconds = time.monotonic() - began
                if log:
                    log.progress_line(progress, args.total_steps)

            save_run(run_dir, args, agent, replay, progress)
            if log:
                log.print(
                    f"{'stopped' if stopped else 'finished'} at step {progress.global_step:,}; "
                    f"go on with --resume {run_dir}"
                )
                log.close()
    except (RunError, OSError) as error:
        kept = f"; {run_dir} keeps its last checkpoint" if rank == 0 else f" (rank {rank})"
        raise RunError(f"step {progress.global_step:,}: {error}{kept}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a mistake in what was asked for, 1 for a run that failed."""
    try:
        args, tasks, saved = parse_arguments(argv)
        torch.manual_seed(args.seed)
        device = torch.device("cpu")
        if args.device != "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            if not args.torch_deterministic:
                torch.set_float32_matmul_precision("high")  # TF32
        if args.torch_deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if args.evaluate:
            evaluate_saved(args, tasks, saved, device)
        else:
            train(args, tasks, saved, device)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
