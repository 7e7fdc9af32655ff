# SPDX-License-Identifier: MIT
"""Compare d2r_sac.py with the authors' code: python results/parity.py CHECKOUT [--updates 6].

CHECKOUT is a clone of github.com/DarkDawn233/D2R_MTRL, of which the networks, the policy and algo/mt_sac.py are taken.
In float64, at the size of MT10 (10 tasks, 16 modules of 128), from the same random weights, inputs, routes and noise, it
prints the worst relative difference, |ours - theirs| / max |theirs|, over all entries of all tensors. Two things are set
so that both can compute the same: the epsilon of 1e-6 in the authors' log-probability is 0, and in the updates Sample-K
is off, since its draws cannot be shared.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import d2r_sac as d2r

T, N, OBS, ACTION, M, K = 10, 16, 39, 4, 16, 2
NAMES = {"base.fc0": "routing_network.obs_encoder.0", "base.fc1": "routing_network.obs_encoder.2"}
NAMES |= {"em_base.fc0": "routing_network.task_encoder", "last": "base_modules.head"}
NAMES |= {f"depth_route_net.gates.{i}": f"routing_network.router.{2 * i}" for i in range(3)}
NAMES |= {f"depth_route_net.module_fcs.{i}": f"base_modules.module.{i}" for i in range(M)}


def pairs(theirs, ours):
    """(their parameter, our parameter) of two networks."""
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name != "gumbel_temperature":  # the route temperatures, which we keep outside of the networks
            layer, leaf = name.rsplit(".", 1)
            yield parameter, own.pop(f"{NAMES[layer]}.{leaf}")
    assert not own, own.keys()


def difference(theirs, ours) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)).item()


def their_network(kind, output_dim, input_dims, resrouting, sample_k):
    from torchrl.networks import MLPBase

    network = kind(
        task_num=T, output_shape=output_dim, base_type=MLPBase, input_shape=[*input_dims, T], hidden_shapes=[400, 400],
        em_hidden_shapes=[400], module_hidden=128, module_num=M, gate_hiddens=[256, 256], top_k=K, rescale_prob=True,
        route_as_sample=True, use_resnet=True, resrouting=resrouting, explore_sample=sample_k, temperature_sample=sample_k,
    )  # fmt: skip
    scales = {"depth_route_net.gates.2": 10, "last": 0.05}  # decided routes; actions that are not all -1 or 1
    for name, parameter in network.named_parameters():
        if name != "gumbel_temperature":
            scale = scales.get(name.rsplit(".", 1)[0], 1.5)
            torch.nn.init.normal_(parameter, std=scale / parameter.shape[-1] ** 0.5)
    return network


def copied(theirs, ours):
    for parameter, own in pairs(theirs, ours):
        own.data.copy_(parameter.data)
    return ours


def compare_networks(FlattenDepthRouteNet):
    """Outputs and every gradient of a critic."""
    for resrouting in (True, False):
        theirs = their_network(FlattenDepthRouteNet, 1, [OBS, ACTION], resrouting, sample_k=False)
        ours = copied(theirs, d2r.D2RNetwork(OBS + ACTION, 1, T, resrouting=resrouting))
        obs, action, task = torch.randn(T * N, OBS), torch.randn(T * N, ACTION), torch.arange(T).repeat_interleave(N)
        inputs, one_hot = torch.cat([obs, action], -1), torch.nn.functional.one_hot(task, T).double()
        with torch.no_grad():
            _, logits = ours.routing_network(inputs, task)
            foreign = d2r.sample_k(logits / 5, K)
        blocked = ~d2r.gradient_kept(logits).gather(-1, foreign)
        chosen = torch.zeros(T * N, M, M).scatter(-1, foreign, 1.0)
        flat = chosen[:, *torch.tril_indices(M, M)]
        for title, routes, given in (("Top-K", None, None), ("foreign routes", foreign, flat)):
            theirs.zero_grad(), ours.zero_grad()
            their_inputs = [torch.cat([obs, one_hot], -1), action]
            expected = theirs(their_inputs, task, gate_sample=given, explore=False)
            output, _ = ours(inputs, task, routes=routes)
            grad_output = torch.randn_like(output)
            expected.backward(grad_output)
            output.backward(grad_output)
            gradients = max(difference(parameter.grad, own.grad) for parameter, own in pairs(theirs, ours))
            name = f"{title}, {'with' if resrouting else 'without'} ResRouting"
            print(f"| {name}: output | {difference(expected, output):.1e} |")
            print(f"| {name}: gradients of all parameters | {gradients:.1e} |")
    print(f"\n{blocked.double().mean():.0%} of the foreign routes' edges are ones that ResRouting blocks.\n")


def compare_updates(updates, DepthRoutePolicy, FlattenDepthRouteNet, MTSAC, TanhNormal):
    """All weights after whole updates."""
    TanhNormal.__init__.__defaults__ = (0.0,)  # epsilon
    args, _, _ = d2r.parse_arguments(["--env-id", "MT10", "--batch-size", str(T * N), "--no-sample-k"])
    agent = d2r.Agent(OBS, ACTION, T, args)
    networks = [their_network(DepthRoutePolicy, 2 * ACTION, [OBS], True, False)]
    networks += [their_network(FlattenDepthRouteNet, 1, [OBS, ACTION], True, False) for _ in range(2)]
    with tempfile.TemporaryDirectory() as directory:
        theirs = MTSAC(
            "depthroute", {"task_nums": T, "action_shape": (ACTION,)}, save_dir=directory, discount=0.99, tau=0.005,
            pf=networks[0], qf1=networks[1], qf2=networks[2], plr=3e-4, qlr=3e-4, alphalr=1e-4, max_log_alpha=0.0,
            temp_reweight=True, mask_extreme_task=True,
        )  # fmt: skip
    their_targets = [theirs.target_qf1, theirs.target_qf2]
    both = list(zip([*networks, *their_targets], [agent.actor, *agent.critics, *agent.target_critics], strict=True))
    for network, own in both:
        copied(network, own)
    theirs.log_alpha.data = torch.linspace(-2, 0, T)
    agent.log_alpha.data = theirs.log_alpha.data.clone()
    before, noise = [parameter.data.clone() for parameter in networks[0].parameters()], []
    TanhNormal.rsample = lambda self, return_pretanh_value: (
        (u := self.normal_mean + self.normal_std * noise.pop().unflatten(0, (T, N)).transpose(0, 1)).tanh(), u
    )  # fmt: skip
    torch.randn_like = lambda mean: noise.pop()
    one_hot = torch.eye(T).repeat_interleave(N, 0)
    for _ in range(updates):
        obs, next_obs, action = torch.randn(T * N, OBS), torch.randn(T * N, OBS), 2 * torch.rand(T * N, ACTION) - 1
        reward, terminated = 10 * torch.rand(T * N), torch.rand(T * N) < 0.1
        with torch.no_grad():
            logits = agent.actor.routing_network(obs, agent.task.repeat_interleave(N))[1]
            routes = d2r.sample_k(logits / 5, K)
        chosen = torch.zeros(T * N, M, M).scatter(-1, routes, 1.0)[:, *torch.tril_indices(M, M)]
        batch = {"obs": torch.cat([obs, one_hot], -1), "next_obs": torch.cat([next_obs, one_hot], -1), "acts": action}
        batch |= {"rewards": 0.1 * reward[:, None], "terminals": terminated[:, None].double(), "gates_onehot": chosen}
        batch["task_idxs"] = agent.task.repeat_interleave(N)[:, None]
        batch = {name: value.unflatten(0, (T, N)).transpose(0, 1).numpy() for name, value in batch.items()}
        of_obs, of_next_obs = torch.randn(2, T * N, ACTION)
        noise[:] = [of_next_obs, of_obs]  # they begin with the actor
        theirs.update(batch)
        noise[:] = [of_obs, of_next_obs]
        agent.update(obs, action, reward, next_obs, terminated, routes.to(torch.uint8))
    moved = max(difference(old, parameter.data) for old, parameter in zip(before, networks[0].parameters()))
    worst = max(difference(parameter.data, weight.data) for nets in both for parameter, weight in pairs(*nets))
    print(f"| weights of actor, critics and targets after {updates} updates | {worst:.1e} |")
    print(f"| log alpha after {updates} updates | {difference(theirs.log_alpha.data, agent.log_alpha.data):.1e} |")
    print(f"\nThe updates changed the actor's weights by up to {moved:.1e} of the greatest of their tensor.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--updates", type=int, default=6)
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout))
    from torchrl.algo.mt_sac import MTSAC
    from torchrl.networks import FlattenDepthRouteNet
    from torchrl.policies import DepthRoutePolicy
    from torchrl.policies.distribution import TanhNormal

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    print("| float64, seed 0 | worst relative difference |\n|---|---|")
    compare_networks(FlattenDepthRouteNet)
    print("| float64, seed 0 | worst relative difference |\n|---|---|")
    compare_updates(options.updates, DepthRoutePolicy, FlattenDepthRouteNet, MTSAC, TanhNormal)


if __name__ == "__main__":
    main()
