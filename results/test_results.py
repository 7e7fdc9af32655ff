# SPDX-License-Identifier: MIT
"""Tests of the scripts in this directory, and of README's examples."""

import collections
import csv
import dataclasses
import itertools
import json
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import ablation
import film
import imageio.v3 as imageio
import numpy as np
import plot
import pytest
import routing
import speed
import torch

import d2r_sac as d2r
from test_d2r_sac import SCRIPT, TINY, TWO_TASKS, close, main, progress, replayed, small_agent, snippet

RESULTS = Path(__file__).parent


def test_an_update_takes_few_operations():
    """Each is a kernel on a GPU, and their number is the time that an update takes there."""
    with speed.Operations() as count:
        a = torch.ones(3, 4)  # 1: empty and fill count once
        (a @ a.T.contiguous()).relu_().view(9)[2:5].unsqueeze(0).detach()  # 2, 3, 4
    assert count.number == 4 and 1900 < speed.operations("MT10") <= 2210


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield  # ablation.py replaces them
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def policy(tmp_path, monkeypatch):
    """A run's directory with a policy of two tasks whose routes change with the state; and the routes it chooses."""
    args, chosen = d2r.Args(**TINY, env_id="reach-v3,drawer-close-v3"), []
    torch.manual_seed(0)
    actor = d2r.Agent(39, 4, 2, args).actor
    actor.routing_network.obs_encoder[0].weight.data *= 30
    torch.save({"args": dataclasses.asdict(args), "actor": actor.state_dict()}, tmp_path / "actor.pt")
    top_k = d2r.top_k
    monkeypatch.setattr(d2r, "top_k", lambda *options: chosen.append(top_k(*options).tolist()) or top_k(*options))
    return tmp_path, chosen


def used_edges(route):
    """(source, module) of all edges that lead to the head, which is the last module."""

    def edges(i):
        return {(j, i) for j in route[i - 1]}.union(*(edges(j) for j in route[i - 1] if j))

    return edges(len(route))


def test_routing_figures(policy, monkeypatch, capsys):
    """What they show is what the policy chose, and what an evaluation of it prints."""
    (run_dir, chosen), recordings = policy, []
    record = routing.record
    monkeypatch.setattr(routing, "record", lambda *options: recordings.append(record(*options)) or recordings[0])
    assert main(run_dir, "--episodes", "0", function=routing.main) == 2
    assert main(run_dir / "none", function=routing.main) == 1 and "none/actor.pt" in capsys.readouterr().err
    assert main(run_dir, "--episodes", "3", "--device", "cpu", function=routing.main) == 0
    assert len(chosen) == 30 and all((run_dir / f"{name}.png").exists() for name in ("paths", "tsne", "depth"))
    rows, steps = [*csv.DictReader((run_dir / "routing.csv").read_text().splitlines())], recordings[0]
    counts = [collections.Counter(edge for step in chosen for edge in used_edges(step[t])) for t in range(2)]
    capsys.readouterr()
    assert main("--evaluate", run_dir, "--eval-episodes", "3") == 0
    evaluated = re.findall(r"(\S+-v3): success ([0-9.]+), .* modules used ([0-9.]+)", capsys.readouterr().out)
    for t, (row, (task, success, used)) in enumerate(zip(rows, evaluated, strict=True)):
        shares = np.zeros((4, 4))
        for (j, i), count in counts[t].items():
            shares[i - 1, j] = count / 30
        np.testing.assert_allclose(steps.edges[:, t].mean(0), shares)
        assert ((steps.weights > 0) == steps.edges).all()
        np.testing.assert_allclose(steps.weights[:, t].sum(-1)[steps.edges[:, t].any(-1)], 1, rtol=1e-5)
        common = sum((counts[0] & counts[1]).values()) / counts[t].total()
        assert float(row["edge_overlap"]) == pytest.approx(common, abs=6e-4) and 0 < common < 1
        depths = [len({j for j, _ in used_edges(step[t])}) for step in chosen[:30]]
        assert float(row["modules_used_std"]) == pytest.approx(np.std(depths), abs=6e-4)
        assert (row["task"], f"{float(row['success']):.2f}") == (task, success)
        assert float(row["modules_used"]) == pytest.approx(float(used), abs=0.06)


def test_film(policy, monkeypatch, capsys):
    """With a stand-in for OpenGL, whose pictures are as bright as MuJoCo's time."""

    def render(model, states, size):
        times = np.array([state.time for state in states])
        np.testing.assert_allclose(times - times[0], np.arange(0, 10, 2) * 0.0125, atol=1e-9)  # of 80 Hz
        return np.stack([np.full((size, size, 3), 1000 * time % 256, np.uint8) for time in times])

    monkeypatch.setattr(film, "render", render)
    for name, task in (("film-reach-v3", ["--task", "reach-v3"]), ("film", [])):
        assert main(policy[0], *task, "--seconds", "0.5", function=film.main) == 0
        frames = imageio.imread(policy[0] / f"{name}.gif")
        assert len(frames) == 5 and all((one != two).any() for one, two in itertools.pairwise(frames))
    assert main(policy[0], "--task", "push-v3", function=film.main) == 2
    assert "the tasks of this run are reach-v3, drawer-close-v3" in capsys.readouterr().err


def test_plots(tmp_path, monkeypatch):
    """A kept run beside what was read off the terminal; return if there is no success."""
    shutil.copytree(RESULTS / "MT10-gpu", tmp_path / "MT10-gpu")
    assert plot.plot_mt10(tmp_path).exists()
    lines = {line.get_label(): line.get_ydata().tolist() for line in plot.plt.gca().get_lines()}
    assert lines["D2R, MT10-gpu"] == [0.185, 0.485, 0.59, 0.56] and {*plot.PUBLISHED} < {*lines}
    header = "global_step,success,success/a,return,return/a,modules_used,modules_used/a\n"
    (tmp_path / "progress.csv").write_text(header + "50\n500,,,-7,-7,3,3\n")
    assert plot.plot(tmp_path).exists()
    assert plot.plt.gcf().axes[0].get_title() == "return"
    assert plot.plt.gcf().axes[0].get_lines()[0].get_ydata() == [-7]
    with pytest.raises(SystemExit, match="there is no .*none/progress.csv"):
        plot.evaluations(tmp_path / "none")


def test_ablation(tmp_path, monkeypatch, capsys):
    """Starts, resumes or leaves alone; a table of what is finished, checked by hand."""
    commands = []

    def start(command, env, **options):
        commands.append(" ".join(map(str, command[2:])))
        failed = int("--top-k 3 --seed 2" in commands[-1])
        return types.SimpleNamespace(wait=lambda: failed, returncode=failed)

    def write(name, success):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"args": {"total_steps": 60}}))
        rows = [f"{10 * n},{value},{n}\n{10 * n + 5},,\n" for n, value in enumerate(success, start=1)]
        (tmp_path / name / "progress.csv").write_text("global_step,success,modules_used\n" + "".join(rows))
        (tmp_path / name / "checkpoint.pt").touch()

    monkeypatch.setattr(ablation.subprocess, "Popen", start)
    write("d2r-seed1", [0, 0.1, 0.2, 0.5, 0.6, 0.6])  # the last five: mean 0.4, and 4 modules used
    write("d2r-seed2", [0, 0, 0, 0.1, 0.2, 0.2])  # 0.1
    write("k3-seed1", [0, 0.9])  # unfinished
    variants = ["--variant", "k3=--top-k 3", "--variant", "model"]
    options = ["--seeds", "1", "2", *variants, "--jobs", "1", "--runs", tmp_path]
    assert main(*options, function=ablation.main) == 1  # the second seed of k3 fails
    new = {"k3-seed2": "--top-k 3 --seed 2"}
    new |= {f"model-seed{seed}": f"{ablation.VARIANTS['model']} --seed {seed}" for seed in (1, 2)}
    new = {f"{ablation.ARGUMENTS} {o} --run-name {name} --results-dir {tmp_path}" for name, o in new.items()}
    assert {*commands} == {f"--resume {tmp_path}/k3-seed1", *new}
    out = capsys.readouterr().out
    assert "| d2r | 2 | 0.25 ± 0.21 | 40 (1 of 2) | 4.0 ± 0.0 |\n" in out and "k3-seed2: exit code 1, see " in out
    assert "| k3" not in out and (tmp_path / "table.md").read_text() in out and (tmp_path / "curves.png").exists()


def test_the_kept_ablation_is_what_its_script_runs(tmp_path):
    """Its arguments and table are those of the script at this commit."""
    for directory in (RESULTS / "ablation").glob("*-seed*/"):
        name, _, seed = directory.name.rpartition("-seed")
        args, *_ = d2r.parse_arguments(f"{ablation.ARGUMENTS} {ablation.VARIANTS[name]} --seed {seed}".split())
        kept = json.loads((directory / "args.json").read_text())["args"]
        mine = json.loads(json.dumps(dataclasses.asdict(args)))
        changed = {name for name in mine.keys() & kept.keys() if mine[name] != kept[name]}
        assert changed <= {"results_dir", "run_name", "resume", "device"}
    shutil.copytree(RESULTS / "ablation", tmp_path / "kept", ignore=shutil.ignore_patterns("table.md"))
    assert ablation.main(["--jobs", "0", "--runs", str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept" / "table.md").read_text() in (RESULTS / "README.md").read_text()


def test_use_it_elsewhere(capsys):
    """README's example learns, with nothing but the block that it tells to paste, and torch."""
    block, code = SCRIPT.read_text().split("# " + "=" * 118 + "\n")[1], snippet("Use it elsewhere")
    assert code.count("# (paste here)\n") == 1
    exec(code.replace("# (paste here)\n", block), names := {})
    errors = [float(error) for error in re.findall(r"error ([0-9.]+)", capsys.readouterr().out)]
    assert len(errors) == 2 and errors[1] < errors[0] / 5 and not {"gym", "np", "tyro", "Args"} & set(names)


def test_use_a_policy(monkeypatch):
    """README's example closes a drawer."""
    monkeypatch.chdir(SCRIPT.parent)
    exec(snippet("Use a policy"), names := {})
    assert names["action"].shape == (3, 4) and names["routes"].shape == (3, 16, 2)
    env = d2r.make_env("drawer-close-v3", names["args"], 1)
    obs, info = env.reset()[0], {"success": 0}
    while not info["success"]:
        names["obs"][1] = torch.from_numpy(obs)
        obs, _, _, truncated, info = env.step(names["agent"].act(names["obs"], deterministic=True)[0][1].numpy())
        assert not truncated


def test_change_the_environments(tmp_path, monkeypatch):
    """README's example trains on pendulums: their bounds, the entropy for their one action, no success to report."""
    for name in ("task_names", "make_env"):
        monkeypatch.setattr(d2r, name, getattr(d2r, name))  # put back what the example replaces
    options = TWO_TASKS.replace("5,10", "5,10,15").replace("--batch-size 16", "--batch-size 24")
    options += f" --total-steps 600 --results-dir {tmp_path} --run-name run"
    monkeypatch.setattr(sys, "argv", ["pendulum.py", *options.split()])
    exec(snippet("Change it"), {"__name__": "__main__"})
    obs, action, _, next_obs, *_ = replayed(tmp_path / "run", N=3)
    assert obs.shape == (200, 3, 3) and action.shape == (200, 3, 1) and action.abs().max() <= 1
    gravity, angle = torch.tensor([5.0, 10.0, 15.0]), torch.atan2(obs[..., 1], obs[..., 0])
    velocity = (obs[..., 2] + (1.5 * gravity * angle.sin() + 6 * action[..., 0]) * 0.05).clamp(-8, 8)
    close(next_obs[..., 2], velocity, 1e-4)  # torque in [-2, 2], mass 1, length 1, steps of 0.05 s
    assert progress(tmp_path / "run")[-1]["success"] == "" and float(progress(tmp_path / "run")[-1]["return/15"]) < 0
    assert d2r.Agent(3, 1, 3, small_agent()[0].args).target_entropy == -1
