# SPDX-License-Identifier: MIT
"""Plot success and modules used of each task over a run: python results/plot.py results/RUN (needs matplotlib)."""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt


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
            axis.plot(steps, values, color=plt.cm.tab10(index % 10), marker=".", label=task)
        axis.plot(steps, [float(row[name]) for row in rows], color="black", linewidth=2, label="mean")
        axis.set(xlabel="environment steps, summed over tasks", title=title)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:,.0f}k")
        axis.set_ylim(0, 1.03 if name == "success" else None)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(run_dir / "progress.png", dpi=110)
    return run_dir / "progress.png"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
