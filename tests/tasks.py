"""Evaluation tasks as a user would write them."""

import random

import numpy as np
import torch

import pretrain


class Accuracy:
    """How often the most likely token follows a fixed one."""

    def __init__(self, tokens: int = 8) -> None:
        self.tokens = tokens

    def evaluate(self, engine):
        random.random(), np.random.rand(), torch.rand(3)  # draws that training must not notice
        ids = torch.arange(1, 1 + self.tokens, device=engine.world.device)
        found = engine.next_tokens(ids.unsqueeze(1), torch.zeros_like(ids))
        assert not engine.model.training
        assert not torch.is_grad_enabled()
        share = (found == ids).float().mean()
        return [
            pretrain.Metric("accuracy", share, better="higher", stderr=0.25),
            pretrain.Metric("tokens", self.tokens, unit="tokens", domain="other"),
            pretrain.Metric("undefined", float("nan")),
        ]


class Mistaken:
    def evaluate(self, engine):
        raise pretrain.UserError("the questions are missing: download them first")


class Broken:
    def evaluate(self, engine):
        return {}["no such key"]
