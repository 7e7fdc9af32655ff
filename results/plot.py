# SPDX-License-Identifier: MIT
"""Draw learning curves (needs matplotlib).

    python results/plot.py results/RUN ...    progress.png: success (else return) of each task, and modules used
    python results/plot.py                    mt10.png: the kept runs of MT10 beside published curves

Pictures go where --out says. By default it is the run's directory, or, if git tracks that, a new one beside it.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

RESULTS = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # Okabe, Ito

# Mean success on MT10 with random goals after so many environment steps, read off the figures of arXiv
# 2503.05126 (to about 0.01): episodes of 500 steps, batch 1,280, 10 seeds; V2 rewards, as here.
STEPS = (1e6, 2e6, 3e6, 5e6, 10e6, 15e6, 20e6)
PUBLISHED = {
    "its widest network, 4,096 units": (GREEN, "^", (0.60, 0.70, 0.74, 0.81, 0.92, 0.92, 0.93)),
    "MTMHSAC, 1.4M parameters": (PINK, "o", (0.41, 0.64, 0.72, 0.75, 0.86, 0.86, 0.86)),
    "MTSAC, 1.4M parameters": (RED, "s", (0.39, 0.66, 0.72, 0.75, 0.83, 0.85, 0.85)),
}
KEPT = {"MT10-cpu": (BLUE, 3_004_490, 0.54), "MT10-gpu": (ORANGE, 622_000, 0.53)}  # policies: steps, success
COMPARED = {"d2r": ("D2R", SKY), "mt-sac": ("MT-SAC", "black")}  # names in results/comparison


def directory(run: Path, out: Path | None) -> Path:
    """Where the pictures of a run go. Never among files that git tracks, unless `out` says so."""
    if out is None:
        command = ["git", "-C", run, "ls-files", "."]
        tracked = subprocess.run(command, capture_output=True, check=False).stdout
        out = run.with_name(f"{run.resolve().name}-pictures") if tracked else run
    out.mkdir(parents=True, exist_ok=True)
    return out


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    print(path)


def read(run: Path) -> list[dict]:
    """The rows of RUN/progress.csv."""
    path = run / "progress.csv"
    if not path.exists():
        sys.exit(f"error: {path} does not exist")
    rows = [*csv.DictReader(path.read_text().splitlines())]
    if not rows:
        sys.exit(f"error: {path} has no row yet; rows begin with the updates")
    return rows


def evaluations(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run, if it is finished; else nothing."""
    if not (run / "progress.csv").exists():
        return []
    rows = csv.DictReader((run / "progress.csv").read_text().splitlines())
    rows = [{name: float(value or "nan") for name, value in row.items()} for row in rows if row.get("success")]
    saved = json.loads((run / "args.json").read_text())
    total = saved["args"]["steps"] * len(saved["tasks"])
    return rows if rows and rows[-1]["global_step"] >= total else []


def curve(rows: list[dict], column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column, where there is a value."""
    points = [(int(row["global_step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in points], [value for _, value in points]


def plot(run: Path, out: Path | None = None) -> None:
    """progress.png: small multiples, a panel for each task."""
    rows = read(run)
    tasks = json.loads((run / "args.json").read_text())["tasks"]
    kind = "success" if any(row.get("success") or row.get("train_success") for row in rows) else "return"
    panels = {kind: "mean", **{f"{kind}/{task}": task for task in tasks}}
    if any(row.get("modules_used") for row in rows):
        panels["modules_used"] = "modules used"
    lines = -(-len(panels) // 6)
    columns = -(-len(panels) // lines)
    size = (2.1 * columns, 1.75 * lines + 0.7)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items()):
        steps, values = curve(rows, f"train_{name}")
        n = max(len(values) // 20, 5)
        means = [sum(values[max(i - n, 0) : i]) / min(i, n) for i in range(1, len(values) + 1)]
        label = f"training, mean of {n} rows" if steps else None
        axis.plot(steps, means, "." if len(steps) == 1 else "-", color=SKY, linewidth=1, label=label)
        steps, values = curve(rows, name)
        axis.plot(steps, values, color=BLUE, marker="o", markersize=3, label="evaluations" if steps else None)
        axis.set_title(title, fontsize=9)
        if name.startswith("success"):
            axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "modules_used" in panels:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    for axis in axes[:, 0]:
        axis.set_ylabel(kind, fontsize=9)
    for axis in axes.flat[len(panels) - columns : len(panels)]:
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supxlabel("environment steps, summed over tasks", fontsize=9)
    shown = axes.flat[0].get_legend_handles_labels()
    if len(shown[0]) > 1:
        figure.legend(*shown, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    save(figure, directory(run, out) / "progress.png")


def plot_mt10(out: Path) -> None:
    """mt10.png: the runs of MT10 that are kept, beside published ones."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, (color, *policy) in KEPT.items():
        steps, success = curve(read(RESULTS / name), "success")
        axis.plot(steps, success, color=color, linewidth=1.2, marker="o", markersize=4, label=f"D2R, {name}, one seed")
        axis.plot(*policy, color=color, marker="*", markersize=17, markeredgecolor="black", linestyle="")
    for name, (label, color) in COMPARED.items():
        runs = [rows for run in sorted(RESULTS.glob(f"comparison/{name}-seed*")) if (rows := evaluations(run))]
        success = np.array([[row["success"] for row in rows] for rows in runs])
        steps = [row["global_step"] for row in runs[0]]
        style = {"color": color, "linewidth": 1.2}
        axis.fill_between(steps, success.min(0), success.max(0), color=color, alpha=0.15, linewidth=0)
        axis.plot(steps, success.mean(0), label=f"{label}, small networks, {len(runs)} seeds", **style)
        steps, success = curve(read(RESULTS / f"longer/{name}-seed3"), "success")
        first = steps.index(1_000_000)
        axis.plot(steps[first:], success[first:], ":", label=f"{label}, one of them continued", **style)
    own, _ = axis.get_legend_handles_labels()
    options = {"frameon": False, "fontsize": "small", "title_fontsize": "small", "alignment": "left"}
    title = "this file, episodes of 200 steps\n(★ a kept policy, 50 episodes):"
    axis.add_artist(axis.legend(handles=own, title=title, loc="upper left", **options))
    for name, (color, marker, success) in PUBLISHED.items():
        axis.plot(STEPS, success, color=color, linewidth=1.2, linestyle="--", marker=marker, markersize=5, label=name)
    published = axis.get_legend_handles_labels()[0][len(own) :]
    title = "arXiv 2503.05126, ten seeds, episodes of 500 steps:"
    axis.legend(handles=published, title=title, loc="lower right", **options)
    axis.set(xscale="log", xlim=(4.5e4, 2.2e7), ylim=(0, 1))
    axis.set(xlabel="environment steps, summed over the ten tasks", ylabel="mean success rate, random goals")
    axis.set_xticks([1e5, 3e5, 1e6, 3e6, 1e7, 2e7])
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    save(figure, out / "mt10.png")


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path | None = None) -> None:
    for run in runs:
        plot(run, out)
    if not runs:
        plot_mt10(directory(RESULTS / "pictures", out))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
