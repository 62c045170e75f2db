"""The shipped configuration: the folder of its YAML files, and its default values."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def conf_dir() -> Path:
    """Return the folder of YAML files: inside the package when installed from a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def defaults_for(config: dict[str, Any]) -> dict[str, Any]:
    """Return the shipped defaults, in which group keys that refer to a root key have the value of ``config``.

    For example ``optimizer.lr`` follows the ``lr`` of ``config``. Every value that still differs from ``config`` was then
    chosen explicitly. Interpolations in ``config`` are not resolved: a config from another person could read the environment
    of the user who inspects the run.
    """
    from omegaconf import OmegaConf

    ours = _composed()
    root = {
        k: v
        for k, v in config.items()
        if k in ours and not OmegaConf.is_config(ours[k]) and not isinstance(v, dict) and "${" not in str(v)
    }
    resolved = OmegaConf.to_container(OmegaConf.merge(ours, root), resolve=True)
    assert isinstance(resolved, dict)
    own = OmegaConf.to_container(ours, resolve=True)
    assert isinstance(own, dict)
    return {str(k): own[k] if k in root else v for k, v in resolved.items()}


@cache
def _composed() -> Any:
    """Return the default config without the user's conf/local.

    It is loaded by Hydra's own loader, because Hydra's `compose` needs a global that the program may be using.
    """
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from pretrain.config.hydra_internals import ConfigLoaderImpl, create_config_search_path

    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    without = ["~local"] if (conf_dir() / "local" / "default.yaml").exists() else []
    config = loader.load_configuration("config", overrides=without, run_mode=RunMode.RUN)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config


def own_default(node: dict[Any, Any], key: Any) -> Any:
    """Return the default value of a key of a part, as plain values; ``...`` where it has none.

    ``node`` is of a checked config, so that its class may be imported.
    """
    from dataclasses import MISSING, fields, is_dataclass
    from inspect import signature

    from hydra.utils import get_object

    from pretrain.config.group_keys import GROUP_KEYS

    part = get_object(node["_target_"]) if isinstance(node.get("_target_"), str) else None
    for owner in (part, *GROUP_KEYS.values()):
        if is_dataclass(owner):
            for field in fields(owner):
                if field.name == key and field.default_factory is not MISSING:
                    return field.default_factory()
        parameter = signature(owner).parameters.get(str(key)) if owner is not None else None
        if parameter is not None:
            return ... if parameter.default is parameter.empty else parameter.default
    return ...
