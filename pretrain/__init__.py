"""Continual pretraining of causal language models. ::

    config = pretrain.compose(["dataset=local", "dataset.nameOrPath=books/", "max_steps=20"])
    result = pretrain.train(config)

The names below are the public ones. Each is imported when it is first used, so that ``import pretrain`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.compose import run_config as compose
    from pretrain.config.schema import RunConfig as RunConfig
    from pretrain.data.loader import Loader as Loader
    from pretrain.data.sources.base import Source as Source
    from pretrain.distributed.context import DistributedContext as DistributedContext
    from pretrain.evaluation.task import EvaluationTask as EvaluationTask
    from pretrain.evaluation.task import Metric as Metric
    from pretrain.launch.library import RunResult as RunResult
    from pretrain.launch.library import evaluate as evaluate
    from pretrain.launch.library import tokenize as tokenize
    from pretrain.launch.library import train as train
    from pretrain.models.model_factory import ModelFactory as ModelFactory
    from pretrain.models.transforms.base import ModelTransform as ModelTransform
    from pretrain.runtime.errors import UserError as UserError
    from pretrain.strategy.base import StepConfig as StepConfig
    from pretrain.strategy.base import Strategy as Strategy
    from pretrain.telemetry.sinks.base import Sink as Sink
    from pretrain.training.hook import Hook as Hook
    from pretrain.training.trainer import Trainer as Trainer

_MODULES = {  # public name → the module that it is imported from
    "DistributedContext": "pretrain.distributed.context",
    "EvaluationTask": "pretrain.evaluation.task",
    "Hook": "pretrain.training.hook",
    "Loader": "pretrain.data.loader",
    "Metric": "pretrain.evaluation.task",
    "ModelFactory": "pretrain.models.model_factory",
    "ModelTransform": "pretrain.models.transforms.base",
    "RunConfig": "pretrain.config.schema",
    "RunResult": "pretrain.launch.library",
    "Sink": "pretrain.telemetry.sinks.base",
    "Source": "pretrain.data.sources.base",
    "StepConfig": "pretrain.strategy.base",
    "Strategy": "pretrain.strategy.base",
    "Trainer": "pretrain.training.trainer",
    "UserError": "pretrain.runtime.errors",
    "evaluate": "pretrain.launch.library",
    "tokenize": "pretrain.launch.library",
    "train": "pretrain.launch.library",
}
__all__ = ["compose", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pretrain")
    if name == "compose":
        return import_module("pretrain.config.compose").run_config
    if name not in _MODULES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
