"""The typed config of a run: the root keys, and each config group as the object that its YAML describes.

`check` builds it once, and it is then passed as an argument. Only `pretrain.config` uses Hydra, dicts of the config and
``_target_``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from inspect import signature
from keyword import iskeyword
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pretrain.config.trust import MULTI_SELECT, PARTS
from pretrain.optim.learning_rate import AUTO, with_lr
from pretrain.optim.lr_factors import LrFactors
from pretrain.optim.plain import PlainOptimizer
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.advise.config import AdviseConfig
    from pretrain.checkpoint.config import CheckpointConfig
    from pretrain.data.replay import Phase, ReplayConfig
    from pretrain.data.sources.base import Dataset
    from pretrain.evaluation.config import EvaluationConfig
    from pretrain.evaluation.prompts import Prompts
    from pretrain.launch.config import LaunchConfig
    from pretrain.merging.config import MergeConfig
    from pretrain.models.causal_lm import CausalLM
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.optim.base import OptimizerFactory
    from pretrain.plan.config import PlanConfig
    from pretrain.strategy.base import Strategy
    from pretrain.strategy.objective import Objective
    from pretrain.strategy.precision import Precision
    from pretrain.sweep.config import SweepConfig
    from pretrain.telemetry.config import TelemetryConfig
    from pretrain.telemetry.sinks.base import Sink
    from pretrain.training.guard.config import GuardConfig
    from pretrain.training.hook import Hook
    from pretrain.training.stop_rule import StopWhen

Finite = Field(allow_inf_nan=False)
ONE_LINE = r"^[^\x00-\x1f\x7f]+$"  # for a folder's name, which can become part of a line of a script or a log
Beta = Annotated[float, Field(ge=0, lt=1)]


NEXT_TOKEN = PARTS["objective"]  # the class of the cross entropy alone
RUNTIME_ARGUMENTS = {  # group → arguments that the run passes, never YAML; a target that needs one is bound, not called
    "scheduler": {"step", "total_steps", "warmup_steps", "peak_lr"},
    "optimizer": {"named_parameters", "params"},
}


@dataclass(frozen=True)
class RootKeys:
    """The keys of conf/config.yaml that are not groups.

    Attributes:
        task: What to run: pretraining · tokenization · evaluation · generation · export · merge · plan · advise.
        name: Name of the run; null: <model>-<dataset>, with the task as a prefix unless it is pretraining.
        output_dir: Run folder; the same command resumes the run in it.
        model_name: The shipped `sample`, a Hugging Face Hub id, a folder, a checkpoint or a run.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per device and micro-batch; auto: the largest that fits, with gradient_accumulation_steps
            sequences per step.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        phases: Other weights or another replay share from a share of the run on: [{from: 0.8, weights: {...},
            replay_share: 0.25}]; docs/mixtures.md.
        number_epochs: Passes over the training documents.
        max_steps: Number of optimizer steps; null: derived from number_epochs.
        lr: Peak learning rate; auto: chosen by the size of the model (docs/runs.md), 1e-3 for the sample.
        warmup_proportion: Share of the steps in which the learning rate increases to its peak.
        weight_decay: Weight decay; applied to matrices only.
        beta1: AdamW's decay rate of the first moment.
        beta2: AdamW's decay rate of the second moment.
        grad_clip: Maximum global gradient norm; null: no clipping.
        seed: Random seed of initial weights, data order and dropout.
        devices: Number of devices per machine; auto: all visible GPUs, or one process on a CPU.
        sweep_dir: Folder of a sweep's jobs (-m); the same folder resumes the sweep; null: multirun/<time>.
        resume: auto: resume the run in output_dir · never: start over · a checkpoint folder, or a run folder for its
            newest checkpoint.
        resume_allow: What may differ from the resumed run: data, tokenizer, sequence_length, global_batch, seed,
            weights, optimizer, objective.
        log_every: Steps between train records.
        evaluate_every: Steps between evaluations; null: only before the first step and after the last one.
        save_every: Steps between checkpoints; null: only at the end.
        allow_targets: Additional classes and packages that a config may name, [module.Class, package]; on the command
            line only.
    """

    task: Literal["pretraining", "tokenization", "evaluation", "generation", "export", "merge", "plan", "advise"]
    name: Annotated[str, Field(pattern=r"^\.*[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$")]  # a folder's name: no `..`, no path
    output_dir: Annotated[str, Field(pattern=ONE_LINE)]
    model_name: Annotated[str, Field(min_length=1)]
    sequence_length: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt | Literal["auto"]
    gradient_accumulation_steps: PositiveInt
    phases: list[dict[str, Any]]
    number_epochs: Annotated[float, Field(gt=0, le=1_000_000)]
    max_steps: PositiveInt | None
    lr: Annotated[PositiveFloat, Finite] | Literal["auto"]
    warmup_proportion: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[NonNegativeFloat, Finite]
    beta1: Beta
    beta2: Beta
    grad_clip: Annotated[PositiveFloat, Finite] | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]  # each rank adds to it, and generators take 64 bits
    devices: Literal["auto"] | PositiveInt
    sweep_dir: Annotated[str, Field(pattern=ONE_LINE)] | None
    resume: Annotated[str, Field(min_length=1)]
    resume_allow: list[
        Literal["tokenizer", "data", "sequence_length", "global_batch", "seed", "weights", "optimizer", "objective"]
    ]
    log_every: PositiveInt
    evaluate_every: PositiveInt | None
    save_every: PositiveInt | None
    allow_targets: list[str]


@dataclass(frozen=True)
class RunConfig(RootKeys):
    """The complete config of a run: the root keys, and an object for each config group.

    Attributes:
        model: The model, not yet built.
        dataset: The source of the training documents, or a mixture of several.
        replay: How much old text is among the training data.
        strategy: How model and optimizer are set up on the devices.
        precision: Dtypes of parameters and matmuls.
        objective: What is minimised.
        optimizer: Builds the optimizer from named parameters.
        scheduler: The schedule, a function of ``step``, ``total_steps`` and ``warmup_steps``.
        checkpoint: What is saved, and how long checkpoints are kept.
        evaluation: What is evaluated.
        generation: The prompts of ``task=generation``.
        merge: What ``task=merge`` merges.
        stop_when: When a run ends before its last step.
        guard: How loss spikes and non-finite values are handled.
        telemetry: Additional measurements.
        launch: How processes are started and supervised.
        sweep: How a sweep is ranked and reported.
        plan: The device to plan for, and what a plan assumes.
        advise: What ``task=advise`` may spend, and what it looks for.
        transforms: The changes of the model, in the order in which they are applied.
        lr_factors: The parameters that have another learning rate, keys of the optimizer group.
        plain: The same config as a dict of plain values, as written to config.yaml and as sent to workers.
    """

    model: CausalLM
    dataset: Dataset
    replay: ReplayConfig
    strategy: Strategy
    precision: Precision
    objective: Objective
    optimizer: OptimizerFactory
    scheduler: Callable[..., float]
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    generation: Prompts
    merge: MergeConfig
    stop_when: StopWhen
    guard: GuardConfig
    telemetry: TelemetryConfig
    launch: LaunchConfig
    sweep: SweepConfig
    plan: PlanConfig
    advise: AdviseConfig
    transforms: tuple[ModelTransform, ...]
    lr_factors: LrFactors
    plain: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> RunConfig:
        """Build the typed config from a checked dict."""
        built = {**with_lr(plain, 1.0)}  # a placeholder for lr=auto: the optimizer is created only after `with_lr`
        shared = {field.name for field in fields(LrFactors)}
        lr_factors = LrFactors(**{key: value for key, value in built["optimizer"].items() if key in shared})
        built["optimizer"] = {key: value for key, value in built["optimizer"].items() if key not in shared}
        groups = {
            group: build_part(built[group], RUNTIME_ARGUMENTS.get(group, ()))
            for group in PARTS
            if group not in MULTI_SELECT
        }
        transforms = tuple(build_part(node) for node in (built.get("transform") or {}).values())
        root = {key.name: plain[key.name] for key in fields(RootKeys)}
        return cls(**root, **groups, transforms=transforms, lr_factors=lr_factors, plain=plain)

    def with_lr(self, lr: float) -> RunConfig:
        """Return the config with ``lr`` in place of ``auto``, also in the optimizer."""
        return self if self.lr != AUTO else RunConfig.of(with_lr(self.plain, lr))

    @property
    def training_phases(self) -> tuple[Phase, ...]:
        """The phases of the run in which the mixture differs from the one at the start."""
        from pretrain.data.replay import Phase

        return tuple(Phase.of(given) for given in self.phases)

    def check_data(self) -> None:
        """Raise ``UserError`` for weights, phases and a replay that are impossible."""
        from pretrain.data.replay import check_training_data

        check_training_data(self.dataset, self.replay, self.phases, self.evaluation.domains)

    def check_schedule(self) -> None:
        """Raise ``UserError`` for a start of the warm-up in a run without one."""
        start_lr = self.plain["scheduler"].get("start_lr")
        if start_lr and self.warmup_proportion == 0:
            raise UserError(
                f"scheduler.start_lr={start_lr}: the warm-up starts from it, and warmup_proportion=0 leaves none; set "
                "warmup_proportion above 0"
            )

    def check_export(self) -> None:
        """Raise ``UserError`` for two answers to the question which model is exported."""
        if self.checkpoint.export == "best" and self.merge.choose is not None:
            raise UserError(
                f"merge.choose={self.merge.choose} with checkpoint.export=best: both say which model is exported; use one"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences per device and micro-batch. ``batch_size=auto`` counts as 1 until the largest size that fits is known."""
        return 1 if self.batch_size == "auto" else self.batch_size

    def build_sinks(self) -> dict[str, Sink]:
        """Return a new object for each chosen sink, by its name in the config."""
        return self._build_each("sink")

    def build_hooks(self) -> dict[str, Hook]:
        """Return a new object for each chosen hook, by its name in the config."""
        return self._build_each("hook")

    def _build_each(self, group: str) -> dict[str, Any]:
        return {name: build_part(node) for name, node in (self.plain.get(group) or {}).items()}

    @property
    def transforms_identity(self) -> list[dict[str, Any]]:
        """Return the transforms in order, each as the config describes it."""
        nodes: list[dict[str, Any]] = json.loads(json.dumps([*(self.plain.get("transform") or {}).values()]))
        return nodes  # as a checkpoint's JSON has them

    @property
    def objective_identity(self) -> dict[str, Any] | None:
        """Return the term of the objective as the config describes it, without what changes no number; ``None`` for the cross
        entropy alone."""
        node: dict[str, Any] = self.plain["objective"]
        apart = {"base_offload"} | ({"base_dtype"} if node.get("base_dtype") is None else set())
        return None if node["_target_"] == NEXT_TOKEN else {key: v for key, v in node.items() if key not in apart}

    @property
    def optimizer_identity(self) -> list[Any]:
        """Return the settings of the optimizer that must not change on a resume: its class and ``compensate``."""
        return [self.plain["optimizer"].get(key) for key in ("_target_", "compensate")]


def build_part(node: dict[Any, Any], of_run: Collection[str] = ()) -> Any:
    """Return the object that ``node`` describes. A key that is a keyword of Python gets an underscore (``async_``).

    A target whose first parameter is in ``of_run`` is bound to its keys, and the run calls it later.
    """
    from hydra.utils import get_object, instantiate

    arguments = {f"{k}_" if iskeyword(str(k)) else k: v for k, v in node.items()}
    first = next(iter(signature(get_object(node["_target_"])).parameters), None) if of_run else None
    if first in of_run:
        arguments["_partial_"] = True
    part = instantiate(arguments, _convert_="all")
    return PlainOptimizer(part) if first == "params" and first in of_run else part
