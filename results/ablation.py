# SPDX-License-Identifier: MIT
"""Compare variants of D2R on five tasks: python results/ablation.py [--seeds 1 2 3] [--jobs 2] [--out DIR].

Trains each variant with each seed, two runs at a time with a thread each, 200,000 environment steps, in
results/ablation/VARIANT-seedSEED; then prints a table of all finished runs there, and writes curves.png to where
plot.py would. --jobs 0 does only that. The same command continues after Ctrl-C or SIGTERM. For a variant of your own:

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

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from plot import BLUE, directory, save

SCRIPT = Path(__file__).parent.parent / "d2r_sac.py"
RUNS = Path(os.path.relpath(Path(__file__).parent / "ablation"))  # args.json shall not tell where the checkout is
ARGUMENTS = (
    "--env-id reach-v3,drawer-close-v3,door-close-v3,window-close-v3,button-press-topdown-v3 --num-modules 8 "
    "--module-width 64 --encoder-widths 128 128 --router-widths 64 --batch-size 160 --learning-rate 1e-3 "
    "--initial-alpha 0.003 --learning-starts 5000 --total-steps 200000 --eval-every 10000 --eval-episodes 10 "
    "--log-every 2000 --checkpoint-minutes 5"
)
VARIANTS = {
    "d2r": "",
    "no-resrouting": "--no-resrouting",
    "no-route-balancing": "--no-route-balancing",
    "no-sample-k": "--no-sample-k",
    "top-k-1": "--top-k 1",
    "layer": "--routing layer --parallel-modules 4",
    "model": "--routing model --parallel-modules 4",
    "no-routing": "--routing model --parallel-modules 1",
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
    options = [*f"{ARGUMENTS} {options} --run-name {run.name}".split(), "--results-dir", str(run.parent)]
    if (run / "checkpoint.pt").exists():
        options = ["--resume", str(run)]
    with open(f"{run}.log", "a") as log:
        print(f"training {run.name}, see {log.name}", flush=True)
        command = [sys.executable, SCRIPT, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # In a session of its own, so that Ctrl-C reaches it through `stop` only.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    PROCESSES.append(process)
    print(f"{run.name} ended with exit code {process.wait()}", flush=True)
    return process.returncode == 0 and not STOP


def evaluations(run: Path) -> list[list[float]]:
    """Step, success and modules used of each evaluation of a run, if it is finished; else nothing."""
    if not (run / "progress.csv").exists():
        return []
    rows = csv.DictReader((run / "progress.csv").read_text().splitlines())
    names = ("global_step", "success", "modules_used")
    rows = [[float(row[name]) for name in names] for row in rows if row["modules_used"]]
    total = json.loads((run / "args.json").read_text())["args"]["total_steps"]
    return rows if rows and rows[-1][0] >= total else []


def table(runs: dict[str, np.ndarray]) -> str:
    """A row for each variant, of the evaluations of its seeds: (seeds, evaluations, 3)."""
    text = "| variant | seeds | success, last five evaluations: mean, range | modules used |\n"
    text += "|---|---|---|---|\n"
    for name, seeds in runs.items():
        _, success, modules = seeds[:, -5:].mean(1).T
        between = f"{success.mean():.2f} ({success.min():.2f} to {success.max():.2f})"
        text += f"| {name} | {len(seeds)} | {between} | {modules.mean():.1f} |\n"
    return text


def plot(runs: dict[str, np.ndarray], path: Path) -> None:
    """A panel for each variant: mean success over its seeds and their range; in grey the first variant's mean."""
    size = (10.4, 2.3 * -(-len(runs) // 4))
    figure, axes = plt.subplots(-(-len(runs) // 4), 4, figsize=size, sharex=True, sharey=True, layout="constrained")
    grey = next(iter(runs.values())).mean(0)
    for axis, (name, seeds) in zip(axes.flat, runs.items()):
        steps = seeds[0, :, 0]
        axis.plot(grey[:, 0], grey[:, 1], color="0.7", linewidth=1)
        axis.fill_between(steps, seeds[..., 1].min(0), seeds[..., 1].max(0), color=BLUE, alpha=0.2, linewidth=0)
        axis.plot(steps, seeds[..., 1].mean(0), color=BLUE)
        axis.set(title=name, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel("environment steps, summed over tasks (grey: d2r)", fontsize="medium")
    figure.supylabel("success rate, mean and range over seeds", fontsize="medium")
    save(figure, path)


def main(
    seeds: tuple[int, ...] = (1, 2, 3), jobs: int = 2, variant: tuple[str, ...] = (), out: Path | None = None
) -> None:
    chosen = {}
    for text in variant or VARIANTS:
        name, equals, options = text.partition("=")
        if not equals and name not in VARIANTS:
            sys.exit(f"error: {name} is none of {', '.join(VARIANTS)}; a variant of your own is NAME=OPTIONS")
        chosen[name] = options if equals else VARIANTS[name]
    RUNS.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    todo = {f"{name}-seed{seed}": f"{chosen[name]} --seed {seed}" for seed in seeds for name in chosen}
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        ended = [pool.submit(train, RUNS / name, todo[name]) for name in todo if jobs]
    if STOP:
        sys.exit(128 + STOP[0])
    if not all(run.result() for run in ended):
        sys.exit("error: a run failed; the same command continues it, --jobs 0 shows the finished ones")
    finished = {name: [] for name in VARIANTS}
    for run in sorted(RUNS.glob("*-seed*/")):
        if rows := evaluations(run):
            finished.setdefault(run.name.rpartition("-seed")[0], []).append(rows)
    runs = {name: np.array(rows) for name, rows in finished.items() if rows}
    if runs:
        print(table(runs), end="")
        plot(runs, directory(RUNS, out) / "curves.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
