"""``batch_size=auto``: what it chooses, that choosing changes nothing, and that the run is the one with that number."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.optim.adafactor import Adafactor
from pretrain.optim.adamw import AdamW
from pretrain.run.folder import recorded_batch_size
from pretrain.run.leftovers import run_of
from pretrain.runtime.out_of_memory import OutOfMemory
from pretrain.strategy.engine import Engine
from pretrain.strategy.precision import Precision
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.batch_size import Trials, choose, largest, moment_bytes
from pretrain.training.ema import Ema
from pretrain.training.micro_batching import MicroBatching
from tests import optimizers
from tests.optimizers import matrices_and_rest, muon_and_adamw
from tests.runs import numbers

TOO_MANY = 2**40  # sequences, whose embeddings no address space holds


@pytest.mark.parametrize("total", [1, 7, 12, 64, 360])
def test_the_largest_is_found_without_trying_much_more(total):
    sizes = MicroBatching(1, total).sizes()
    for limit in range(total + 1):
        tried = []

        def fit(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        found = largest(sizes, fit)
        assert found == max((size for size in sizes if size <= limit), default=0)
        for size in tried:
            assert size == min(s for s in sizes if s >= min(size, 2 * found)), "further than twice what fits"
        assert len(tried) <= 2 * len(sizes).bit_length() + 1


@pytest.mark.parametrize("total", [1, 12, 64])
def test_a_plan_only_saves_trials(total):
    """Whatever it predicts, the result is the same; two trials are enough if it is right."""
    sizes = MicroBatching(1, total).sizes()
    for limit in range(total + 1):
        right = max((size for size in sizes if size <= limit), default=0)
        for first in (*sizes, None, total + 1):
            tried = []

            def fit(size, limit=limit, tried=tried):
                tried.append(size)
                return size <= limit

            assert largest(sizes, fit, first=first) == right
            assert len(tried) == len(set(tried))
            if first == right:
                assert len(tried) <= 2


@pytest.fixture
def engine(tiny_model):
    from pretrain.models.causal_lm import Pretrained

    def build(weights="float32"):
        precision = Precision("any", weights, weights)
        spec = Pretrained(name_or_path=str(tiny_model))
        model = spec.build(param_dtype=precision.param_dtype, device=torch.device("cpu"), seed=0)
        optimizer = AdamW(lr=1e-3)(model.hf_named_parameters())
        return Engine(model, optimizer, precision=precision, world=DistributedContext())

    return build


def rows(size: int) -> Batch:
    """``size`` sequences that need no memory themselves."""
    ids = torch.arange(16).expand(size, 16)
    return Batch(ids, ids, None, 16 * size)


def test_trials_leave_everything_as_it_was(engine):
    tried = engine()
    before = {name: weight.clone() for name, weight in tried.model.hf_state().items()}
    trials = Trials(tried, rows, moment_bytes=1000)
    assert trials.fit(4)
    assert not trials.fit(TOO_MANY)
    assert trials.failure.startswith("tried to allocate")
    assert trials.fit(8), "after a failure as before"
    assert all(torch.equal(weight, before[name]) for name, weight in tried.model.hf_state().items())
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    assert not tried.optimizer.state
    assert tried.model.training


def test_on_a_cpu_it_asks_before_it_tries(engine):
    """The kernel refuses nothing and kills; so what a size will take is worked out from the two before it."""
    asked = []

    def counted(size):
        asked.append(size)
        return rows(size)

    trials = Trials(engine(), counted, moment_bytes=0, room=2**30)
    for size in (512, 1024):
        assert trials.fit(size)
    needed = trials.seen[1]
    assert needed > 2**20
    trials.room = int(1.5 * needed)
    assert not trials.fit(2048)
    assert trials.failure.startswith("needs ")
    assert asked == [512, 1024], "2048 must not have been tried"


def test_moments_need_their_room(engine):
    trials = Trials(engine(), rows, moment_bytes=2**30, room=2**30)
    assert not trials.fit(1)
    assert trials.failure == "needs 1.0 GiB of 1.0 GiB available"


def test_not_even_one_fits(engine):
    with pytest.raises(OutOfMemory, match="tried to allocate") as raised:
        choose(engine(), lambda size: rows(TOO_MANY), total=4, sequence_length=16, moment_bytes=0)
    assert raised.value.doing == "step"


def test_more_than_fits(engine):
    def growing(size):
        return rows(size if size < 8 else TOO_MANY)

    split, why = choose(engine(), growing, total=24, sequence_length=16, moment_bytes=0)
    assert split == MicroBatching(6, 4)
    assert why.startswith("larger ones do not fit: tried to allocate")


def test_more_than_helps_on_a_cpu(engine):
    tried, why = choose(engine(), rows, total=16, sequence_length=4096, moment_bytes=0)
    assert (tried, why) == (MicroBatching(2, 8), "larger ones are no faster on a CPU")
    assert choose(engine(), rows, total=16, sequence_length=16, moment_bytes=0) == (
        MicroBatching(16, 1),
        "all in one micro-batch",
    )


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_moments_are_what_the_optimizer_makes(weights, engine):
    """AdamW's two, and in bf16 the compensation beside them."""
    used = engine(weights)
    expected = moment_bytes(AdamW(lr=1e-3), used.model)
    used.backward(rows(2), tokens=32, last=True)
    used.step(None)
    kept = [value for state in used.optimizer.state.values() for value in state.values()]
    assert expected == pytest.approx(sum(v.numel() * v.element_size() for v in kept), rel=0.01)


def test_the_moments_of_several_optimizers(engine):
    """Muon has one moment of each hidden matrix, AdamW two of the rest and a counter."""
    model = engine().model
    hidden = sum(p.numel() for p in matrices_and_rest(model.hf_named_parameters())[0])
    rest = matrices_and_rest(model.hf_named_parameters())[1]
    expected = 4 * hidden + sum(8 * p.numel() + 4 for p in rest)
    assert moment_bytes(muon_and_adamw, model) == expected


@pytest.mark.parametrize(
    ("optimizer", "of_matrix", "of_vector"),
    [
        (Adafactor(lr=1e-2), 4 * (1024 + 4800) + 4, 4 * 4800 + 4),
        (AdamW(lr=1e-3, moments_dtype="int8"), (2 + 8 / 64) * 1024 * 4800 + 4, 8 * 4800 + 4),
        (AdamW(lr=1e-3, moments_dtype="bfloat16"), 4 * 1024 * 4800 + 4, 4 * 4800 + 4),
        (optimizers.row_wise, 4 * 1024 + 4, 4 + 4),
        (optimizers.factored_plain, 4 * (1024 + 4800), None),
        (optimizers.of_the_shard, (4 + 1 + 4 / 16) * 1024 * 4800 + 4, (4 + 1 + 4 / 16) * 4800 + 4),
    ],
    ids=["adafactor", "int8", "bfloat16", "row_wise", "factored", "of_the_shard"],
)
def test_state_that_is_smaller_than_its_parameter(optimizer, of_matrix, of_vector):
    """Of rows, of columns, and of blocks of 64 elements, because 4,800 = 75 × 64."""
    named = {"up.weight": torch.nn.Parameter(torch.empty(1024, 4800, device="meta"))}
    expected = of_matrix
    if of_vector is not None:
        named["norm.weight"] = torch.nn.Parameter(torch.empty(4800, device="meta"))
        expected += of_vector
    model = SimpleNamespace(hf_named_parameters=named.items)
    assert moment_bytes(optimizer, model) == pytest.approx(expected, rel=1e-6)


AUTO = ["batch_size=auto", "gradient_accumulation_steps=4"]


def test_the_state_of_hooks_is_in_memory_in_every_trial(base_arguments, command, tmp_path, monkeypatch):
    order, setup, fit = [], Ema.setup, Trials.fit
    monkeypatch.setattr(Ema, "setup", lambda self, engine: (order.append("setup"), setup(self, engine))[1])
    monkeypatch.setattr(Trials, "fit", lambda self, size: (order.append("trial"), fit(self, size))[1])
    code, _, err = command([*base_arguments, *AUTO, "hook=[ema]", "max_steps=1", f"output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    assert order[:2] == ["setup", "trial"]
    assert order.count("setup") == 1


SAME = ["batch_size=4", "gradient_accumulation_steps=1"]


def test_auto_is_the_run_with_that_number(base_arguments, command, tmp_path):
    """To the last bit, with dropout, over stops and changes from auto to the number and back."""
    common = [*base_arguments, "scheduler=constant", "warmup_proportion=0", "evaluate_every=null", "sink=jsonl"]

    def go_on(run, steps, split):
        code, _, said = command([*common, *split, f"max_steps={steps}", f"output_dir={run}"])
        assert code == 0, said
        return said

    def trained(run):
        return [record for record in numbers(run) if record["event"] == "train"]

    go_on(tmp_path / "same", 10, SAME)
    run = tmp_path / "auto"
    assert "batch_size=auto: batch_size=4 gradient_accumulation_steps=1 (all in one micro-batch)" in go_on(run, 4, AUTO)
    assert read_run_file(run)["batch_size"] == 4
    go_on(run, 7, SAME)
    go_on(run, 10, AUTO)
    assert trained(run) == trained(tmp_path / "same")

    go_on(run, 11, ["batch_size=2", "gradient_accumulation_steps=2"])
    said = go_on(run, 12, AUTO)
    assert "batch_size=auto: batch_size=2 gradient_accumulation_steps=2 (as in this run so far)" in said


def test_a_mixture_whose_first_part_is_small(base_arguments, corpus, command, tmp_path):
    """It has fewer sequences than are tried at once."""
    (tmp_path / "small").mkdir()
    for number in range(2):
        (tmp_path / f"small/{number}.txt").write_text((corpus / f"{number:02}.txt").read_text()[:60])
    places = {"a": tmp_path / "small", "b": corpus}
    mixture = [word for word in base_arguments if not word.startswith("dataset")] + ["dataset=mixture"]
    for name, place in places.items():
        mixture += [f"dataset@dataset.parts.{name}=local", f"dataset.parts.{name}.nameOrPath={place}"]
    more = [*AUTO, "~evaluation.domains.base", "dataset.parts.a.held_out=0", "max_steps=1", "sink=jsonl"]
    code, _, said = command([*mixture, *more, f"output_dir={tmp_path / 'run'}"])
    assert code == 0, said
    assert "batch_size=auto: batch_size=4 " in said


def test_two_processes(base_arguments, exact_model, command, tmp_path):
    """Each finds its own, and they agree; the losses are those of one process."""
    common = [*base_arguments, f"model_name={exact_model('llama')}", "max_steps=5", "sink=jsonl"]
    losses = []
    for name, more in (
        ("one", SAME),
        ("two", [*AUTO[:1], "gradient_accumulation_steps=2", "strategy=ddp", "devices=2"]),
    ):
        run = tmp_path / name
        code, _, said = command([*common, *more, f"output_dir={run}"])
        assert code == 0, said
        losses.append([r["loss"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"])
    assert read_run_file(run)["batch_size"] == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_ranks_that_need_each_other_can_not_try(strategy, base_arguments, command, tmp_path):
    code, _, said = command([*base_arguments, *AUTO, f"strategy={strategy}", f"output_dir={tmp_path}"])
    assert code == 2
    assert f"batch_size=auto with strategy={strategy}: its ranks need each other" in said


def test_an_evaluation_alone_needs_a_number(base_arguments, command, tmp_path):
    alone = [*base_arguments, "task=evaluation", f"output_dir={tmp_path}"]
    code, _, said = command([*alone, "batch_size=auto", "evaluation.batch_size=${batch_size}"])
    assert code == 2
    assert "evaluation.batch_size=auto is the batch_size of a training run; this task needs a number" in said
    code, _, said = command([*alone, "batch_size=auto", "evaluation.batch_size=4", "sink=jsonl"])
    assert code == 0, said


def test_the_record_counts_on_the_same_kind_of_device(tmp_path):
    checkpoint = tmp_path / "checkpoints/step-00000005"
    assert recorded_batch_size(checkpoint, device="cpu") is None
    (tmp_path / "run.json").write_text('{"batch_size": 4, "device": "cpu"}')
    assert recorded_batch_size(checkpoint, device="cpu") == 4
    assert recorded_batch_size(checkpoint, device="NVIDIA H100") is None
    assert recorded_batch_size(None, device="cpu") is None


def test_the_record_is_found_from_within_the_checkpoints_folder(tmp_path, monkeypatch):
    """``resume=step-00000005``, typed there, has no folder in front of it."""
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    (tmp_path / "run.json").write_text('{"batch_size": 4, "device": "cpu"}')
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert recorded_batch_size(Path("step-00000005"), device="cpu") == 4
    assert run_of(Path("/step-00000005")) == Path("/")
