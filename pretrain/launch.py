"""Where a run happens. Data is prepared first, by the command itself; then the workers train: here, one, in-process."""

from __future__ import annotations

import os
from typing import Any

from pretrain.errors import UserError
from pretrain.interrupt import Interrupt


def launch(resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt) -> int:
    """Carry out ``resolved['task']``; return the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: strategy=single is one process; start it without torchrun"
        )
    if resolved["devices"] not in ("auto", 1):
        raise UserError(
            f"devices={resolved['devices']}: strategy=single is one process on one device; allowed: auto, 1"
        )
    from pretrain import tasks

    return tasks.TASKS[resolved["task"]](resolved, overrides, interrupt)
