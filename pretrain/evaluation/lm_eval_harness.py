"""The engine as a model of the lm-evaluation-harness. This is the only module that imports it (seen with lm_eval 0.4.13)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from pretrain.evaluation.likelihood import Request, likelihoods
from pretrain.evaluation.task import EvaluationInterrupted
from pretrain.runtime.console import shows_progress
from pretrain.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    from pretrain.evaluation.lm_eval import LmEval
    from pretrain.strategy.engine import InferenceEngine

BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means
MAX_GENERATED = 256  # tokens, where a task sets no limit


def task_manager(include_path: str | None) -> Any:
    """Return the index of the harness's tasks and of those in ``include_path``."""
    return TaskManager(include_path=include_path)


def run(model: EngineModel, settings: LmEval, manager: Any) -> dict[str, Any]:
    """Return the harness's results. All ranks call this and compute the same. Raises ``UserError`` where a task can't run, such
    as one whose dataset is not available."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    bars = nullcontext() if shows_progress() else redirect_stderr(StringIO())
    try:
        with bars:
            found = _evaluate(model, settings, manager)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        OSError,
        ValueError,
        ImportError,
    ) as error:  # no network, no such dataset, code that must be confirmed, a package
        raise UserError(f"evaluation.lm_eval.tasks=[{','.join(settings.tasks)}]: {one_line(error, lines=2)}") from error
    return dict(found or {"results": {}})


def _evaluate(model: EngineModel, settings: LmEval, manager: Any) -> Any:
    return simple_evaluate(
        model,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
        task_manager=manager,
    )


class EngineModel(TemplateLM):
    """A model of the harness that runs on an engine. The ranks share the requests, so for the harness there is one process."""

    def __init__(
        self, engine: InferenceEngine, tokenizer: Any, *, bos: int | None, separator: int, batch_size: int
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer
        self.bos, self.separator, self.batch_size = bos, separator, batch_size

    @property
    def eot_token_id(self) -> int:
        return self.separator

    @property
    def prefix_token_id(self) -> int:
        return self.separator if self.bos is None else self.bos

    @property
    def max_length(self) -> int:
        return self.engine.model.num_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        found = [int(token) for token in self.tokenizer(string, add_special_tokens=False)["input_ids"]]
        starts = self.bos is not None and add_special_tokens is not False and found[:1] != [self.bos]
        return [self.prefix_token_id, *found] if starts else found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        return [(f.logprob, f.is_greedy) for f in likelihoods(self.engine, asked, batch_size=self.batch_size)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            length = min(self.max_length, max(len(tokens), 1))
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, length, 1):
                windows.append(Request(*utils.make_disjoint_window(window)))
                owners.append(i)
        summed = [0.0] * len(requests)
        for i, found in zip(owners, likelihoods(self.engine, windows, batch_size=self.batch_size), strict=True):
            summed[i] += found.logprob
        return summed

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to one of its stop texts. Every rank generates all, because the lengths differ."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0):
            raise UserError(
                "evaluation.lm_eval.tasks: a task that samples with a temperature is not supported; only greedy ones"
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        count = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_GENERATED)
        count = min(count, self.max_length - 1)
        tokens = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        device, start, text = self.engine.world.device, len(tokens), ""
        for _ in range(count):
            if self.engine.interrupted():
                raise EvaluationInterrupted
            ids = torch.tensor([tokens], device=device)
            token = int(self.engine.next_tokens(ids, torch.tensor([len(tokens) - 1], device=device)))
            if token == self.separator:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens[start:], skip_special_tokens=True)
            if any(stop and stop in text for stop in stops):
                break
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text
