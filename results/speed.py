# SPDX-License-Identifier: MIT
"""Measure the speed of d2r_sac.py and fast.py.

    python results/speed.py                     MT10, a batch of 128 of each task
    python results/speed.py --env-id MT50

Prints tables: medians (quartiles) of updates and acting, in turns; and the speed of whole runs with 1, 2, 4 and 8
environments per task, on a GPU with a batch as many times as large, and with --compile. Leave the machine alone.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import fast
import torch
import tyro
from fast import d2r
from plot import read

OBS, ACTION = 39, 4
FORMS = {d2r: fast.PLAIN, fast: (fast.FastNetwork, fast.FastAgent)}


def in_turns(calls: dict) -> dict:
    """Time functions, given by name: six rounds of six calls, the first of which does not count, after a round to warm
    up, compile and capture. Returns medians (quartiles) in milliseconds."""
    times = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            for _ in range(6):
                start = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        values = [value for i, value in enumerate(values) if i >= 6 and i % 6]
        times[name] = "{1:.4g} ms ({0:.4g} to {2:.4g})".format(*statistics.quantiles(values, n=4, method="inclusive"))
    return times


def make_agent(args, form, mode):
    """update and act of a fresh agent, with a batch of its own routes."""
    T = len(args.tasks)
    B = T * args.batch_size
    torch.manual_seed(0)
    d2r.D2RNetwork, agent = FORMS[form]
    agent = agent(OBS, ACTION, T, args, args.device)
    if "compile" in mode:
        for network in (agent.actor, *agent.critics, *agent.target_critics):
            network.compile(dynamic=False, options={"fallback_random": True})
    with torch.no_grad(), torch.device(args.device):
        obs, next_obs, action = torch.randn(B, OBS), torch.randn(B, OBS), 2 * torch.rand(B, ACTION) - 1
        task = agent.tasks.repeat_interleave(args.batch_size)
        _, routes = agent.actor(obs, task, temperature=torch.ones(T))
        batch = (obs, action, torch.rand(B), next_obs, torch.zeros(B, dtype=torch.bool), routes.to(torch.int16))
    graph = (lambda function: function) if mode == "eager" else d2r.CUDAGraph
    update, act = graph(agent.update), graph(agent.act)
    observations = torch.randn(T, OBS)
    return partial(update, *batch), lambda: act(observations.to(args.device))[0].cpu()


def updates_and_acting(args) -> None:
    """Time updates and acting of both forms, in turns."""
    modes = ["eager"] if args.device == "cpu" else ["eager", "captured", "captured, --compile"]
    calls = {}
    for mode in modes:
        for form in FORMS:
            calls[f"update, {mode}", form], calls[f"acting, {mode}", form] = make_agent(args, form, mode)
    times = in_turns(calls)
    print(f"\n| {args.env_id}, batch {args.batch_size} of each task | d2r_sac.py | fast.py |\n|---|---|---|")
    for what in dict.fromkeys(what for what, _ in calls):
        print(f"| {what} | {times[what, d2r]} | {times[what, fast]} |", flush=True)


def loop(args, form) -> str:
    """Steps per second of a run: median and range of five rows, after a first one, in which it warms up."""
    E = args.envs_per_task
    rounds = 300 if args.device == "cuda" else 32_000 // len(args.tasks) // args.batch_size  # between two rows
    with tempfile.TemporaryDirectory() as run_dir:
        command = f"{sys.executable} {form.__file__} --env-id {args.env_id} --batch-size {args.batch_size} "
        command += f"--envs-per-task {E} --device {args.device} --learning-starts {E} --steps {7 * rounds * E} "
        command += f"--log-every {rounds * E} --eval-every 1000000000 --eval-episodes 1 --run-dir {run_dir}"
        options = ["--compile"] if args.device == "cuda" else []
        subprocess.run([*command.split(), *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        speeds = [row["steps_per_second"] for row in read(Path(run_dir))][1:6]  # the seventh contains an evaluation
    return f"{statistics.median(speeds):,.1f} steps/s ({min(speeds):,.1f} to {max(speeds):,.1f})"


def main(env_id: str = "MT10", batch_size: int = 128) -> None:
    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 32  # of both forms; beyond it torch.compile silently stops
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = torch.cuda.get_device_name() if cuda else f"{len(cpus)} cores of {cpus[0].split(': ')[1]}"
    print(f"Commit {commit}; {machine}; {torch.get_num_threads()} threads; torch {torch.__version__}.")
    args = d2r.Args(env_id=env_id, batch_size=batch_size)
    updates_and_acting(args)
    print("\n| environments per task | batch of each task | the whole loop, d2r_sac.py | fast.py |\n|---|---|---|---|")
    for args.envs_per_task in (1, 2, 4, 8):
        args.batch_size = batch_size * (args.envs_per_task if cuda else 1)
        print(f"| {args.envs_per_task} | {args.batch_size} | {loop(args, d2r)} | {loop(args, fast)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
