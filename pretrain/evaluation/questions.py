"""Questions of one's own in a JSONL file: multiple choice and cloze, without any harness.

A line with ``question``, ``choices`` and ``answer`` is multiple choice; ``answer`` is the index of the right choice, counted from
0, or its text. A line with ``question`` and ``answer`` alone is cloze: ``answer`` is the text that continues ``question``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.evaluation.likelihood import Likelihood, Request, encode_pair, likelihoods
from pretrain.evaluation.task import EvaluationTask, Metric
from pretrain.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine

KEYS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """A question with its ``choices``, of which the one with the index ``right`` is the answer. A cloze has one choice."""

    text: str
    choices: tuple[str, ...]
    right: int = 0

    @property
    def is_cloze(self) -> bool:
        return len(self.choices) == 1

    @property
    def continuations(self) -> list[str]:
        """Return what follows the text: the choices, after a space unless the text ends with white space."""
        space = "" if not self.text or self.text[-1].isspace() else " "
        return [space + choice.strip() for choice in self.choices]


def read_questions(name: str, file: Path) -> list[Question]:
    """Return the questions of ``file``. Raises ``UserError`` naming the key ``evaluation.questions.<name>`` and the line."""
    key = f"evaluation.questions.{name}={file}"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: can't be read: {error.__class__.__name__}: {error}") from None
    questions = [_question(f"{key}: line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{key}: has no questions; a line is {{'question': …, 'choices': […], 'answer': …}}")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    for given in row:
        if given not in KEYS:
            raise UserError(f"{where}: has no key {given!r}{did_you_mean(given, KEYS)}; the keys are {', '.join(KEYS)}")
    text, answer, choices = row.get("question"), row.get("answer"), row.get("choices")
    if not isinstance(text, str):
        raise UserError(f"{where}: question={text!r}: a text is needed")
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"{where}: answer={answer!r}: without choices, a text that continues the question is needed"
            )
        return Question(text, (answer,))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{where}: choices={choices!r}: at least two texts are needed")
    return Question(text, tuple(choices), _right(where, answer, choices))


def _right(where: str, answer: Any, choices: list[str]) -> int:
    """Return the index of the right choice."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    raise UserError(
        f"{where}: answer={answer!r}: the index of a choice, 0 to {len(choices) - 1}, or the text of one choice is needed"
    )


@dataclass(frozen=True)
class Questions(EvaluationTask):
    """The questions of one file.

    Metrics, under the domain ``name``: of multiple choice ``accuracy`` (the choice with the largest log-probability) and
    ``accuracy_norm`` (the largest log-probability per byte); of cloze ``exact_match`` (greedy decoding gives the answer) and
    ``answer_loss`` (nats per byte of the answer).

    Attributes:
        name: name of the questions.
        questions: the questions.
        tokenizer: the run's tokenizer.
        first: the token that begins a document: BOS, or an end-of-text token.
        batch_size: continuations per forward.
    """

    name: str
    questions: Sequence[Question]
    tokenizer: Any
    first: int
    batch_size: int

    def evaluate(self, engine: InferenceEngine) -> list[Metric]:
        asked = [(question, text) for question in self.questions for text in question.continuations]
        requests: list[Request] = [encode_pair(self.tokenizer, q.text, text, first=self.first) for q, text in asked]
        found = iter(likelihoods(engine, requests, batch_size=self.batch_size))
        scored = [(question, [next(found) for _ in question.choices]) for question in self.questions]
        return [*self._multiple_choice(scored), *self._cloze(scored)]

    def _multiple_choice(self, scored: list[tuple[Question, list[Likelihood]]]) -> list[Metric]:
        plain, norm = [], []
        for question, found in scored:
            if not question.is_cloze:
                logprobs = [f.logprob for f in found]
                per_byte = [p / len(t.encode()) for p, t in zip(logprobs, question.continuations, strict=True)]
                plain.append(float(_argmax(logprobs) == question.right))
                norm.append(float(_argmax(per_byte) == question.right))
        return [self._mean("accuracy", plain), self._mean("accuracy_norm", norm)] if plain else []

    def _cloze(self, scored: list[tuple[Question, list[Likelihood]]]) -> list[Metric]:
        exact, loss = [], []
        for question, found in scored:
            if question.is_cloze:
                exact.append(float(found[0].is_greedy))
                loss.append(-found[0].logprob / len(question.continuations[0].encode()))
        if not exact:
            return []
        return [self._mean("exact_match", exact), self._mean("answer_loss", loss, unit="nats per byte", better="lower")]

    def _mean(
        self, metric: str, values: list[float], *, unit: str = "", better: Literal["lower", "higher"] = "higher"
    ) -> Metric:
        """Return the mean of ``values`` with its standard error, that of a sample (n - 1)."""
        n, mean = len(values), sum(values) / len(values)
        stderr = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        return Metric(metric, mean, unit=unit, better=better, domain=self.name, stderr=stderr)


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
