# SPDX-License-Identifier: MIT
"""Measure the speed of d2r_sac.py, and print tables in Markdown. Leave the machine alone meanwhile.

    python results/speed.py                                     MT10, batch 1280
    python results/speed.py --env-id MT50 --batch-size 6400

Updates and acting take turns, in a new order each round, of six calls, the first of which does not count. The loop is
whole runs, with 1, 2, 4 and 8 environments per task: on a GPU with a batch as many times as large, and with --compile.
"""

import csv
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

ROUNDS, CALLS, OBS, ACTION = 6, 5, 39, 4


def seconds(function) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> str:
    """Median, lower and upper quartile, in milliseconds."""
    low, median, high = (1e3 * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median:.4g} ms ({low:.4g} to {high:.4g})"


def make_agent(args, form):
    """update and act of a fresh agent, with a batch of its own routes."""
    T, B = len(args.tasks), args.batch_size
    torch.manual_seed(0)
    agent = d2r.Agent(OBS, ACTION, T, args, args.device)
    if "compile" in form:
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    with torch.no_grad(), torch.device(args.device):
        obs, next_obs, action = torch.randn(B, OBS), torch.randn(B, OBS), 2 * torch.rand(B, ACTION) - 1
        task = agent.tasks.repeat_interleave(B // T)
        _, routes = agent.actor(obs, task, temperature=torch.ones(T))
        batch = (obs, action, torch.rand(B), next_obs, torch.zeros(B, dtype=torch.bool), routes.to(torch.int16))
    graph = (lambda function: function) if form == "eager" else d2r.CUDAGraph
    update, act = graph(agent.update), graph(agent.act)
    observations = torch.randn(T, OBS)
    return partial(update, *batch), lambda: act(observations.to(args.device))[0].cpu()


def updates_and_acting(args) -> None:
    """Time the forms of an update and of acting, in turns."""
    forms = ["eager"] if args.device == "cpu" else ["eager", "captured", "captured, --compile"]
    agents = {form: make_agent(args, form) for form in forms}
    calls = {f"update, {name}": update for name, (update, _) in agents.items()}
    calls |= {f"acting, {name}": act for name, (_, act) in agents.items()}
    for call in calls.values():
        seconds(lambda call=call: [call() for _ in range(CALLS)])  # to warm up, compile and capture
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample([*agents], len(agents)):
            for kind in ("update", "acting"):
                times[f"{kind}, {name}"] += [seconds(calls[f"{kind}, {name}"]) for _ in range(CALLS + 1)][1:]
    print(f"\n| {args.env_id}, batch {args.batch_size:,} | median (quartiles) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {quartiles(values)} |")


def loop(args) -> list[float]:
    """Steps per second between the rows of a run, without the first, in which it warms up."""
    stride = args.envs_per_task * len(args.tasks)
    steps = stride * (1800 if args.device == "cuda" else 192_000 // args.batch_size)
    with tempfile.TemporaryDirectory() as results_dir:
        command = f"{sys.executable} {d2r.__file__} --env-id {args.env_id} --batch-size {args.batch_size} "
        command += f"--envs-per-task {args.envs_per_task} --device {args.device} --learning-starts {stride} "
        command += f"--total-steps {steps} --log-every {steps // 6} --eval-every {100 * steps} --eval-episodes 1 "
        command += f"--results-dir {results_dir} --run-name run"
        options = ["--compile"] if args.device == "cuda" else []
        subprocess.run([*command.split(), *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [*csv.DictReader(Path(results_dir, "run", "progress.csv").read_text().splitlines())]
    points = [(float(row["global_step"]), float(row["seconds"])) for row in rows]
    return [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(points)]


def main(env_id: str = "MT10", batch_size: int = 1280) -> None:
    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{len(cpus)} cores of {cpus[0].split(': ')[1]}; {torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_name() if cuda else "no GPU"
    print(f"Commit {commit}; {gpu}; {machine}; Python {platform.python_version()}, torch {torch.__version__}.")
    args = d2r.Args(env_id=env_id, batch_size=batch_size)
    updates_and_acting(args)
    print("\n| environments per task | the whole loop | batch |\n|---|---|---|")
    for args.envs_per_task in (1, 2, 4, 8):
        args.batch_size = batch_size * (args.envs_per_task if cuda else 1)
        speeds = loop(args)
        speed = f"{statistics.median(speeds):,.1f} steps/s ({min(speeds):,.1f} to {max(speeds):,.1f})"
        print(f"| {args.envs_per_task} | {speed} | {args.batch_size:,} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
