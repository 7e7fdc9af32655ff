# SPDX-License-Identifier: MIT
"""Look at a policy's routes: python results/routing.py results/RUN [--episodes 10].

Runs RUN/actor.pt as an evaluation does, and writes

    RUN/paths.png    for each task, the modules and edges it uses, its success, and its number of modules used
    RUN/tsne.png     t-SNE of the routing probabilities of some 200 states of each task
"""

import math
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.collections import LineCollection
from plot import RED, save
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

STATES = 200  # of each task, for t-SNE


class Steps(NamedTuple):
    """What T tasks do in a step, or in S of them: arrays ([S], T, ...)."""

    probability: np.ndarray  # (M, M), softmax of the routing logits
    used: np.ndarray  # (M,), the modules used
    weights: np.ndarray  # (M, M), routing weights of the edges chosen that end in one of them, or in the head; else 0
    success: np.ndarray  # a success in this step of the episode, or before
    ended: np.ndarray  # the episode's last step


@torch.no_grad()
def rollout(actor, args, envs, tasks: list[int]):
    """Act in envs, of the tasks with these indices, as an evaluation does, for ever: Steps, one by one."""
    task = torch.tensor(tasks)
    success = np.zeros(len(tasks), bool)
    envs.reset(seed=args.seed)
    obs, _ = envs.reset()
    while True:
        h, logits = actor.routing_network(torch.as_tensor(obs, dtype=torch.float32), task)
        routes = d2r.top_k(logits, actor.K)
        output = actor.run_modules(h, logits, routes)
        used = d2r.used_modules(routes)
        weights = torch.zeros_like(logits).scatter_add_(-1, routes, d2r.routing_weights(logits, routes))
        weights *= F.pad(used[:, 1:], (0, 1), value=True)[..., None]
        obs, _, terminated, truncated, infos = envs.step(output.chunk(2, dim=-1)[0].tanh().numpy())
        ended = terminated | truncated
        now = np.where(ended, infos.get("final_info", {}).get("success", 0), infos.get("success", 0)) > 0
        success = success | now
        yield Steps(logits.softmax(-1).numpy(), used.numpy(), weights.numpy(), success, ended)
        success = success & ~ended


def record(actor, args, episodes: int) -> Steps:
    """So many episodes of each task, in processes of their own."""
    steps = []
    finished = 0
    args.envs_per_task = 1
    with closing(d2r.make_envs(args, args.seed)) as envs:
        for step in rollout(actor, args, envs, [*range(len(args.tasks))]):
            steps.append(step)
            finished = finished + step.ended
            if finished.min() >= episodes:
                return Steps(*map(np.stack, zip(*steps)))


class Graph:
    """The modules in a row on an axis, in the same place for every task, and the head; all edges lead to the right."""

    def __init__(self, axis, args, inches):
        """inches: about the axis' width."""
        M = args.num_modules
        self.targets, self.sources = d2r.allowed_sources(M, args.routing, args.parallel_modules).numpy().nonzero()
        length = self.targets + 1 - self.sources
        angle = np.linspace(0, math.pi, 30)[:, None]
        curves = [self.sources + length * (1 - np.cos(angle)) / 2, 0.9 * length**0.75 * np.sin(angle)]
        self.width = 1.2 * inches
        self.edges = LineCollection(np.stack(curves, -1).swapaxes(0, 1), colors=RED, linewidths=0, zorder=1)
        axis.add_collection(self.edges)
        size = (inches * 36 / (M + 3)) ** 2
        self.nodes = axis.scatter(range(M), [0] * M, s=size, linewidths=0.5, edgecolors="0.5", zorder=2)
        axis.scatter([M], [0], s=size, marker="s", color="0.2", zorder=2)
        for x, text, align in ((-0.4, "0", "left"), (M - 0.6, f"{M - 1}", "right"), (M - 0.4, "head", "left")):
            axis.text(x, -0.9, text, ha=align, va="top", fontsize=5 + 0.6 * inches)
        axis.set(xlim=(-1, M + 1.3), ylim=(-2.4, 0.9 * M**0.75 + 0.6))
        axis.axis("off")

    def show(self, shade, thickness):
        """shade (M,): 0 to 1 for each module; thickness (M, M): 0 to 1 for each edge."""
        self.nodes.set_facecolor(plt.cm.Blues(0.95 * np.asarray(shade, float)))
        self.edges.set_linewidths(self.width * thickness[self.targets, self.sources])


def plot_paths(steps, args, path):
    lines = math.ceil(len(args.tasks) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(10, 1.4 * lines + 0.3), squeeze=False, layout="constrained")
    success = (steps.success & steps.ended).sum(0) / steps.ended.sum(0)
    depth = steps.used.sum(2)  # (S, T)
    for t, (axis, task) in enumerate(zip(axes.flat, args.tasks)):
        Graph(axis, args, 5).show(steps.used[:, t].mean(0), steps.weights[:, t].mean(0))
        title = f"{task}: success {success[t]:.2f}, modules used {depth[:, t].mean():.1f} ± {depth[:, t].std():.1f}"
        axis.set_title(title, fontsize=9)
        print(title)
    for axis in axes.flat[len(args.tasks) :]:
        axis.remove()
    text = "blue: share of steps that use a module; width of an edge: mean weight × share of steps that choose it; "
    text += f"±: standard deviation over steps; {steps.ended.sum(0).min()} episodes"
    figure.supxlabel(text, fontsize=8)
    save(figure, path)


def plot_tsne(steps, tasks, path):
    S = len(steps.used)
    shown = np.linspace(0, S - 1, min(S, STATES)).astype(int)
    points = steps.probability[shown].swapaxes(0, 1)  # (T, states, M, M)
    points = points.reshape(-1, points.shape[-1] ** 2)
    places = TSNE(init="pca", perplexity=min(30, len(points) / 4), random_state=0).fit_transform(points)
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for t, place in enumerate(places.reshape(len(tasks), len(shown), 2)):
        axis.scatter(*place.T, s=14, color=plt.cm.tab10(t % 10), marker="osD^v"[(t + t // 10) % 5], label=tasks[t])
    axis.set(xticks=[], yticks=[], title="t-SNE of the routing probabilities, a point per state")
    figure.legend(loc="outside right center", frameon=False, markerscale=1.5, ncols=math.ceil(len(tasks) / 25))
    save(figure, path)


def main(run: tyro.conf.Positional[Path], episodes: int = 10) -> None:
    torch.set_num_threads(1)  # more would compete with the environments
    actor, tasks, args = d2r.load_policy(run / "actor.pt")
    print(f"running {episodes} episodes of each task", flush=True)
    steps = record(actor, args, episodes)
    plot_paths(steps, args, run / "paths.png")
    plot_tsne(steps, tasks, run / "tsne.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
