"""`hook=[ema]`: the averages against a plain computation, exact after a resume, scored beside the weights and exported."""

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config.compose import run_config
from pretrain.data.batch import Batch
from pretrain.distributed import sharding as tensors
from pretrain.models.causal_lm import Pretrained
from pretrain.models.model_factory import ModelFactory
from pretrain.optim.adamw import AdamW
from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.deepspeed import Deepspeed
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.replaced import replaced_weights
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.ema import Ema
from tests.engines import engine_of, same, trained
from tests.group import together
from tests.loops import loop_in
from tests.strategy.test_precision import load


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.hf_named_parameters()}


@pytest.mark.parametrize("warmup", [False, True])
def test_the_values(warmup):
    engine, hook = engine_of(), Ema(decays=[0.5, 0.9], warmup=warmup)
    hook.setup(engine)
    expected = {decay: weights(engine) for decay in hook.decays}
    for update in (1, 2, 3):
        trained(engine, steps=1)
        hook.after_step(None, engine)
        for decay, average in expected.items():
            used = min(decay, (1 + update) / (10 + update)) if warmup else decay
            now = weights(engine)
            expected[decay] = {name: used * old + (1 - used) * now[name] for name, old in average.items()}
    averages = hook.averages("evaluate")
    assert list(averages) == ["ema_0.5", "ema_0.9"]
    for decay, average in expected.items():
        for name, tensor in average.items():
            torch.testing.assert_close(averages[f"ema_{decay:g}"][name], tensor)


def test_a_resume_is_exact(tmp_path):
    loop, whole, resumed = loop_in(tmp_path), Ema(), Ema()
    trainer, _, _ = loop(hooks={"ema": whole}, exporter=None)
    trainer.run()
    checkpoint = trainer.checkpoints.writer.store.path(2)
    loop(hooks={"ema": resumed}, exporter=None, resume_from=checkpoint)[0].run()
    for name, average in whole.averages("export").items():
        assert same(average, resumed.averages("export")[name])
        assert not same(average, weights(trainer.engine))


def test_other_weights_for_a_while():
    engine = engine_of()
    own, other = weights(engine), {name: p.double() * 2 for name, p in weights(engine).items()}
    with pytest.raises(RuntimeError, match="inside"), replaced_weights(engine, other):
        assert same(weights(engine), {name: 2 * p for name, p in own.items()})
        raise RuntimeError("inside")
    assert same(weights(engine), own), "to the last bit, also after an error"


def test_a_run_scores_and_exports_them(base_arguments, command, tmp_path):
    words = ["hook=[ema]", "hook.ema.decays=[0.9]", "max_steps=4", "evaluate_every=2", "save_every=null"]
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert command([*base_arguments, *words[2:], f"output_dir={plain}"])[0] == 0
    code, _, err = command([*base_arguments, *words, f"output_dir={run}"])
    assert code == 0, err
    scores = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"]
    keys = ("step", "domain", "loss", "delta_loss")
    of_plain = [r for r in read_records(plain / "metrics.jsonl") if r["event"] == "evaluation"]
    assert [[r[k] for k in keys] for r in scores] == [[r[k] for k in keys] for r in of_plain], "nothing else changes"
    assert same(load_file(run / "model/model.safetensors"), load_file(plain / "model/model.safetensors"))
    metrics = {(r["step"], r["domain"]): r for r in read_records(run / "metrics.jsonl") if r["event"] == "metric"}
    assert metrics.keys() == {(r["step"], r["domain"]) for r in scores if r["step"]}
    assert {r["name"] for r in metrics.values()} == {"ema_0.9_loss"}
    average = load_file(run / "averages/ema_0.9/model.safetensors")
    saved = load_file(run / "checkpoints/step-00000004/hook.safetensors")
    assert same({f"ema/ema_0.9/{name}": t for name, t in average.items()}, saved)
    assert "The weights are the average ema_0.9." in (run / "averages/ema_0.9/README.md").read_text()
    scored = ["task=evaluation", f"model_name={run / 'averages/ema_0.9'}", f"output_dir={tmp_path / 'scored'}"]
    assert command([*base_arguments[1:], *scored])[0] == 0
    again = [r for r in read_records(tmp_path / "scored/metrics.jsonl") if r["event"] == "evaluation"]
    assert {r["domain"]: r["loss"] for r in again} == pytest.approx(
        {domain: r["value"] for (step, domain), r in metrics.items() if step == 4}, rel=1e-6
    )


def test_what_it_refuses():
    with pytest.raises(UserError, match=r"hook.ema.decays=\[0.9, 0.9\]: each decay may be there once"):
        Ema(decays=[0.9, 0.9]).setup(engine_of())
    with pytest.raises(UserError, match=r"hook.ema.decays=\[1.0\]: input should be less than 1"):
        run_config(["hook=[ema]", "hook.ema.decays=[1.0]"])


def on_ranks(world, model, strategy, batch, folder):
    """The average after two steps, and the weights while it is in their place."""
    factory = ModelFactory(Pretrained(name_or_path=str(model)), torch.float32, 0)
    step = StepConfig(load("32-true"), batch_size=2 // world.size, accumulation=1, grad_clip=0.5)
    engine = strategy.setup(factory, lambda m: AdamW(lr=1e-2)(m.hf_named_parameters()), step, world)
    hook, mine = Ema(decays=[0.9]), Batch(*(t[world.rank : world.rank + 1] for t in batch[:2]), None, 16)
    hook.setup(engine)
    for _ in range(2):
        engine.train_step(mine)
        hook.after_step(None, engine)
    saved = hook.state_dict()
    average = {name: tensors.full_tensor(saved[f"ema_0.9/{name}"]) for name, _ in engine.full_weights()}
    kept = {name: part.clone() for name, part in hook.averages("export")["ema_0.9"].items()}
    hook.load_state_dict(saved)
    again = same(
        {n: tensors.local(t) for n, t in hook.averages("export")["ema_0.9"].items()},
        {n: tensors.local(t) for n, t in kept.items()},
    )
    before = {name: t.clone() for name, t in engine.full_weights()}
    with replaced_weights(engine, hook.averages("export")["ema_0.9"]):
        inside = {name: t.clone() for name, t in engine.full_weights()}
    restored = same(before, dict(engine.full_weights()))
    return same(average, inside), restored, again, {n: t.numpy() for n, t in average.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        Ddp(),
        Fsdp(),
        Fsdp(sharding_strategy="NO_SHARD"),
        *(Deepspeed(zero_stage=stage) for stage in (0, 1, 2, 3)),
        Deepspeed(zero_stage=2, offload_optimizer=True),
        Deepspeed(zero_stage=3, offload_optimizer=True, offload_parameters=True),
    ],
    ids=["ddp", "fsdp", "copies", "stage0", "stage1", "stage2", "stage3", "stage2-host", "stage3-host"],
)
def test_on_two_ranks(strategy, tmp_path, exact_model):
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    given = (exact_model("llama-tied"), strategy, (ids[:, :-1], ids[:, 1:]), tmp_path)
    found = together(on_ranks, *given, folder=tmp_path)
    expected = _alone(exact_model("llama-tied"), ids)
    for *held, average in found:
        assert held == [True, True, True], "replaced, restored, saved and loaded"
        for name, tensor in expected.items():
            torch.testing.assert_close(torch.from_numpy(average[name]), tensor, rtol=1e-4, atol=1e-5)


def _alone(model, ids):
    from pretrain.distributed.context import DistributedContext
    from pretrain.strategy.single import Single

    factory = ModelFactory(Pretrained(name_or_path=str(model)), torch.float32, 0)
    step = StepConfig(load("32-true"), batch_size=2, accumulation=1, grad_clip=0.5)
    engine = Single().setup(factory, lambda m: AdamW(lr=1e-2)(m.hf_named_parameters()), step, DistributedContext())
    hook = Ema(decays=[0.9])
    hook.setup(engine)
    for _ in range(2):
        engine.train_step(Batch(ids[:, :-1], ids[:, 1:], None, 32))
        hook.after_step(None, engine)
    return hook.averages("export")["ema_0.9"]
