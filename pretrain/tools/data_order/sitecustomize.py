"""Record what a run trains on, for ``pretrain.tools.verify_resume``: the hash of the tokens of every step, one file for each rank
in the folder ``$PRETRAIN_DATA_ORDER``. Python imports a module of this name when it starts, here in every process of the run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).parent)


def watch(trainer: Any) -> None:
    """Make the class ``trainer`` record the batch of every step."""
    import xxhash

    train_step = trainer.train_step

    def recorded(self: Any, batch: Any) -> Any:
        tokens = batch.input_ids.cpu().numpy().tobytes() + batch.labels.cpu().numpy().tobytes()
        done = train_step(self, batch)
        with open(Path(os.environ["PRETRAIN_DATA_ORDER"]) / f"rank-{self.world.rank}", "a") as file:
            file.write(f"{done.step} {xxhash.xxh3_64_hexdigest(tokens)}\n")
        return done

    trainer.train_step = recorded


class Finder:
    """A finder that calls `watch` after the trainer's module has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "pretrain.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            watch(module.Trainer)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def start() -> None:
    """Watch the trainer of this process, and execute the module ``sitecustomize`` that Python would have imported."""
    if "pretrain.training.trainer" in sys.modules:  # of a process that was forked
        watch(sys.modules["pretrain.training.trainer"].Trainer)
    else:
        sys.meta_path.insert(0, Finder())
    hidden = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != HERE])
    if hidden is not None and hidden.loader is not None:
        hidden.loader.exec_module(importlib.util.module_from_spec(hidden))


if __name__ == "sitecustomize":  # as a module of the package it does nothing
    start()
