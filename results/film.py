# SPDX-License-Identifier: MIT
"""Film a policy: MUJOCO_GL=egl python results/film.py results/RUN [--task drawer-close-v3 ...] [--seconds 8].

Writes a GIF of an episode of RUN/actor.pt, up to a little after its success: the robot, the graph of that very step
with the modules and edges that it uses, and the modules used over time. Several tasks, without --task all of the run,
stand side by side, in RUN/film.gif; one is in RUN/film-TASK.gif. A film of more than 3 MB loses every second frame. For
Meta-World alone; MuJoCo renders with OpenGL: on a GPU with MUJOCO_GL=egl, without one with MUJOCO_GL=osmesa (Debian:
apt-get install libosmesa6), which takes half a minute for a task.
"""

import argparse
import copy
import importlib
import subprocess
import sys
from itertools import islice
from pathlib import Path

if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:  # before MuJoCo is imported: it looks for OpenGL then
    check = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8)"
    probe = subprocess.run([sys.executable, "-c", check], check=False, capture_output=True, text=True)
    if probe.returncode:
        advice = "set MUJOCO_GL=egl on a GPU; without one set MUJOCO_GL=osmesa, and install libosmesa6 (Debian's name)"
        reason = next((line for line in probe.stderr.splitlines() if "Error: " in line), "")
        print(f"error: MuJoCo finds no OpenGL here; {advice} ({reason})", file=sys.stderr)
        sys.exit(2)
    importlib.import_module("torch._dynamo")  # Triton's LLVM after OSMesa's is a segmentation fault

import gymnasium as gym
import imageio.v3 as imageio
import matplotlib.pyplot as plt
import mujoco
import numpy as np
from PIL import Image
from routing import Graph, Steps, d2r, grid, load, rollout

FRAMES_PER_SECOND, STEPS_AFTER_SUCCESS, WIDTH, BYTES = 10, 15, 840, 3e6


class Remember(gym.Wrapper):
    """Keeps MuJoCo's state of before each step."""

    def __init__(self, env):
        super().__init__(env)
        self.states = []

    def step(self, action):
        self.states.append(copy.copy(self.unwrapped.data))
        return super().step(action)


def play(args, tasks, actor, index):
    """An episode of a task, without its last step, in which the environment resets itself: MuJoCo's model and states,
    and Steps."""
    env = Remember(d2r.make_env(tasks[index], args, args.seed))
    make = [lambda: gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))]
    envs = gym.vector.SyncVectorEnv(make, autoreset_mode="SameStep")
    steps = [*islice(rollout(actor, envs, args.seed, [index]), max(args.episode_length - 1, 1))]
    return env.unwrapped.model, env.states, Steps(*map(np.concatenate, zip(*steps)))


def render(model, states, size):
    """Pictures (N, size, size, 3) of states of MuJoCo."""
    renderer, pictures = mujoco.Renderer(model, size, size), []
    for state in states:
        renderer.update_scene(state, camera="corner4")
        pictures.append(renderer.render()[::-1, ::-1])  # Meta-World's corner cameras are upside down
    renderer.close()
    return np.stack(pictures)


def panel(axes, args, title, pictures, steps: Steps, shown, inches):
    """Put a task on its axes. Returns a function that shows its n-th picture."""
    small = inches < 2
    axes["robot"].set_title(title, fontsize=7 if small else 9)
    axes["robot"].axis("off")
    robot = axes["robot"].imshow(pictures[0])
    options = {"va": "top", "color": "white", "weight": "bold", "fontsize": 7 if small else 9}
    solved = axes["robot"].text(0.03, 0.96, "success", transform=axes["robot"].transAxes, **options)
    graph = Graph(axes["graph"], args, inches)
    M = args.num_modules
    axes["depth"].set(xlim=(1, shown[-1] + 1), ylim=(0, 1.08 * M), yticks=(0, M))
    axes["depth"].set_xlabel("step", fontsize=8, labelpad=1)
    axes["depth"].set_ylabel("modules used", fontsize=6 if small else 8)
    axes["depth"].tick_params(labelsize=7)
    (depth,) = axes["depth"].plot([], color="#0072B2", drawstyle="steps-post")

    def show(n):
        step = shown[n]
        robot.set_data(pictures[n])
        solved.set_visible(step > 0 and steps.success[step - 1])  # the picture is of before the step
        graph.show(steps.used[step], steps.weights[step])
        depth.set_data(range(1, step + 2), steps.used[: step + 1].sum(1))

    return show


def draw(args, titles, episodes, shown):
    """Frames (height, WIDTH, 3) of the steps that are shown, of episodes as `play` gives them, side by side."""
    lines, columns = grid(len(titles))
    size = WIDTH // max(columns, 2)
    form, ratios, height = [["robot"], ["graph"], ["depth"]], (5, 2.5, 1.6), (1.6 * size + 60) * lines
    if len(titles) == 1:
        form, ratios, height = [["robot", "graph"], ["depth", "depth"]], (4, 1), 0.62 * WIDTH
    figure = plt.figure(figsize=(WIDTH / 100, height / 100), dpi=100, layout="constrained")
    panels = []
    cells = figure.subfigures(lines, columns, squeeze=False).flat
    for cell, title, (model, states, steps) in zip(cells, titles, episodes):
        pictures = render(model, [states[step] for step in shown], size)
        axes = cell.subplot_mosaic(form, height_ratios=ratios)
        panels.append(panel(axes, args, title, pictures, steps, shown, size / 100))
    for n in range(len(shown)):
        for show in panels:
            show(n)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all frames as the first
        yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=8)
    options = parser.parse_args(argv)
    args, tasks, actor = load(options.run, "cpu")
    if not {*options.task} <= {*tasks}:
        parser.error(f"--task: the tasks of this run are {', '.join(tasks)}")
    if not 0.1 <= options.seconds <= 60:
        parser.error("--seconds must lie between 0.1 and 60")
    chosen = [*dict.fromkeys(options.task)] or tasks
    episodes = [play(args, tasks, actor, tasks.index(task)) for task in chosen]
    solved = [steps.success.argmax() if steps.success.any() else args.episode_length for *_, steps in episodes]
    length = min(max(solved) + STEPS_AFTER_SUCCESS, len(episodes[0][2].success))
    number = min(length, round(options.seconds * FRAMES_PER_SECOND))
    shown = np.linspace(0, length - 1, number).astype(int)
    frames = [Image.fromarray(frame) for frame in draw(args, chosen, episodes, shown)]
    # One palette for all frames: what does not move has the same colours in each, and takes no space.
    palette = Image.fromarray(np.concatenate(frames[:: max(1, number // 4)])).quantize(256)
    frames = [np.asarray(frame.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")) for frame in frames]

    def gif():
        duration = 1000 * options.seconds / len(frames)
        return imageio.imwrite("<bytes>", frames, extension=".gif", loop=0, duration=duration)

    while len(data := gif()) > BYTES and len(frames) > 1:
        frames = frames[::2]
    path = options.run / (f"film-{chosen[0]}.gif" if len(options.task) == 1 else "film.gif")
    path.write_bytes(data)
    print(path, f"{len(frames)} frames, {len(data) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
