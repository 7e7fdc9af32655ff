# SPDX-License-Identifier: MIT
"""Look at a policy's routing: python results/routing.py results/RUN [--episodes 10] [--device cpu].

Runs RUN/actor.pt as an evaluation does, and writes into RUN/

    paths.png     each task's graph of modules, from the state on the left to the action on the right
    depth.png     modules used by each task, against its success and its steps to success
    tsne.png      t-SNE of the routing probabilities of some 200 states of each task
    routing.csv   the numbers, which it also prints

    episodes            at least so many of each task; all that follows is of these
    success             share of episodes with a success at any step
    steps_to_success    of those episodes, on average
    modules_used, _std  mean and standard deviation over all steps
    edge_overlap        share of the task's edges that the nearest task has, too: sum min(p, q) / sum p, where p and q
                        are the shares of steps at which the two use an edge
"""

import argparse
import csv
import math
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
from plot import legend, style

import d2r_sac as d2r

STATES = 200  # of each task, for t-SNE


class Steps(NamedTuple):
    """What T tasks do in a step, or in S of them: arrays ([S], T, ...)."""

    probability: np.ndarray  # (M, M), softmax of the routing logits
    used: np.ndarray  # (M,), the modules used
    edges: np.ndarray  # (M, M), the edges chosen that end in one of them, or in the head
    weights: np.ndarray  # (M, M), their routing weights, elsewhere 0
    success: np.ndarray  # a success in this step of the episode, or before
    ended: np.ndarray  # the episode's last step


def load(run_dir: Path, device: str):
    """Arguments, tasks and policy of RUN/actor.pt."""
    if not (run_dir / "actor.pt").exists():
        sys.exit(f"error: there is no {run_dir / 'actor.pt'}")
    args, path, _ = d2r.parse_arguments(["--evaluate", str(run_dir / "actor.pt"), "--device", device])
    weights = torch.load(path, map_location="cpu")["actor"]
    obs_dim = weights["routing_network.obs_encoder.0.weight"].shape[1]
    action_dim = len(weights["base_modules.head.weight"]) // 2
    actor = d2r.Agent(obs_dim, action_dim, len(args.tasks), args, device).actor
    actor.load_state_dict(weights)
    return args, args.tasks, actor


@torch.no_grad()
def rollout(actor, envs, seed: int, tasks: list[int]):
    """Act in envs, of the tasks with these indices, as an evaluation does, for ever: Steps, one by one."""
    task = torch.tensor(tasks, device=actor.base_modules.head.weight.device)
    success = np.zeros(len(tasks), bool)
    envs.reset(seed=seed)
    obs, _ = envs.reset()
    while True:
        h, logits = actor.routing_network(torch.as_tensor(obs, dtype=torch.float32, device=task.device), task)
        routes = d2r.top_k(logits, actor.K)
        output = actor.run_modules(h, logits, routes)
        used = d2r.used_modules(routes)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, routes, True)
        edges = chosen & F.pad(used[:, 1:], (0, 1), value=True)[..., None]
        weights = torch.zeros_like(logits).scatter_add_(-1, routes, d2r.routing_weights(logits, routes)) * edges
        obs, _, terminated, truncated, infos = envs.step(output.chunk(2, dim=-1)[0].tanh().cpu().numpy())
        ended = terminated | truncated
        now = np.where(ended, infos.get("final_info", {}).get("success", 0), infos.get("success", 0)) > 0
        success = success | now
        tensors = logits.softmax(-1), used, edges, weights
        yield Steps(*(tensor.cpu().numpy() for tensor in tensors), success, ended)
        success = success & ~ended


def record(args, tasks: list[str], actor, episodes: int) -> Steps:
    """So many episodes of each task, in processes of their own."""
    steps, finished = [], 0
    with closing(d2r.make_envs(args, args.seed)) as envs:
        for step in rollout(actor, envs, args.seed, [*range(len(tasks))]):
            steps.append(step)
            finished = finished + step.ended
            if finished.min() >= episodes:
                return Steps(*map(np.stack, zip(*steps)))


def table(steps: Steps, tasks: list[str]) -> list[dict]:
    """A row of numbers for each task."""
    rows, depth, shares = [], steps.used.sum(2), steps.edges.mean(0)  # depth (S, T), shares (T, M, M)
    for t, task in enumerate(tasks):
        ends = [-1, *np.flatnonzero(steps.ended[:, t])]
        episodes = [steps.success[start + 1 : end + 1, t] for start, end in pairwise(ends)]
        times = [np.flatnonzero(episode)[0] + 1 for episode in episodes if episode.any()]
        others = [u for u in range(len(tasks)) if u != t]
        common = {u: np.minimum(shares[t], shares[u]).sum() / shares[t].sum() for u in others}
        nearest = max(common, key=common.get, default=None)
        rows.append({
            "task": task,
            "episodes": len(episodes),
            "success": len(times) / len(episodes),
            "steps_to_success": np.mean(times) if times else math.nan,
            "modules_used": depth[:, t].mean(),
            "modules_used_std": depth[:, t].std(),
            "edge_overlap": common.get(nearest, math.nan),
            "nearest_task": tasks[nearest] if others else "",
        })  # fmt: skip
    return rows


def grid(T: int) -> tuple[int, int]:
    """Lines and columns for the pictures of T tasks, at most five side by side."""
    lines = math.ceil(T / 5)
    return lines, math.ceil(T / lines)


class Graph:
    """The modules and their edges on an axis. All edges lead to the right, since each module stands to the right of the
    one before. It also stands below it, until a new slanted column begins: with routing by layer or model a column is a
    layer, and a row a chain. Places are in units of a sixteenth of the modules' width."""

    def __init__(self, axis, args, inches):
        """inches: about the axis' width."""
        M, P = args.num_modules, args.parallel_modules
        rows = round(M**0.5) if args.routing == "module" else P
        height = 6.6 if rows > 1 else 0
        place = [(16 * i / M, -height * (i % rows) / max(rows - 1, 1)) for i in range(M)]
        place = np.array([*place, (16.5, -height / 2)])  # and the head
        self.targets, self.sources = d2r.allowed_sources(M, args.routing, P).numpy().nonzero()
        start, end = place[self.sources], place[self.targets + 1]
        normal = (end - start)[:, ::-1] * (-1, 1)
        bend = 0.5 * (start + end) + 0.2 * normal  # else edges in one line would hide each other
        t = np.linspace(0, 1, 20)[:, None, None]
        curves = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        self.width, edge = inches / 3.4 * min(1, 16 / M), "#D55E00"
        self.edges = LineCollection(curves.swapaxes(0, 1), colors=edge, linewidths=0, capstyle="round", zorder=1)
        axis.add_collection(self.edges)
        for x, y, text in ((-1.7, 0, "state"), (*place[M], "action")):
            axis.plot([x, x + 1.7], [y, y], color=edge, linewidth=1.5 * self.width, zorder=0)
            axis.text(x + 0.85, y + 0.7, text, ha="center", fontsize=6 * inches / 3.4 + 2)
        options = {"s": 60 * self.width**2, "linewidths": 0.6 * self.width}
        axis.scatter(*place[:M].T, facecolors="white", edgecolors="0.6", zorder=0, **options)  # under the edges
        self.nodes = axis.scatter(*place[:M].T, zorder=2, **options)
        axis.scatter(*place[M:].T, marker="s", color="0.2", zorder=2, **options)
        axis.set(xlim=(-2.5, 19), ylim=(-8, 1.8), aspect="equal")
        axis.axis("off")

    def show(self, shade, thickness):
        """shade (M,): 0 to 1 for each module; thickness (M, M): 0 to 1 for each edge."""
        color = plt.cm.Blues(0.1 + 0.85 * np.asarray(shade, float))
        color[:, 3] = np.asarray(shade) > 0
        self.nodes.set(facecolors=color, edgecolors=color * (0.4, 0.4, 0.4, 1))
        thickness = thickness[self.targets, self.sources]
        self.edges.set_linewidths(np.where(thickness > 0, self.width * (0.15 + 4.35 * thickness), 0))


def plot_paths(steps, rows, args, path):
    lines, columns = grid(len(rows))
    width = 10 if columns > 2 else 7
    size = width / columns
    height = (0.45 * size + 0.5) * lines + 0.3
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    usage, thickness = steps.used.mean(0), steps.weights.mean(0)
    for t, (axis, row) in enumerate(zip(axes.flat, rows)):
        Graph(axis, args, min(size, 3.5)).show(usage[t], thickness[t])
        title = f"{row['task']}\nsuccess {row['success']:.2f}, {row['modules_used']:.1f} modules"
        axis.set_title(title, fontsize=8.5 if columns > 3 else 10, linespacing=1.3)
    text = "Modules 0, 1, ... column by column. Blue: share of steps that use it; "
    text += "edge: mean weight × share of steps that choose it."
    figure.text(0.5, 0.05 / height, text, ha="center", va="bottom", fontsize=8.5)
    figure.subplots_adjust(0.005, 0.3 / height, 0.995, 1 - 0.45 / height, 0.02, 0.5 / (0.45 * size))
    figure.savefig(path, dpi=120)


def plot_depth(rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for t, row in enumerate(rows):
        for axis, name in zip(axes, ("success", "steps_to_success")):
            options = {"xerr": row["modules_used_std"], "elinewidth": 0.5, "label": row["task"], "linestyle": ""}
            axis.errorbar(row["modules_used"], row[name], markersize=7, markerfacecolor="none", **options, **style(t))
    axes[0].set(xlabel="modules used, ± standard deviation", ylabel="success rate", ylim=(-0.05, 1.05))
    axes[1].set(xlabel="modules used, ± standard deviation", ylabel="steps to success, where there is one")
    axes[1].sharex(axes[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    legend(figure)
    figure.savefig(path, dpi=110)


def plot_tsne(steps, tasks, path):
    S = len(steps.used)
    shown = np.linspace(0, S - 1, min(S, STATES)).astype(int)
    points = steps.probability[shown].swapaxes(0, 1)  # (T, states, M, M)
    points = points.reshape(-1, points.shape[-1] ** 2)
    if len(points) < 10 or np.ptp(points, axis=0).max() < 1e-6:
        print("no t-SNE: there are too few states, or all have the same routing probabilities")
        return
    places = TSNE(init="pca", perplexity=min(30, len(points) / 4), random_state=0).fit_transform(points)
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for t, place in enumerate(places.reshape(len(tasks), len(shown), 2)):
        axis.scatter(*place.T, s=18, linewidths=0.6, alpha=0.75, label=tasks[t], **style(t))
    axis.set(xticks=[], yticks=[], title="t-SNE of the routing probabilities, a point per state")
    legend(figure)
    figure.savefig(path, dpi=110)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=d2r.Args.device)
    options = parser.parse_args(argv)
    if options.episodes < 1:
        parser.error("--episodes must be at least 1")
    args, tasks, actor = load(options.run, options.device)
    steps = record(args, tasks, actor, options.episodes)
    rows = table(steps, tasks)
    lines = [[*rows[0]]] + [[f"{x:.4g}" if isinstance(x, float) else x for x in row.values()] for row in rows]
    with open(options.run / "routing.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    for line in lines:
        print(f"{line[0]:<28}", *(f"{cell:>16}" for cell in line[1:-1]), "", line[-1])
    plot_paths(steps, rows, args, options.run / "paths.png")
    plot_depth(rows, options.run / "depth.png")
    plot_tsne(steps, tasks, options.run / "tsne.png")


if __name__ == "__main__":
    main()
