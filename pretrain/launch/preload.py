"""Slow imports that every worker needs, done once in the fork server; see ``agent.warm_up``.

No module imported here may initialize CUDA. The garbage collector is off during the imports, which create millions of
permanent objects. These objects are frozen afterwards, so that their memory stays shared between the workers.
"""

# ruff: noqa: E402, F401
import gc

gc.disable()

import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.modeling_utils
import transformers.tokenization_utils_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pretrain.data.loader
import pretrain.data.tokenization.tokenize
import pretrain.models.language_model
import pretrain.models.tokenizer
import pretrain.run.tasks
import pretrain.strategy.engine
import pretrain.training.trainer

gc.freeze()
gc.enable()
