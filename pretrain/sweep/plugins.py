"""Our sweeper and launchers under the names by which conf/hydra/ calls them: Hydra takes names in ``hydra_plugins`` only."""

from __future__ import annotations

from hydra.core.plugins import Plugins


def register(*plugins: type) -> None:
    for plugin in plugins:
        Plugins.instance().class_name_to_class[f"hydra_plugins.pretrain.{plugin.__name__}"] = plugin
