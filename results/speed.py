# SPDX-License-Identifier: MIT
"""Measure the speed of d2r_sac.py, and print a table in Markdown: python results/speed.py [--mt50] [--device cpu].

What is compared takes turns of six calls, the first of which does not count. Leave the machine alone meanwhile.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

ROUNDS, CALLS = 6, 5


def seconds(function, device) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def matrix_products(args, T: int, obs_dim: int, action_dim: int, device):
    """The matrix products of one update, all modules for all samples: a function, and its floating-point operations.

    Forward: the actor, the target critics, the critics; the actor, the critics again. Backward: gradients of weights
    and inputs in the critics' regression and in the actor, of inputs alone in the critics inside the actor's loss.
    """
    M, H, (*encoder, E), router = args.num_modules, args.module_width, args.encoder_widths, args.router_widths

    def layers(input_dim, output_dim):
        paths = [input_dim, *encoder, E], [E, *router, M * (M + 1) // 2], [E, H]
        pairs = [pair for path in paths for pair in pairwise(path)]
        return [*pairs, (T, E), *[(H, H)] * (M - 1), (H, output_dim)]

    actor, critic, B = layers(obs_dim, 2 * action_dim), layers(obs_dim + action_dim, 1), args.batch_size
    shapes = [(B, i, o) for i, o in 2 * actor + 6 * critic]  # forward
    shapes += [(B, o, i) for i, o in actor + 4 * critic] + [(i, B, o) for i, o in actor + 2 * critic]  # backward
    operands = {
        shape: (torch.randn(shape[:2], device=device), torch.randn(shape[1:], device=device)) for shape in shapes
    }
    results = {shape: a @ b for shape, (a, b) in operands.items()}

    def multiply():
        for shape in shapes:
            torch.mm(*operands[shape], out=results[shape])

    return multiply, sum(2 * a * b * c for a, b, c in shapes)


def make_agent(env_id, batch_size, device, all_modules=False, **changes):
    """A fresh agent, and a batch for it of random observations and its own routes."""
    args, tasks, _ = d2r.parse_arguments(["--env-id", env_id, "--batch-size", str(batch_size)])
    for name, value in changes.items():
        setattr(args, name, value)
    torch.manual_seed(0)
    agent = d2r.Agent(args, tasks, 39, 4, device)
    if all_modules:  # every module takes the one before as a source
        last = torch.tensor([i * (i + 3) // 2 for i in range(args.num_modules)])
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.routing_network.router[-1].bias.data[last] += 20
    B, task = batch_size, agent.task.repeat_interleave(batch_size // len(tasks))
    obs, action = torch.randn(B, 39, device=device), torch.rand(B, 4, device=device) * 2 - 1
    with torch.no_grad():
        _, routes = agent.actor(obs, task, temperature=torch.ones(len(tasks), device=device))
    reward, terminated = torch.rand(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)
    batch = d2r.Transition(obs, action, reward, torch.randn(B, 39, device=device), terminated, routes.to(torch.uint8))
    return agent, batch


def modules_used(agent, batch) -> float:
    """The mean over the networks and their passes in one update, on a CPU."""
    counts, used_modules = [], d2r.used_modules

    def counted(routes):
        counts.append(used_modules(routes).sum(-1).float().mean().item())
        return used_modules(routes)

    d2r.used_modules = counted
    agent.update(batch)
    d2r.used_modules = used_modules
    return statistics.mean(counts)


def updates_and_acting(env_id, batch_size, device, rows) -> float:
    """Time the floor, the updates and acting, in turns. Returns the median of the default update, in seconds."""
    variants = {"eager": {}, "`--compile`": {"compile": True}, "`--precision bfloat16`": {"precision": "bfloat16"}}
    if device.type == "cuda":
        variants["`--compile --precision bfloat16`"] = {"compile": True, "precision": "bfloat16"}
    else:  # on a GPU every module is computed in any case
        variants["eager, every module used"] = {"all_modules": True}
    agents = {name: make_agent(env_id, batch_size, device, **changes) for name, changes in variants.items()}
    T = len(agents["eager"][0].tasks)
    multiply, operations = matrix_products(agents["eager"][0].args, T, 39, 4, device)
    obs = np.random.default_rng(0).normal(size=(T, 39))
    times = {name: [] for name in ("floor", *agents, *(f"acting, {name}" for name in agents))}
    for measured in (False, *[True] * ROUNDS):  # the first round warms up, compiles and captures
        for call in range(CALLS + 1):
            times["floor"] += [seconds(multiply, device)] * (measured and call > 0)
        for name, (agent, batch) in agents.items():
            for call in range(CALLS + 1):
                update = seconds(lambda agent=agent, batch=batch: agent.update(batch), device)
                acting = seconds(lambda agent=agent: agent.act(obs), device)
                times[name] += [update] * (measured and call > 0)
                times[f"acting, {name}"] += [acting] * (measured and call > 0)
    floor = statistics.median(times["floor"])
    for name, values in times.items():
        median, low, high = quartiles(values)
        ms = f"{1e3 * median:.4g} ms ({1e3 * low:.4g} to {1e3 * high:.4g})"
        if name == "floor":
            title = f"matrix products alone: {operations / 1e9:.1f} GFLOP at {operations / median / 1e9:,.0f} GFLOP/s"
            rows.append((title, ms, "1"))
        elif name in agents:
            used = f": {modules_used(*agents[name]):.1f} modules used" if device.type == "cpu" else ""
            rows.append((f"update, {name}{used}", ms, f"{median / floor:.2f}"))
        else:
            rows.append((f"{name}: {T} tasks, after an update", ms, ""))
    return statistics.median(times["eager"])


def environments(env_id) -> float:
    """Seconds that a step of every task takes, with random actions."""
    args, tasks, _ = d2r.parse_arguments(["--env-id", env_id])
    rng = np.random.default_rng(0)
    with d2r.worker_envs(tasks, args) as envs:
        envs.reset()
        actions = rng.uniform(-1, 1, (40, 10, len(tasks), 4)).astype(np.float32)
        times = [seconds(lambda a=a: [envs.step(action) for action in a], torch.device("cpu")) / 10 for a in actions]
    return statistics.median(times)


def child(mode: str, *arguments: str, environment=()) -> dict:
    """Run one of the functions below in a process of its own. Returns what it prints."""
    command = [sys.executable, __file__, mode, *arguments]
    variables = {**os.environ, "STARTED_AT": str(time.time()), **dict(environment)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables) as process:
        out, error = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)}:\n{out}{error}")
    return json.loads(out.splitlines()[-1])


def first_update(env_id, batch_size, device) -> None:
    """Child: print the seconds that the first action and the first update take with --compile."""
    agent, batch = make_agent(env_id, int(batch_size), torch.device(device), compile=True)
    obs = np.zeros((len(agent.tasks), 39))
    print(json.dumps(seconds(lambda: (agent.act(obs), agent.update(batch), agent.update(batch)), agent.task.device)))


def memory(pid, file: str, name: str) -> float:
    """A line of a process's accounts, in GB."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1e6


def loop(env_id, batch_size, device, *options) -> None:
    """Child: train a while with a replay that is full from the start, and print what progress.csv says."""
    make_replay, act, filling, acted_at, workers = d2r.make_replay, d2r.Agent.act, [], [], []

    def full_replay(*arguments):
        start, replay = time.time(), make_replay(*arguments)
        replay.size = replay.capacity
        for ring in replay.storage[:4]:
            ring.normal_()
        replay.storage.terminated.fill_(False)
        M, K = replay.storage.routes.shape[-2:]
        table = d2r.routing_table(torch.zeros(replay.T, M * (M + 1) // 2), M)
        replay.storage.routes[:] = d2r.sample_k(table, K, torch.ones(replay.T))
        filling.append(time.time() - start)
        return replay

    def timed_act(agent, obs):
        acted_at.append(time.time() - float(os.environ["STARTED_AT"]) - filling[0])
        if len(acted_at) == 20:
            children = multiprocessing.active_children()
            workers.append(
                sum(memory(process.pid, "smaps_rollup", "Pss:") for process in children)
            )  # shared pages once
        return act(agent, obs)

    d2r.make_replay, d2r.Agent.act = full_replay, timed_act
    T = len(d2r.task_names(env_id))
    steps = T * (6000 if device == "cuda" else 192_000 // int(batch_size))
    with tempfile.TemporaryDirectory() as results_dir:
        arguments = f"--env-id {env_id} --batch-size {batch_size} --device {device} --learning-starts {T} "
        arguments += f"--total-steps {steps} --log-every {steps // 6} --eval-every {100 * steps} --eval-episodes 1 "
        arguments += f"--episode-length 20 --no-tensorboard --results-dir {results_dir} --run-name run"
        if d2r.main([*arguments.split(), *options]):
            sys.exit(1)
        with open(Path(results_dir, "run", "progress.csv"), newline="") as file:
            rows = list(csv.DictReader(file))[1:]  # the first one warms up
    values = {name: [float(row[name]) for row in rows] for name in ("steps_per_second", "update_ms")}
    gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(
        json.dumps(
            {
                **values,
                "peak": memory("self", "status", "VmHWM:"),
                "workers": workers[0],
                "gpu": gpu / 1e9,
                "start": acted_at[0],
            }
        )
    )


def measure(env_id, batch_size, device) -> None:
    """Print the table of one benchmark and batch size."""
    torch._dynamo.reset()
    rows = []
    update = updates_and_acting(env_id, batch_size, device, rows)
    with tempfile.TemporaryDirectory() as cache:
        options = {"TORCHINDUCTOR_CACHE_DIR": cache}
        for title in ("cold", "warm"):
            value = child("first-update", env_id, str(batch_size), device.type, environment=options.items())
            rows.append((f"`--compile`, first action and update, {title}", f"{value:.1f} s", ""))
    step = environments(env_id)
    T = len(d2r.task_names(env_id))
    rows.append((f"environments alone, {T} workers", f"{T / step:,.0f} steps/s, {1e3 * step:.1f} ms", ""))
    for options in ([], ["--compile"]) if device.type == "cuda" else ([],):
        run = child("loop", env_id, str(batch_size), device.type, *options)
        median, low, high = quartiles(run["steps_per_second"])
        loop_title = " ".join(["the whole loop", *(f"`{option}`" for option in options)])
        speed = f"{median:,.1f} steps/s ({low:,.1f} to {high:,.1f}), {1e3 * T / median:.4g} ms"
        rows.append((f"{loop_title}: a step of each task, and an update", speed, ""))
        if device.type == "cpu":
            its_update = statistics.median(run["update_ms"]) / 1e3
            for title, longer in (("an update alone", update), (f"its updates, {1e3 * its_update:.4g} ms", its_update)):
                beyond = 100 * (T / median / max(longer, step) - 1)
                rows.append((f"the loop beyond the longer of the environments and {title}", f"{beyond:+.0f} %", ""))
    rows.append(("from the start of a run to its first step", f"{run['start']:.1f} s", ""))
    rows.append(("peak memory of the learner, replay full", f"{run['peak']:.2f} GB", ""))
    rows.append((f"memory of the {T} workers together", f"{run['workers']:.2f} GB", ""))
    if device.type == "cuda":
        rows.append(("peak memory on the GPU", f"{run['gpu']:.2f} GB", ""))
    print(f"\n## {env_id}, batch {batch_size:,}\n\n| | median (quartiles) | of the floor |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mt50", action="store_true", help="MT50 at batch 6400 instead of MT10 at 1280 and 320")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    print(
        f"Commit {commit}; {name}; {len(cpus)} cores of {cpus[0].split(': ')[1]}; {torch.get_num_threads()} threads; ",
        end="",
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}. {ROUNDS * CALLS} repetitions.")
    for env_id, batch_size in [("MT50", 6400)] if options.mt50 else [("MT10", 1280), ("MT10", 320)]:
        measure(env_id, batch_size, device)


if __name__ == "__main__":
    children = {"first-update": first_update, "loop": loop}
    if sys.argv[1:2] and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
    else:
        main()
