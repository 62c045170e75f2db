"""What every worker needs and what takes long to import; see ``agent.warm_up``. Nothing here may ask for a GPU."""

import datasets  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import pretrain.tasks
import pretrain.trainer  # noqa: F401
