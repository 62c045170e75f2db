"""The model as a Hugging Face folder: when it is written, in which files, from what, and what starts from it."""

import json
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.preloaded import run_preloaded
from tests.test_parity import whole_model

LIMIT = 20_000  # bytes a file: the tiny model's embedding, 38,400 bytes, is larger
SMALL_FILES = "checkpoint.export_shard_size=20KB"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run(made, base_arguments, command) -> Path:
    """A run of 20 steps that exported at every save, made by the first test that asks for it."""
    if not (made / "run").exists():
        arguments = [*base_arguments, f"output_dir={made / 'run'}", "checkpoint.export=save", SMALL_FILES]
        code, _, err = command(arguments)
        assert code == 0, err
    return made / "run"


@pytest.fixture
def sharded_run(made, base_arguments, exact_model, command) -> Path:
    """The same of two processes, with a checkpoint and a final model in pieces."""
    if not (made / "fsdp").exists():
        arguments = [*base_arguments, f"model_name={exact_model('llama-tied')}", f"output_dir={made / 'fsdp'}"]
        split = ["strategy=fsdp", "devices=2", "batch_size=2", "strategy.state_dict_type=sharded", SMALL_FILES]
        code, _, err = command([*arguments, *split, "max_steps=2", "save_every=null", "precision=bf16-true"])
        assert code == 0, err
    return made / "fsdp"


def assert_same_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    ours = whole_model(folder)
    assert ours.keys() == weights.keys()
    for name, tensor in weights.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def assert_small_files(folder: Path) -> None:
    """No file is larger than asked for, but where one weight is; and the index knows them all."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(files) > 2
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    for tensors in files.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= LIMIT


def scores(run: Path, step: int) -> dict[str, float]:
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation" and r["step"] == step]
    return {r["domain"]: r["loss"] for r in records}


# When -----------------------------------------------------------------------------------------------------------------


def test_at_every_save(run):
    """A model stays as long as its checkpoint, and that of the last one is the final one."""
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]
    assert [p.name for p in (run / "models").iterdir()] == ["step-00000015"]
    for folder, step in ((run / "models" / "step-00000015", 15), (run / "model", 20)):
        assert_same_weights(folder, load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"))
        assert_small_files(folder)
        assert f"step {step} of 20" in (folder / "README.md").read_text()


def test_never(base_arguments, command, tmp_path):
    arguments = [*base_arguments, "max_steps=2", f"output_dir={tmp_path}", "checkpoint.export=never"]
    code, out, err = command(arguments)
    assert code == 0, err
    assert not (tmp_path / "model").exists()
    assert "model  " not in out
    assert read_run_file(tmp_path)["status"] == "finished"
    code, _, err = command(arguments)
    assert code == 0
    assert "no model was exported" in err
    assert f"task=export model_name={tmp_path}" in err


def test_a_folder_that_cannot_be_written_costs_a_line_and_not_the_run(base_arguments, command, tmp_path):
    (tmp_path / ".run_id").touch()  # of a run
    (tmp_path / "models").write_text("a file where the folder has to be")
    more = [f"output_dir={tmp_path}", "checkpoint.export=save", "max_steps=2", "save_every=1"]
    code, _, err = command([*base_arguments, *more])
    assert code == 0, err
    assert "models/step-00000001 could not be written" in err
    assert (tmp_path / "model" / "config.json").exists()


def test_killed_while_it_exports(base_arguments, command, tmp_path):
    """There is no model before it is whole; the same command makes it."""
    code = (
        "import os, signal\n"
        "from pretrain.training import exporter\n"
        "exporter.write_files = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from pretrain.cli.main import program\nprogram()"
    )
    arguments = [*base_arguments, "max_steps=2", f"output_dir={tmp_path}"]
    killed = run_preloaded(["-c", code, *arguments])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "model.partial" / "model.safetensors").exists(), "it was in the middle of it"
    assert not (tmp_path / "model").exists()
    code, _, err = command(arguments)
    assert code == 0, err
    assert not (tmp_path / "model.partial").exists()
    assert_same_weights(tmp_path / "model", load_file(tmp_path / "checkpoints/step-00000002/model.safetensors"))


# From what ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model_folder(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(20)[None]
    logits = []
    for folder in (run / "checkpoints/step-00000020", run / "model"):
        assert AutoTokenizer.from_pretrained(folder)("the sea")["input_ids"]
        logits.append(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-00000020", "run/model"])
def test_task_export(name, run, command, tmp_path):
    code, out, err = command(["task=export", f"model_name={run.parent / name}", f"output_dir={tmp_path}", SMALL_FILES])
    assert code == 0, err
    assert f"model    {tmp_path / 'model'} (" in out
    assert_same_weights(tmp_path / "model", load_file(run / "checkpoints/step-00000020/model.safetensors"))
    assert_small_files(tmp_path / "model")
    ours, theirs = (
        {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != ".safetensors" and "index" not in f.name}
        for folder in (tmp_path / "model", run / "model")
    )
    assert ours == theirs


def test_task_export_in_another_type(run, command, tmp_path):
    from transformers import AutoModelForCausalLM

    given = ["task=export", f"model_name={run}", f"output_dir={tmp_path}", "model.save_dtype=bfloat16"]
    code, _, err = command(given)
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_task_export_spares_the_model_of_a_run(run, command):
    code, _, err = command(["task=export", f"model_name={run}", f"output_dir={run}"])
    assert code == 2
    assert "choose another output_dir" in err


def test_pieces_of_two_processes(sharded_run, base_arguments, command, tmp_path):
    """Exported, scored, and trained further, by one process and by two, they are the model that the run has left."""
    checkpoint = sharded_run / "checkpoints/step-00000002"
    assert sorted(f.name for f in checkpoint.glob("model*")) == ["model.rank-0.safetensors", "model.rank-1.safetensors"]
    assert_small_files(sharded_run / "model")
    code, _, err = command(["task=export", f"model_name={checkpoint}", f"output_dir={tmp_path / 'exported'}"])
    assert code == 0, err
    weights = whole_model(sharded_run / "model")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert_same_weights(tmp_path / "exported/model", weights)
    expected = None
    for number, (folder, more) in enumerate(
        [
            (tmp_path / "exported/model", ["task=evaluation"]),
            (checkpoint, ["task=evaluation"]),
            (checkpoint, ["strategy=fsdp", "devices=2", "max_steps=1"]),
        ]
    ):
        out = tmp_path / str(number)
        code, _, err = command([*base_arguments, *more, f"model_name={folder}", f"output_dir={out}"])
        assert code == 0, err
        expected = expected or scores(out, 0)
        assert scores(out, 0) == pytest.approx(expected, abs=1e-6)


def test_weights_alone_of_a_checkpoint_start_a_run(run, base_arguments, command, tmp_path):
    """As the exported model does; moments, schedule and steps are new. The run is named by its model folder too."""
    last = scores(run, 20)
    for number, folder in enumerate((run / "checkpoints/step-00000020", run, run / "model")):
        out = tmp_path / str(number)
        code, _, err = command([*base_arguments, f"model_name={folder}", f"output_dir={out}", "max_steps=1"])
        assert code == 0, err
        assert scores(out, 0) == last
        assert read_run_file(out)["steps"] == 1


@pytest.mark.parametrize("task", ["export", "generation"])
def test_a_torn_checkpoint_starts_nothing(task, run, command, tmp_path):
    import shutil

    torn = tmp_path / "torn"
    shutil.copytree(run / "checkpoints/step-00000020", torn)
    os.truncate(torn / "model.safetensors", 100)
    code, _, err = command([f"task={task}", f"model_name={torn}", f"output_dir={tmp_path / 'out'}"])
    assert code == 2
    assert f"error: model_name={torn}: not a complete checkpoint: model.safetensors has 100 bytes" in err
    (torn / "COMPLETE.json").unlink()
    code, _, err = command([f"task={task}", f"model_name={torn}", f"output_dir={tmp_path / 'out'}"])
    assert code == 2
    assert "not a complete checkpoint: no COMPLETE.json" in err


def test_a_run_stands_for_its_newest_whole_checkpoint(run, tmp_path):
    import shutil

    from pretrain.checkpoint.weights import weights_folder
    from pretrain.runtime.errors import UserError

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert weights_folder(str(copy), key="model_name") == str(copy / "checkpoints/step-00000020")
    (copy / "checkpoints/step-00000020/COMPLETE.json").unlink()
    assert weights_folder(str(copy), key="model_name") == str(copy / "checkpoints/step-00000015")
    shutil.rmtree(copy / "checkpoints")
    assert weights_folder(str(copy), key="model_name") == str(copy / "model")
    shutil.rmtree(copy / "model")
    with pytest.raises(UserError, match="neither a complete checkpoint nor a model/"):
        weights_folder(str(copy), key="model_name")
    assert weights_folder("owner/name", key="model_name") == "owner/name"


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_tells_data_settings_and_results(run, corpus):
    text = (run / "model" / "README.md").read_text()
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter)["library_name"] == "transformers"
    facts = read_run_file(run)
    for domain, last in facts["results"].items():
        row = next(line for line in body.splitlines() if line.startswith(f"| {domain} ({last['role']}) |"))
        before = last["loss"] - last["delta_loss"]
        for number in (
            f"{before:.4f} → {last['loss']:.4f}",
            f"{last['delta_loss']:+.4f}",
            f"{last['perplexity']:,.2f}",
        ):
            assert number in row
        assert f"→ {last['bits_per_byte']:.4f} |" in row
    assert f"{facts['tokens']:,} target tokens" in body
    assert f"{facts['parameters']:,} parameters" in body
    assert "| lr | 0.001 |" in body
    assert f"torch {version('torch')}" in body, "as installed; torch.__version__ may have +cpu behind it"
    assert f"`{corpus.name}` (local)" in body
    assert str(run.parent) not in text
    assert str(corpus.parent) not in text
