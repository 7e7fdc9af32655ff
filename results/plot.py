# SPDX-License-Identifier: MIT
"""Plot success and modules used of each task over a run: python results/plot.py results/RUN (needs matplotlib)."""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLORS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # told apart by the colour-blind: Okabe, Ito
MARKERS = "osD^vPX<>"


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


def plot(run_dir: Path) -> Path:
    """Write RUN/progress.png, from the evaluations in RUN/progress.csv."""
    with open(run_dir / "progress.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["success"]]
    if not rows:
        sys.exit(f"{run_dir} holds no evaluation yet")
    steps = [int(row["global_step"]) for row in rows]
    tasks = [column.removeprefix("success/") for column in rows[0] if column.startswith("success/")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, name, title in zip(axes, ("success", "modules_used"), ("success rate", "modules used")):
        for index, task in enumerate(tasks):
            values = [float(row[f"{name}/{task}"]) for row in rows]
            axis.plot(steps, values, markersize=4, linewidth=1.2, label=task, **style(index))
        axis.plot(steps, [float(row[name]) for row in rows], color="black", linewidth=2, label="mean")
        axis.set(xlabel="environment steps, summed over tasks", title=title)
        axis.xaxis.set_major_formatter(
            lambda step, _: f"{step / 1e6:g}M" if steps[-1] > 2e6 else f"{step / 1000:,.0f}k"
        )
        axis.set_ylim(0, 1.03 if name == "success" else None)
        axis.grid(alpha=0.3)
    legend(figure)
    figure.savefig(run_dir / "progress.png", dpi=110)
    return run_dir / "progress.png"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
