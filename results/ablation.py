# SPDX-License-Identifier: MIT
"""Compare variants of D2R on five tasks: python results/ablation.py [--seeds 1 2 3] [--jobs 2].

Trains each variant with each seed, two runs at a time with a thread each, 200,000 environment steps, in
results/ablation/VARIANT-seedSEED, and writes table.md and curves.png there, from all finished runs that are there;
--jobs 0 does nothing else. After Ctrl-C or SIGTERM the same command goes on. To train a variant of your own only:

    python results/ablation.py --variant "k3=--top-k 3"
"""

import argparse
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
from plot import COLORS

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


def stop(number, _) -> None:  # of SIGINT and SIGTERM
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
        command = [sys.executable, SCRIPT, *options]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    PROCESSES.append(process)
    print(f"{run.name}: exit code {process.wait()}, see {log.name}", flush=True)
    return process.returncode == 0 and not STOP


def evaluations(run: Path) -> list[list[float]]:
    """Step, success and modules used of each evaluation of a run, once it is finished; else nothing."""
    if not (run / "args.json").exists() or not (run / "progress.csv").exists():
        return []
    with open(run / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modules_used"]]
    rows = [[float(row[name]) for name in ("global_step", "success", "modules_used")] for row in rows]
    total = json.loads((run / "args.json").read_text())["args"]["total_steps"]
    return rows if rows and rows[-1][0] >= total else []


def spread(values, form: str) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}" if len(values) else ""


def table(runs: dict[str, np.ndarray]) -> str:
    """A row for each variant, of the evaluations of its seeds: (seeds, evaluations, 3)."""
    text = "| variant | seeds | success, last five evaluations | steps to 0.5 | modules used, last five evaluations |\n"
    text += "|---|---|---|---|---|\n"
    for name, seeds in runs.items():
        _, success, modules = seeds[:, -5:].mean(1).T
        steps = [rows[rows[:, 1] >= 0.5][0, 0] for rows in seeds if rows[:, 1].max() >= 0.5]
        missing = f" ({len(steps)} of {len(seeds)})" if len(steps) < len(seeds) else ""
        when = f"{spread(steps, ',.0f')}{missing}".strip()
        text += f"| {name} | {len(seeds)} | {spread(success, '.2f')} | {when} | {spread(modules, '.1f')} |\n"
    return text


def plot(runs: dict[str, np.ndarray], path: Path) -> None:
    """An axis for each variant: mean success over its seeds and their range, over the first variant's mean in grey."""
    lines = -(-len(runs) // 4)
    figure = plt.figure(figsize=(10.4, 2.3 * lines), layout="constrained")
    grey = next(iter(runs.values())).mean(0)
    for n, (name, seeds) in enumerate(runs.items(), start=1):
        axis = figure.add_subplot(lines, 4, n, title=name, ylim=(0, 1.02))
        steps = seeds[0, :, 0] / 1000
        axis.plot(grey[:, 0] / 1000, grey[:, 1], color="0.7", linewidth=1)
        axis.fill_between(steps, seeds[..., 1].min(0), seeds[..., 1].max(0), color=COLORS[0], alpha=0.2, linewidth=0)
        axis.plot(steps, seeds[..., 1].mean(0), color=COLORS[0])
        axis.grid(alpha=0.3)
        axis.label_outer()
    figure.supxlabel("environment steps / 1000, summed over tasks", fontsize="medium")
    figure.supylabel("success rate", fontsize="medium")
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="to train with (1 2 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2); 0: only the table and the plot")
    parser.add_argument("--variant", action="append", metavar="NAME[=OPTIONS]", help="train only these: repeat it")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"directory of the runs ({RUNS})")
    args = parser.parse_args(argv)
    named = [variant.partition("=") for variant in args.variant or VARIANTS]
    variants = VARIANTS | {name: options for name, equals, options in named if equals}
    names = [name for name, _, _ in named]
    if not {*names} <= {*variants}:
        parser.error(f'--variant: NAME=OPTIONS, as "k3=--top-k 3", or one of {", ".join(VARIANTS)}')
    args.runs.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    todo = [(name, seed) for seed in args.seeds for name in names] if args.jobs else []
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        ended = [pool.submit(train, args.runs / f"{n}-seed{s}", f"{variants[n]} --seed {s}") for n, s in todo]
    seeds = {name: [] for name in variants}
    for run in sorted(args.runs.glob("*-seed*/")):
        if rows := evaluations(run):
            seeds.setdefault(run.name.rpartition("-seed")[0], []).append(rows)
    runs = {name: np.array(rows) for name, rows in seeds.items() if rows}
    if runs:
        (args.runs / "table.md").write_text(table(runs))
        print(table(runs), end="")
        plot(runs, args.runs / "curves.png")
    return 0 if all(run.result() for run in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
