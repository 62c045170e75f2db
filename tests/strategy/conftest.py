"""Models for strategies to set up."""

import pytest
import torch

from pretrain.batch import Batch
from pretrain.models.blueprint import Blueprint
from pretrain.models.causal_lm import Pretrained


@pytest.fixture
def blueprint(exact_model):
    """``blueprint(shape)``: of a tiny model in fp32."""
    return lambda shape: Blueprint(Pretrained(name_or_path=str(exact_model(shape))), torch.float32, 0)


@pytest.fixture
def batch():
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], None, 32)
