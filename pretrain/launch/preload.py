"""What every worker needs and what takes long to import; see ``agent.warm_up``. Nothing here may ask for a GPU.

The collector is off meanwhile: imports make millions of objects that stay. Frozen, their memory stays shared by the workers.
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
