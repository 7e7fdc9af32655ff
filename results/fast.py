# SPDX-License-Identifier: MIT
"""Train with faster networks that compute the same as those of d2r_sac.py, up to rounding. The options are the same:

    python results/fast.py --env-id MT10

On a CPU a module is computed only for the samples that use it, so one of your own must accept an empty batch. On a GPU
independent passes run side by side. Gradients are by hand: second derivatives, torch.func and vmap do not work.
"""

import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import d2r_sac as d2r

PLAIN = (d2r.D2RNetwork, d2r.Agent)


class MixSources(torch.autograd.Function):
    """Both sums of mix_sources. All outputs o_j = f_j + x_j lie in one tensor o (S, H), with a slot for each computed
    pair of a module and a sample. Autograd does not see the writes into it. With g_i the gradient of what module i
    reads, and s_i that of its shortcut, a source j collects from its readers i

        grad f_j = sum_i w_ij (kept_ij g_i + s_i)      grad x_j = sum_i w_ij (g_i + s_i)

    The backward pass runs from the head to module 1. `inbox` (S, 2, H) has no values, only a gradient, to which each
    reader adds these terms. When module j takes its own out, all its readers have added theirs."""

    @staticmethod
    def forward(ctx, inbox, o, f_prev, x_prev, slots_prev, w, w_fx, slots):
        """Store o = f + x of the previous module, then mix the sources of this one, for the B_i samples that use it.
        w, slots (B_i, K); w_fx (B_i, K, 2): w_ij kept_ij and w_ij. Returns inbox, and the sum twice (B_i, H)."""
        torch.add(f_prev, x_prev, out=o[slots_prev])
        ctx.o = o  # save_for_backward would object to the later writes, which go to other slots
        ctx.slots_prev = slots_prev
        ctx.save_for_backward(w, w_fx, slots)
        if torch.compiler.is_compiling():  # it fuses this, but not embedding_bag
            mixed = (F.embedding(slots, o) * w[..., None]).sum(1)
        else:
            mixed = F.embedding_bag(slots, o, mode="sum", per_sample_weights=w)
        return torch.empty_like(inbox), mixed, mixed.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grads, g, s):
        w, w_fx, slots = ctx.saved_tensors
        picked = F.embedding(slots, ctx.o)  # (B_i, K, H)
        grad_w = (picked * (g + s)[:, None]).sum(-1)
        grad_fx = w_fx[..., None] * g[:, None, None]  # (B_i, K, 2, H)
        grad_fx.addcmul_(w[..., None, None], s[:, None, None])
        grads.index_add_(0, slots.flatten(), grad_fx.flatten(0, 1))  # in place: nobody has read these slots yet
        grad_f, grad_x = grads[ctx.slots_prev].unbind(1)
        return grads, None, grad_f, grad_x, None, grad_w, None, None


class FastNetwork(d2r.D2RNetwork):
    static = False  # True: compute all modules for all samples on a CPU, too

    def run_modules(self, h, logits, routes):
        B, M, _ = routes.shape
        w = d2r.routing_weights(logits, routes)
        w_f = w
        if self.resrouting and torch.is_grad_enabled():
            w_f = w * d2r.gradient_kept(logits).gather(-1, routes)
        w_fx = torch.stack([w_f, w], dim=-1).detach()
        # Pair j B + b is that of module j and sample b. Its slot is its position among the computed pairs, here all.
        slots = routes * B + torch.arange(B, device=h.device)[:, None, None]
        computed = slice(None)
        counts = [B] * (M + 1)
        if h.is_cpu and not self.static and not torch.compiler.is_compiling():  # a CUDA graph needs static shapes
            used = F.pad(d2r.used_modules(routes), (0, 1), value=True).T  # (M + 1, B); all samples use the head
            slots = (used.flatten().cumsum(0) - 1)[slots]
            computed = used[1:].flatten().nonzero().squeeze(1)  # of the pairs of modules 1 ... M
            counts = used.sum(1).tolist()  # samples of each module
        # A tensor for each of the modules 1 ... M, with a row for each sample that uses it
        by_module = [t.transpose(0, 1).flatten(0, 1)[computed].split(counts[1:]) for t in (w, w_fx, slots)]
        f = self.base_modules[0](F.relu(h))
        x = torch.zeros_like(f)
        o = f.new_empty(sum(counts[:M]), f.shape[1])
        inbox = f.new_empty(sum(counts[:M]), 2, f.shape[1])  # nothing reads the last, so gradients start with zeros
        slots_prev = slice(0, B)
        for reader, w_i, w_fx_i, slots_i in zip([*self.base_modules[1:], self.head], *by_module, strict=True):
            inbox, read, x = MixSources.apply(inbox, o, f, x, slots_prev, w_i, w_fx_i, slots_i)
            f = reader(read)
            slots_prev = slice(slots_prev.stop, slots_prev.stop + len(read))
        return f


def side_by_side(*functions):
    """The results of independent functions: within a CUDA graph each runs on a stream of its own."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [function() for function in functions]
    stream = torch.cuda.current_stream()
    branches = [torch.cuda.Stream() for _ in functions]
    results = []
    for branch, function in zip(branches, functions):
        branch.wait_stream(stream)
        with torch.cuda.stream(branch):  # its backward pass will run there, too
            results.append(function())
    for branch in branches:
        stream.wait_stream(branch)
    return results


class FastAgent(d2r.Agent):
    def q(self, critics, obs, action, task, temperature=None):
        inputs = torch.cat([obs, action], dim=-1)
        passes = [partial(critic, inputs, task, temperature=temperature) for critic in critics]
        return torch.stack([value for value, _ in side_by_side(*passes)]).view(2, len(self.tasks), -1)

    def critic_loss(self, obs, action, reward, next_obs, terminated, task):
        target = partial(self.td_target, reward, next_obs, terminated, task)
        q = partial(self.q, self.critics, obs, action, task, self.temperature())
        target, q = side_by_side(target, q)
        return ((q - target) ** 2).mean(-1).sum(0)


def small_update(network, agent):
    """The metrics and gradients of one update of small networks, from a fixed seed, in float64."""
    d2r.D2RNetwork = network
    args = SimpleNamespace(**{field.name: field.default for field in fields(d2r.Args)})
    vars(args).update(num_modules=6, module_width=8, encoder_widths=(8, 8), router_widths=(), max_task_loss=1e9)
    torch.manual_seed(0)
    agent = agent(5, 2, 3, args).double()
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # some edges are blocked then, others kept
    x = torch.randn(24, 14, dtype=torch.float64)  # random observations, actions, rewards and next observations
    metrics = agent.update(x[:, :5], x[:, 5:7].tanh(), x[:, 7], x[:, 8:13], x[:, 13] > 1, agent.act(x[:, :5])[1])
    return [*metrics.values(), *(p.grad for p in agent.parameters() if p.grad is not None)]


def install():
    """Swap the fast forms into d2r_sac. Ends the program if they compute something else than what is there."""
    plain = small_update(d2r.D2RNetwork, d2r.Agent)
    for FastNetwork.static in (True, False):
        pairs = zip(plain, small_update(FastNetwork, FastAgent), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in pairs):
            sys.exit("error: results/fast.py and d2r_sac.py compute different losses or gradients; use d2r_sac.py")
    d2r.Agent = FastAgent  # D2RNetwork already is FastNetwork


if __name__ == "__main__":
    install()
    d2r.main()
