"""Our sweeper and launcher under the names by which conf/hydra/ calls them: Hydra takes names in ``hydra_plugins`` only."""

from __future__ import annotations

from hydra.core.plugins import Plugins

from pretrain.sweep.optuna_sweeper import OptunaSweeper
from pretrain.sweep.side_by_side import SideBySideLauncher


def register() -> None:
    for plugin in (OptunaSweeper, SideBySideLauncher):
        Plugins.instance().class_name_to_class[f"hydra_plugins.pretrain.{plugin.__name__}"] = plugin
