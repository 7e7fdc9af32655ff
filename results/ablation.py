# SPDX-License-Identifier: MIT
"""Compare variants of D2R: train them, then print a table of the finished runs and draw curves.png.

    python results/ablation.py --commands --seeds 4 5 6 | xargs -P 2 -L 1 env    two at a time; the same line continues
    python results/ablation.py

--commands prints a command per line, for xargs, GNU parallel or a job array. Runs and curves.png are in
results/BENCHMARK; those of seeds 1 to 3 are kept, so finished. The benchmarks are

    ablation      D2R and its ablations on five tasks, 40,000 environment steps of each
    comparison    D2R and the baseline MT-SAC on MT10, 100,000 steps of each task

A variant whose name begins with mt-sac trains mtsac.py instead of fast.py. To add one of your own:

    python results/ablation.py --commands --variant "k3=--top-k 3" | xargs -P 2 -L 1 env
"""

import os
import sys
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from plot import BLUE, evaluations, save

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
        depth = values(seeds, "modules_used")[:, -5:].mean()
        cells += ["–" if name.startswith("mt-sac") else f"{depth:.1f}"]  # a baseline without routing
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
    figure.supylabel("success rate", fontsize="medium")
    save(figure, path)


def main(
    benchmark: Literal["ablation", "comparison"] = "ablation",
    commands: bool = False,
    seeds: tuple[int, ...] = (1, 2, 3),
    variant: tuple[str, ...] = (),
) -> None:
    """
    :param commands: print the commands of the runs that are not finished, instead of the table
    :param seeds: of the commands
    :param variant: one more, as NAME=OPTIONS
    """
    variants = VARIANTS[benchmark] | dict(text.split("=", 1) for text in variant)
    if commands:
        for seed in seeds:
            for name, options in variants.items():
                run = HERE / benchmark / f"{name}-seed{seed}"
                script = HERE / ("mtsac.py" if name.startswith("mt-sac") else "fast.py")
                options = f"{ARGUMENTS[benchmark]} {SMALL} {options} --seed {seed}".split()
                if evaluations(run):
                    print(f"{run} is finished", file=sys.stderr)
                else:
                    print(f"OMP_NUM_THREADS=1 python {script} {' '.join(options)} --run-dir {run}")
        return
    runs = {name: [] for name in variants}
    for run in sorted((HERE / benchmark).glob("*-seed*/")):
        if rows := evaluations(run):
            runs.setdefault(run.name.rpartition("-seed")[0], []).append(rows)
        else:
            print(f"not finished: {run.name}")
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    if not runs:
        sys.exit("error: no run is finished")
    print(table(runs), end="")
    plot(runs, HERE / benchmark / "curves.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
