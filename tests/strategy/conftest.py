"""Models for strategies to set up."""

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.models.causal_lm import Pretrained
from pretrain.models.model_factory import ModelFactory


@pytest.fixture
def factory(exact_model):
    """``factory(shape)``: of a tiny model in fp32."""
    return lambda shape: ModelFactory(Pretrained(name_or_path=str(exact_model(shape))), torch.float32, 0)


@pytest.fixture
def batch():
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], None, 32)
