"""The flat YAML of the original design means what the contract says."""

import importlib.util
import json
from pathlib import Path

import hydra
import pytest
import yaml

from pretrain.cli.flat_yaml import KEYS, overrides_from, schema
from pretrain.config.check import check, conf_dir
from pretrain.config.compose import forced, resolve
from pretrain.runtime.errors import UserError

CONTRACT = """\
task: pretraining
output_dir: outputs/gpt2_pretrain
model_name: gpt2
precision: "bf16-mixed"
number_epochs: 3
batch_size: 32
gradient_accumulation_steps: 4
lr: 1e-4
lr_scheduler: "cosine"
warmup_proportion: 0.1
weight_decay: 0.01
beta1: 0.9
beta2: 0.999
dataset:
  source: "local"
  nameOrPath: "path/to/dataset"
parallelization_strategy: "fsdp"
auto_wrap_policy: "gpt2"
sharding_strategy: "FULL_SHARD"
"""


@pytest.fixture
def compose(tmp_path):
    def run(text: str, *later: str) -> dict:
        file = tmp_path / "flat.yaml"
        file.write_text(text)
        overrides = [forced(o) for o in overrides_from(file, list(later))]
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            resolved = resolve(hydra.compose("config", overrides=overrides))
        check(resolved)
        return resolved

    return run


def test_the_contract_s_example(compose):
    resolved = compose(CONTRACT)
    assert resolved["output_dir"] == "outputs/gpt2_pretrain"
    assert resolved["model"]["name_or_path"] == "gpt2"
    assert resolved["precision"]["name"] == "bf16-mixed"
    assert (
        resolved["optimizer"] | {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01}
        == resolved["optimizer"]
    )
    assert resolved["scheduler"]["_target_"].endswith(".cosine")
    assert resolved["dataset"]["nameOrPath"] == "path/to/dataset"
    assert resolved["number_epochs"] == 3
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["strategy"]["_target_"] == "pretrain.strategy.fsdp.Fsdp"
    assert resolved["strategy"]["auto_wrap_policy"] == "gpt2"
    assert resolved["strategy"]["sharding_strategy"] == "FULL_SHARD"


STRATEGIES = {
    "fsdp": "auto_wrap_policy: gpt2\nsharding_strategy: FULL_SHARD\nstate_dict_type: sharded\nlimit_all_gathers: true",
    "deepspeed": "zero_stage: 3\noffload_optimizer: true",
    "deep_speed": "parallelization_config: {zero_stage: 1, offload_optimizer: false}",
    "ddp": "find_unused_parameters: false\nstatic_graph: false\nbackend: gloo",
    "dp": "",
}


def with_strategy(strategy: str) -> str:
    return CONTRACT.split("parallelization_strategy")[0] + (
        f"parallelization_strategy: {strategy}\n{STRATEGIES[strategy]}\n"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_contract_s_example_with_each_strategy(strategy, compose):
    wanted = {
        "fsdp": {"auto_wrap_policy": "gpt2", "sharding_strategy": "FULL_SHARD", "state_dict_type": "sharded"},
        "deepspeed": {"zero_stage": 3, "offload_optimizer": True},
        "deep_speed": {"zero_stage": 1, "offload_optimizer": False},
        "ddp": {"find_unused_parameters": False, "static_graph": False},
        "dp": {},
    }
    resolved = compose(with_strategy(strategy))["strategy"]
    assert resolved["_target_"].split(".")[-2] == strategy.replace("_", "")
    assert resolved | wanted[strategy] == resolved


@pytest.mark.parametrize(
    "strategy", ["fsdp", "dp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("deepspeed", "deep_speed", "ddp"))]
)
def test_the_contract_s_example_runs_unchanged(strategy, exact_model, corpus, command, tmp_path):
    """Only what it names is made small: the model, the text, and the sizes of batches."""
    text = with_strategy(strategy).replace("gpt2\nprecision", f"{exact_model('gpt2')}\nprecision")
    text = text.replace("path/to/dataset", str(corpus)).replace("outputs/gpt2_pretrain", str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(text)
    small = [
        "sequence_length=32",
        "batch_size=2",
        "max_steps=3",
        "evaluation.max_tokens=500",
        "sink=jsonl",
        "devices=2",
    ]
    code, _, err = command(["--config", tmp_path / "run.yaml", *small])
    assert code == 0, err
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["status"], facts["steps"]) == ("finished", 3)
    assert facts["world_size"] == (1 if strategy == "dp" else 2)
    assert ("limit_all_gathers: has no effect" in err) == (strategy == "fsdp")


def test_the_command_line_wins(compose):
    resolved = compose(CONTRACT, "lr=0.5", "precision=32-true", "dataset=sample")
    assert resolved["lr"] == 0.5
    assert resolved["precision"]["name"] == "32-true"
    assert resolved["dataset"]["source"] == "sample"
    assert "nameOrPath" not in resolved["dataset"]


def test_wandb_comes_beside_the_usual_sinks(compose):
    assert list(compose("logging_config: wandb")["sink"]) == [*compose("seed: 1")["sink"], "wandb"]
    assert list(compose("logging_config: wandb\nwandb_project: p", "sink=jsonl")["sink"]) == ["jsonl"]


MEANINGS = [
    ("task: clm_training", {"task": "pretraining"}),
    ("experiment_name: mine", {"name": "mine", "output_dir": "outputs/mine"}),
    ("lr_scheduler: fixed", {"warmup_proportion": 0.0, "scheduler._target_": "pretrain.optim.schedule.constant"}),
    ("lr_scheduler: warmup_constant", {"scheduler._target_": "pretrain.optim.schedule.constant"}),
    ("lr_scheduler: warmup_linear", {"scheduler._target_": "pretrain.optim.schedule.linear"}),
    ("lr_scheduler: warmup_cosine", {"scheduler._target_": "pretrain.optim.schedule.cosine", "scheduler.cycles": 1}),
    ("lr_scheduler: warmup_cosine_restart", {"scheduler.cycles": 2}),
    ("lr_decay: false\nlr_scheduler: warmup_cosine", {"scheduler._target_": "pretrain.optim.schedule.constant"}),
    ("gradient_accumulation: false", {"gradient_accumulation_steps": 1}),
    ("gradient_accumulation: true\ngradient_accumulation_steps: 4", {"gradient_accumulation_steps": 4}),
    ("validate_after_k_steps: 7", {"evaluate_every": 7}),
    ("validate_after_epoch: true", {"evaluation.per_epoch": 1}),
    ("validations_per_epoch: 4", {"evaluation.per_epoch": 4}),
    ("save_on_validate: true", {"checkpoint.with_evaluation": True}),
    ("checkpoint: runs/a/checkpoints/step-00000020", {"resume": "runs/a/checkpoints/step-00000020"}),
    ("checkpoint: null", {"resume": "auto"}),
    ("initial_weights_checkpoint: folder", {"model_name": "folder", "model.name_or_path": "folder"}),
    ("log_iter_interval: 3", {"log_every": 3}),
    ("log_every_n_steps: 3", {"log_every": 3}),
    ("verbose_level: 2", {"sink.console.level": 2}),
    ("train_data_ratio: 0.5", {"dataset.train_data_ratio": 0.5}),
    (
        "logging_config: wandb\nwandb_project: p\nwandb_entity: e\nwandb_run_name: r\nlog_model: all",
        {"sink.wandb.project": "p", "sink.wandb.entity": "e", "sink.wandb.name": "r", "sink.wandb.log_model": True},
    ),
    ("logging_config: wandb\nexperiment_name: mine\nwandb_project: null", {"sink.wandb.name": "mine"}),
    ("num_workers: 3", {"dataset.num_workers": 3}),
    ("gradient_checkpointing: true", {"model.gradient_checkpointing": True}),
    ("parallelization_strategy: none", {"strategy._target_": "pretrain.strategy.single.Single"}),
    ("dataset: {source: huggingface, nameOrPath: a/b}", {"dataset.source": "huggingface", "dataset.nameOrPath": "a/b"}),
    ("seed: 3\ngrad_clip: 0.5", {"seed": 3, "grad_clip": 0.5}),
    ("output_dir: \"with 'quotes' and, commas\"", {"output_dir": "with 'quotes' and, commas"}),
]


@pytest.mark.parametrize(("text", "meaning"), MEANINGS, ids=[t.splitlines()[0] for t, _ in MEANINGS])
def test_meanings(text, meaning, compose):
    resolved = compose(text)
    for path, value in meaning.items():
        found = resolved
        for key in path.split("."):
            found = found[key]
        assert found == value, path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("limit_all_gathers: true", "limit_all_gathers: has no effect with strategy single"),
        (
            "parallelization_strategy: ddp\nparallelization_config: {zero_stage: 2, bucket_cap_mb: 5}",
            "zero_stage: has no effect with strategy ddp",
        ),
        ("validate_on_end: false", "the end is always evaluated"),
        ("wandb_project: p", "wandb project=p: has no effect without logging_config: wandb"),
        ("logging_config: none\nlog_model: true", "wandb log_model=True: has no effect"),
        ("dataset: {source: local, nameOrPath: x, format: hf}", "dataset.format: has no effect"),
    ],
)
def test_a_key_without_effect_says_so(text, says, compose, capsys):
    compose(text)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch_sise: 3", "unknown key 'batch_sise'; did you mean 'batch_size'"),
        ("precision: fp8", "precision='fp8': input should be '32-true'"),
        ("lr_scheduler: cosin", "lr_scheduler='cosin': input should be"),
        ("gradient_accumulation: false\ngradient_accumulation_steps: 4", "the steps must be 1"),
        ("dataset: {source: s3}", "dataset.source='s3': not a source"),
        ("dataset: text.txt", "dataset='text.txt': input should be a valid dictionary"),
        ("- a", "not a YAML mapping"),
        ("", "not a YAML mapping"),
        ("parallelization_strategy: tpu", "parallelization_strategy='tpu'"),
        (
            "parallelization_strategy: fsdp\nparallelization_config: {sharding_strategi: NO_SHARD}",
            "parallelization_config.sharding_strategi: no strategy has such a key; did you mean 'sharding_strategy'",
        ),
    ],
)
def test_mistakes(text, says, compose):
    with pytest.raises(UserError) as raised:
        compose(text)
    assert says in str(raised.value)


def test_the_schema_in_the_repository_is_the_generated_one():
    script = Path(__file__).parents[2] / "scripts" / "make_schema.py"
    spec = importlib.util.spec_from_file_location("make_schema", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.text(), "run: python scripts/make_schema.py"


def test_the_schema_knows_every_key_and_the_example():
    properties = schema()["properties"]
    assert properties.keys() == KEYS.keys()
    assert set(yaml.safe_load(CONTRACT)) <= properties.keys()
