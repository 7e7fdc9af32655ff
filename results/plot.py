# SPDX-License-Identifier: MIT
"""Plot the evaluations of runs (needs matplotlib).

python results/plot.py results/RUN ...   success (else return) and modules used of each task, in RUN/progress.png
python results/plot.py                   mean success of the kept runs of MT10, and published curves, in results/mt10.png
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLORS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # told apart by the colour-blind: Okabe, Ito
MARKERS = "osD^vPX<>"

# Mean success on MT10 with random goals after so many million environment steps, read off the figures of arXiv
# 2503.05126 (to about 0.01): episodes of 500 steps, batch 1,280, 10 seeds; V2 rewards, as here.
MILLIONS = 1, 2, 3, 5, 10, 15, 20
PUBLISHED = {
    "width 4,096": (0.60, 0.70, 0.74, 0.81, 0.92, 0.92, 0.93),
    "MTMHSAC, 1.4M parameters": (0.41, 0.64, 0.72, 0.75, 0.86, 0.86, 0.86),
    "MTSAC, 1.4M parameters": (0.39, 0.66, 0.72, 0.75, 0.83, 0.85, 0.85),
    "width 256": (0.28, 0.49, 0.58, 0.66, 0.70, 0.75, 0.74),
}
KEPT = "MT10-cpu", "MT10-gpu"
# MT10-gpu's machine was gone before it could save these: they are from the terminal.
NOT_SAVED = {"MT10-gpu": ((750_000, 0.59), (1_000_000, 0.56))}


def style(task: int) -> dict:
    """Colour and marker of the task of this index: each of 54 has a pair of its own."""
    return {"color": COLORS[task % len(COLORS)], "marker": MARKERS[(task + task // 18) % len(MARKERS)]}


def legend(figure) -> None:
    """The labels of its last axis: on the right, or below where they are many."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    options = {"loc": "outside right center"}
    if len(labels) > 20:
        options = {"loc": "outside lower center", "ncols": 5, "fontsize": "small"}
        figure.set_figheight(figure.get_figheight() + 0.04 * len(labels))
    figure.legend(handles, labels, frameon=False, markerscale=1.5, **options)


def evaluations(run_dir: Path) -> list[dict]:
    """The rows of RUN/progress.csv that have an evaluation."""
    path = run_dir / "progress.csv"
    if not path.exists():
        sys.exit(f"error: there is no {path}")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modules_used"]]
    if not rows:
        sys.exit(f"error: {run_dir} holds no evaluation yet")
    return rows


def plot(run_dir: Path) -> Path:
    """Write RUN/progress.png."""
    rows = evaluations(run_dir)
    steps = [int(row["global_step"]) for row in rows]
    tasks = [column.removeprefix("success/") for column in rows[0] if column.startswith("success/")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left = ("success", "success rate") if rows[-1]["success"] else ("return", "return")
    for axis, (name, title) in zip(axes, (left, ("modules_used", "modules used"))):
        for index, task in enumerate(tasks):
            values = [float(row[f"{name}/{task}"]) for row in rows]
            axis.plot(steps, values, markersize=4, linewidth=1.2, label=task, **style(index))
        axis.plot(steps, [float(row[name]) for row in rows], color="black", marker=".", linewidth=2, label="mean")
        axis.set(xlabel="environment steps, summed over tasks", title=title)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1e6:g}M" if steps[-1] > 2e6 else f"{step / 1000:g}k")
        if len(steps) == 1:
            axis.set_xticks(steps)
        if name != "return":
            axis.set_ylim(0, 1.03 if name == "success" else None)
        axis.grid(alpha=0.3)
    legend(figure)
    figure.savefig(run_dir / "progress.png", dpi=110)
    return run_dir / "progress.png"


def plot_mt10(results: Path) -> Path:
    """Write mt10.png: the runs of MT10 that are kept, beside published ones."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for index, run_dir in enumerate(results / name for name in KEPT if (results / name).exists()):
        points = [(int(row["global_step"]), float(row["success"])) for row in evaluations(run_dir)]
        points += NOT_SAVED.get(run_dir.name, ())
        axis.plot(*zip(*points), linewidth=2.2, markersize=5, label=f"D2R, {run_dir.name}", **style(index))
    axis.plot([], [], " ", label="published, 10 seeds, episodes of 500 steps:")
    for index, (name, success) in enumerate(PUBLISHED.items()):
        steps = [million * 1_000_000 for million in MILLIONS]
        options = {"color": "0.55", "linewidth": 1, "marker": MARKERS[5 - index], "markersize": 4}
        axis.plot(steps, success, label=name, **options)
    axis.set(xscale="log", xlim=(9e4, 2.2e7), ylim=(0, 1), ylabel="mean success rate, random goals")
    axis.set_xlabel("environment steps, summed over the ten tasks")
    ticks = {100_000: "100k", 300_000: "300k", 1_000_000: "1M", 3_000_000: "3M", 10_000_000: "10M", 20_000_000: "20M"}
    axis.set_xticks([*ticks], ticks.values())
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper left", fontsize="small", title="here, one seed, episodes of 200 steps:")
    axis.get_legend().set(alignment="left")
    axis.get_legend().get_title().set_fontsize("small")
    figure.savefig(results / "mt10.png", dpi=110)
    return results / "mt10.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    runs = parser.parse_args().runs
    for run_dir in runs:
        print(plot(run_dir))
    if not runs:
        print(plot_mt10(Path(__file__).parent))


if __name__ == "__main__":
    main()
