"""Evaluation tasks: how often the model continues a repeated token, and how it continues a text."""

from dataclasses import dataclass
from typing import Any

import torch

from pretrain import EvaluationTask, Metric
from pretrain.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Repetition(EvaluationTask):
    """The share of tokens t in 0 … ``tokens`` - 1 after which, in the sequence t t t t, the model predicts t."""

    tokens: int = 16

    def evaluate(self, engine: Any) -> list[Metric]:
        token = torch.arange(self.tokens, device=engine.world.device)
        predicted = engine.next_tokens(token[:, None].repeat(1, 4), torch.full_like(token, 3))
        share = (predicted == token).float()
        return [
            Metric("repetition", share.mean().item(), better="higher", stderr=share.std().item() / self.tokens**0.5),
            Metric("first_prediction", float(predicted[0])),
        ]


@dataclass(frozen=True)
class Continuation(EvaluationTask):
    """1 if the most likely token after ``text`` is the first token of ``word``, otherwise 0."""

    model: CausalLM
    text: str
    word: str

    def evaluate(self, engine: Any) -> list[Metric]:
        tokenizer = self.model.tokenizer(None)
        text, word = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (self.text, self.word))
        ids = torch.tensor([text], device=engine.world.device)
        predicted = engine.next_tokens(ids, torch.full_like(ids[:, 0], len(text) - 1))
        return [Metric("continued", float(predicted[0] == word[0]), better="higher")]
