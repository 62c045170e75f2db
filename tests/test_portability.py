"""One checkpoint format for all: a run handed from strategy to strategy and from world size to world size continues as if
nothing had happened, and ends where the run in one process ends."""

import pytest
import torch
import yaml

from pretrain.checkpoint.store import load
from pretrain.config.check import conf_dir
from pretrain.telemetry.sinks.jsonl import read_records
from tests.preloaded import run_preloaded
from tests.test_parity import STRATEGIES, whole_model


def fsdp(*options):
    return ["strategy=fsdp", *(f"strategy.{option}" for option in options)]


def deepspeed(stage, *options):
    return ["strategy=deepspeed", f"strategy.zero_stage={stage}", *(f"strategy.{option}" for option in options)]


# Strategy and options, number of processes: every kind saves for, and loads from, another kind or size.
LEGS = [
    (["strategy=single"], 1),
    (deepspeed(3), 2),
    (["strategy=ddp"], 4),
    (deepspeed(2), 2),
    (fsdp("sharding_strategy=HYBRID_SHARD"), 4),
    (deepspeed(1), 2),
    (fsdp(), 2),
    (["strategy=single"], 1),
]
SHARDINGS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
HYBRID = "sharding_strategy=HYBRID_SHARD"
CELLS = [
    (["strategy=single"], 1),
    (["strategy=dp"], 1),
    *((["strategy=ddp"], n) for n in (1, 2, 4)),
    *((fsdp(f"sharding_strategy={s}"), n) for s in SHARDINGS for n in (1, 2, 4)),
    *((fsdp(HYBRID, f"replicas={replicas}"), n) for replicas, n in ((1, 2), (2, 4), (1, 4))),
    (fsdp("cpu_offload=true"), 2),
    *((deepspeed(stage), n) for stage in range(4) for n in (1, 2, 4)),
    *((deepspeed(stage, "offload_optimizer=true"), 2) for stage in (2, 3)),
    (deepspeed(3, "offload_optimizer=true", "offload_parameters=true"), 4),
]


def named(legs):
    return [pytest.param(*leg, id=f"{' '.join(leg[0])} × {leg[1]}") for leg in legs]


def split(processes):
    """The same global batch of 8 sequences."""
    return [f"devices={processes}", f"batch_size={4 // processes}", "gradient_accumulation_steps=2"]


def in_a_process(arguments):
    done = run_preloaded(["-m", "pretrain", *arguments])
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def train(base_arguments, exact_model, command):
    """``train(shape, out, (strategy, processes), *more)``: its exit code. The learning rate rises, then follows a
    cosine, so that no step's is another's."""

    def run(shape, out, leg, *more, code=0):
        strategy, processes = leg
        common = [*base_arguments, f"model_name={exact_model(shape)}", "scheduler=cosine", "warmup_proportion=0.3"]
        common += ["evaluate_every=null", "save_every=null", "dataset.document_mask=true", "sink=jsonl"]
        # A process that has been in a group of its own is not used again: DeepSpeed remembers its groups.
        start = in_a_process if processes == 1 else command
        left, _, err = start([*common, f"output_dir={out}", *strategy, *split(processes), *more])
        assert left == code, f"{strategy} × {processes}: {err}"

    return run


def assert_same_training(run, reference, *, steps):
    """Losses and norms of ``steps``, and all that the last checkpoint holds."""
    ours, theirs = (
        [r for r in read_records(folder / "metrics.jsonl") if r["event"] == "train" and r["step"] in steps]
        for folder in (run, reference)
    )
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(steps)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), f"step {a['step']}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), f"step {a['step']}"
        assert (a["lr"], a["tokens"]) == (b["lr"], b["tokens"]), f"step {a['step']}"
    last = f"checkpoints/step-{steps[-1]:08d}"
    states = [load(folder / last)["engine"] for folder in (run, reference)]
    for kind in ("model", "optimizer"):
        ours, theirs = (state[kind] for state in states)
        assert ours.keys() == theirs.keys()
        for key in sorted(ours.keys()):
            assert_close(ours.read(key), theirs.read(key), key)
    models = [whole_model(folder / "model") for folder in (run, reference)]
    assert models[0].keys() == models[1].keys()
    for key in models[1]:
        assert_close(models[0][key], models[1][key], key)


def assert_close(ours, theirs, name):
    """As near as rounding leaves it, whatever the size of the numbers."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    error = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-30)
    assert error < 1e-3, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama-tied", "gpt2"])
def test_a_run_handed_on(shape, train, tmp_path):
    """Every leg is stopped by a signal after its step, and continued by the next."""
    steps = len(LEGS)
    train(shape, tmp_path / "alone", (["strategy=single"], 1), f"max_steps={steps}")
    for step, leg in enumerate(LEGS, start=1):
        stop = f"+sink.stop={{_target_: tests.stopper.Stopper, event: train, at: {step}, resumed_too: true}}"
        more = ["allow_targets=[tests.stopper.Stopper]", stop] if step < steps else []
        train(shape, tmp_path / "handed", leg, f"max_steps={steps}", *more, code=75 if more else 0)
    assert_same_training(tmp_path / "handed", tmp_path / "alone", steps=range(1, steps + 1))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return tmp_path_factory.mktemp("origin") / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes"), named(CELLS))
def test_every_strategy_and_size(strategy, processes, train, origin, tmp_path):
    """Continues the checkpoint of one process, and one process continues its."""
    more = ["max_steps=4", "save_every=1", "checkpoint.keep_last=null"]
    single = (["strategy=single"], 1)
    if not origin.exists():
        train("llama-tied", origin, single, *more)
    start = f"resume={origin}/checkpoints/step-00000002"
    train("llama-tied", tmp_path / "there", (strategy, processes), *more, start)
    assert_same_training(tmp_path / "there", origin, steps=range(3, 5))
    train("llama-tied", tmp_path / "back", single, *more, f"resume={tmp_path}/there/checkpoints/step-00000003")
    assert_same_training(tmp_path / "back", origin, steps=range(4, 5))


def writes_shards(strategy):
    return "state_dict_type" in yaml.safe_load((conf_dir() / f"strategy/{strategy}.yaml").read_text())


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("single", "dp")])
def test_the_final_model_opens_with_from_pretrained(strategy, base_arguments, exact_model, command, tmp_path):
    """And starts the next run, as any Hugging Face folder does: sharded or whole, tied as it was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = [*base_arguments, f"strategy={strategy}", "devices=2", "batch_size=2", "sink=jsonl", "save_every=null"]
    common += ["strategy.state_dict_type=sharded"] if writes_shards(strategy) else []
    code, _, err = command(
        [*common, f"model_name={exact_model('llama-tied')}", f"output_dir={tmp_path / 'a'}", "max_steps=2"]
    )
    assert code == 0, err
    folder = tmp_path / "a" / "model"
    assert len(list(folder.glob("model*.safetensors"))) == (2 if writes_shards(strategy) else 1)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    alone = [] if writes_shards(strategy) else ["strategy=single", "devices=1", "batch_size=4"]
    code, _, err = command([*common, *alone, f"model_name={folder}", f"output_dir={tmp_path / 'b'}", "max_steps=1"])
    assert code == 0, err
    scores = [r for run in "ab" for r in read_records(tmp_path / run / "metrics.jsonl") if r["event"] == "evaluation"]
    before = {r["domain"]: r["loss"] for r in scores[-4:] if r["step"] == 0}
    after = {r["domain"]: r["loss"] for r in scores[:4] if r["step"] == 2}
    assert before == pytest.approx(after, abs=1e-6 if writes_shards(strategy) else 1e-5)
