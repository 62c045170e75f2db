"""What every worker needs and what takes long to import; see ``agent.warm_up``. Nothing here may ask for a GPU."""

import datasets  # noqa: F401
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import pretrain.tasks
import pretrain.trainer  # noqa: F401
