# SPDX-License-Identifier: MIT
"""Compare variants of D2R on five tasks: python results/ablation.py [--seeds 1 2 3] [--jobs 2].

Trains each variant with each seed, two runs at a time with a thread each, 200,000 environment steps, in
results/ablation/VARIANT-seedSEED, and writes table.md and curves.png there, from all finished runs that are there;
--jobs 0 does nothing else. After Ctrl-C or SIGTERM the same command goes on. To add a variant of your own:

    python results/ablation.py --only k3 --variant "k3=--top-k 3"
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

RUNS = Path(os.path.relpath(Path(__file__).parent / "ablation"))  # args.json shall not tell where the checkout is
ARGUMENTS = (
    "--env-id reach-v3,drawer-close-v3,door-close-v3,window-close-v3,button-press-topdown-v3 --num-modules 8 "
    "--module-width 64 --encoder-widths 128 128 --router-widths 64 --batch-size 160 --learning-rate 1e-3 "
    "--initial-alpha 0.003 --learning-starts 5000 --total-steps 200000 --eval-every 10000 --eval-episodes 10 "
    "--log-every 2000 --checkpoint-minutes 5 --no-tensorboard"
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


def train(runs: Path, name: str, seed: int, variant: str) -> bool:
    """A run, or what is left of it. Returns whether it is finished."""
    run = runs / f"{name}-seed{seed}"
    if evaluations(run) or STOP:
        return not STOP
    options = ["--resume", str(run)]
    if not (run / "checkpoint.pt").exists():
        (run / "args.json").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        options = [*f"{ARGUMENTS} {variant} --seed {seed} --run-name {run.name}".split(), "--results-dir", str(runs)]
    print(f"{run.name}\n", end="", flush=True)
    with open(f"{run}.log", "a") as log:
        command = [sys.executable, d2r.__file__, *options]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    PROCESSES.append(process)
    if process.wait():
        print(f"{run.name} failed: see {log.name}", file=sys.stderr)
    return process.returncode == 0 and not STOP


def evaluations(run: Path) -> list[list[float]]:
    """Step, success and modules used of each evaluation of a run, once it is finished; else nothing."""
    if not ((run / "progress.csv").exists() and (run / "args.json").exists()):
        return []
    with open(run / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["success"]]
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
    columns = min(len(runs), 4)
    lines = -(-len(runs) // columns)
    size = {"figsize": (2.6 * columns, 2.3 * lines), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(lines, columns, layout="constrained", **size)
    first = next(iter(runs.values())).mean(0)
    for axis, (name, seeds) in zip(axes.flat, runs.items()):
        steps, success, _ = (seeds / (1000, 1, 1)).mean(0).T
        axis.plot(first[:, 0] / 1000, first[:, 1], color="0.7", linewidth=1)
        axis.fill_between(steps, seeds[:, :, 1].min(0), seeds[:, :, 1].max(0), color=COLORS[0], alpha=0.2, linewidth=0)
        axis.plot(steps, success, color=COLORS[0])
        axis.set(title=name, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    figure.supxlabel("environment steps / 1000, summed over tasks", fontsize="medium")
    figure.supylabel("success rate", fontsize="medium")
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="to train with (1 2 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2); 0: only the table and the plot")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=ARGUMENTS", help="one more")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the variants, train no others")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"directory of the runs ({RUNS})")
    options = parser.parse_args(argv)
    d2r.check(all("=" in variant for variant in options.variant), '--variant: write NAME=ARGUMENTS, as "k3=--top-k 3"')
    variants = VARIANTS | dict(variant.split("=", 1) for variant in options.variant)
    names = options.only or list(variants)
    d2r.check({*names} <= {*variants}, f"--only: the variants are {', '.join(variants)}")
    todo = [(name, seed) for seed in options.seeds for name in names] if options.jobs else []
    options.runs.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(max(options.jobs, 1)) as pool:
        ended = [*pool.map(lambda run: train(options.runs, *run, variants[run[0]]), todo)]
    if STOP:
        print("interrupted; the same command goes on", file=sys.stderr)
    seeds = {}
    for run in sorted(options.runs.glob("*-seed*/")):
        if rows := evaluations(run):
            seeds.setdefault(run.name.rpartition("-seed")[0], []).append(rows)
    runs = {name: np.array(seeds[name]) for name in [*variants, *(seeds.keys() - variants.keys())] if name in seeds}
    if runs:
        (options.runs / "table.md").write_text(table(runs))
        print(table(runs), end="")
        plot(runs, options.runs / "curves.png")
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
