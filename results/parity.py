# SPDX-License-Identifier: MIT
"""Compare d2r_sac.py and fast.py with the authors' code, github.com/DarkDawn233/D2R_MTRL; CHECKOUT is a clone of it.

    python results/parity.py CHECKOUT [--seed 0]     the worst difference, relative to the largest entry of its tensor
    python results/parity.py CHECKOUT --time 128     how long updates of this batch of each task take, in float32

All have the size of MT10, and the same random weights, inputs, routes and noise. So that all can compute the same, the
epsilon of 1e-6 in the authors' log-probability is 0, and Sample-K is off (except with --time).
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import tyro
from fast import PLAIN, FastAgent, FastNetwork, d2r
from speed import in_turns

T, OBS, ACTION, M, K = 10, 39, 4, 16, 2
FORMS = {"d2r_sac.py": PLAIN, "fast.py": (FastNetwork, FastAgent)}


def pairs(theirs, ours):
    """(their parameter, our parameter) of two networks, without their route temperatures, which come first."""
    own = [*ours.parameters()]  # encoders, router, modules, head; in theirs the router stands behind the modules
    own = own[:6] + own[12 : 12 + 2 * M] + own[6:12] + own[12 + 2 * M :]
    return zip([*theirs.parameters()][1:], own, strict=True)


def difference(theirs, ours) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)).item()


def agents(form, seed, sample_k):
    """Their agent and ours, and pairs of their networks and ours, with the same random weights."""
    from torchrl.algo.mt_sac import MTSAC
    from torchrl.networks import FlattenDepthRouteNet, MLPBase
    from torchrl.policies import DepthRoutePolicy

    torch.manual_seed(seed)
    options = {
        "task_num": T, "base_type": MLPBase, "hidden_shapes": [400, 400], "em_hidden_shapes": [400], "top_k": K,
        "module_hidden": 128, "module_num": M, "gate_hiddens": [256, 256], "rescale_prob": True, "use_resnet": True,
        "route_as_sample": True, "resrouting": True, "explore_sample": sample_k, "temperature_sample": sample_k,
    }  # fmt: skip
    actor = DepthRoutePolicy(output_shape=2 * ACTION, input_shape=[OBS, T], **options)
    critics = [FlattenDepthRouteNet(output_shape=1, input_shape=[OBS, ACTION, T], **options) for _ in range(2)]
    theirs = MTSAC(
        "depthroute", {"task_nums": T, "action_shape": (ACTION,)}, save_dir=tempfile.mkdtemp(), discount=0.99,
        tau=0.005, pf=actor, qf1=critics[0], qf2=critics[1], plr=3e-4, qlr=3e-4, alphalr=1e-4, max_log_alpha=0.0,
        temp_reweight=True, mask_extreme_task=True,
    )  # fmt: skip
    d2r.D2RNetwork, agent = FORMS[form]
    ours = agent(OBS, ACTION, T, d2r.Args(sample_k=sample_k))
    networks = [(actor, ours.actor), *zip(critics, ours.critics)]
    networks += zip((theirs.target_qf1, theirs.target_qf2), ours.target_critics)
    scales = {"depth_route_net.gates.2": 10, "last": 0.02}  # decided routes; like the initial head
    for network, own in networks:
        for name, parameter in [*network.named_parameters()][1:]:
            scale = scales.get(name.rsplit(".", 1)[0], 1.5)
            torch.nn.init.normal_(parameter, std=scale / parameter.shape[-1] ** 0.5)
        for parameter, weights in pairs(network, own):
            weights.data.copy_(parameter)
    ours.log_alpha.data = torch.linspace(-2, 0, T)
    theirs.log_alpha.data = ours.log_alpha.data.clone()
    return theirs, ours, networks


def random_batch(agent, n):
    """n samples of each task, with sampled routes of our actor: as they take them, and as we do."""
    obs, next_obs, action = torch.randn(T * n, OBS), torch.randn(T * n, OBS), 2 * torch.rand(T * n, ACTION) - 1
    reward, terminated = 10 * torch.rand(T * n), torch.rand(T * n) < 0.1
    task, one_hot = agent.tasks.repeat_interleave(n), torch.eye(T).repeat_interleave(n, 0)
    with torch.no_grad():
        routes = d2r.sample_k(agent.actor.routing_network(obs, task)[1] / 5, K)
    edges = torch.zeros(T * n, M, M).scatter(-1, routes, 1.0)
    batch = {"obs": torch.cat([obs, one_hot], -1), "next_obs": torch.cat([next_obs, one_hot], -1), "acts": action}
    batch |= {"rewards": 0.1 * reward[:, None], "terminals": terminated[:, None].to(obs), "task_idxs": task[:, None]}
    batch["gates_onehot"] = edges[:, *torch.tril_indices(M, M)]
    batch = {name: value.unflatten(0, (T, n)).transpose(0, 1).numpy() for name, value in batch.items()}
    return batch, (obs, action, reward, next_obs, terminated, routes)


def compare_critics(agent, theirs, ours):
    """Output and every gradient of a critic: for Top-K and for routes passed in, with and without ResRouting."""
    outputs = []
    gradients = []
    task = agent.tasks.repeat_interleave(16)
    for resrouting in (False, True):
        theirs.depth_route_net.resrouting = ours.resrouting = resrouting
        their_batch, (obs, action, *_, passed_in) = random_batch(agent, 16)
        edges = torch.as_tensor(their_batch["gates_onehot"]).transpose(0, 1).flatten(0, 1)
        for routes, given in ((None, None), (passed_in, edges)):
            theirs.zero_grad()
            ours.zero_grad()
            their_inputs = [torch.cat([obs, torch.eye(T)[task]], -1), action]
            expected = theirs(their_inputs, task, gate_sample=given, explore=False)
            output, _ = ours(torch.cat([obs, action], -1), task, routes=routes)
            outputs.append(difference(expected, output))
            expected.sum().backward()
            output.sum().backward()
            gradients += [difference(parameter.grad, own.grad) for parameter, own in pairs(theirs, ours)]
    return max(outputs), max(gradients)


def compare_updates(theirs, ours, networks):
    """All weights after six whole updates, with the same noise."""
    from torchrl.policies.distribution import TanhNormal

    def their_sample(self, return_pretanh_value):
        u = self.normal_mean + self.normal_std * noise.pop().unflatten(0, (T, 16)).transpose(0, 1)
        return u.tanh(), u

    noise = []
    TanhNormal.__init__.__defaults__ = (0.0,)  # epsilon
    TanhNormal.rsample = their_sample
    torch.randn_like = lambda mean: noise.pop()
    for _ in range(6):
        their_batch, batch = random_batch(ours, 16)
        of_obs, of_next_obs = torch.randn(2, T * 16, ACTION)
        noise[:] = [of_next_obs, of_obs]  # they begin with the actor
        theirs.update(their_batch)
        noise[:] = [of_obs, of_next_obs]
        ours.update(*batch)
    return max(difference(parameter.data, own.data) for pair in networks for parameter, own in pairs(*pair))


def compare_time(batch_size):
    """The time of an update, in turns."""
    updates = {}
    for form in FORMS:
        theirs, ours, _ = agents(form, seed=0, sample_k=True)
        their_batch, batch = random_batch(ours, batch_size)
        updates["the authors' code"] = partial(theirs.update, their_batch)
        updates[form] = partial(ours.update, *batch)
    print(f"| batch {batch_size} of each task, {torch.get_num_threads()} threads | an update |\n|---|---|")
    for name, time in in_turns(updates).items():
        print(f"| {name} | {time} |")


def main(checkout: tyro.conf.Positional[Path], time: int | None = None, seed: int = 0) -> None:
    sys.path.insert(0, str(checkout))
    if time:
        compare_time(time)
        return
    torch.set_default_dtype(torch.float64)
    print(f"| float64, seed {seed} | outputs | all gradients of a critic | all weights after six updates |")
    print("|---|---|---|---|")
    for form in FORMS:
        theirs, ours, networks = agents(form, seed, sample_k=False)
        outputs, gradients = compare_critics(ours, *networks[1])
        print(f"| {form} | {outputs:.1e} | {gradients:.1e} | {compare_updates(theirs, ours, networks):.1e} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
