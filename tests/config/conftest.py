"""A package of somebody else's parts, with its folder of configs."""

import pytest

PARTS = """
from dataclasses import dataclass
from pretrain import ModelTransform, Source

@dataclass(frozen=True)
class Freeze:
    pattern: str = "wte"
    def apply(self, model): pass

@dataclass(frozen=True)
class Lora:
    rank: int = 4
    def apply(self, model): pass

@dataclass
class Ema:
    decay: float = 0.99
    def setup(self, engine): pass
    def after_step(self, state, engine): pass
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

@dataclass(frozen=True)
class Lion:
    lr: float
    beta1: float = 0.5
    beta2: float = 0.6
    weight_decay: float = 0.0
    eps: float = 1.0
    def __call__(self, named_parameters): pass

class Anything:
    def __init__(self, url, **options): self.url, self.options = url, options
    def evaluate(self, engine): return []

@dataclass(frozen=True, kw_only=True)
class Query(Source):
    url: str
    port: int = 1
    def fingerprint(self): return self.url
    def documents(self): yield "text"

def both(named_parameters, lr, weight_decay=0.0, parts=(), wrap=None): return (lr, weight_decay, parts, wrap)

def half(step, *, total_steps, warmup_steps, ratio=0.5): return ratio

def undefined(step, *, total_steps, warmup_steps): return 0 * float("inf")

class Accuracy:
    def __init__(self, questions: int = 3): self.questions = questions
    def evaluate(self, engine): return []

class Lines:
    def open(self, run, start): pass
    def write(self, record): pass
    def close(self): pass

class Unfinished(ModelTransform):
    pass
"""
FILES = {
    "transform/still.yaml": "# Freeze parameters.\nstill: {_target_: ourlab.parts.Freeze, pattern: wte}\n",
    "transform/adapter.yaml": "# LoRA.\nadapter: {_target_: ourlab.parts.Lora, rank: 8}\n",
    "optimizer/lion.yaml": "# Lion: the sign of the momentum.\n_target_: ourlab.parts.Lion\nlr: ${lr}\n",
    "ourlab/default.yaml": "# Where our data is.\nurl: here\nsizes: [1, 2]\n",
    "hook/average.yaml": "# Average.\naverage: {_target_: ourlab.parts.Ema, decay: 0.9}\n",
}


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """The folder of configs; the package is importable."""
    package = {"ourlab/__init__.py": "from ourlab.parts import Lion\nimport os\n", "ourlab/parts.py": PARTS}
    for name, text in (package | FILES).items():
        file = tmp_path / ("" if name.endswith(".py") else "conf") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / "conf")
