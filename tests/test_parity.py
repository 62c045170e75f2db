"""Every strategy equals one process: losses, gradient norms, scores and weights, at the same global batch of 8.

A strategy YAML is picked up by its name alone.
"""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.config.check import conf_dir
from pretrain.distributed.sharding import PIECES
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.preloaded import run_preloaded

STRATEGIES = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))
SHARD_GRAD_OP = ["strategy=fsdp", "strategy.sharding_strategy=SHARD_GRAD_OP"]
OWN_UNITS = ["strategy.auto_wrap_policy=LlamaMLP", "strategy.state_dict_type=sharded"]
VARIANTS = [
    [*SHARD_GRAD_OP, *OWN_UNITS],
    ["strategy=fsdp", "strategy.sharding_strategy=NO_SHARD"],
    ["strategy=fsdp", "strategy.cpu_offload=true", "model.gradient_checkpointing=true"],
    ["strategy=deepspeed", "strategy.zero_stage=3"],
    *(
        pytest.param(variant, marks=pytest.mark.slow)
        for variant in (
            SHARD_GRAD_OP,
            ["strategy=fsdp", *OWN_UNITS],
            ["strategy=fsdp", "strategy.cpu_offload=true"],
            ["strategy=fsdp", "model.gradient_checkpointing=true"],
            ["strategy=single", "model.compile=true", "batch_size=4"],
            ["strategy=ddp", "model.compile=true"],
            ["strategy=fsdp", "model.compile=true"],
            ["strategy=fsdp", "model.compile=true", "model.gradient_checkpointing=true"],
            ["strategy=deepspeed", "strategy.zero_stage=2", "model.compile=true"],
            ["strategy=deepspeed", "strategy.zero_stage=3", "model.compile=true"],
            ["strategy=fsdp", "strategy.prefetch=2", "strategy.reshard_root=false"],
            ["strategy=ddp", "strategy.gradient_as_bucket_view=false"],
            ["strategy=ddp", "strategy.find_unused_parameters=true"],
            ["strategy=ddp", "model.gradient_checkpointing=true"],
            ["strategy=ddp", "model.gradient_checkpointing=2"],
            ["strategy=fsdp", "model.gradient_checkpointing=selective"],
            ["strategy=deepspeed", "strategy.zero_stage=3", "model.gradient_checkpointing=true"],
            ["strategy=fsdp", "strategy.accumulate_unsharded=true"],
            ["strategy=ddp", "strategy.static_graph=true", "gradient_accumulation_steps=1", "batch_size=4"],
            ["strategy=deepspeed", "strategy.zero_stage=0"],
            ["strategy=deepspeed", "strategy.zero_stage=1"],
            ["strategy=deepspeed", "strategy.zero_stage=1", "strategy.offload_optimizer=true"],
            ["strategy=deepspeed", "strategy.zero_stage=2", "strategy.offload_optimizer=true"],
            ["strategy=deepspeed", "strategy.zero_stage=3", "strategy.offload_optimizer=true"],
            ["strategy=deepspeed", "strategy.zero_stage=3", "strategy.offload_parameters=true"],
            [
                "strategy=deepspeed",
                "strategy.zero_stage=3",
                "strategy.offload_optimizer=true",
                "strategy.offload_parameters=true",
            ],
            ["strategy=deepspeed", "strategy.config.zero_optimization.reduce_bucket_size=5000"],
        )
    ),
]


def arguments(base_arguments, model, out):
    common = [*base_arguments, f"model_name={model}", f"output_dir={out}", "max_steps=10", "evaluate_every=5"]
    common += ["dataset.document_mask=true", "grad_clip=0.5", "warmup_proportion=0.3", "gradient_accumulation_steps=2"]
    return [*common, "save_every=null", "resume=never", "sink=jsonl", "telemetry.layers_every=5"]


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.fixture
def reference(references, base_arguments, exact_model, command, tmp_path_factory):
    """``reference(shape, precision)``: the folder of the run in one process."""

    def run(shape, precision="32-true"):
        key = (shape, precision)
        if key not in references:
            out = tmp_path_factory.mktemp("reference")
            given = arguments(base_arguments, exact_model(shape), out)
            code, _, err = command([*given, "strategy=single", "batch_size=4", f"precision={precision}"])
            assert code == 0, err
            references[key] = out
        return references[key]

    return run


def assert_equal_runs(run, reference, *, loss, norm, weights):
    """Absolute bounds for losses and weights, a relative one for gradient norms."""
    ours, theirs = (read_records(folder / "metrics.jsonl") for folder in (run, reference))
    layers, expected = ([r for r in records if r["event"] == "layers"] for records in (ours, theirs))
    if layers or read_run_file(run)["strategy"] != "deepspeed":  # its stages 1 to 3 have none
        assert_equal_layers(layers, expected, rel=100 * norm)  # early updates are signs of gradients, large or tiny
    ours, theirs = ([r for r in records if r["event"] != "layers"] for records in (ours, theirs))
    assert [(r["event"], r["step"]) for r in ours] == [(r["event"], r["step"]) for r in theirs]
    clipped = 0
    for a, b in zip(ours, theirs, strict=True):
        if a["event"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], abs=loss)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm)
            assert (a["lr"], a["tokens"], a["epoch"]) == (b["lr"], b["tokens"], b["epoch"])
            clipped += b["grad_norm"] > 0.5
        if a["event"] == "evaluation":
            assert a["loss"] == pytest.approx(b["loss"], abs=loss)
            assert a["tokens"] == b["tokens"]
            assert a["kl_to_base"] == pytest.approx(b["kl_to_base"], abs=10 * loss)
            assert (a["kl_to_base"] > 0) == (a["step"] > 0)
            assert a["in_context_gain"] == pytest.approx(b["in_context_gain"], abs=10 * loss)
        if a["event"] == "positions":
            assert a["loss"] == pytest.approx(b["loss"], abs=10 * loss)
            assert a["tokens"] == b["tokens"]
        if (
            a["event"] == "sample" and loss < 1e-4
        ):  # with rounding as coarse as bf16's another token may be the likeliest
            assert (a["domain"], a["prompt"], a["text"]) == (b["domain"], b["prompt"], b["text"])
    assert clipped > 2, "the clipping must have something to do"
    a, b = (whole_model(folder / "model") for folder in (run, reference))
    assert a.keys() == b.keys()
    for name, tensor in a.items():  # not max(…) < weights: a NaN that does not come first is no maximum
        assert float((tensor - b[name]).abs().max()) < weights, name


def assert_equal_layers(ours, theirs, *, rel):
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [5, 10]
    for a, b in zip(ours, theirs, strict=True):
        assert a["layers"].keys() == b["layers"].keys()
        for name, norms in a["layers"].items():
            assert norms == {key: pytest.approx(value, rel=rel) for key, value in b["layers"][name].items()}, name


def whole_model(folder):
    """All weights of a Hugging Face folder, in one file or several."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def shares(run):
    """What part of its tensors each writer of the last checkpoint has written, by the rows."""
    written = []
    for file in sorted((run / "checkpoints/step-00000010").glob("*.safetensors")):
        tensors = safe_open(file, framework="pt")
        parts = json.loads(tensors.metadata().get(PIECES, "{}"))
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        written.append(
            {shape[0] / parts[name][1][0] if name in parts else 1 for name, shape in shapes.items() if shape}
        )
    return written


def assert_shared(run, *, ranks):
    """Model and optimizer each lie in equal parts on so many ranks."""
    assert shares(run) == 2 * ranks * [{1 / ranks}]


FP32 = {"loss": 1e-5, "norm": 1e-5, "weights": 2e-5}


EQUAL = [(strategy, shape) for strategy in STRATEGIES for shape in ("gpt2", "llama", "llama-tied")]
# By default each strategy trains one shape here, llama-tied in the variants below, and fsdp also gpt2 in
# `test_a_layout_that_transformers_converts`.
ONE_EACH = [(strategy, "llama" if strategy in ("fsdp", "deepspeed") else "gpt2") for strategy in STRATEGIES]


@pytest.mark.parametrize(
    ("strategy", "shape"), [pytest.param(*e, marks=() if e in ONE_EACH else pytest.mark.slow) for e in EQUAL]
)
def test_two_processes_equal_one(strategy, shape, reference, base_arguments, exact_model, command, tmp_path):
    split = ["devices=1", "batch_size=4"] if strategy == "single" else ["devices=2", "batch_size=2"]
    given = arguments(base_arguments, exact_model(shape), tmp_path)
    code, _, err = command([*given, f"strategy={strategy}", *split])
    assert code == 0, err
    assert_equal_runs(tmp_path, reference(shape), **FP32)
    if strategy != "deepspeed":  # whose ranks share the names
        assert_shared(tmp_path, ranks=2 if strategy == "fsdp" else 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_options_change_nothing(variant, reference, base_arguments, exact_model, command, tmp_path):
    given = arguments(base_arguments, exact_model("llama-tied"), tmp_path)
    code, _, err = command([*given, "devices=2", "batch_size=2", *variant])
    assert code == 0, err
    assert_equal_runs(tmp_path, reference("llama-tied"), **FP32)
    if "strategy=fsdp" in variant:
        assert_shared(tmp_path, ranks=1 if "strategy.sharding_strategy=NO_SHARD" in variant else 2)


@pytest.mark.parametrize("replicas", ["null", pytest.param("1", marks=pytest.mark.slow)])
def test_four_processes_in_copies_of_shards(replicas, reference, base_arguments, exact_model, command, tmp_path):
    hybrid = ["strategy=fsdp", "strategy.sharding_strategy=HYBRID_SHARD", f"strategy.replicas={replicas}"]
    given = arguments(base_arguments, exact_model("llama-tied"), tmp_path)
    code, _, err = command([*given, *hybrid, "devices=4", "batch_size=1"])
    assert code == 0, err
    assert_equal_runs(tmp_path, reference("llama-tied"), **FP32)
    assert_shared(tmp_path, ranks=2 if replicas == "null" else 4)


# bf16 has 8 significant bits: the bounds are what its rounding does to a loss of 5.7 and to gradients.
BF16 = {"loss": 2e-2, "norm": 5e-2, "weights": 1e-2}


STAGES = [["strategy=deepspeed", f"strategy.zero_stage={stage}"] for stage in (0, 1, 3)]


@pytest.mark.parametrize("shape", ["llama-tied", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy",
    [
        *([f"strategy={s}"] for s in STRATEGIES if s not in ("single", "dp")),
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES),
    ],
    ids=" ".join,
)
def test_bf16_agrees_within_its_rounding(strategy, shape, reference, base_arguments, exact_model, command, tmp_path):
    """And is bf16: fp32's losses are others."""
    given = arguments(base_arguments, exact_model(shape), tmp_path)
    code, _, err = command([*given, *strategy, "devices=2", "batch_size=2", "precision=bf16-mixed"])
    assert code == 0, err
    assert_equal_runs(tmp_path, reference(shape, "bf16-mixed"), **BF16)
    ours, exact = (
        [r["loss"] for r in read_records(f / "metrics.jsonl") if r["event"] == "train"]
        for f in (tmp_path, reference(shape))
    )
    assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) > FP32["loss"]


def test_random_weights_are_those_of_one_process(reference, base_arguments, exact_model, command, tmp_path):
    """Drawn whole on rank 0 and sent to the shards of the others."""
    scratch = ["model=scratch", "seed=7"]
    for name, split in (("alone", ["batch_size=4"]), ("fsdp", ["strategy=fsdp", "devices=2", "batch_size=2"])):
        given = arguments(base_arguments, exact_model("llama-tied"), tmp_path / name)
        code, _, err = command([*given, *scratch, *split])
        assert code == 0, err
    assert_equal_runs(tmp_path / "fsdp", tmp_path / "alone", **FP32)


def test_a_layout_that_transformers_converts(reference, base_arguments, exact_model, command, tmp_path):
    """GPT-2's files of old name their weights without the prefix of today's class."""
    folder = tmp_path / "model"
    shutil.copytree(exact_model("gpt2"), folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    given = arguments(base_arguments, folder, tmp_path / "run")
    code, _, err = command([*given, "strategy=fsdp", "devices=2", "batch_size=2"])
    assert code == 0, err
    assert_equal_runs(tmp_path / "run", reference("gpt2"), **FP32)


@pytest.mark.parametrize("head", ["equal", "other"])
def test_a_tied_head_with_weights_of_its_own(head, base_arguments, exact_model, command, tmp_path):
    """A second copy of the tied weight is none; another weight contradicts the config, and shards have no room for it."""
    folder = tmp_path / "model"
    shutil.copytree(exact_model("llama-tied"), folder)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0.1 if head == "other" else 0.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    given = [*arguments(base_arguments, folder, tmp_path / "run"), "strategy=fsdp", "max_steps=1"]
    code, _, err = command(given)
    if head == "equal":
        assert code == 0, err
        return
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert (
        "the weight files hold a head that is not the embedding; set it to false, or remove the head from" in errors[0]
    )


def test_fsdp_never_holds_a_pretrained_model_whole(base_arguments, exact_model, tmp_path):
    """Building it is made an error: every rank reads its own rows of the files."""
    code = (
        "from pretrain.models.causal_lm import Pretrained\n"
        "def build(*given, **more): raise AssertionError('the whole model')\n"
        "Pretrained.build = build\n"
        "from pretrain.cli.main import program\nprogram()"
    )
    given = [*arguments(base_arguments, exact_model("llama"), tmp_path), "max_steps=2"]
    for strategy, returncode in (("fsdp", 0), ("single", 1)):
        done = run_preloaded(["-c", code, *given, f"strategy={strategy}"])
        assert done.returncode == returncode, done.stderr
