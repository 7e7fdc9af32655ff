# SPDX-License-Identifier: MIT
"""Compare variants of D2R on five tasks: python results/ablation.py [--seeds 1 2 3] [--jobs 2].

Trains each variant with each seed, two runs at a time, each with one thread and 200,000 environment steps, in
results/ablation/VARIANT-seedSEED. Then it writes table.md and curves.png there, from all finished runs that are there;
with --jobs 0 it does nothing else. After Ctrl-C or SIGTERM, which end the runs with a checkpoint, the same command goes
on. To compare a variant of your own with those that are kept, and to run some with other arguments, elsewhere:

    python results/ablation.py --only k3 --variant "k3=--top-k 3"
    python results/ablation.py --only d2r k3 --variant "k3=--top-k 3" --arguments "--num-modules 16" --runs results/large
"""

import argparse
import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
from plot import COLORS

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

SCRIPT = Path(__file__).parent.parent / "d2r_sac.py"
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


PROCESSES = []  # of the runs, to be ended with this one


def train(run: Path, arguments: str) -> bool:
    """A run, or what is left of it. Returns whether it ended well."""
    if evaluations(run):  # it is finished
        return True
    options = ["--resume", str(run)]
    if not (run / "checkpoint.pt").exists():
        (run / "args.json").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        options = [*arguments.split(), "--results-dir", str(run.parent), "--run-name", run.name]
    print(f"{run.name}\n", end="", flush=True)
    with open(f"{run}.log", "a") as log:
        command, environment = [sys.executable, SCRIPT, *options], os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    PROCESSES.append(process)
    if process.wait():
        print(f"{run.name} failed: see {log.name}", file=sys.stderr)
    return process.returncode == 0


def runs_in(directory: Path) -> list[Path]:
    return sorted(run for run in directory.glob("*-seed*/") if run.name.rpartition("-seed")[2].isdigit())


def check(run: Path, arguments: str) -> None:
    """Raises UsageError where the arguments are wrong, or the run is there and has others."""
    wanted = json.loads(json.dumps(asdict(d2r.parse_arguments(arguments.split())[0])))
    if not (run / "args.json").exists():
        return
    found = json.loads((run / "args.json").read_text())["args"]
    for name, value in wanted.items():
        if name not in ("results_dir", "run_name", "resume") and found.get(name, value) != value:
            raise d2r.UsageError(f"{run} has {name} {found[name]}, not {value}: choose another name, or --runs")


def evaluations(run: Path) -> list[dict[str, float]]:
    """global_step, success and modules_used of each evaluation of a run, once it is finished."""
    if not ((run / "progress.csv").exists() and (run / "args.json").exists()):
        return []
    with open(run / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["success"]]
    total = json.loads((run / "args.json").read_text())["args"]["total_steps"]
    columns = "global_step", "success", "modules_used"
    finished = rows and int(rows[-1]["global_step"]) >= total
    return [{column: float(row[column]) for column in columns} for row in rows] if finished else []


def spread(values: list[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}" if values else ""


def table(runs: dict[str, list]) -> str:
    """A row for each variant, of the evaluations of its seeds."""
    title = "| variant | seeds | success, last five evaluations | steps to 0.5 | modules used, last five evaluations |"
    lines = [title, "|---|---|---|---|---|"]
    for name, seeds in runs.items():
        success, modules = (
            [statistics.mean(row[c] for row in rows[-5:]) for rows in seeds] for c in ("success", "modules_used")
        )
        reached = [next((row["global_step"] for row in rows if row["success"] >= 0.5), None) for rows in seeds]
        steps = [step for step in reached if step]
        missing = f"({len(steps)} of {len(seeds)})" if len(steps) < len(seeds) else ""
        when = f"{spread(steps, ',.0f')} {missing}".strip()
        cells = name, str(len(seeds)), spread(success, ".2f"), when, spread(modules, ".1f")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, list], path: Path) -> None:
    """An axis for each variant: mean success over its seeds and their range, over the first variant's mean in grey."""
    columns = min(len(runs), 4)
    lines = math.ceil(len(runs) / columns)
    size = {"figsize": (2.6 * columns, 2.3 * lines), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(lines, columns, layout="constrained", **size)
    first = None
    for axis, (name, seeds) in zip(axes.flat, runs.items()):
        evaluated = [*zip(*seeds)]  # each evaluation, by all seeds
        steps = [rows[0]["global_step"] / 1000 for rows in evaluated]
        success = [[row["success"] for row in rows] for rows in evaluated]
        first = first or (steps, [*map(statistics.mean, success)])
        axis.plot(*first, color="0.7", linewidth=1)
        axis.fill_between(steps, [*map(min, success)], [*map(max, success)], color=COLORS[0], alpha=0.2, linewidth=0)
        axis.plot(steps, [*map(statistics.mean, success)], color=COLORS[0])
        axis.set(title=name, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    figure.supxlabel("environment steps / 1000, summed over tasks", fontsize="medium")
    figure.supylabel("success rate", fontsize="medium")
    figure.savefig(path, dpi=110)


def interrupt(*_):
    """KeyboardInterrupt, once: what comes later must not keep it from ending the runs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="to train with (1 2 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2); 0: table and plot alone")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=ARGUMENTS", help="one more")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the variants, train no others")
    parser.add_argument("--arguments", default="", help="of d2r_sac.py, for all variants: --arguments='--gamma 0.9'")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"directory of the runs ({RUNS})")
    options = parser.parse_args(argv)
    if not all(re.fullmatch(r"[\w.-]+=.*", variant) for variant in options.variant):
        parser.error('--variant: write NAME=ARGUMENTS, as "k3=--top-k 3"')
    variants = VARIANTS | dict(variant.split("=", 1) for variant in options.variant)
    if unknown := {*(options.only or [])} - {*variants}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(variants)}")

    names = [(name, seed) for seed in dict.fromkeys(options.seeds) for name in options.only or variants]
    todo = [options.runs / f"{name}-seed{seed}" for name, seed in names] if options.jobs else []
    arguments = {}
    try:
        for run in dict.fromkeys([*todo, *runs_in(options.runs)]):
            name, _, seed = run.name.rpartition("-seed")
            if name in variants:
                arguments[run] = f"{ARGUMENTS} {options.arguments} {variants[name]} --seed {seed}"
                check(run, arguments[run])
    except d2r.UsageError as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    pool = ThreadPoolExecutor(max(options.jobs, 1))
    try:
        options.runs.mkdir(parents=True, exist_ok=True)
        futures = [pool.submit(train, run, arguments[run]) for run in todo]
        ended = [future.result() for future in futures]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in PROCESSES:
            process.terminate()
        pool.shutdown()
        ended = [False]
        print("interrupted; the same command goes on", file=sys.stderr)
    runs = {name: [] for name in variants}
    for run in runs_in(options.runs):
        runs.setdefault(run.name.rpartition("-seed")[0], []).append(evaluations(run))
    runs = {name: [*filter(None, seeds)] for name, seeds in runs.items() if any(seeds)}
    if runs:
        (options.runs / "table.md").write_text(table(runs))
        print(table(runs), end="")
        plot(runs, options.runs / "curves.png")
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
