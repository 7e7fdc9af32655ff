# SPDX-License-Identifier: MIT
"""Compare variants of D2R: python results/ablation.py [--benchmark comparison] [--seeds 1 2 3] [--jobs 2] [--out DIR].

Trains each variant of a benchmark with each seed, two runs at a time with a thread each, in
results/BENCHMARK/VARIANT-seedSEED; then prints a table of all finished runs there, and writes curves.png to where
plot.py would. --jobs 0 does only that. The same command continues after Ctrl-C or SIGTERM. The benchmarks are

    ablation      D2R and its ablations on five tasks, 40,000 environment steps of each
    comparison    D2R and MT-SAC on MT10, 100,000 steps of each task

A variant whose name begins with mt-sac trains mtsac.py instead of fast.py. For one of your own:

    python results/ablation.py --variant "k3=--top-k 3"
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from plot import BLUE, directory, evaluations, save

HERE = Path(os.path.relpath(Path(__file__).parent))  # args.json shall not tell where the checkout is
SMALL = "--num-modules 8 --module-width 64 --encoder-widths 128 128 --router-widths 64"
ARGUMENTS = {
    "ablation": (
        "--env-id reach-v3,drawer-close-v3,door-close-v3,window-close-v3,button-press-topdown-v3 --batch-size 32 "
        "--learning-rate 1e-3 --initial-alpha 0.003 --learning-starts 1000 --steps 40000 --eval-every 2000 "
        "--eval-episodes 10 --log-every 400"
    ),
    "comparison": (
        "--env-id MT10 --batch-size 32 --learning-rate 1e-3 --initial-alpha 0.003 --alpha-learning-rate 1e-5 "
        "--learning-starts 1000 --steps 100000 --eval-every 5000 --eval-episodes 20"
    ),
}
VARIANTS = {
    "ablation": {
        "d2r": "",
        "no-resrouting": "--no-resrouting",
        "no-route-balancing": "--no-route-balancing",
        "no-sample-k": "--no-sample-k",
        "top-k-1": "--top-k 1",
        "layer": "--routing layer --parallel-modules 4",
        "model": "--routing model --parallel-modules 4",
        "no-routing": "--routing model --parallel-modules 1",
    },
    "comparison": {
        "d2r": "",
        "mt-sac": "--routing model --parallel-modules 1 --num-modules 3 --module-width 128 --router-widths 8 "
        "--no-resrouting --no-sample-k",
    },
}


def start(run: Path, options: str) -> subprocess.Popen:
    """Begin a run, or continue it: the command is the same."""
    script = HERE / ("mtsac.py" if run.name.startswith("mt-sac") else "fast.py")
    command = [sys.executable, script, *options.split(), "--run-dir", run]
    with open(f"{run}.log", "a") as log:
        print(f"training {run.name}, see {log.name}", flush=True)
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def train(todo: dict[Path, str], jobs: int) -> None:
    """Train the runs with their options, `jobs` at a time. Exits if a run fails, or at Ctrl-C or SIGTERM."""
    waiting = [run for run in todo if not evaluations(run)]
    running = {}
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    while (waiting or running) and not stop:
        if waiting and len(running) < jobs:
            run = waiting.pop(0)
            running[run] = start(run, todo[run])
            continue
        time.sleep(1)
        for run in [run for run, process in running.items() if process.poll() is not None]:
            print(f"{run.name} ended with exit code {running.pop(run).returncode}", flush=True)
    for process in running.values():
        process.kill()
        process.wait()
    if stop:
        sys.exit("the same command continues")
    if not all(evaluations(run) for run in todo):
        sys.exit("error: a run failed, its log says why; --jobs 0 shows the finished ones")


def values(seeds: list[list[dict]], name: str) -> np.ndarray:
    """A column of the evaluations of a variant's runs, (seeds, evaluations)."""
    return np.array([[row[name] for row in rows] for rows in seeds])


def table(runs: dict[str, list]) -> str:
    """A row for each variant. Success is that of the last five evaluations; its area is the mean of all."""
    tasks = [name.removeprefix("success/") for name in next(iter(runs.values()))[0][0] if name.startswith("success/")]
    between = lambda means: f"{means.mean():.2f} ({means.min():.2f} to {means.max():.2f})"
    text = "| variant | seeds | success: mean, range | area: mean, range | modules used | "
    text += " | ".join(task.removesuffix("-v3") for task in tasks) + " |\n" + "|---" * (len(tasks) + 5) + "|\n"
    for name, seeds in runs.items():
        success = values(seeds, "success")
        cells = [name, str(len(seeds)), between(success[:, -5:].mean(1)), between(success.mean(1))]
        cells += [f"{values(seeds, 'modules_used')[:, -5:].mean():.1f}"]
        cells += [f"{values(seeds, f'success/{task}')[:, -5:].mean():.2f}" for task in tasks]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def plot(runs: dict[str, list], path: Path) -> None:
    """A panel for each variant: mean success over its seeds and their range; in grey the first variant's mean."""
    columns = min(len(runs), 4)
    lines = -(-len(runs) // columns)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.3 * lines), **options)
    first = values(next(iter(runs.values())), "success").mean(0)
    for axis, (name, seeds) in zip(axes.flat, runs.items()):
        steps = values(seeds, "global_step")[0]
        success = values(seeds, "success")
        axis.plot(steps, first, color="0.7", linewidth=1)
        axis.fill_between(steps, success.min(0), success.max(0), color=BLUE, alpha=0.2, linewidth=0)
        axis.plot(steps, success.mean(0), color=BLUE)
        axis.set(title=name, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel(f"environment steps, summed over tasks (grey: {next(iter(runs))})", fontsize="medium")
    figure.supylabel("success rate, mean and range over seeds", fontsize="medium")
    save(figure, path)


def main(
    benchmark: Literal["ablation", "comparison"] = "ablation",
    seeds: tuple[int, ...] = (1, 2, 3),
    jobs: int = 2,
    variant: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    known = VARIANTS[benchmark]
    chosen = {}
    for text in variant or known:
        name, equals, options = text.partition("=")
        if not equals and name not in known:
            sys.exit(f"error: {name} is none of {', '.join(known)}; a variant of your own is NAME=OPTIONS")
        chosen[name] = f"{ARGUMENTS[benchmark]} {SMALL} {options if equals else known[name]}"
    directory_of_runs = HERE / benchmark
    directory_of_runs.mkdir(parents=True, exist_ok=True)
    todo = {}
    for seed in seeds:
        for name, options in chosen.items():
            todo[directory_of_runs / f"{name}-seed{seed}"] = f"{options} --seed {seed}"
    if jobs:
        train(todo, jobs)
    runs = {name: [] for name in known}
    for run in sorted(directory_of_runs.glob("*-seed*/")):
        if rows := evaluations(run):
            runs.setdefault(run.name.rpartition("-seed")[0], []).append(rows)
        else:
            print(f"not finished: {run.name}")
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    if runs:
        print(table(runs), end="")
        plot(runs, directory(directory_of_runs, out) / "curves.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
