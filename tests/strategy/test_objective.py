"""The terms that an objective adds to the loss: their gradients against plain autograd, and equal under every strategy."""

import copy

import pytest
import torch

from pretrain.data.batch import IGNORE
from pretrain.models.causal_lm import Pretrained
from pretrain.models.model_factory import ModelFactory
from pretrain.optim.adamw import AdamW
from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig
from pretrain.strategy.engine import InferenceEngine
from pretrain.strategy.objective import KlToBase, L2ToBase, Objective
from pretrain.strategy.single import Single
from pretrain.telemetry.sinks.jsonl import read_records
from tests.engines import ALONE, BATCH, FULL, engine_of, trained
from tests.runs import assert_same_run, kill_and_resume


def with_term(objective, name="llama", **more):
    """An engine that has moved away from its base by two steps, and a copy of the base."""
    engine = engine_of(name, **more)
    base = copy.deepcopy(engine.model)
    engine.term = objective.term(engine, lambda: InferenceEngine(copy.deepcopy(base), precision=FULL, world=ALONE))
    trained(engine)
    if engine.term is not None:
        engine.term.restart()
    return engine, base.eval()


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.model.hf_named_parameters()}


def plain_loss(engine):
    logits = engine.model.hf(input_ids=BATCH.input_ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), ignore_index=IGNORE), logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_kl_to_base(name):
    """Loss and gradient of CE + weight T² KL(base ‖ model) by autograd on full logits; the reported loss is the CE alone."""
    engine, base = with_term(KlToBase(weight=0.5, temperature=2.0), name)
    ce, logits = plain_loss(engine)
    with torch.no_grad():
        p = torch.log_softmax(base.hf(input_ids=BATCH.input_ids, use_cache=False).logits / 2, -1)
    kl = (p.exp() * (p - torch.log_softmax(logits / 2, -1))).sum(-1).mean()
    (ce + 0.5 * 4 * kl).backward()
    expected = gradients(engine)
    engine.optimizer.zero_grad(set_to_none=True)
    reported = engine.backward(BATCH, tokens=32, last=True)
    assert reported == pytest.approx(float(ce.detach()), rel=1e-6)
    assert engine.term.take(engine, 32) == pytest.approx(float(kl.detach()), rel=1e-4)
    for key, grad in gradients(engine).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-6, msg=key)


def test_l2_to_base():
    engine, base = with_term(L2ToBase(weight=0.5))
    before = {name: p.detach().clone() for name, p in base.hf_named_parameters()}
    plain_loss(engine)[0].backward()
    expected = {n: p.grad + 0.5 * (p.detach() - before[n]) for n, p in engine.model.hf_named_parameters()}
    distance = sum(((p.detach() - before[n]) ** 2).sum() for n, p in engine.model.hf_named_parameters()).sqrt()
    engine.optimizer.zero_grad(set_to_none=True)
    engine.backward(BATCH, tokens=32, last=True)
    engine.term.add_gradients(engine)
    assert engine.term.take(engine, 32) == pytest.approx(float(distance), rel=1e-5)
    for key, grad in gradients(engine).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_the_reference_is_frozen():
    engine, base = with_term(KlToBase())
    reference = engine.term._reference.model
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    for (_, now), (_, then) in zip(reference.hf_named_parameters(), base.hf_named_parameters(), strict=True):
        assert torch.equal(now, then)


def test_without_a_term():
    assert Objective().term(engine_of(), None) is None


def test_a_head_that_is_no_matrix_has_no_kl_term():
    engine = engine_of()
    engine.model.logits_map = None
    with pytest.raises(UserError, match=r"objective=kl_to_base: the head of LlamaForCausalLM is not a matrix alone"):
        KlToBase().term(engine, None)


def test_with_a_load_balancing_loss():
    """The gradient is that of the cross entropy with it, plus that of the divergence."""
    engine, _ = with_term(KlToBase(weight=0.5), "mixtral")
    found = {}
    for balancing in (0.0, 0.5):
        engine.model.balancing = balancing
        for term in (None, engine.term):
            engine.term, kept = term, engine.term
            engine.backward(BATCH, tokens=32, last=True)
            found[balancing, term is None] = gradients(engine)
            engine.optimizer.zero_grad(set_to_none=True)
            engine.term = kept
    for key, grad in found[0.5, False].items():
        pull = found[0.5, True][key] - found[0.0, True][key]
        torch.testing.assert_close(grad, found[0.0, False][key] + pull, rtol=1e-4, atol=1e-6, msg=key)
    assert any(not torch.equal(found[0.5, True][key], grad) for key, grad in found[0.0, True].items())


def test_a_base_model_in_bf16(exact_model):
    """Half the memory; the divergence differs by what bf16 rounds, which is far below what a run moves away from its base."""
    factory = ModelFactory(Pretrained(name_or_path=str(exact_model("llama"))), torch.float32, 0)
    step, found = StepConfig(FULL), {}
    for dtype in (None, "bfloat16"):
        objective = KlToBase(base_dtype=dtype)
        engine = Single().setup(factory, lambda m: AdamW(lr=1e-3)(m.hf_named_parameters()), step, ALONE)
        engine.term = objective.term(engine, lambda o=objective: o.reference(Single(), factory, step, ALONE))
        kept = {p.dtype for p in engine.term._reference.model.parameters()}
        assert kept == {torch.float32 if dtype is None else torch.bfloat16}
        values = []
        for _ in range(3):
            engine.backward(BATCH, tokens=32, last=True)
            engine.step(1.0)
            values.append(float(engine.term.take(engine, 32)))
        found[dtype] = values
    assert found[None][0] == 0
    assert 0 < found["bfloat16"][0] < 1e-4
    assert found["bfloat16"][1:] == pytest.approx(found[None][1:], rel=0.1, abs=1e-4)


def test_only_fsdp_keeps_the_base_model_on_the_host():
    objective = KlToBase(base_offload=True)
    with pytest.raises(UserError, match=r"objective.base_offload=true with strategy=single: only strategy=fsdp"):
        objective.reference(Single(), None, StepConfig(FULL), ALONE)


def test_one_graph_has_no_kl_term():
    engine = engine_of()
    engine.model._compiled = engine.model._loss
    with pytest.raises(UserError, match=r"objective=kl_to_base with model.compile=graph: .* use blocks"):
        KlToBase().term(engine, None)


STRATEGIES = {
    "ddp": ["strategy=ddp", "devices=2", "batch_size=2"],
    "fsdp": ["strategy=fsdp", "devices=2", "batch_size=2"],
    "stage0": ["strategy=deepspeed", "strategy.zero_stage=0", "devices=2", "batch_size=2"],
    "stage1": ["strategy=deepspeed", "strategy.zero_stage=1", "devices=2", "batch_size=2"],
    "stage2": ["strategy=deepspeed", "strategy.zero_stage=2", "devices=2", "batch_size=2"],
    "host2": [
        "strategy=deepspeed",
        "strategy.zero_stage=2",
        "strategy.offload_optimizer=true",
        "devices=2",
        "batch_size=2",
    ],
    "host3": [
        "strategy=deepspeed",
        "strategy.zero_stage=3",
        "strategy.offload_optimizer=true",
        "devices=2",
        "batch_size=2",
    ],
    "stage3": ["strategy=deepspeed", "strategy.zero_stage=3", "devices=2", "batch_size=2"],
    "dp": ["strategy=dp", "batch_size=4"],
}


@pytest.fixture
def run(base_arguments, exact_model, command, tmp_path):
    """``run(name, *words)``: the train records of a run of ten steps."""
    words = [w for w in base_arguments if not w.startswith("model_name=")]
    words += [f"model_name={exact_model('llama')}", "max_steps=10", "evaluate_every=5", "log_every=1", "sink=jsonl"]

    def start(name, *more):
        code, _, err = command([*words, f"output_dir={tmp_path / name}", *more])
        return code, err, tmp_path / name

    return start


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kl_to_base", "l2_to_base"])
def test_equal_under_every_strategy(objective, run):
    """Losses, norms and values of the term."""
    words = [f"objective={objective}", "objective.weight=0.5"]
    code, err, folder = run("single", *words, "strategy=single", "batch_size=4")
    assert code == 0, err
    expected = [r for r in read_records(folder / "metrics.jsonl") if r["event"] == "train"]
    assert expected[0][objective] == 0
    assert expected[-1][objective] > 0.001
    more = {"host": [*STRATEGIES["fsdp"], "objective.base_offload=true"]} if objective == "kl_to_base" else {}
    for name, strategy in (STRATEGIES | more).items():
        code, err, folder = run(name, *words, *strategy)
        assert code == 0, err
        found = [r for r in read_records(folder / "metrics.jsonl") if r["event"] == "train"]
        for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4), (objective, 1e-4)):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], abs=bound), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("objective", ["kl_to_base", "l2_to_base"])
def test_killed_and_resumed(objective, strategy, base_arguments, command, spawn, tmp_path):
    """Bit for bit; another weight on resume is refused."""
    words = [
        *base_arguments,
        "max_steps=20",
        "save_every=5",
        "log_every=1",
        f"objective={objective}",
        f"strategy={strategy}",
    ]
    words += ["batch_size=4"] if strategy == "single" else ["devices=2", "batch_size=2"]
    reference = tmp_path / "reference"
    code, _, err = command([*words, f"output_dir={reference}"])
    assert code == 0, err
    kill_and_resume(words, tmp_path / "killed", command, spawn, at=7)
    assert_same_run(tmp_path / "killed", reference)
    if (objective, strategy) == ("kl_to_base", "single"):
        code, _, err = command([*words, f"output_dir={reference}", "objective.weight=0.2"])
        assert code == 2
        assert "objective.weight: 0.1 → 0.2" in err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_levers_of_zero_are_resumed(stage, base_arguments, command, spawn, tmp_path):
    """The averages, the term and weights that thaw, bit for bit, also in bf16, whose weights are fp32 in the shards alone."""
    words = [*base_arguments, "max_steps=20", "save_every=5", "log_every=1", "strategy=deepspeed", "devices=2"]
    words += [
        f"strategy.zero_stage={stage}",
        "batch_size=2",
        "objective=l2_to_base",
        "hook=[ema]",
        "precision=bf16-mixed",
    ]
    words += ["transform=[freeze]", "transform.freeze.trainable=embed|norm", "transform.freeze.thaw_at=0.5"]
    reference = tmp_path / "reference"
    code, _, err = command([*words, f"output_dir={reference}"])
    assert code == 0, err
    assert [r["l2_to_base"] > 0 for r in read_records(reference / "metrics.jsonl") if r["event"] == "train"][-1]
    kill_and_resume(words, tmp_path / "killed", command, spawn, at=7)
    assert_same_run(tmp_path / "killed", reference)
