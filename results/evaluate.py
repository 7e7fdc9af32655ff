# SPDX-License-Identifier: MIT
"""Evaluate a trained policy: python results/evaluate.py results/three-tasks [--episodes 32] [--seed 1].

Prints success, return and the number of modules used, of each task and their means. If a policy was trained with your
own task_names, make_env or BaseModule, replace them in d2r_sac before you call main(path).
"""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import d2r_sac as d2r


def main(path: tyro.conf.Positional[Path], episodes: int = 32, seed: int = 1) -> None:
    """path: a run's directory, or an actor.pt. seed: of the goals; with that of the training they are the same."""
    torch.set_num_threads(1)  # more would compete with the environments
    actor, tasks, args = d2r.load_policy(path / "actor.pt" if path.is_dir() else path)
    vars(args).update(eval_episodes=episodes, seed=seed, envs_per_task=1, device="cpu")

    @torch.no_grad()
    def act(obs):
        output, routes = actor(obs, torch.arange(len(tasks)))
        return output.chunk(2, dim=-1)[0].tanh(), routes

    envs = d2r.make_envs(args, seed)
    envs.reset(seed=seed)
    d2r.evaluate(args, act, envs)
    envs.close()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
