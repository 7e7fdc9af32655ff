# SPDX-License-Identifier: MIT
"""Draw learning curves.

    python results/plot.py results/RUN ...    success (else return) of each task, and modules used
    python results/plot.py                    kept runs of MT10 beside published curves; a star is a kept policy

Writes progress.png into the directory of each run, or results/mt10.png.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

RESULTS = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # Okabe, Ito
LEGEND = {"frameon": False, "fontsize": "small", "title_fontsize": "small", "alignment": "left"}

# mt10.png: name: colour; kept runs; steps and success of a kept policy, or longer runs with the same settings
OWN = {
    "D2R, 2.05M parameters": (ORANGE, "MT10-gpu", (622_000, 0.53)),
    "D2R, 0.63M": (GREEN, "MT10-cpu", (3_004_490, 0.54)),
    "D2R, 0.21M": (SKY, "comparison/d2r-seed[123]", "longer/d2r-seed[123]"),
    "MT-SAC (baseline), 0.23M": ("black", "comparison/mt-sac-seed[123]", "longer/mt-sac-seed[123]"),
}
# Mean success on MT10 with random goals after so many environment steps, read off the figures of arXiv
# 2503.05126 (to about 0.01): episodes of 500 steps, batch 1,280, 10 seeds; V2 rewards, as here.
STEPS = (1e6, 2e6, 3e6, 5e6, 10e6, 15e6, 20e6)
PUBLISHED = {
    "MT-SAC, 1.4M parameters": (RED, "s", (0.39, 0.66, 0.72, 0.75, 0.83, 0.85, 0.85)),
    "MT-SAC with a head per task, 1.4M": (PINK, "o", (0.41, 0.64, 0.72, 0.75, 0.86, 0.86, 0.86)),
}


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    print(path)


def read(run: Path) -> list[dict[str, float]]:
    """The rows of RUN/progress.csv, without what was not measured. There are none before the first updates."""
    path = run / "progress.csv"
    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def evaluations(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run, if it is finished; else nothing."""
    rows = [row for row in read(run) if "success" in row]
    if not rows:
        return []
    saved = json.loads((run / "args.json").read_text())
    total = saved["args"]["steps"] * len(saved["tasks"])
    return rows if rows[-1]["global_step"] >= total else []


def curve(rows: list[dict[str, float]], column: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column, where there is a value."""
    rows = [row for row in rows if column in row]
    return [row["global_step"] for row in rows], [row[column] for row in rows]


def plot(run: Path) -> None:
    """progress.png: a panel for each task."""
    rows = read(run)
    if not rows:
        sys.exit(f"error: {run / 'progress.csv'} has no row yet; rows begin with the updates")
    tasks = json.loads((run / "args.json").read_text())["tasks"]
    kind = "success" if any("success" in row or "train_success" in row for row in rows) else "return"
    panels = {kind: "mean", **{f"{kind}/{task}": task for task in tasks}, "modules_used": "modules used"}
    lines = -(-len(panels) // 6)
    columns = -(-len(panels) // lines)
    size = (2.1 * columns, 1.75 * lines + 0.7)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items()):
        axis.plot(*curve(rows, f"train_{name}"), ".", color=SKY, markersize=2)
        axis.plot(*curve(rows, name), "o-", color=BLUE, markersize=3, linewidth=1)
        axis.set_title(title, fontsize=9)
        if name.startswith("success"):
            axis.set_ylim(-0.05, 1.05)
        elif name == "modules_used":
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(kind, fontsize=9)
    dots = "; line: evaluations, dots: training" if f"train_{kind}" in rows[-1] else ""
    figure.supxlabel(f"environment steps, summed over tasks{dots}", fontsize=9)
    save(figure, run / "progress.png")


def plot_mt10(path: Path) -> None:
    """The kept runs of MT10 beside published ones."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, (color, pattern, more) in OWN.items():
        curves = [curve(read(run), "success") for run in sorted(RESULTS.glob(pattern))]
        steps = curves[0][0]
        success = np.array([values for _, values in curves])
        label = f"{name}, {len(curves)} seeds" if len(curves) > 1 else f"{name}, one seed"
        axis.plot(steps, success.mean(0), ".-", color=color, markersize=4, label=label)
        axis.fill_between(steps, success.min(0), success.max(0), color=color, alpha=0.15, linewidth=0)
        if isinstance(more, tuple):
            axis.plot(*more, "*", color=color, markersize=13, markeredgecolor="black")
        else:
            for run in sorted(RESULTS.glob(more)):
                axis.plot(*curve(read(run), "success"), ":", color=color)
    title = "this repository, episodes of 200 steps\n(band: range over seeds; dotted: longer runs, one each;\n★: its policy in the repository)"
    axis.add_artist(axis.legend(title=title, loc="upper left", **LEGEND))
    published = []
    for name, (color, marker, success) in PUBLISHED.items():
        published += axis.plot(STEPS, success, "--", color=color, marker=marker, markersize=5, label=name)
    title = "published: arXiv 2503.05126,\nten seeds, episodes of 500 steps"
    axis.legend(handles=published, title=title, loc="lower right", **LEGEND)
    axis.set(xscale="log", xlim=(4.5e4, 2.2e7), ylim=(0, 1))
    axis.set(xlabel="environment steps of all ten tasks (log scale)", ylabel="mean success rate, random goals")
    axis.set_xticks([1e5, 3e5, 1e6, 3e6, 1e7, 2e7])
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    save(figure, path)


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    for run in runs:
        plot(run)
    if not runs:
        plot_mt10(RESULTS / "mt10.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
