# SPDX-License-Identifier: MIT
"""Film a policy: python results/film.py results/RUN [--task drawer-close-v3 ...].

Writes RUN/film.gif: an episode of each task of RUN/actor.pt, side by side, up to a little after the last first success.
Below each robot are the modules and edges used in that very step, and their number over time. MuJoCo renders with EGL
on a GPU, and else with OSMesa (Debian: apt-get install libosmesa6), half a minute for a task.
"""

import copy
import os
import sys
from itertools import islice
from pathlib import Path

import torch._dynamo  # first: Triton's LLVM after OSMesa's would be a segmentation fault

if __name__ == "__main__" and "--help" not in sys.argv:  # before MuJoCo is imported, which then looks for OpenGL
    os.environ.setdefault("MUJOCO_GL", "egl" if torch.cuda.is_available() else "osmesa")
    try:
        import mujoco
    except (AttributeError, ImportError, RuntimeError) as error:
        sys.exit(f"error: MuJoCo finds no OpenGL; without a GPU install libosmesa6 ({error})")

import gymnasium as gym
import imageio.v3 as imageio
import matplotlib.pyplot as plt
import mujoco
import numpy as np
import tyro
from PIL import Image
from plot import BLUE
from routing import Graph, Steps, d2r, rollout

FRAMES_PER_SECOND, FRAMES, STEPS_AFTER_SUCCESS, WIDTH = 10, 80, 15, 840  # WIDTH in pixels


def play(actor, args, index):
    """An episode of a task, without its last step, in which the environment resets itself: MuJoCo's model, its states
    after each step, and Steps."""
    env = d2r.make_policy_env(args.tasks[index], args, args.seed)
    envs = gym.vector.SyncVectorEnv([lambda: env], autoreset_mode="SameStep")
    states = []
    steps = []
    for step in islice(rollout(actor, args, envs, [index]), max(args.episode_length - 1, 1)):
        states.append(copy.copy(env.unwrapped.data))
        steps.append(step)
    return env.unwrapped.model, states, Steps(*map(np.concatenate, zip(*steps)))


def render(model, states, size):
    """Pictures (N, size, size, 3) of states of MuJoCo."""
    renderer = mujoco.Renderer(model, size, size)
    pictures = []
    for state in states:
        renderer.update_scene(state, camera="corner4")
        pictures.append(renderer.render()[::-1, ::-1])  # Meta-World's corner cameras are upside down
    renderer.close()
    return np.stack(pictures)


def panel(cell, args, title, pictures, steps: Steps, shown, inches, most):
    """Draw a task into a subfigure. Returns a function that shows its n-th picture. most: modules used, at most."""
    axes = cell.subplot_mosaic([["robot"], ["graph"], ["depth"]], height_ratios=(5, 2.5, 1.6))
    axes["robot"].set_title(title, fontsize=3 + 2 * inches)
    axes["robot"].axis("off")
    robot = axes["robot"].imshow(pictures[0])
    options = {"color": "white", "weight": "bold", "fontsize": 3 + 2 * inches}
    solved = axes["robot"].annotate("success", (0.03, 0.9), xycoords="axes fraction", **options)
    graph = Graph(axes["graph"], args, inches)
    axes["depth"].set(xlim=(1, shown[-1] + 1), ylim=(0, 1.15 * most), yticks=(0, most))
    axes["depth"].set_xlabel("step", fontsize=8, labelpad=1)
    axes["depth"].set_ylabel("modules used", fontsize=3 + 1.5 * inches)
    axes["depth"].tick_params(labelsize=7)
    (depth,) = axes["depth"].plot([], color=BLUE, drawstyle="steps-post")

    def show(n):
        step = shown[n]
        robot.set_data(pictures[n])
        solved.set_visible(steps.success[step])
        graph.show(steps.used[step], steps.weights[step])
        depth.set_data(range(1, step + 2), steps.used[: step + 1].sum(1))

    return show


def draw(args, titles, episodes, shown):
    """Frames (height, WIDTH, 3) of the steps that are shown, of episodes as `play` gives them, side by side."""
    lines = -(-len(titles) // 5)
    columns = -(-len(titles) // lines)
    size = WIDTH // max(columns, 2)
    figure = plt.figure(figsize=(columns * size / 100, (1.6 * size + 60) * lines / 100), dpi=100, layout="constrained")
    panels = []
    most = max(steps.used.sum(1).max() for *_, steps in episodes)
    for cell, title, episode in zip(figure.subfigures(lines, columns, squeeze=False).flat, titles, episodes):
        model, states, steps = episode
        print(f"rendering {title}", flush=True)
        pictures = render(model, [states[step] for step in shown], size)
        panels.append(panel(cell, args, title, pictures, steps, shown, size / 100, most))
    for n in range(len(shown)):
        for show in panels:
            show(n)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all frames as the first
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


def main(run: tyro.conf.Positional[Path], task: tuple[str, ...] = ()) -> None:
    actor, tasks, args = d2r.load_policy(run / "actor.pt")
    chosen = task or tasks
    episodes = [play(actor, args, tasks.index(task)) for task in chosen]
    solved = [steps.success.argmax() if steps.success.any() else len(steps.success) for *_, steps in episodes]
    length = min(max(solved) + STEPS_AFTER_SUCCESS, len(episodes[0][2].success))
    shown = np.linspace(0, length - 1, min(length, FRAMES)).astype(int)
    frames = [*draw(args, chosen, episodes, shown)]
    # One palette for all frames: what does not move has the same colours in each, and takes no space.
    palette = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 4)])).quantize(256)
    frames = [np.asarray(frame.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")) for frame in frames]
    imageio.imwrite(run / "film.gif", frames, loop=0, duration=1000 / FRAMES_PER_SECOND)
    print(run / "film.gif")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
