"""AdamW for weights of 16 bits and for moments of 16 or 8 bits.

Bytes per parameter with its gradient: 12 for bf16 weights (fp32 master weights take 16), and for fp32 weights 16 with fp32, 12
with bf16 and about 10 with 8-bit moments.

Existing implementations do not meet the requirements. torch-optimi 0.3.3 stores the second moment in bf16, where beta2 = 0.999
can never lower it, and keeps its step count outside of the parameters' state. torchao compiles its kernels, needs the learning
rate as a tensor, and keeps 8-bit moments in a tensor class of blocks that no other number of ranks can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from pretrain.distributed.sharding import local
from pretrain.optim.low_bits import block_size, dequantize, quantize, rounded_stochastically

CHUNK = {"cpu": 2**20}  # elements updated at a time, so that their fp32 copies fit into a core's cache
CHUNK_ELSEWHERE = 2**26
MomentsDtype = Literal["float32", "bfloat16", "int8"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class CompensatedAdamW(Optimizer):
    """AdamW with Kahan summation for parameters in less than 32 bits, and with smaller moments.

    The state of a parameter is ``step`` (fp32 scalar), ``exp_avg`` and ``exp_avg_sq`` and, for parameters that are not in fp32,
    ``compensation`` (in the dtype of the parameter). By ``moments_dtype``, the moments are

    - ``float32``: fp32, but the first moment of a 16-bit parameter in the parameter's dtype;
    - ``bfloat16``: bf16, the second one rounded stochastically;
    - ``int8``: for matrices dicts ``{"codes", "scales"}`` (see `low_bits`), for other parameters as with ``float32``.

    The update is torch's AdamW in fp32, applied to parameter + compensation. The part of the result that the dtype of the
    parameter can't represent becomes the new compensation (Kahan summation; for bf16 AdamW see arXiv:2010.06192, section 3).
    The update is deterministic, so a resumed run continues bit for bit: the random numbers of the rounding depend on ``updates``,
    the number of updates so far, which is a value of each parameter group. As in torch's fused AdamW, a loss scaler may set the
    attribute ``found_inf`` (a 0-d tensor); where it is 1, parameters and state stay unchanged.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
        moments_dtype: MomentsDtype = "float32",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, defaults)
        self._moments_dtype = moments_dtype
        for group in self.param_groups if moments_dtype == "bfloat16" else ():
            group.setdefault("updates", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Return the loss of ``closure`` when it is given."""
        loss = closure() if closure is not None else None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for number, group in enumerate(self.param_groups):
            noise: dict[torch.device, torch.Generator] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if "updates" in group and parameter.device not in noise:
                    seed = 2 * group["updates"] + number  # two groups never have the same numbers
                    noise[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
                self._update(parameter, parameter.grad, group, found_inf, noise.get(parameter.device))
            if "updates" in group:
                group["updates"] += 1
        return loss

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        found_inf: Tensor | None,
        noise: torch.Generator | None,
    ) -> None:
        """Update one parameter in place.

        For each chunk of a 16-bit parameter p with compensation c:
            x  = fp32(p) + c          the value before the last rounding
            x' = AdamW(x, g, m, v)    torch's own update, entirely in fp32; m and v are then rounded back to their storage
            p  = bf16(x')             what the model computes with
            c  = x' - p               the rounding error, which the next step adds again
        An update smaller than half a unit in the last place of p changes only c, and reaches p when enough of them have
        accumulated. Where ``found_inf`` is 1, p, c, m, v and ``step`` keep their values.
        """
        state = self.state[parameter]
        if not state:
            self._create(parameter, state, group)
        slots = [state[key] for key in (*MOMENTS, "compensation") if key in state]
        for p, g, m, v, *compensation in _chunks(parameter, gradient, *slots):
            step = state["step"].clone()  # adamw() increments its step, and it is called once per chunk
            exact, exp_avg, exp_avg_sq = p, _opened(m, signed=True), _opened(v, signed=False)
            if compensation:
                exact = p.float().add_(compensation[0])
            _adamw(exact, g.to(exact.dtype), exp_avg, exp_avg_sq, step, group, found_inf)
            if compensation:
                _store_weight(p, compensation[0], exact, found_inf)
            _store(m, exp_avg, found_inf, signed=True, noise=None)
            _store(v, exp_avg_sq, found_inf, signed=False, noise=noise)
        state["step"] += 1 if found_inf is None else 1 - found_inf

    def _create(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Create the state of a parameter before its first update."""
        state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
        is_matrix = parameter.ndim > 1 and local(parameter).is_contiguous()
        block = block_size(parameter.shape[-1]) if is_matrix and self._moments_dtype == "int8" else 0
        for key, dtype in zip(MOMENTS, (parameter.dtype, torch.float32), strict=True):
            if block:
                codes = torch.zeros_like(parameter, dtype=torch.uint8)
                if key == "exp_avg":
                    codes.fill_(127)  # the level 0 of the signed ones
                scales = torch.zeros_like(parameter[..., : parameter.shape[-1] // block], dtype=torch.float32)
                state[key] = {"codes": codes, "scales": scales}
            else:
                stored = torch.bfloat16 if self._moments_dtype == "bfloat16" else dtype
                state[key] = torch.zeros_like(parameter, dtype=stored)
        if parameter.dtype != torch.float32:
            state["compensation"] = torch.zeros_like(parameter)


def _opened(moment: Any, *, signed: bool) -> Tensor:
    """Return a moment in fp32: itself if it is stored so, else a copy."""
    if isinstance(moment, tuple):
        return dequantize(*moment, signed=signed)
    return moment.float()


def _store(
    moment: Any, value: Tensor, found_inf: Tensor | None, *, signed: bool, noise: torch.Generator | None
) -> None:
    """Store the fp32 ``value`` of a moment, which `_opened` has returned. Where ``found_inf`` is 1, codes stay as they are; other
    values did not change then, and are rounded to themselves."""
    if isinstance(moment, tuple):
        for stored, new in zip(moment, quantize(value, signed=signed), strict=True):
            stored.copy_(new if found_inf is None else torch.where(found_inf == 1, stored, new))
    elif moment is not value:
        rounds = noise is not None and moment.dtype == torch.bfloat16
        moment.copy_(rounded_stochastically(value, noise) if rounds else value)  # type: ignore[arg-type]


def _store_weight(p: Tensor, error: Tensor, exact: Tensor, found_inf: Tensor | None) -> None:
    """Store ``exact`` as the weight ``p`` and its rounding ``error``."""
    rounded = exact.to(p.dtype)
    new_error = exact.sub_(rounded)
    if found_inf is not None:  # rounding p + c again could move p when c is half a unit in the last place
        rounded, new_error = (torch.where(found_inf == 1, a, b) for a, b in ((p, rounded), (error, new_error)))
    p.copy_(rounded)
    error.copy_(new_error)


def _adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, group: dict[str, Any], found_inf: Tensor | None
) -> None:
    """Apply torch's functional AdamW to one tensor in place: parameter ``p``, gradient ``g``, moments ``m`` and ``v``."""
    adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [step],
        foreach=False,
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        found_inf=found_inf,
    )


def _chunks(parameter: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Yield matching chunks of ``parameter`` and ``others``: flat ones, or blocks [n, b] if a moment is in codes, which then is a
    tuple of codes and scales. A sharded tensor contributes its local shard, because the update is elementwise. Tensors that are
    not contiguous are yielded unchunked."""
    block = next((o["codes"].shape[-1] // o["scales"].shape[-1] for o in others if isinstance(o, dict)), 1)
    tensors = [local(parameter), *(local(t) for o in others for t in (o.values() if isinstance(o, dict) else (o,)))]
    size = CHUNK.get(tensors[0].device.type, CHUNK_ELSEWHERE) // block
    if block > 1 and tensors[0].numel() == 0:
        return
    if block > 1:
        pieces = [t.reshape(-1, block if t.shape == tensors[0].shape else 1).split(size) for t in tensors]
    elif all(t.is_contiguous() for t in tensors):
        pieces = [t.view(-1).split(size) for t in tensors]
    else:
        pieces = [(t,) for t in tensors]
    for chunk in zip(*pieces, strict=True):
        parts = iter(chunk)
        yield (next(parts), *((next(parts), next(parts)) if isinstance(o, dict) else next(parts) for o in others))
