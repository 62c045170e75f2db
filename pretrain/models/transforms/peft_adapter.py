"""What is used of PEFT: injecting LoRA layers into a model, and its files. Nothing in such a file runs code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.strict_json import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in an adapter's file
USED = {  # keys of PEFT's LoRA config that are taken over
    *("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save", "fan_in_fan_out", "task_type"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"),
}
WITHOUT_EFFECT = {  # keys that say nothing of the weights
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "peft_type",
        "peft_version",
    ),
    *(
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
    ),
    *("ensure_weight_tying",),
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights; the others change the base model


def read_config(folder: str) -> dict[str, Any]:
    """Return the settings of the LoRA adapter in ``folder``. Raises ``UserError`` where there is none, and for one with parts
    that can't be trained further here. It does not import torch."""
    path, key = expanded(folder), f"transform.lora.adapter={folder}"
    try:
        config = read_json(path / CONFIG)
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(f"{key}: no adapter of PEFT: {error or CONFIG}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{key}: its peft_type is {config.get('peft_type')!r}, not LORA")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{key}: has no {WEIGHTS}; other formats of weights are not read")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{key}: init_lora_weights={config['init_lora_weights']!r} changes the base model; "
            "convert the adapter to plain LoRA first"
        )
    for name, value in config.items():
        if name not in USED | WITHOUT_EFFECT | {"init_lora_weights"} and value not in (None, False, "none", [], {}):
            raise UserError(f"{key}: {name}={value!r} is not supported")
    return {name: value for name, value in config.items() if name in USED}


def inject(model: Any, config: Any) -> dict[str, tuple[float, bool]]:
    """Add LoRA layers to ``model`` in place, as ``config`` says. Return the scale of each layer's update by the layer's name, and
    whether its weight is transposed.

    Raises ``UserError`` where PEFT refuses.
    """
    import warnings

    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer

    from pretrain.models.transforms.derived import derive

    saved, config.modules_to_save = config.modules_to_save, None  # trained in place, without a copy
    try:
        with stand_ins(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(config, model)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"transform.lora: PEFT: {' '.join(str(error).split())}") from None
    config.modules_to_save = saved
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, LoraLinear):
            raise UserError(f"transform.lora: {name} is no linear layer")
        layers[name] = (float(layer.scaling["default"]), bool(layer.fan_in_fan_out))
        if "default" in layer.lora_magnitude_vector:
            weight: Any = layer.get_base_layer().weight
            norms = _norms(weight, transposed=bool(layer.fan_in_fan_out))
            magnitude: Any = layer.lora_magnitude_vector["default"]
            magnitude.weight = derive(weight, norms, tuple(magnitude.weight.shape))
    return layers


def _norms(weight: Any, *, transposed: bool) -> Any:
    """Return the function that computes DoRA's initial magnitudes, the norms of the rows of ``weight``."""

    def rows(read: Any, start: int, stop: int) -> Any:
        if not transposed:
            return read(weight, start, stop).norm(dim=1)
        return read(weight, 0, weight.shape[0])[:, start:stop].norm(dim=0)

    return rows


@contextmanager
def stand_ins(model: Any) -> Iterator[None]:
    """Inside this context the parameters on the meta device are zeros on the CPU without memory of their own. PEFT puts new
    parameters on the device of those that they belong to, where they must have values."""
    import torch

    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.is_meta
    ]
    for module, name, parameter in places:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def load_adapter(folder: str, model: Any, saved: Mapping[str, Any]) -> None:
    """Fill the LoRA layers of ``model``, and replace the parameters of the modules ``saved``, by the values in ``folder``.

    Raises ``UserError`` if it does not hold exactly these.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pretrain.models.transforms.lora import is_adapter

    key = f"transform.lora.adapter={folder}"
    try:
        found = load_file(expanded(folder) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {WEIGHTS}: {error}") from None
    own = {in_file(name): p for name, p in model.named_parameters() if is_adapter(name)}
    places = {f"{PREFIX}{name}.{part}": (m, part) for name, m in saved.items() for part, _ in m.named_parameters()}
    wrong = sorted(found.keys() ^ (own.keys() | places.keys()))
    if wrong:
        raise UserError(
            f"{key}: does not fit this model: {wrong[0]} is {'not in the model' if wrong[0] in found else 'missing'}"
        )
    replaced: dict[int, Any] = {}  # a tied weight stays tied
    for name, (module, part) in places.items():
        owner, _, attribute = part.rpartition(".")
        old = getattr(module.get_submodule(owner), attribute)
        own[name] = old
        if id(old) not in replaced:
            replaced[id(old)] = torch.nn.Parameter(found[name].to(old.dtype))
    for name, parameter in own.items():
        if parameter.shape != found[name].shape:
            shapes = f"{list(found[name].shape)} instead of {list(parameter.shape)}"
            raise UserError(f"{key}: does not fit this model: {name} is {shapes}")
        if name not in places:
            parameter.data = found[name].to(parameter.dtype)
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) in replaced:
                setattr(module, name, replaced[id(parameter)])


def in_file(name: str) -> str:
    """Return the name that an adapter's file has for a parameter of an adapter in the model."""
    plain = name.replace(".default", "")
    return PREFIX + (plain.removesuffix(".weight") if ".lora_magnitude_vector" in plain else plain)


def written(config: Any, state: Mapping[str, Any], in_full: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files of the adapter with the full weights ``state``. ``in_full`` maps the name that a weight trained in full
    has in the file to its name in ``state``, which a tied weight has once."""
    from safetensors.torch import save

    from pretrain.models.transforms.lora import is_adapter

    tensors = {in_file(name): tensor.contiguous() for name, tensor in state.items() if is_adapter(name)}
    tensors |= {PREFIX + name: state[own].clone() for name, own in in_full.items()}
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = (Path(folder) / CONFIG).read_bytes()
    return {CONFIG: settings, WEIGHTS: save(tensors, metadata={"format": "pt"})}
