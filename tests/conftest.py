"""A tiny real model, a small real corpus, and the command line to run on them."""

import gc
import multiprocessing.util
import os
import random
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests import preloaded
from tests.foreign import foreign_module
from tests.preloaded import Preloaded

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The imports of all tests stay; Python would scan them again and again, which took a twelfth of the time of configs' tests.
gc.set_threshold(50_000, 20, 100)

settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")

pytest_plugins = ["tests.time_limit"]


def pytest_configure(config):
    """Tests are of processes on a CPU, whatever the machine has, but for those that `-m gpu` asks for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux":
        preloaded.session = dict(os.environ)
        multiprocessing.util.spawnv_passfds = preloaded.start_fork_server  # of the workers of runs in this process


STARTS_A_RUN = {"command", "spawn", "base_arguments"}
STARTS_PROCESSES = "browser cli optimizer_state optuna round_trip scripts sources subprocess_queue tokenize".split()
STARTS_PROCESSES += "transforms_on_ranks wandb".split()
MANY_CASES = "dtypes interpolation probe statistics".split()  # every architecture, or large inputs
NOT_QUICK = {"tests", "launch", "runtime", "strangers"} | {f"test_{n}.py" for n in (*STARTS_PROCESSES, *MANY_CASES)}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups
def pytest_collection_modifyitems(items):
    """Mark as `quick` what `scripts/test.sh --quick` runs: tests of a part alone, which take about a second at most. Tests that
    share what a fixture of their module makes run in one process of pytest-xdist, which makes it once.

    Files of such tests alone come last, so that the processes of pytest-xdist end together. Those of SLURM come first: they wait
    most of their time, beside which another process can compute.
    """
    for item in items:
        kept_out = STARTS_A_RUN & set(item.fixturenames) or NOT_QUICK & {item.path.parent.name, item.path.name}
        if not kept_out and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    sharing = {item.path for item in items if "reference" in item.fixturenames or has_module_fixtures(item.path)}
    for item in items:
        if item.path in sharing:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
    long = {item.path for item in items if not item.get_closest_marker("quick")}
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, item.path not in long))


@cache
def has_module_fixtures(path: Path) -> bool:
    return '@pytest.fixture(scope="module"' in path.read_text()


def pytest_collection_finish():
    gc.freeze()


WORDS = "the sea road of stone a ship and its crew went under light rain to see old cities far from home again".split()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither use nor fill the user's token cache. The processes of pytest-xdist share one."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    os.environ["PRETRAIN_CACHE"] = str(root / "cache")


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty text files of about 2 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(sentences(i, 40))
    return folder


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other_corpus")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(sentences(1000 + i, 40).upper())
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from pretrain.models.bpe import train_bpe

    return train_bpe(iter(sentences(i, 200) for i in range(5)), vocab_size=300)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """A Llama of 27 k parameters with dropout in its attention, so that a lost random state shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHAPES = {  # without dropout, so that any number of ranks draws the same numbers: none
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
}
# OPT keeps documents apart by a mask only, GPT-2 and Llama by positions.
SHAPES["opt"] = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SHAPES["opt"] |= {"max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
SHAPES["llama-tied"] = SHAPES["llama"] | {"tie_word_embeddings": True}


@pytest.fixture(scope="session")
def exact_model(tmp_path_factory, tokenizer):
    """``exact_model(shape)``: the folder of a tiny model of that shape whose losses depend on nothing random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(shape: str) -> Path:
        if shape not in made:
            torch.manual_seed(0)
            special = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
            made[shape] = tmp_path_factory.mktemp(shape)
            config = AutoConfig.for_model(**SHAPES[shape], **special)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[shape])
            tokenizer.save_pretrained(made[shape])
        return made[shape]

    return make


@pytest.fixture
def base_arguments(tiny_model, corpus, other_corpus):
    """A run of 20 steps that takes about a second once everything is imported."""
    return [
        f"model_name={tiny_model}",
        "dataset=local",
        f"dataset.nameOrPath={corpus}",
        "dataset@evaluation.domains.base=local",
        f"evaluation.domains.base.nameOrPath={other_corpus}",
        "evaluation.domains.base.name=other",
        "evaluation.max_tokens=200",
        "evaluation.batch_size=8",
        "evaluation.sample_tokens=4",  # a forward pass each
        "sequence_length=32",
        "batch_size=2",
        "gradient_accumulation_steps=2",
        "max_steps=20",
        "log_every=1",
        "evaluate_every=8",
        "save_every=5",
        "lr=1e-3",
        "sink=[console,jsonl]",  # without the page, whose charts take longer than such a run
    ]


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """Where the foreign code leaves its mark. It can be imported, so only a refusal keeps it from running."""
    left = foreign_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    return left


@pytest.fixture
def command(capsys):
    """Run the command line in this process: ``command(arguments) -> (exit code, stdout, stderr)``."""

    def run(arguments):
        from pretrain.cli.main import main

        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    yield run
    from pretrain.distributed.sockets import restore_environment

    restore_environment()  # of a run that has ended with an error


@pytest.fixture
def spawn():
    """Start the command line as a process of its own; what is left of it and its children at the end is killed.
    ``fresh``: it imports everything itself (see tests/preloaded.py)."""
    import psutil

    started = []

    def start(arguments, *, fresh=False, **options):
        process = (subprocess.Popen if fresh else Preloaded)(
            [sys.executable, "-m", "pretrain", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:  # some outlive their parent and its pipe: submitit's
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.communicate()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, request):
    """The uninterrupted run, made by the first test that asks for it."""
    return tmp_path_factory.mktemp("reference") / "run"


@pytest.fixture
def uninterrupted(reference, base_arguments, command):
    if not reference.exists():
        code, _, err = command([*base_arguments, f"output_dir={reference}"])
        assert code == 0, err
    return reference
