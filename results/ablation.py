# SPDX-License-Identifier: MIT
"""Compare variants of D2R: python results/ablation.py [--benchmark comparison] [--seeds 1 2 3] [--jobs 2] [--out DIR].

Trains each variant of a benchmark with each seed, two runs at a time with a thread each, in
results/BENCHMARK/VARIANT-seedSEED; then prints a table of all finished runs there, and writes curves.png to where
plot.py would. --jobs 0 does only that. The same command continues after Ctrl-C or SIGTERM. The benchmarks are

    ablation      D2R and its ablations on five tasks, 200,000 environment steps
    comparison    D2R and MT-SAC on MT10, a million steps

A variant whose name begins with mt-sac trains mtsac.py instead of d2r_sac.py. For one of your own:

    python results/ablation.py --variant "k3=--top-k 3"
"""

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from plot import BLUE, directory, save

HERE = Path(os.path.relpath(Path(__file__).parent))  # args.json shall not tell where the checkout is
SMALL = "--num-modules 8 --module-width 64 --encoder-widths 128 128 --router-widths 64"
ARGUMENTS = {
    "ablation": (
        "--env-id reach-v3,drawer-close-v3,door-close-v3,window-close-v3,button-press-topdown-v3 --batch-size 160 "
        "--learning-rate 1e-3 --initial-alpha 0.003 --learning-starts 5000 --total-steps 200000 --eval-every 10000 "
        "--eval-episodes 10 --log-every 2000 --checkpoint-minutes 5"
    ),
    "comparison": (
        "--env-id MT10 --batch-size 320 --learning-rate 1e-3 --initial-alpha 0.003 --alpha-learning-rate 1e-5 "
        "--learning-starts 10000 --total-steps 1000000 --eval-every 50000 --eval-episodes 20"
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
PROCESSES = []
STOP = []  # signals that came


def stop(number, _) -> None:
    STOP.append(number)
    for process in PROCESSES:
        process.terminate()


def train(run: Path, options: str) -> bool:
    """A run, or what is left of it. Returns whether it is finished."""
    if evaluations(run) or STOP:
        return not STOP
    options = [*options.split(), "--run-name", run.name, "--results-dir", str(run.parent)]
    if (run / "checkpoint.pt").exists():
        options = ["--resume", str(run)]
    script = HERE / "mtsac.py" if run.name.startswith("mt-sac") else HERE.parent / "d2r_sac.py"
    with open(f"{run}.log", "a") as log:
        print(f"training {run.name}, see {log.name}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # In a process group of its own, so that Ctrl-C reaches it through `stop` only.
        command = [sys.executable, script, *options]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    PROCESSES.append(process)
    print(f"{run.name} ended with exit code {process.wait()}", flush=True)
    return process.returncode == 0 and not STOP


def evaluations(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run, if it is finished; else nothing."""
    if not (run / "progress.csv").exists():
        return []
    rows = csv.DictReader((run / "progress.csv").read_text().splitlines())
    rows = [{name: float(value or "nan") for name, value in row.items()} for row in rows if row["success"]]
    total = json.loads((run / "args.json").read_text())["args"]["total_steps"]
    return rows if rows and rows[-1]["global_step"] >= total else []


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        todo = [(directory_of_runs / f"{name}-seed{seed}", seed, name) for seed in seeds for name in chosen]
        ended = [pool.submit(train, run, f"{chosen[name]} --seed {seed}") for run, seed, name in todo if jobs]
    if STOP:
        print("the same command continues")
        sys.exit(128 + STOP[0])
    if not all(run.result() for run in ended):
        sys.exit("error: a run failed, its log says why; --jobs 0 shows the finished ones")
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
