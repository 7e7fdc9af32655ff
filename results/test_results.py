# SPDX-License-Identifier: MIT
"""Tests of the scripts in this directory, and of README's examples."""

import collections
import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import types
from pathlib import Path

import ablation
import evaluate
import fast
import film
import imageio.v3 as imageio
import mtsac
import numpy as np
import plot
import pytest
import routing
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

import d2r_sac as d2r
from test_d2r_sac import SCRIPT, TINY, TWO_TASKS, close, main, progress, replayed, snippet

RESULTS = Path(__file__).parent
MT_SAC = ablation.VARIANTS["comparison"]["mt-sac"]


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: neither views nor empty tensors."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not (function.is_view or "empty" in function.name() or "detach" in function.name())
        return function(*args, **kwargs or {})


def test_an_update_takes_few_operations(monkeypatch):
    """Each is a kernel on a GPU, and their number is the time that an update takes there. Without clipping and Adam,
    whose number depends on the device."""
    monkeypatch.setattr(d2r, "D2RNetwork", fast.FastNetwork)
    adam = types.SimpleNamespace(zero_grad=lambda: 0, step=lambda: 0, param_groups=[])
    monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: adam)
    agent = fast.FastAgent(39, 4, 10, d2r.Args(), "meta")
    with torch.device("meta"):
        batch = torch.empty(1280, 39), torch.empty(1280, 4), torch.empty(1280), torch.empty(1280, 39)
        terminated, routes = torch.empty(1280, dtype=torch.bool), torch.empty(1280, 16, 2, dtype=torch.int16)
    with Operations() as count:
        agent.update(*batch, terminated, routes)
    assert 1900 < count.number <= 2650


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


command = lambda script: lambda: tyro.cli(script.main)


def used_edges(route):
    """(source, module) of all edges that lead to the head, which is the last module."""

    def edges(i):
        return {(j, i) for j in route[i - 1]}.union(*(edges(j) for j in route[i - 1] if j))

    return edges(len(route))


def test_routing_figures(policy, monkeypatch, capsys):
    """What they show is what the policy chose, and what evaluate.py prints."""
    (run_dir, chosen), recordings = policy, []
    record = routing.record
    monkeypatch.setattr(routing, "record", lambda *options: recordings.append(record(*options)) or recordings[0])
    assert main(run_dir, "--episodes", "3", function=command(routing)) == 0
    assert len(chosen) == 30 and [*run_dir.glob("paths.png"), *run_dir.glob("tsne.png")]
    printed, steps = capsys.readouterr().out.splitlines(), recordings[0]
    counts = [collections.Counter(edge for step in chosen for edge in used_edges(step[t])) for t in range(2)]
    assert main(run_dir, "--episodes", "3", function=command(evaluate)) == 0
    evaluated = re.findall(r"(\S+-v3): success ([0-9.]+), .* modules used ([0-9.]+)", capsys.readouterr().out)
    for t, (line, (task, success, used)) in enumerate(zip(printed[2:4], evaluated, strict=True)):
        shares = np.zeros((4, 4))
        for (j, i), count in counts[t].items():
            shares[i - 1, j] = count / 30
        np.testing.assert_allclose((steps.weights[:, t] > 0).mean(0), shares)
        read = steps.weights[:, t].any(-1)  # by the modules used and the head
        np.testing.assert_allclose(steps.weights[:, t].sum(-1)[read], 1, rtol=1e-5)
        depths = [len({j for j, _ in used_edges(step[t])}) for step in chosen[:30]]
        assert line == f"{task}: success {success}, modules used {used} ± {np.std(depths):.1f}"


def test_film(policy, monkeypatch):
    """With a stand-in for OpenGL, whose pictures are as bright as MuJoCo's time."""

    def render(model, states, size):
        times = np.array([state.time for state in states])
        np.testing.assert_allclose(times - times[0], np.arange(9) * 0.0125, atol=1e-9)  # of 80 Hz
        return np.stack([np.full((size, size, 3), 1000 * time % 256, np.uint8) for time in times])

    monkeypatch.setattr(film, "render", render)
    for task in (["--task", "reach-v3"], []):
        assert main(policy[0], *task, function=command(film)) == 0
        frames = imageio.imread(policy[0] / "film.gif")
        assert len(frames) == 9 and all((one != two).any() for one, two in itertools.pairwise(frames))


def test_plots(tmp_path):
    """Kept runs beside published ones; return if there is no success; a run before its first evaluation."""
    plot.plot_mt10(tmp_path / "mt10.png")
    lines = {line.get_label(): line.get_ydata().tolist() for line in plot.plt.gca().get_lines()}
    assert lines["D2R, 2.05M parameters, one seed"] == [0.185, 0.485] and {*plot.PUBLISHED} < {*lines}
    seeds = [plot.read(RESULTS / f"comparison/mt-sac-seed{seed}") for seed in (1, 2, 3)]
    last = [[row["success"] for row in rows if "success" in row][-1] for rows in seeds]
    assert lines["MT-SAC (baseline), 0.23M, 3 seeds"][-1] == np.mean(last)
    assert [values[19] for values in lines.values() if len(values) == 40][1] == last[2]  # the one that was continued
    (tmp_path / "args.json").write_text('{"tasks": ["a"]}')
    header = "global_step,success,success/a,return,return/a,train_return,modules_used,modules_used/a\n"
    for empty in ("", header):
        (tmp_path / "progress.csv").write_text(empty)
        assert main(tmp_path, function=command(plot)) == 1
    for rows, evaluated, trained in (("50,,,,,-9,,\n", [], [-9]), ("50\n500,,,-7,-7,,3,3\n", [-7], [])):
        (tmp_path / "progress.csv").write_text(header + rows)
        plot.plot(tmp_path)
        training, evaluations = plot.plt.gcf().axes[0].get_lines()
        assert list(evaluations.get_ydata()) == evaluated and list(training.get_ydata()) == trained


def test_ablation(tmp_path, monkeypatch, capsys):
    """The commands of what is not finished, as a shell and xargs split them; a table of the rest, checked by hand."""
    runs = tmp_path / "comparison"

    def write(name, success):
        (runs / name).mkdir(parents=True)
        (runs / name / "args.json").write_text('{"args": {"steps": 30}, "tasks": ["a-v3", "b-v3"]}')
        rows = [f"{10 * n},{value},{n},{1 - value}\n{10 * n + 5},,,\n" for n, value in enumerate(success, start=1)]
        (runs / name / "progress.csv").write_text("global_step,success,modules_used,success/a-v3\n" + "".join(rows))

    monkeypatch.setattr(ablation, "HERE", tmp_path)
    assert main("--benchmark", "comparison", function=command(ablation)) == 1
    write("d2r-seed1", [0, 0.1, 0.2, 0.5, 0.6, 0.6])  # the last five: mean 0.4, and 4 modules used
    write("d2r-seed2", [0, 0, 0, 0.1, 0.2, 0.2])  # 0.1
    write("mt-sac-seed2", [0.9] * 6)
    write("k3-seed1", [0, 0.9])  # unfinished
    options = ["--commands", "--seeds", "1", "2", "--variant", "k3=--top-k 3"]
    assert main("--benchmark", "comparison", *options, function=command(ablation)) == 0
    printed = capsys.readouterr().out.splitlines()
    runs_left = [
        ("mt-sac-seed1", "mtsac.py", MT_SAC),
        ("k3-seed1", "fast.py", "--top-k 3"),
        ("k3-seed2", "fast.py", "--top-k 3"),
    ]
    common = f"{ablation.ARGUMENTS['comparison']} {ablation.SMALL}"
    assert printed == [
        f"OMP_NUM_THREADS=1 python {tmp_path / script} {common} {text} --seed {name[-1]} --run-dir {runs / name}"
        for name, script, text in runs_left
    ]
    assert main("--benchmark", "comparison", function=command(ablation)) == 0
    out = capsys.readouterr().out  # the area: means of 2 / 6 and 0.5 / 6
    assert "not finished: k3-seed1\n| variant | seeds | success: mean, range | area: mean, range |" in out
    assert "\n| d2r | 2 | 0.25 (0.10 to 0.40) | 0.21 (0.08 to 0.33) | 4.0 | 0.75 |\n" in out
    assert "\n| mt-sac | 1 | 0.90 (0.90 to 0.90) | 0.90 (0.90 to 0.90) | – | 0.10 |\n" in out
    assert (runs / "curves.png").exists()


@pytest.mark.parametrize("benchmark", ["ablation", "comparison"])
def test_kept_runs_are_what_the_script_runs(tmp_path, monkeypatch, capsys, benchmark):
    """Its arguments and table are those of the script at this commit."""
    git = ["git", "-C", RESULTS, "ls-files", benchmark]
    for name in subprocess.run(git, capture_output=True, text=True, check=True).stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    monkeypatch.setattr(ablation, "HERE", tmp_path)
    for directory in (tmp_path / benchmark).glob("*-seed*/"):
        name, _, seed = directory.name.rpartition("-seed")
        options = f"{ablation.ARGUMENTS[benchmark]} {ablation.SMALL} {ablation.VARIANTS[benchmark][name]}"
        args = tyro.cli(d2r.Args, args=f"{options} --seed {seed}".split())
        kept = json.loads((directory / "args.json").read_text())["args"]
        mine = json.loads(json.dumps(dataclasses.asdict(args)))
        changed = {name for name in mine.keys() & kept.keys() if mine[name] != kept[name]}
        assert changed <= {"run_dir", "device", "checkpoint_minutes"}
    assert main("--benchmark", benchmark, function=command(ablation)) == 0
    assert capsys.readouterr().out.partition(str(tmp_path))[0] in (RESULTS / "README.md").read_text()


def test_mtsac(monkeypatch):
    """Environments with the one-hot of their task; as many parameters as the page says, and those of D2R."""
    monkeypatch.setattr(d2r, "make_env", mtsac.make_one_hot_env)
    args = d2r.Args(env_id="reach-v3,drawer-close-v3")
    with contextlib.closing(d2r.make_envs(args, 0)) as envs:
        obs, _ = envs.reset(seed=0)
        for _ in range(3):
            np.testing.assert_array_equal(obs[:, 39:], np.eye(2))
            obs, *_ = envs.step(np.ones((2, 4), np.float32))
    for variant, size, expected in (("d2r", 39, 214_720), ("mt-sac", 49, 227_069)):
        options = f"{ablation.ARGUMENTS['comparison']} {ablation.SMALL} {ablation.VARIANTS['comparison'][variant]}"
        agent = d2r.Agent(size, 4, 10, tyro.cli(d2r.Args, args=options.split()))
        assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == expected


def test_the_commands_of_the_front_page_are_understood():
    readme = (SCRIPT.parent / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:.* && |[A-Z_]+=1 )?python (?:d2r_sac|results/fast)\.py (.*)$", readme, re.MULTILINE)
    assert len([tyro.cli(d2r.Args, args=shlex.split(options, comments=True)) for options in commands]) >= 2


def test_use_it_elsewhere(capsys):
    """README's example learns, with nothing but the block that it tells to paste, and torch."""
    block, code = SCRIPT.read_text().split("# " + "=" * 118 + "\n")[1], snippet("Use it elsewhere")
    assert code.count("# (paste here)\n") == 1
    exec(code.replace("# (paste here)\n", block), names := {})
    errors = re.findall(r"^error ([0-9.]+)", capsys.readouterr().out, re.MULTILINE)
    assert errors == re.findall(r"^error ([0-9.]+)", (SCRIPT.parent / "README.md").read_text(), re.MULTILINE)
    assert not {"gym", "np", "tyro", "Args"} & set(names)


def test_use_a_policy(monkeypatch, capsys):
    """README's example closes a drawer."""
    monkeypatch.chdir(SCRIPT.parent)
    exec(snippet("Use it elsewhere", 1), {})
    assert re.fullmatch(r"drawer closed in step \d\d, with \d modules\n", capsys.readouterr().out)


def test_change_the_environments(tmp_path, monkeypatch):
    """README's example trains on pendulums: their bounds, and no success to report."""
    for name in ("task_names", "make_env"):
        monkeypatch.setattr(d2r, name, getattr(d2r, name))  # put back what the example replaces
    options = f"{TWO_TASKS.replace('5,10', '5,10,15')} --steps 200 --run-dir {tmp_path}"
    assert main(*options.split(), function=lambda: exec(snippet("Change it"), {"__name__": "__main__"})) == 0
    obs, action, _, next_obs, *_ = replayed(tmp_path)
    assert obs.shape == (200, 3, 3) and action.shape == (200, 3, 1) and action.abs().max() <= 1
    gravity, angle = torch.tensor([5.0, 10.0, 15.0]), torch.atan2(obs[..., 1], obs[..., 0])
    velocity = (obs[..., 2] + (1.5 * gravity * angle.sin() + 6 * action[..., 0]) * 0.05).clamp(-8, 8)
    close(next_obs[..., 2], velocity, 1e-4)  # torque in [-2, 2], mass 1, length 1, steps of 0.05 s
    last = progress(tmp_path)[-1]
    assert not last.get("success") and float(last["return/15"]) < 0
    example = (
        snippet("Use it elsewhere", 1).replace("results/three-tasks", str(tmp_path)).replace("drawer-close-v3", "10")
    )
    exec(example.replace('info["success"]', "truncated"), names := {})  # the policy in these environments
    assert names["step"] == 10 and names["env"].action_space.high == [1]
