"""The configuration that comes with the program: where its YAML lies, and what it says when nothing is changed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def conf_dir() -> Path:
    """The folder of YAML: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def defaults_for(config: dict[str, Any]) -> dict[str, Any]:
    """The shipped defaults, with what of their groups follows a root key (``optimizer.lr`` the ``lr``) following those of
    ``config``: what is left to differ was chosen. No interpolation of ``config`` is followed: a stranger's could read the
    environment of whoever looks at the run."""
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
    """Without the user's conf/local. Hydra's own loader, because `compose` works through a global that the program may be
    using."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    without = ["~local"] if (conf_dir() / "local" / "default.yaml").exists() else []
    config = loader.load_configuration("config", overrides=without, run_mode=RunMode.RUN)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return config
