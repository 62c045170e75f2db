"""Optimizers of any class: four steps, a checkpoint, a new engine and four more steps equal eight, to the last bit; and a
checkpoint of one process or strategy is that of another, where its state can be resharded."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.checkpoint.store import load
from pretrain.models.causal_lm import Pretrained
from pretrain.models.model_factory import ModelFactory
from pretrain.runtime.errors import ReplicasDiffer, UserError
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single
from pretrain.training.guard.replicas import check_replicas
from tests.conftest import SHAPES
from tests.engines import ALONE
from tests.group import together
from tests.strategy.optimizer_states import (
    CELLS,
    MADE,
    MORE,
    PER_RANK,
    SHARDED,
    bits,
    continues,
    cosine,
    differences,
    engine_of,
    loaded,
    refusal,
    save,
    trained,
)
from tests.strategy.ranks import set_up


def of_two_ranks(world, factory, folder, cells) -> dict:
    found = {}
    for name, strategy in cells:
        found[name, strategy] = continues(strategy, name, factory, world, folder / f"{strategy} {name}")
        if strategy == SHARDED:
            engine = engine_of(SHARDED, name, factory, world)
            try:
                save(loaded(engine, folder / f"single {name}"), folder / f"again {name}")
            except UserError as error:
                found[name, "from one process"] = str(error)
        if (name, strategy) == ("of_the_shard", SHARDED):
            engine = engine_of("ddp", name, factory, world)
            found["another strategy"] = refusal(
                lambda engine=engine: loaded(engine, folder / f"{SHARDED} of_the_shard")
            )
    if ("of_the_shard", SHARDED) in cells:
        for kind in (torch.optim.Adafactor, torch.optim.Rprop):
            found[kind.__name__] = refusal(
                lambda kind=kind: set_up(Fsdp(), factory, world, optimizer=lambda named: kind([p for _, p in named]))
            )
    if ("scalars", "ddp") in cells:
        found["orders"] = of_another_order(trained(engine_of("ddp", "scalars", factory, world), 0, 4))
    return found


def of_another_order(engine) -> dict:
    """What is found in state that rank 1 keeps in the reverse order."""
    found, weights = {}, dict(engine.model.hf_named_parameters())
    for p, state in engine.optimizer.state.items() if engine.world.rank else ():
        engine.optimizer.state[p] = dict(reversed(state.items()))
    state = engine.optimizer.state[weights["model.norm.weight"]]
    state["decay"] = math.nan
    found["nan"] = engine.state_dict()["optimizer_values"]["state"]["model.norm.weight/decay"]
    check_replicas(engine, 4)
    weights["model.norm.weight"].data[3] += engine.world.rank
    with pytest.raises(ReplicasDiffer) as refused:
        check_replicas(engine, 4)
    found["differ"] = str(refused.value).partition(":")[2].partition(":")[0]
    state["decay"] = 1.0 + engine.world.rank
    found["values differ"] = refusal(engine.state_dict)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    """Of a model of one block, in fp32."""
    special = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES["llama-tied"] | special)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return ModelFactory(Pretrained(name_or_path=str(path)), torch.float32, 0)


@pytest.fixture(scope="module")
def of_one(folder, factory):
    return {name: continues("single", name, factory, ALONE, folder / f"single {name}") for name in MADE}


@pytest.fixture(scope="module")
def of_two(folder, factory, of_one):
    return together(of_two_ranks, factory, folder, CELLS, folder=folder)


@pytest.fixture(scope="module")
def of_two_more(folder, factory, of_one):
    (folder / "more").mkdir()
    return together(of_two_ranks, factory, folder, MORE, folder=folder / "more")


@pytest.mark.parametrize("name", MADE)
def test_one_process_continues_to_the_last_bit(name, of_one):
    assert of_one[name] == []


@pytest.mark.parametrize(("name", "strategy"), CELLS)
def test_two_processes_continue_to_the_last_bit(name, strategy, of_two):
    assert [of_rank[name, strategy] for of_rank in of_two] == [[], []]


def test_optimizers_that_cannot_update_shards_are_refused_before_the_start(of_two):
    for of_rank in of_two:
        assert of_rank["Adafactor"] == (
            "optimizer: torch.optim.Adafactor can't update parameters that are sharded as DTensors; optimizer=adafactor can, "
            "and so can strategy=single and strategy=ddp"
        )
        assert of_rank["Rprop"].startswith("optimizer: torch.optim.Rprop can't update parameters that are sharded")


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_cannot_train_a_language_model_are_refused_before_the_start(kind, factory):
    made = refusal(lambda: set_up(Single(), factory, ALONE, optimizer=lambda named: kind([p for _, p in named])))
    assert made.startswith(f"optimizer: torch.optim.{kind.__name__} ")


def test_ranks_that_keep_their_state_in_another_order_are_compared(of_two):
    for of_rank in of_two:
        found = of_rank["orders"]
        assert math.isnan(found["nan"]), "NaN is the same as NaN"
        assert found["differ"] == " rank 1 has other numbers than rank 0 in model.norm.weight"
        assert found["values differ"] == (
            "the plain values in the optimizer's state differ between ranks and can't be saved"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), MORE)
def test_two_processes_continue_under_every_strategy(name, strategy, of_two_more):
    assert [of_rank[name, strategy] for of_rank in of_two_more] == [[], []]


def tensors_in(folder) -> dict:
    engine = load(folder / "step-00000004")["engine"]
    read = {f"{kind}:{n}": engine[kind].read(n) for kind in ("model", "optimizer") for n in sorted(engine[kind].keys())}
    return read | {"values": engine["optimizer_values"]}


def check_resharding(name, folder, factory):
    """One process reads what two have sharded, and they what it has saved: no bit is another."""
    sharded = tensors_in(folder / f"{SHARDED} {name}")
    engine = loaded(engine_of("single", name, factory, ALONE), folder / f"{SHARDED} {name}")
    assert differences({n: t for n, t in bits(engine).items() if not n.startswith("own:")}, sharded) == []
    assert differences(tensors_in(folder / f"again {name}"), tensors_in(folder / f"single {name}")) == []


def resharded(cells) -> list[str]:
    return [name for name, strategy in cells if strategy == SHARDED and name not in PER_RANK]


@pytest.mark.parametrize("name", resharded(CELLS))
def test_it_is_resharded(name, of_two, folder, factory):
    check_resharding(name, folder, factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", resharded(MORE))
def test_more_is_resharded(name, of_two_more, folder, factory):
    check_resharding(name, folder, factory)


def test_state_of_the_local_shard_is_saved_by_each_rank(of_two, folder):
    saved = load(folder / f"{SHARDED} of_the_shard/step-00000004")["engine"]["optimizer"]
    whole = load(folder / "single of_the_shard/step-00000004")["engine"]["optimizer"]
    for key in ("moment", "codes", "norm"):
        parts = [saved.shape(f"rank-{rank}-of-2/model.embed_tokens.weight/{key}") for rank in (0, 1)]
        shape = whole.shape(f"model.embed_tokens.weight/{key}")
        assert parts == [(shape[0] // 2, *shape[1:])] * 2 if shape else [(), ()], key
    replicated = load(folder / "NO_SHARD of_the_shard/step-00000004")["engine"]["optimizer"]
    assert not any(name.startswith("rank-") for name in sorted(replicated.keys()))


def test_it_needs_the_same_number_of_processes_and_says_so(of_two, folder, factory):
    engine = engine_of("single", "of_the_shard", factory, ALONE)
    with pytest.raises(UserError) as refused:
        loaded(engine, folder / f"{SHARDED} of_the_shard")
    assert str(refused.value) == (
        "model.embed_tokens.weight/codes was saved by each of 2 processes for itself and can't be resharded (this run has "
        "1); resume with the strategy and the number of processes of before, or start a new run from the checkpoint's "
        "weights (model_name=<checkpoint>)"
    )
    for of_rank in of_two:
        assert of_rank["another strategy"] == (
            "model.embed_tokens.weight/codes was saved for this process's shards, which are others now; resume with the "
            "strategy and the number of processes of before, or start a new run from the checkpoint's weights "
            "(model_name=<checkpoint>)"
        )
        assert of_rank["of_the_shard", "from one process"].endswith(
            "here; resume with the strategy and the number of processes of before, or start a new run from the "
            "checkpoint's weights (model_name=<checkpoint>)"
        )


def test_plain_values_and_groups(of_one, folder):
    found = json.loads((folder / "single scalars/step-00000004/state.json").read_text())["optimizer_values"]
    norm = {key: found["state"][f"model.norm.weight/{key}"] for key in ("count", "decay", "phase", "history")}
    assert norm == {"count": 4, "decay": 1 / (1 + 4 / 3), "phase": "even", "history": [1, 2, 3, 4]}
    assert [set(group) for group in found["groups"]] == [{"warm"}]
    for name in ("groups", "muon_and_adamw", "adagrad"):
        assert "optimizer_values" not in json.loads((folder / f"single {name}/step-00000004/state.json").read_text())


def test_an_empty_dict_that_came_late_is_there_again(factory, folder):
    """The first update makes ``early``, which is filled later, and does not make ``late``."""

    def kept(engine):
        return engine.optimizer.state[dict(engine.model.hf_named_parameters())["model.norm.weight"]]

    def with_early():
        engine = engine_of("single", "row_wise", factory, ALONE)
        step = engine.optimizer.step

        def step_with_early(*given):
            step(*given)
            kept(engine).setdefault("early", {})

        engine.optimizer.step = step_with_early
        return engine

    made = trained(with_early(), 0, 4)
    kept(made).update({"late": {}, "deep": {"er": {}, "count": 2}, "early": {"sum": torch.ones(2)}})
    save(made, folder / "late")
    found = kept(loaded(with_early(), folder / "late"))
    assert (found["late"], found["deep"]) == ({}, {"er": {}, "count": 2})
    assert found["early"]["sum"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda o, p: o.state[p].update(inner=[torch.ones(2)]),
            "optimizer state model.norm.weight/inner can't be saved in a checkpoint: a Tensor in a list is not JSON",
        ),
        (
            lambda o, p: o.state["total"].update(step=1),
            "optimizer state total can't be saved in a checkpoint: it belongs to no parameter",
        ),
        (
            lambda o, p: o.param_groups[0].update(d=torch.ones(())),
            "optimizer state value 'd' of a parameter group can't be saved in a checkpoint: a Tensor is not JSON",
        ),
        (
            lambda o, p: o.state[p].update({"acc": {0: torch.ones(2)}}),
            "optimizer state model.norm.weight/acc can't be saved in a checkpoint: its key 0 is not a string without '/'",
        ),
        (
            lambda o, p: o.state[p].update({"acc/slow": 1}),
            "optimizer state model.norm.weight can't be saved in a checkpoint: its key 'acc/slow' is not a string without '/'",
        ),
    ],
    ids=["tensors in a list", "of no parameter", "a tensor in a group", "a number as key", "a path as key"],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(change, says, factory):
    engine = trained(engine_of("single", "row_wise", factory, ALONE), 0, 1)
    change(engine.optimizer, dict(engine.model.hf_named_parameters())["model.norm.weight"])
    assert refusal(engine.state_dict) == says


def test_another_optimizers_state_is_refused(of_one, folder, factory):
    engine = engine_of("single", "factored", factory, ALONE)
    assert refusal(lambda: loaded(engine, folder / "single row_wise")) == (
        "optimizer state model.embed_tokens.weight/column is not in the checkpoint, whose optimizer had other settings; "
        "resume with those, or start a new run from the checkpoint's weights (model_name=<checkpoint>)"
    )


def test_state_that_is_created_late_is_restored_in_its_place_and_in_one_order(factory, tmp_path):
    def state_of(engine):
        return engine.optimizer.state[dict(engine.model.hf_named_parameters())["model.norm.weight"]]

    engine = trained(engine_of("single", "row_wise", factory, ALONE), 0, 1)
    late = {f"late {i}": torch.tensor([i]) for i in range(12)}
    state_of(engine).update(late, acc={"fast": {"mean": torch.ones(2), "hits": 3}, "slow": torch.zeros(2)})
    save(engine, tmp_path)
    again = state_of(loaded(engine_of("single", "row_wise", factory, ALONE), tmp_path))
    assert list(again) == ["step", "row", "acc", *sorted(late)]
    assert again["acc"]["fast"]["mean"].tolist() == [1, 1]
    assert again["acc"]["fast"]["hits"] == 3
    assert again["acc"]["slow"].tolist() == [0, 0]
    assert [again[name].item() for name in late] == list(range(12))


def test_a_value_and_values_in_it_are_refused(of_one, folder, factory):
    state = load(folder / "single row_wise/step-00000004")["engine"]
    state["optimizer_values"] = {"state": {"model.norm.weight/row/slow": 1}}
    engine = engine_of("single", "row_wise", factory, ALONE)
    assert refusal(lambda: engine.load_state_dict(state)) == (
        "optimizer state model.norm.weight/row is in the checkpoint, and model.norm.weight/row/slow in it"
    )


@pytest.mark.parametrize("key", ["params", "schedule", "lr", "initial_lr", "param_names", "own", "unknown"])
def test_a_checkpoint_sets_no_other_values_of_a_group_than_the_optimizer_changes(key, of_one, folder, factory):
    state = load(folder / "single scalars/step-00000004")["engine"]
    state["optimizer_values"]["groups"] = [{"warm": 0.75, key: []}]
    engine = engine_of("single", "scalars", factory, ALONE)
    engine.optimizer.param_groups[0]["own"] = callable
    before = dict(engine.optimizer.param_groups[0])
    assert refusal(lambda: engine.load_state_dict(state)) == (
        f"the checkpoint sets {key!r} of the optimizer's parameter group 0, which is no value that this run's optimizer "
        "changes; resume with the optimizer of before, or start a new run from the checkpoint's weights "
        "(model_name=<checkpoint>)"
    )
    after = engine.optimizer.param_groups[0]
    assert after["params"] is before["params"]
    assert {k: v for k, v in after.items() if k not in ("params", "warm")} == {
        k: v for k, v in before.items() if k not in ("params", "warm")
    }


def test_rates_and_schedules_of_groups(factory):
    engine = engine_of("single", "groups", factory, ALONE)
    assert engine.set_lr(cosine, 8) == pytest.approx(1e-2 * 0.5)
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([1e-2 * 0.5, 1e-3 / 9])
