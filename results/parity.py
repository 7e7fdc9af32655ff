# SPDX-License-Identifier: MIT
"""Compare d2r_sac.py with the authors' code.

    python results/parity.py CHECKOUT                   outputs, gradients and six updates, in float64
    python results/parity.py CHECKOUT --time 1280       how long updates of this batch take, in turns, in float32

CHECKOUT is a clone of github.com/DarkDawn233/D2R_MTRL, of which the networks, the policy and algo/mt_sac.py are taken.
In float64, at the size of MT10 (10 tasks, 16 modules of 128), from the same random weights, inputs, routes and noise, it
prints the worst relative difference, |ours - theirs| / max |theirs|, over all entries of all tensors. Two things are set
so that both can compute the same: the epsilon of 1e-6 in the authors' log-probability is 0, and in the updates Sample-K
is off, since its draws cannot be shared. When they are timed it is on.
"""

import argparse
import statistics
import sys
import tempfile
import time
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
        ours = copied(theirs, d2r.D2RNetwork(OBS + ACTION, 1, T, d2r.Args(resrouting=resrouting)))
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


def agents(batch_size, sample_k, DepthRoutePolicy, FlattenDepthRouteNet, MTSAC):
    """Their agent and ours, and pairs of their networks and ours, with the same weights."""
    agent = d2r.Agent(OBS, ACTION, T, d2r.Args(env_id="MT10", batch_size=batch_size, sample_k=sample_k))
    networks = [their_network(DepthRoutePolicy, 2 * ACTION, [OBS], True, sample_k)]
    networks += [their_network(FlattenDepthRouteNet, 1, [OBS, ACTION], True, sample_k) for _ in range(2)]
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
    return theirs, agent, both


def random_batch(agent, n):
    """n samples of each task, with routes of our actor: as they take them, and as we do."""
    obs, next_obs, action = torch.randn(T * n, OBS), torch.randn(T * n, OBS), 2 * torch.rand(T * n, ACTION) - 1
    reward, terminated = 10 * torch.rand(T * n), torch.rand(T * n) < 0.1
    task, one_hot = agent.task.repeat_interleave(n), torch.eye(T).repeat_interleave(n, 0)
    with torch.no_grad():
        routes = d2r.sample_k(agent.actor.routing_network(obs, task)[1] / 5, K)
    chosen = torch.zeros(T * n, M, M).scatter(-1, routes, 1.0)[:, *torch.tril_indices(M, M)]
    batch = {"obs": torch.cat([obs, one_hot], -1), "next_obs": torch.cat([next_obs, one_hot], -1), "acts": action}
    batch |= {"rewards": 0.1 * reward[:, None], "terminals": terminated[:, None].to(obs), "gates_onehot": chosen}
    batch["task_idxs"] = task[:, None]
    batch = {name: value.unflatten(0, (T, n)).transpose(0, 1).numpy() for name, value in batch.items()}
    return batch, (obs, action, reward, next_obs, terminated, routes.to(torch.uint8))


def compare_time(batch_size, *kinds):
    """Updates in turns: six rounds of six each, the first of which does not count."""
    theirs, agent, _ = agents(batch_size, True, *kinds)
    their_batch, batch = random_batch(agent, batch_size // T)
    updates = {"theirs": lambda: theirs.update(their_batch), "ours": lambda: agent.update(*batch)}
    seconds = {name: [] for name in updates}
    for _ in range(6):
        for name, update in updates.items():
            for call in range(6):
                start = time.perf_counter()
                update()
                seconds[name] += [time.perf_counter() - start] if call else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"An update of {batch_size}, {torch.get_num_threads()} threads, medians of 30: ", end="")
    print(", ".join(f"{name} {1e3 * median:.1f} ms" for name, median in medians.items()), end="; ")
    print(f"{medians['theirs'] / medians['ours']:.2f} times as fast")


def compare_updates(updates, kinds, TanhNormal):
    """All weights after whole updates."""
    TanhNormal.__init__.__defaults__ = (0.0,)  # epsilon
    theirs, agent, both = agents(T * N, False, *kinds)
    policy = both[0][0]
    before, noise = [parameter.data.clone() for parameter in policy.parameters()], []
    TanhNormal.rsample = lambda self, return_pretanh_value: (
        (u := self.normal_mean + self.normal_std * noise.pop().unflatten(0, (T, N)).transpose(0, 1)).tanh(), u
    )  # fmt: skip
    torch.randn_like = lambda mean: noise.pop()
    for _ in range(updates):
        their_batch, batch = random_batch(agent, N)
        of_obs, of_next_obs = torch.randn(2, T * N, ACTION)
        noise[:] = [of_next_obs, of_obs]  # they begin with the actor
        theirs.update(their_batch)
        noise[:] = [of_obs, of_next_obs]
        agent.update(*batch)
    moved = max(difference(old, parameter.data) for old, parameter in zip(before, policy.parameters()))
    worst = max(difference(parameter.data, weight.data) for nets in both for parameter, weight in pairs(*nets))
    print(f"| weights of actor, critics and targets after {updates} updates | {worst:.1e} |")
    print(f"| log alpha after {updates} updates | {difference(theirs.log_alpha.data, agent.log_alpha.data):.1e} |")
    print(f"\nThe updates changed the actor's weights by up to {moved:.1e} of the greatest of their tensor.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--time", type=int, help="batch of the updates that are timed")
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout))
    from torchrl.algo.mt_sac import MTSAC
    from torchrl.networks import FlattenDepthRouteNet
    from torchrl.policies import DepthRoutePolicy
    from torchrl.policies.distribution import TanhNormal

    torch.manual_seed(0)
    kinds = DepthRoutePolicy, FlattenDepthRouteNet, MTSAC
    if options.time:
        return compare_time(options.time, *kinds)
    torch.set_default_dtype(torch.float64)
    print("| float64, seed 0 | worst relative difference |\n|---|---|")
    compare_networks(FlattenDepthRouteNet)
    print("| float64, seed 0 | worst relative difference |\n|---|---|")
    compare_updates(options.updates, kinds, TanhNormal)


if __name__ == "__main__":
    main()
