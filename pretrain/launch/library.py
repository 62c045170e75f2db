"""Runs from Python, in a notebook or a script: `train`, `evaluate`, and `tokenize` for a loop of one's own.

`train` and `evaluate` restore the state of the process afterwards.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.launch.launcher import launch
from pretrain.runtime.console import end_log, quiet_libraries
from pretrain.runtime.errors import UserError
from pretrain.runtime.signals import EXIT_CODE, SIGNALS, Interrupt, Stopped
from pretrain.telemetry.run_file import read_run_file

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.data.sources.base import Source
    from pretrain.data.store.token_store import TokenView
    from pretrain.models.causal_lm import CausalLM


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: ``finished``, or ``stopped`` by a signal; `train` with the same config then resumes the run.
        folder: The run folder (``output_dir``).
        step: Optimizer steps done, those of earlier starts included.
        metrics: ``train_loss``, ``new_loss``, ``new_delta``, ``forgetting`` (nats per token), ``tokens_per_second``, and
            ``results``, the last evaluation of each domain; also ``metric/<name>`` (of a domain: ``metric/<domain>/<name>``)
            for each metric of an evaluation task. ``None`` where a run has no such number.
    """

    status: str
    folder: Path
    step: int
    metrics: dict[str, Any]


def tokenize(source: Source, model: CausalLM) -> tuple[TokenView, TokenView]:
    """Return the training and the held-out documents of ``source``, as tokens of the tokenizer of ``model``.

    Text that is in the cache is not tokenized again. Raises `UserError` for text that can't be read.
    """
    from pretrain.data.tokenization.tokenize import training_texts
    from pretrain.models.tokenizer import boundaries
    from pretrain.run.prepare_data import tokenized, views

    tokenizer = model.tokenizer(partial(training_texts, source))
    return views(
        tokenized(source, tokenizer, boundaries(tokenizer, bos=source.bos, separator=source.separator)), source
    )


def train(config: RunConfig) -> RunResult:
    """Start the run that ``config`` (of `pretrain.compose`) describes, or resume it where its folder holds one.

    With several devices the run happens in worker processes; a script then needs ``if __name__ == "__main__":`` around
    its own code. Signals stop the run as on the command line: the step is finished and a checkpoint is saved. Afterwards
    signal handlers, environment variables, warning filters and the garbage collector are as they were.

    Raises:
        UserError: A mistake in the config or the data; the message names the key and what is allowed.
        WorkersFailed: A worker process failed; the message says where its log is.
    """
    return _run(config, "pretraining")


def evaluate(config: RunConfig) -> RunResult:
    """Score the model on the held-out documents of every domain, as ``task=evaluation`` does on the command line.

    ``config`` is composed with ``task=evaluation``. The scores are in ``metrics["results"]`` by domain.

    Raises:
        UserError: A mistake in the config or the data; the message names the key and what is allowed.
    """
    return _run(config, "evaluation")


def _run(config: RunConfig, task: str) -> RunResult:
    from pretrain.sweep.measure import measures_of

    if config.task != task:
        raise UserError(f"task={config.task}: this function needs a config with task={task}")
    folder = Path(config.output_dir)
    with _process_restored():
        interrupt = Interrupt()
        if threading.current_thread() is threading.main_thread():
            interrupt.install()
        quiet_libraries()
        try:
            code = launch(config, [], interrupt)
        except Stopped:
            code = EXIT_CODE
    facts = read_run_file(folder)
    status = "stopped" if code == EXIT_CODE else str(facts.get("status"))
    return RunResult(status, folder, int(facts.get("steps", 0)), measures_of(folder))


@contextmanager
def _process_restored() -> Iterator[None]:
    """Restore, at the end of the block, the process state that a run changes."""
    environment, frozen, threshold = dict(os.environ), gc.get_freeze_count(), gc.get_threshold()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        end_log()
        if "torch.distributed" in sys.modules:
            from pretrain.distributed.context import leave

            leave()  # a run that has failed may still be in its process group
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        gc.set_threshold(*threshold)
        if not frozen:
            gc.unfreeze()
