"""Building a model whose parameters are on the meta device but whose buffers (RoPE's frequencies, masks) are real.

A model built entirely on the meta device would lose the buffers that no checkpoint contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside this context every parameter that a module registers is moved to the meta device; ties are kept."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # torch: a hook may return one
    try:
        yield
    finally:
        hook.remove()


def put_buffers(module: nn.Module, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set ``buffers`` (by name) on ``device`` in their own dtype: RoPE's frequencies lose too much precision in 16 bits."""
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer.to(device))


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters to ``dtype``. Ties are kept and buffers are not cast. Unlike `dtypes.cast`, this also casts the
    parameters that a model lists as fp32."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def replace_parameters(module: nn.Module, replace: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by ``replace(parameter)``; ties are kept, and so is whether a parameter is trained. Unlike
    ``Module.to``, this also moves parameters from and to the meta device with their ties."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old ones too, so that no id is used twice
    for part in module.modules():
        for name, parameter in [*part.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) not in made:
                tensor = replace(parameter)
                new = parameter if tensor is parameter else nn.Parameter(tensor.detach(), parameter.requires_grad)
                made[id(parameter)] = parameter, new
            part.register_parameter(name, made[id(parameter)][1])


def materialise(module: nn.Module, device: torch.device) -> None:
    """Allocate the parameters on the meta device on ``device``, uninitialised, and move buffers and other parameters there."""
    replace_parameters(module, lambda p: torch.empty_like(p, device=device) if p.is_meta else p)
    module.to(device)
