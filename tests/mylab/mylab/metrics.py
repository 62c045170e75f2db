"""An evaluation task: how often the model continues a repeated word by itself."""

from dataclasses import dataclass
from typing import Any

import torch

from pretrain import EvaluationTask, Metric


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
