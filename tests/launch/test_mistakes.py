"""Where processes can't be had as asked: exit code 2 and one line, before anything is started where that can be known."""

import os
import re
import shutil
import socket

import pytest

from tests.conftest import sentences
from tests.damage import as_format_3
from tests.launch.test_launch import PAIR

ENVIRONMENTS = [
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, [], "strategy=single is one process"),
    (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
        ["strategy=dp"],
        "strategy=dp is one process",
    ),
    ({"RANK": "0", "WORLD_SIZE": "2"}, ["strategy=ddp"], "without MASTER_ADDR"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, ["strategy=ddp"], "RANK=2, WORLD_SIZE=2"),
    ({"RANK": "a", "WORLD_SIZE": "2"}, ["strategy=ddp"], "RANK=a in the environment: not a number"),
    (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        ["strategy=ddp", "devices=4"],
        "2 processes were started",
    ),
    ({"RANK": "0", "WORLD_SIZE": "2"}, ["task=evaluation"], "task=evaluation is one process"),
    (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "99999"},
        ["strategy=ddp"],
        "MASTER_PORT=99999 in the environment: a port is a number from 1 to 65535",
    ),
    (
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "198.51.100.1",
            "MASTER_PORT": "29500",
        },
        ["strategy=ddp"],
        "GLOO_SOCKET_IFNAME=lo in the environment: that is the loopback",
    ),
]


@pytest.mark.parametrize(("variables", "more", "says"), ENVIRONMENTS, ids=[e[2] for e in ENVIRONMENTS])
def test_an_environment_that_does_not_fit(variables, more, says, command, monkeypatch, base_arguments, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", *more])
    assert code == 2, err
    assert says in err


MISTAKES = [
    (
        ["devices=2"],
        "strategy=single is one process on one device; allowed: auto, 1; for several: strategy=ddp, deepspeed",
    ),
    (["strategy=fsdp", "strategy.sharding_strategy=HYBRID_SHARD", "devices=2"], "2 processes can't be split into 2"),
    (["strategy=fsdp", "strategy.sharding_strategy=HYBRID_SHARD", "devices=6", "strategy.replicas=4"], "6 processes"),
    (["strategy=fsdp", "strategy.replicas=2", "devices=2"], "only HYBRID_SHARD has replicas"),
    (
        ["strategy=fsdp", "strategy.sharding_strategy=HALF"],
        "strategy.sharding_strategy='HALF': input should be 'FULL_SHARD'",
    ),
    (["strategy=ddp", "strategy.static_graph=true", "devices=2"], "gradient_accumulation_steps=2"),
    (["strategy=ddp", "strategy.zero_stage=2"], "Ddp has no 'zero_stage'; it is a key of strategy=deepspeed"),
    (["strategy=deepspeed", "strategy.sharding_strategy=FULL_SHARD"], "it is a key of strategy=fsdp"),
    (["strategy=deepspeed", "strategy.zero_stage=4"], "strategy.zero_stage=4: input should be 0, 1, 2 or 3"),
    (["strategy=deepspeed", "strategy.zero_stage=0", "strategy.offload_optimizer=true"], "only stages 1, 2 and 3"),
    (["strategy=deepspeed", "strategy.offload_parameters=true"], "only stage 3"),
    (["strategy=deepspeed", "precision=16-mixed", "precision.allow_cpu=true"], "does not support fp16 on a CPU"),
    (["strategy=deepspeed", "precision=bf16-true"], "use bf16-mixed"),
    (
        ["strategy=deepspeed", "strategy.config.gradient_clipping=5"],
        "gradient_clipping=5: the run sets it to 1.0 (grad_clip)",
    ),
    (
        ["strategy=deepspeed", "strategy.config.zero_optimisation.stage=3"],
        "zero_optimisation: DeepSpeed has no such key; did you mean 'zero_optimization'",
    ),
    (["strategy=ddp", "launch.nodes=2"], "launch.endpoint=<host>:<port>"),
    (["launch.nodes=2", "launch.endpoint=localhost:29511"], "strategy=single is one process"),
    (["strategy=ddp", "launch.endpoint=localhost"], "launch.endpoint='localhost'"),
    (
        ["strategy=ddp", "launch.nodes=2", "launch.endpoint=localhost:99999"],
        "launch.endpoint=localhost:99999: a port is a number from 1 to 65535",
    ),
    (["strategy=ddp", "launch.max_restarts=-1"], "launch.max_restarts=-1"),
    (["strategy=ddp", "devices=0"], "devices=0"),
]


@pytest.mark.parametrize(("more", "says"), MISTAKES, ids=[" ".join(m) for m, _ in MISTAKES])
def test_mistakes(more, says, command, base_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", *more])
    assert code == 2, err
    assert says in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_more_devices_than_gpus(command, base_arguments, tmp_path, monkeypatch):
    from pretrain.launch import topology as layout

    monkeypatch.setattr(layout, "gpu_visible", lambda: True)
    monkeypatch.setattr(layout, "_gpus", lambda: 2)
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", "strategy=ddp", "devices=3"])
    assert code == 2
    assert "devices=3: 2 GPUs are visible; use at most that" in err


def test_idle_gpus_are_mentioned(capsys, monkeypatch):
    from pretrain.config.compose import run_config
    from pretrain.launch import topology as layout

    monkeypatch.setattr(layout, "gpu_visible", lambda: True)
    monkeypatch.setattr(layout, "_gpus", lambda: 4)
    found = layout.topology_of(run_config([]))
    assert (found.device_type, found.workers_per_node) == ("cuda", 1)
    assert "strategy=single uses 1 of 4 GPUs" in capsys.readouterr().err


def test_a_strategy_of_ones_own_is_among_those_that_are_offered(monkeypatch, tmp_path):
    from pretrain.cli import help as help_page
    from pretrain.config import choices
    from pretrain.config.check import conf_dir
    from pretrain.strategy import topology as layout

    (tmp_path / "strategy").mkdir()
    for name in ("single", "dp", "fsdp"):
        (tmp_path / f"strategy/{name}.yaml").write_text((conf_dir() / f"strategy/{name}.yaml").read_text())
    (tmp_path / "strategy/zones.yaml").write_text("_target_: pretrain.strategy.fsdp.Fsdp\n")
    for module in (layout, help_page, choices):
        monkeypatch.setattr(module, "conf_dir", lambda: tmp_path)
    assert layout.multi_process_choices() == "fsdp or zones"


def test_deepspeed_that_is_not_installed(command, base_arguments, tmp_path, monkeypatch):
    from pretrain.strategy import deepspeed

    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", "strategy=deepspeed"])
    assert code == 2
    assert "pip install 'pretrain[deepspeed]'" in err


def test_a_port_in_use(command, base_arguments, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        more = ["strategy=ddp", "launch.nodes=2", f"launch.endpoint={endpoint}"]
        code, _, err = command([*base_arguments, f"output_dir={tmp_path}", *more])
    assert code == 2, err
    assert f"launch.endpoint={endpoint}: another program listens there" in err


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_port_in_use_where_ranks_meet(rank, command, base_arguments, monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}", "strategy=ddp"])
    assert code == 2, err
    assert err == f"error: MASTER_PORT={port}: another program listens there at 127.0.0.1; choose a free port\n"
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        pytest.param("lr", "configuration", id="lr", marks=pytest.mark.slow),
        pytest.param("text", "data", id="text"),
        pytest.param("model", "model", id="model", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_disagree(differs, says, spawn, base_arguments, exact_model, tmp_path):
    """Two ranks as a cluster starts them, with another command or, under the same paths, other files on the other's disk."""
    shapes = ["llama", "llama-tied" if differs == "model" else "llama"]
    ranks = []
    address = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for rank, shape in enumerate(shapes):
        disk = tmp_path / str(rank)
        disk.mkdir()
        (disk / "model").symlink_to(exact_model(shape))
        (disk / "book.txt").write_text(sentences(rank if differs == "text" else 0, 400))
        given = [*base_arguments, "model_name=model", "dataset.nameOrPath=book.txt", "strategy=ddp", "sink=jsonl"]
        given += [f"lr={1 + rank}e-3"] if differs == "lr" else []
        own = address | {"RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        ranks.append(spawn([*given, f"output_dir={tmp_path / 'run'}"], cwd=disk, env=own))
    outs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outs
    for out in outs:
        assert (
            out == f"error: rank 1 differs from rank 0 in its {says}: all ranks need the same command, model and text\n"
        )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wider(exact_model, tmp_path):
    """``wider(folder)``: the same model with twice the width, in ``folder``."""

    def make(folder):
        from transformers import AutoConfig, AutoModelForCausalLM

        shutil.copytree(exact_model("llama"), folder, dirs_exist_ok=True)
        config = AutoConfig.from_pretrained(folder)
        config.hidden_size = 64
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def test_a_checkpoint_of_another_shape_is_refused(base_arguments, exact_model, wider, command, tmp_path):
    """Another model's, or the same folder's with its content exchanged, here or from elsewhere: the message has the shapes."""
    model, run = shutil.copytree(exact_model("llama"), tmp_path / "model"), tmp_path / "run"
    given = [*base_arguments, "sink=jsonl"]
    code, _, err = command([*given, f"model_name={model}", f"output_dir={run}", "max_steps=1"])
    assert code == 0, err
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    elsewhere = [f"output_dir={tmp_path / 'elsewhere'}", f"resume={run}"]
    other = exact_model("llama-tied")
    wider(model)
    for more, says in (
        ([f"model_name={model}", *PAIR, f"output_dir={run}"], "hidden_size: 32 → 64"),
        ([f"model_name={model}", *elsewhere], "hidden_size: 32 → 64"),
        ([f"model_name={other}", f"output_dir={run}"], f"{model} → {other}; tie_word_embeddings: False → True"),
    ):
        code, _, err = command([*given, *more, "max_steps=4"])
        assert code == 2, err
        assert "can't be continued with other settings: " in err
        assert says in err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_a_run_from_scratch_of_another_shape_is_refused(base_arguments, exact_model, command, tmp_path):
    given = [*base_arguments, f"model_name={exact_model('llama')}", "model=scratch", f"output_dir={tmp_path}"]
    code, _, err = command([*given, "max_steps=1", "sink=jsonl"])
    assert code == 0, err
    code, _, err = command([*given, "max_steps=2", "+model.overrides.hidden_size=64"])
    assert code == 2, err
    assert "model.overrides.hidden_size: None → 64" in err
    assert "hidden_size: 32 → 64" in err


@pytest.mark.parametrize(
    "strategy", ["single", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fsdp", "deepspeed"))]
)
def test_a_checkpoint_with_the_weights_of_another_shape(
    strategy, base_arguments, exact_model, wider, command, tmp_path
):
    """Exchanged by hand, marker and all: what it says of itself fits, what it holds does not."""
    given = [*base_arguments, f"model_name={exact_model('llama')}", f"output_dir={tmp_path / 'run'}", "sink=jsonl"]
    code, _, err = command([*given, "max_steps=1"])
    assert code == 0, err
    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    shutil.copy(wider(tmp_path / "wider") / "model.safetensors", checkpoint)
    as_format_3(checkpoint)
    code, _, err = command([*given, f"strategy={strategy}", "max_steps=2"])
    assert code == 2, err
    assert re.search(r"error: weights that do not fit the model: \S+ is \(.*64.*\), the model's \(.*32.*\)\n", err)
