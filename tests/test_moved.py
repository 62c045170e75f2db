"""Where a model, a tokenizer or data lie is no part of a run's identity: content is. What a checkpoint holds need not exist
elsewhere."""

import shutil

import pytest

from tests.cli.test_cli import assert_mistake
from tests.damage import as_format_3, edit_state


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def begun(model, base_arguments, command, tmp_path):
    """Arguments of a run that has come to step 10 of 20, but for its model."""
    rest = [*base_arguments[1:], f"output_dir={tmp_path / 'run'}"]
    code, _, err = command([f"model_name={model}", *rest, "max_steps=10", "checkpoint.export=never"])
    assert code == 0, err
    return rest


def test_a_model_typed_otherwise_is_the_same(model, begun, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)

    def is_finished(typed):
        code, _, err = command([f"model_name={typed}", *begun, "max_steps=10", "checkpoint.export=never"])
        assert code == 0, err
        assert "is finished: 10 steps" in err

    for typed in (f"{model}/", f"{model}/.", "./model", "link"):
        is_finished(typed)
    moved = model.rename(tmp_path / "elsewhere")
    is_finished(moved)
    code, out, err = command([f"model_name={moved}", *begun, "max_steps=12"])
    assert code == 0, err
    assert "continues at step 10 of 12" in out


def test_another_model_at_the_same_place_is_another(model, exact_model, begun, command):
    shutil.rmtree(model)
    shutil.copytree(exact_model("llama"), model)
    assert_mistake(command([f"model_name={model}", *begun, "max_steps=20"]), "can't be continued with other settings: ")


def test_data_that_was_moved_is_the_same(corpus, other_corpus, begun, model, command, tmp_path):
    new = {
        str(corpus): shutil.copytree(corpus, tmp_path / "c"),
        str(other_corpus): shutil.copytree(other_corpus, tmp_path / "o"),
    }
    moved = [f"{a.partition('=')[0]}={new[v]}" if (v := a.partition("=")[2]) in new else a for a in begun]
    assert moved != begun
    code, out, err = command([f"model_name={model}", *moved, "max_steps=12"])
    assert code == 0, err
    assert "continues at step 10 of 12" in out


@pytest.mark.parametrize("how", ["as it was", "scratch", "own tokenizer", "only its weights"])
def test_a_run_continues_without_its_base_model(how, tiny_model, base_arguments, command, tmp_path):
    """To the bit: as where the folder is still there."""
    model, tokenizer = (shutil.copytree(tiny_model, tmp_path / name) for name in ("model", "tokenizer"))
    more = {"scratch": ["model=scratch"], "own tokenizer": [f"model.tokenizer_name={tokenizer}"]}.get(how, [])
    given = [f"model_name={model}", *base_arguments[1:], *more, "scheduler=constant"]
    for name in ("whole", "run"):
        if name == "run":
            code, _, err = command([*given, "max_steps=10", "checkpoint.export=never", f"output_dir={tmp_path / name}"])
            assert code == 0, err
            shutil.rmtree(tokenizer)
            shutil.rmtree(model) if how != "only its weights" else (model / "model.safetensors").unlink()
        code, out, err = command([*given, f"output_dir={tmp_path / name}"])
        assert code == 0, err
    assert "continues at step 10 of 20" in out
    assert (
        err.count(f"model_name={model} no longer exists: the run continues with the model in {tmp_path / 'run'}") == 1
    )
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_a_model_that_is_gone_begins_no_other_run(model, begun, command, tmp_path):
    """Only the run that began with it may continue without it; and another name that leads nowhere is a mistake."""
    gone = f"model_name={model}: no such folder"
    shutil.rmtree(model)
    assert_mistake(command([f"model_name={model}", *begun, "resume=never"]), gone)
    assert_mistake(command([f"model_name={model}", *begun, f"output_dir={tmp_path / 'other'}"]), gone)
    typo = f"model_name={tmp_path}/typo: no such folder or model; {tmp_path / 'run'}/checkpoints/step-00000010 was trained with"
    assert_mistake(
        command([f"model_name={tmp_path}/typo", *begun]), f"{typo} model_name={model}: with this name the run"
    )
    assert_mistake(command(["task=evaluation", f"model_name={model}", *begun]), gone)


def test_the_identity_of_earlier_checkpoints_is_known(model, begun, command, tmp_path):
    """They are of format 3, and have the name in front of the content."""
    newest = tmp_path / "run/checkpoints/step-00000010"
    edit_state(lambda s: s["identity"].update(model=f"models/m@None {s['identity']['model']}"))(newest)
    as_format_3(newest)
    code, out, err = command([f"model_name={model}", *begun, "max_steps=12"])
    assert code == 0, err
    assert "continues at step 10 of 12" in out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed strategy.zero_stage=3"])
def test_two_processes_continue_without_their_base_model(strategy, tiny_model, base_arguments, spawn, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    given = [f"model_name={model}", *base_arguments[1:], *f"strategy={strategy}".split(), "devices=2", "batch_size=1"]
    given += ["scheduler=constant"]

    def train(name, *more):
        process = spawn([*given, f"output_dir={tmp_path / name}", *more])
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        return out

    train("whole")
    train("run", "max_steps=10", "checkpoint.export=never")
    shutil.rmtree(model)
    out = train("run")
    assert "continues at step 10 of 20" in out
    assert out.count("no longer exists: ") == 1
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
