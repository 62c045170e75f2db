"""Register this project's sweeper and launchers under the names that conf/hydra/ uses. Hydra accepts only names in
``hydra_plugins``."""

from __future__ import annotations

from hydra.core.plugins import Plugins


def register(*plugins: type) -> None:
    """Make ``plugins`` known to Hydra as ``hydra_plugins.pretrain.<class name>``."""
    for plugin in plugins:
        Plugins.instance().class_name_to_class[f"hydra_plugins.pretrain.{plugin.__name__}"] = plugin
