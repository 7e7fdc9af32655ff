# SPDX-License-Identifier: MIT
"""Measure the speed of d2r_sac.py, and print a table in Markdown.

    python results/speed.py                      MT10, batch 1280 and, on a CPU, 320
    python results/speed.py --mt50               MT50, batch 6400
    python results/speed.py --before FILE        updates and acting, in turns with FILE, an earlier d2r_sac.py

On a CPU what is compared takes turns, in a new order each round, of six calls, the first of which does not count. On a
GPU each form has a process of its own: torch.compile leaves a function uncompiled after eight forms. The loop runs with
1, 2, 4 and 8 environments per task: on a GPU with a batch as many times as large, on a CPU with the same one. Leave the
machine alone meanwhile.
"""

import argparse
import csv
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

ROUNDS, CALLS, OBS, ACTION = 6, 5, 39, 4
ENVS_PER_TASK = 1, 2, 4, 8


def seconds(function, device) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(title: str, value: str, multiple: str = "") -> None:
    print(f"| {title} | {value} | {multiple} |", flush=True)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def matrix_products(args, T, device, used=None):
    """The matrix products of one update, in their shapes: a function, and its floating-point operations.

    used: for each of the eight passes, the samples of each module; else every module is computed for all. Passes
    forward: the actor, the target critics, the critics; the actor, the critics again. Backward: gradients of weights
    and inputs in the critics' regression and in the actor, of inputs alone in the critics inside the actor's loss.
    """
    M, H, B = args.num_modules, args.module_width, args.batch_size
    (*encoder, E), router = args.encoder_widths, args.router_widths
    shapes = []
    for n, kind in enumerate(["actor", *["critic"] * 4, "actor", *["critic"] * 2]):
        input_dim, output_dim = (OBS, 2 * ACTION) if kind == "actor" else (OBS + ACTION, 1)
        paths = [input_dim, *encoder, E], [E, *router, M * (M + 1) // 2], [E, H]
        layers = [(B, *pair) for path in paths for pair in pairwise(path)] + [(B, T, E), (B, H, output_dim)]
        layers += [(samples, H, H) for samples in (used[n][1:] if used else [B] * (M - 1)) if samples]
        shapes += layers
        shapes += [(samples, o, i) for samples, i, o in layers] if n >= 3 else []
        shapes += [(i, samples, o) for samples, i, o in layers] if n in (3, 4, 5) else []
    operands = {s: (torch.randn(s[:2], device=device), torch.randn(s[1:], device=device)) for s in shapes}
    results = {shape: a @ b for shape, (a, b) in operands.items()}

    def multiply():
        for shape in shapes:
            torch.mm(*operands[shape], out=results[shape])

    return multiply, sum(2 * a * b * c for a, b, c in shapes)


def make_agent(env_id, batch_size, device, module=d2r, all_modules=False, eager=False, **changes):
    """A fresh agent of a d2r_sac.py: its update and act, with a batch of its own routes."""
    args = module.parse_arguments(["--env-id", env_id, "--batch-size", str(batch_size)])[0]
    vars(args).update(changes)
    T = len(module.task_names(env_id))
    torch.manual_seed(0)
    agent = module.Agent(OBS, ACTION, T, args, device)
    if all_modules:  # every module takes the one before as a source
        last = torch.tensor([i * (i + 3) // 2 for i in range(args.num_modules)])
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.routing_network.router[-1].bias.data[last] += 20
    torch.manual_seed(0)
    obs, next_obs, action = torch.randn(2 * batch_size, OBS).split(batch_size) + (
        torch.rand(batch_size, ACTION) * 2 - 1,
    )
    batch = [obs, action, torch.rand(batch_size), next_obs, torch.zeros(batch_size, dtype=torch.bool)]
    batch = [tensor.to(device) for tensor in batch]
    with torch.no_grad():
        task = agent.task.repeat_interleave(batch_size // T)
        _, routes = agent.actor(batch[0], task, temperature=torch.ones(T, device=device))
    batch.append(routes.to(torch.uint8))
    observations = np.random.default_rng(0).normal(size=(T, OBS)).astype(np.float32)
    if args.compile and device.type == "cuda":
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    graph = (lambda function: function) if eager else module.CUDAGraph
    act, update = graph(agent.act), graph(agent.update)
    return agent, lambda: update(*batch), lambda: act(torch.as_tensor(observations, device=device))[0].cpu().numpy()


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: neither views nor empty tensors."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.number += not (function.is_view or "empty" in function.name() or "detach" in function.name())
        return result


def operations(env_id) -> int:
    """Those of one update without clipping and Adam, whose number depends on the device, in the form for a GPU."""
    args = d2r.Args(env_id=env_id)
    B, M, K, meta = args.batch_size, args.num_modules, args.top_k, torch.device("meta")
    with mock.patch("torch.optim.Adam"), mock.patch("torch.nn.utils.clip_grad_norm_"):
        agent = d2r.Agent(OBS, ACTION, len(args.tasks), args, meta)
        shapes = (B, OBS), (B, ACTION), (B,), (B, OBS)
        batch = [torch.empty(shape, device=meta) for shape in shapes] + [torch.empty(B, dtype=torch.bool, device=meta)]
        with Operations() as count:
            agent.update(*batch, torch.empty(B, M, K, dtype=torch.uint8, device=meta))
    return count.number


def samples_used(update) -> list[list[int]]:
    """Of each module, in each pass of one update on a CPU."""
    counts, used_modules = [], d2r.used_modules

    def counted(routes):
        used = used_modules(routes)
        counts.append(used.sum(0).tolist())
        return used

    d2r.used_modules = counted
    update()
    d2r.used_modules = used_modules
    return counts


def updates_and_acting(env_id, batch_size, device, before) -> float:
    """Time the floors, the updates and acting, in turns. Returns the median of the default update, in seconds."""
    if device.type == "cuda":
        return on_gpu(env_id, batch_size)
    variants = {"eager": {}, "every module used": {"all_modules": True}}
    if before:
        now, variants = variants, {}
        for name, changes in now.items():
            variants |= {name: changes, f"{name}, before": changes | {"module": before}}
    agents = {name: make_agent(env_id, batch_size, device, **changes) for name, changes in variants.items()}
    agent, update, _ = agents["eager"]
    T, floors, used = len(agent.task), {}, samples_used(update)
    floors["every module"] = matrix_products(agent.args, T, device)
    floors["the modules used"] = matrix_products(agent.args, T, device, used)
    times = {name: [] for name in (*floors, *agents, *(f"acting, {name}" for name in agents))}
    for warming_up in (True, *[False] * ROUNDS):
        for name, (multiply, _) in floors.items():
            times[name] += [seconds(multiply, device) for _ in range(CALLS + 1)][1:]
        for name in random.sample([*agents], len(agents)):
            _, update, act = agents[name]
            pairs = [(seconds(update, device), seconds(act, device)) for _ in range(CALLS + 1)][1:]
            times[name] += [pair[0] for pair in pairs]
            times[f"acting, {name}"] += [pair[1] for pair in pairs]
        if warming_up:
            times = {name: [] for name in times}
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        median, low, high = quartiles(values)
        ms = f"{1e3 * median:.4g} ms ({1e3 * low:.4g} to {1e3 * high:.4g})"
        if name in floors:
            operations = floors[name][1]
            speed = f"{operations / 1e9:.1f} GFLOP at {operations / median / 1e9:,.0f} GFLOP/s"
            row(f"matrix products alone, {name}: {speed}", ms)
        elif name in agents:
            title, of_floors = f"update, {name}", [f"{median / medians[floor]:.2f}" for floor in floors]
            if name == "eager":
                title += f": {sum(map(sum, used)) / len(used) / batch_size:.1f} modules used"
            row(title, ms, " / ".join(of_floors))
        else:
            row(f"{name}: {T} tasks, after an update", ms)
    if before:
        for now, then in pairwise(times):
            if then == f"{now}, before":
                row(f"{now}, compared with before", f"{medians[now] / medians[then]:.3f}")
    return medians["eager"]


FORMS = {"eager": {"eager": True}, "captured": {}, "captured, `--compile`": {"compile": True}}


def on_gpu(env_id, batch_size) -> float:
    """Time the forms of an update, each in a process of its own. Returns the median of the captured one, in seconds."""
    for name in FORMS:
        form = child("one-form", env_id, str(batch_size), name)
        median, low, high = (f"{1e3 * value:.4g}" for value in quartiles(form["updates"]))
        kernels = f"{form['kernels']:.0f} kernels, together {form['busy']:.4g} ms"
        row(f"update, {name}: {kernels}", f"{median} ms ({low} to {high})", f"{form['floor']:.2f}")
        median, low, high = (f"{1e3 * value:.4g}" for value in quartiles(form["acting"]))
        row(f"acting, {name}: observations from the host, actions to it", f"{median} ms ({low} to {high})")
        row(f"first four actions and updates, {name}, cold", f"{form['first']:.1f} s")
        print(f"{name}: the kernels that take longest: microseconds of an update, number, name", file=sys.stderr)
        for kernel in form["longest"]:
            print(*kernel, file=sys.stderr)
        if name == "captured":
            captured = statistics.median(form["updates"])
    return captured


def one_form(env_id, batch_size, name) -> None:
    """Child: time one form of the update on a GPU, and count its kernels."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda")
    torch.set_float32_matmul_precision("high")
    agent, update, act = make_agent(env_id, int(batch_size), device, **FORMS[name])
    first = seconds(lambda: [(act(), update()) for _ in range(4)], device)  # the fourth captures
    times = [(seconds(update, device), seconds(act, device)) for _ in range(20 + ROUNDS * CALLS)][20:]
    multiply, _ = matrix_products(agent.args, len(agent.task), device)
    floor = statistics.median([seconds(multiply, device) for _ in range(20)])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(lambda: [update() for _ in range(3)], device)
    kernels, counts = {}, {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0) + event.time_range.elapsed_us() / 3
            counts[event.name] = counts.get(event.name, 0) + 1 / 3
    longest = [(round(t), round(counts[n]), n[:90]) for n, t in sorted(kernels.items(), key=lambda k: -k[1])[:25]]
    updates, acting = zip(*times)
    facts = {
        "updates": updates,
        "acting": acting,
        "first": first,
        "longest": longest,
        "busy": sum(kernels.values()) / 1e3,
    }
    print(json.dumps(facts | {"kernels": sum(counts.values()), "floor": statistics.median(updates) / floor}))


def environments(env_id, envs_per_task) -> float:
    """Seconds that a step of all environments takes, with random actions."""
    args = d2r.Args(env_id=env_id, envs_per_task=envs_per_task)
    shape = 40, 10, envs_per_task * len(args.tasks), ACTION
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    with closing(d2r.make_envs(args, args.seed)) as envs:
        envs.reset()
        times = [seconds(lambda a=a: [envs.step(action) for action in a], torch.device("cpu")) / 10 for a in actions]
    return statistics.median(times)


def child(mode: str, *arguments: str, **environment) -> dict:
    """Run one of the functions below in a process of its own. Returns what it prints."""
    command = [sys.executable, __file__, mode, *arguments]
    variables = {**os.environ, "STARTED_AT": str(time.time()), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(pid, file: str, name: str) -> float:
    """A line of a process's accounts, in GB."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1e6


def loop(env_id, batch_size, device, envs_per_task, *options) -> None:
    """Child: train a while with a replay that is full from the start, and print what progress.csv says."""
    acted_at, updates, filling, workers = [], [], [], []
    act, update = d2r.Agent.act, d2r.Agent.update

    class FullReplay(d2r.ReplayBuffer):
        def __init__(self, capacity, T, obs_dim, action_dim, M, K, device):
            start = time.time()
            super().__init__(capacity, T, obs_dim, action_dim, M, K, device)
            self.added = capacity
            *numbers, terminated, routes = self.columns
            for column in numbers:
                column.normal_()
            terminated.zero_()
            logits = torch.zeros(T, M, M).masked_fill(torch.ones(M, M).triu(1) > 0, -torch.inf)
            routes.view(-1, T, M, K)[:] = d2r.sample_k(logits, K)
            filling.append(time.time() - start)

    def timed_act(agent, obs, deterministic=False):
        acted_at.append(time.time() - float(os.environ["STARTED_AT"]) - filling[0])
        if len(acted_at) == 4:  # after that, a GPU's graph; shared pages once
            workers.extend(memory(p.pid, "smaps_rollup", "Pss:") for p in multiprocessing.active_children())
        return act(agent, obs, deterministic)

    def timed_update(agent, *batch):
        start = time.perf_counter()
        losses = update(agent, *batch)
        updates.append(time.perf_counter() - start)
        return losses

    d2r.ReplayBuffer, d2r.Agent.act, d2r.Agent.update = FullReplay, timed_act, timed_update
    N = int(envs_per_task) * len(d2r.task_names(env_id))
    steps = N * (1800 if device == "cuda" else 192_000 // int(batch_size))
    with tempfile.TemporaryDirectory() as results_dir:
        arguments = f"--env-id {env_id} --batch-size {batch_size} --device {device} --learning-starts {N} "
        arguments += f"--envs-per-task {envs_per_task} "
        arguments += f"--total-steps {steps} --log-every {steps // 6} --eval-every {100 * steps} --eval-episodes 1 "
        arguments += f"--results-dir {results_dir} --run-name run"
        d2r.main([*arguments.split(), *options])
        with open(Path(results_dir, "run", "progress.csv"), newline="") as file:
            rows = [(float(row["global_step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(rows)]  # without the first, which warms up
    facts = {"speeds": speeds, "update": statistics.median(updates), "start": acted_at[0], "workers": sum(workers)}
    facts["gpu"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0
    print(json.dumps({**facts, "peak": memory("self", "status", "VmHWM:")}))


def measure(env_id, batch_size, device, before) -> None:
    """Print the table of one benchmark and batch size."""
    print(f"\n## {env_id}, batch {batch_size:,}\n\n| | median (quartiles) | multiple of the floors |\n|---|---|---|")
    row("operations of an update in the form for a GPU, without clipping and Adam", f"{operations(env_id):,}")
    update = updates_and_acting(env_id, batch_size, device, before)
    T, cuda = len(d2r.task_names(env_id)), device.type == "cuda"
    if not before:
        for options in ([], ["--compile"]) if cuda else ([],):
            title = " ".join(["the whole loop", *(f"`{option}`" for option in options)])
            print(f"\n| environments per task | environments alone | {title} | batch | workers | learner | start |")
            print("|---|---|---|---|---|---|---|")
            for E in (E for E in ENVS_PER_TASK if E * T <= 80 or cuda):
                size = batch_size * E if cuda else batch_size
                step = environments(env_id, E)
                run = child("loop", env_id, str(size), device.type, str(E), *options)
                median, low, high = quartiles(run["speeds"])
                cells = [E, f"{E * T / step:,.0f} steps/s, {1e3 * step:.1f} ms"]
                cells += [
                    f"{median:,.1f} steps/s ({low:,.1f} to {high:,.1f}), {1e3 * E * T / median:.4g} ms",
                    f"{size:,}",
                ]
                cells += [f"{run['workers']:.2f} GB", f"{run['peak']:.2f} GB", f"{run['start']:.1f} s"]
                print("|", " | ".join(map(str, cells)), "|", flush=True)
                if cuda:
                    print(f"{E} environments per task: {run['gpu']:.2f} GB on the GPU", file=sys.stderr)
                elif E == 1:
                    beyond = [100 * (T / median / max(longer, step) - 1) for longer in (update, run["update"])]
                    text = "{:+.0f} % (alone), {:+.0f} % (in the loop)".format(*beyond)
                    print(f"the loop beyond the longer of the environments and an update: {text}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mt50", action="store_true", help="MT50 at batch 6400 instead of MT10 at 1280 and 320")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--before", help="an earlier d2r_sac.py, from ac2079e on: time its update and acting beside ours"
    )
    options = parser.parse_args()
    device, before = torch.device(options.device), None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if options.before:
        spec = importlib.util.spec_from_file_location("before", options.before)
        before = sys.modules["before"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(before)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{len(cpus)} cores of {cpus[0].split(': ')[1]}; {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"Commit {commit}; {name}; {machine}; {versions}. {ROUNDS * CALLS} repetitions.")
    sizes = [("MT10", 1280)] if device.type == "cuda" else [("MT10", 1280), ("MT10", 320)]
    for env_id, batch_size in [("MT50", 6400)] if options.mt50 else sizes:
        measure(env_id, batch_size, device, before)


if __name__ == "__main__":
    children = {"one-form": one_form, "loop": loop}
    if sys.argv[1:2] and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
    else:
        main()
