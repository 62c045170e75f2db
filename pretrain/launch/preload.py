"""Slow imports that every worker needs, done once in the fork server; see ``agent.warm_up``.

No module imported here may initialize CUDA. The garbage collector is off during the imports, which create millions of
permanent objects. These objects are frozen afterwards, so that their memory stays shared between the workers.
"""

# ruff: noqa: E402, F401
import gc

gc.disable()

import hydra.utils
import rich.table
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.generation.utils
import transformers.modeling_layers
import transformers.modeling_utils
import transformers.tokenization_utils_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pretrain.data.loader
import pretrain.data.sources.local
import pretrain.data.tokenization.tokenize
import pretrain.models.model_factory
import pretrain.run.build_trainer
import pretrain.run.tasks
import pretrain.strategy.ddp
import pretrain.strategy.fsdp_engine
import pretrain.telemetry.sinks.terminal
import pretrain.training.trainer

gc.freeze()
gc.enable()
