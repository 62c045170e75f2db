"""Continual pretraining of causal language models. ::

    config = pretrain.compose(["dataset=local", "dataset.nameOrPath=books/", "max_steps=20"])
    result = pretrain.train(config)

The names below are the public ones. Each is imported when it is first used, so that ``import pretrain`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.compose import run_config as compose
    from pretrain.config.schema import RunConfig
    from pretrain.data.sources.base import Source
    from pretrain.evaluation.task import EvaluationTask, Metric
    from pretrain.launch.library import RunResult, train
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.runtime.errors import UserError
    from pretrain.strategy.base import Strategy
    from pretrain.telemetry.sinks.base import Sink
    from pretrain.training.hook import Hook
    from pretrain.training.trainer import Trainer

__all__ = [
    "EvaluationTask",
    "Hook",
    "Metric",
    "ModelTransform",
    "RunConfig",
    "RunResult",
    "Sink",
    "Source",
    "Strategy",
    "Trainer",
    "UserError",
    "compose",
    "train",
]
_PLACES = {  # public name → module, and its name there
    "EvaluationTask": ("pretrain.evaluation.task", "EvaluationTask"),
    "Hook": ("pretrain.training.hook", "Hook"),
    "Metric": ("pretrain.evaluation.task", "Metric"),
    "ModelTransform": ("pretrain.models.transforms.base", "ModelTransform"),
    "RunConfig": ("pretrain.config.schema", "RunConfig"),
    "RunResult": ("pretrain.launch.library", "RunResult"),
    "Sink": ("pretrain.telemetry.sinks.base", "Sink"),
    "Source": ("pretrain.data.sources.base", "Source"),
    "Strategy": ("pretrain.strategy.base", "Strategy"),
    "Trainer": ("pretrain.training.trainer", "Trainer"),
    "UserError": ("pretrain.runtime.errors", "UserError"),
    "compose": ("pretrain.config.compose", "run_config"),
    "train": ("pretrain.launch.library", "train"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pretrain")
    if name not in _PLACES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
