"""Optimizers of other people: small ones, each with a kind of state of its own."""

import math

import torch
from torch.distributed.tensor import DTensor, Replicate

from pretrain.distributed.sharding import local


class Own(torch.optim.Optimizer):
    """The base class. A subclass has `create`, which returns the state of a parameter, and `update`, which makes its step."""

    def __init__(self, params, lr=1e-2, **more):
        super().__init__(params, {"lr": lr} | more)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p].update(self.create(p))
                    self.update(p, p.grad, self.state[p], group)


class RowWise(Own):
    """A second moment of each row [n, 1], sharded as its parameter; a counter on the host."""

    def create(self, p):
        return {"step": torch.tensor(0.0), "row": torch.zeros_like(p.mean(-1, keepdim=True))}

    def update(self, p, grad, state, group):
        state["step"] += 1
        state["row"].mul_(0.9).add_(grad.square().mean(-1, keepdim=True), alpha=0.1)
        p.sub_(group["lr"] * grad / (state["row"].sqrt() + 1e-8))


class Factored(Own):
    """Rows [n, 1] that are sharded and columns [1, m] of which every rank has all: a DTensor, or with ``plain`` a tensor."""

    def create(self, p):
        return {"row": torch.zeros_like(p.mean(-1, keepdim=True)), "column": torch.zeros_like(self.columns(p))}

    def columns(self, grad):
        mean = grad.square().mean(0, keepdim=True)
        if not isinstance(mean, DTensor):
            return mean
        mean = mean.redistribute(placements=[Replicate()] * mean.device_mesh.ndim)
        return mean.to_local() if self.defaults["plain"] else mean

    def update(self, p, grad, state, group):
        state["row"].mul_(0.9).add_(grad.square().mean(-1, keepdim=True), alpha=0.1)
        state["column"].mul_(0.9).add_(self.columns(grad), alpha=0.1)
        scale = local(state["row"]) + local(state["column"])
        local(p).sub_(group["lr"] * local(grad) / (scale.sqrt() + 1e-8))


class Local(Own):
    """Plain tensors of the local shard: a moment of its shape, its norm (0-d), and blocks of 8 bits with a scale for each."""

    def create(self, p):
        blocks = math.ceil(local(p).numel() / 16)
        return {
            "moment": torch.zeros_like(local(p)),
            "norm": torch.tensor(0.0),
            "codes": torch.zeros(blocks, 16, dtype=torch.uint8),
            "scales": torch.zeros(blocks, 1),
        }

    def update(self, p, grad, state, group):
        grad, weight = local(grad), local(p)
        if not grad.numel():
            return
        state["moment"].mul_(0.9).add_(grad)
        state["norm"].copy_(state["moment"].norm())
        old = (state["codes"].float() - 128) * state["scales"]
        old = old.flatten()[: grad.numel()].view_as(grad) * 0.5 + grad
        blocks = torch.nn.functional.pad(old.flatten(), (0, state["codes"].numel() - old.numel())).view(-1, 16)
        state["scales"].copy_(blocks.abs().amax(-1, keepdim=True) / 127)
        state["codes"].copy_((blocks / state["scales"].clamp_min(1e-30) + 128).round().clamp(0, 255))
        weight.sub_(group["lr"] * (state["moment"] / (state["norm"] + 1e-8) + old))


class Scalars(Own):
    """Numbers, words, a nested dict, a tensor and nested dicts that are created late, and values of the group that training
    changes."""

    def create(self, p):
        return {
            "count": 0,
            "decay": 0.5,
            "phase": None,
            "history": (),
            "inner": {"moment": torch.zeros_like(p), "total": torch.tensor(0.0, dtype=torch.float64)},
        }

    def update(self, p, grad, state, group):
        state["count"] += 1
        state["decay"] = 1 / (1 + state["count"] / 3)
        state["phase"] = "even" if state["count"] % 2 == 0 else "odd"
        state["history"] = (*state["history"], state["count"])
        state["inner"]["total"] += state["decay"]
        state["inner"]["moment"].mul_(state["decay"]).add_(grad)
        if state["count"] == 3:
            state["late"] = torch.ones_like(p)
            state["deep"] = {"hits": 0, "slow": {"moment": torch.full_like(p, 0.5)}}
        if "deep" in state:
            state["deep"]["hits"] += 1
            state["deep"]["slow"]["moment"].mul_(1 + 1 / (1 + state["deep"]["hits"]))
        factor = state.get("late", 1.0) * (state["deep"]["slow"]["moment"] if "deep" in state else 1.0)
        p.sub_(group["lr"] * group["warm"] * state["inner"]["moment"] * factor)
        group["warm"] = min(1.0, group["warm"] + 1e-3)


def matrices_and_rest(named):
    named = [(n, p) for n, p in named if p.requires_grad]
    hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    return hidden, [p for _, p in named if not any(p is h for h in hidden)]


def adafactor(named_parameters):
    return torch.optim.Adafactor([p for _, p in named_parameters], lr=1e-2)


def adagrad(named_parameters):
    """Its state exists before the first step."""
    return torch.optim.Adagrad([p for _, p in named_parameters], lr=1e-2)


def row_wise(named_parameters):
    return RowWise([p for _, p in named_parameters])


def factored(named_parameters):
    return Factored([p for _, p in named_parameters], plain=False)


def factored_plain(named_parameters):
    return Factored([p for _, p in named_parameters], plain=True)


def of_the_shard(named_parameters):
    return Local([p for _, p in named_parameters])


def scalars(named_parameters):
    return Scalars([p for _, p in named_parameters], warm=0.5, betas=(0.9, 0.99))


def muon_and_adamw(named_parameters):
    hidden, rest = matrices_and_rest(named_parameters)
    return [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)]


def groups(named_parameters):
    """Two groups with their own rates; the second one's falls by itself."""
    hidden, rest = matrices_and_rest(named_parameters)
    own = {"params": rest, "lr": 1e-3, "schedule": lambda step, **run: 1 / (step + 1)}
    return torch.optim.AdamW([{"params": hidden}, own], lr=1e-2, fused=True)
