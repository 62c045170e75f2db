"""A pickle that comes with a model or a checkpoint never runs, wherever a loader might look for one: files that are not
needed stay unopened, and one in the place of a needed file is a mistake of one line."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from pretrain.runtime.folders import MARKER
from tests.cli.test_cli import assert_mistake
from tests.damage import forge

# Where other programs keep pickles.
BESIDE = [
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"),
    *("scaler.pt", "rng_state.pth", "rng_state_0.pth", "consolidated.00.pth", "model.pt", "mp_rank_00_model_states.pt"),
    *("global_step1/mp_rank_00_model_states.pt", ".metadata", "__0_0.distcp", "tokenizer.pkl", "vocab.pkl"),
]


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self):
        return Path.touch, (self._victim,)


@pytest.fixture
def payload(tmp_path):
    """A file that pickle, and torch.load by its old way, would run; and the file whose existence tells that it ran."""
    return pickle.dumps(Payload(tmp_path / "victim")), tmp_path / "victim"


@pytest.fixture
def unpickled():
    """Every global that pickle looks up in this process from here on, whether it runs or not."""
    found: list[str] = []
    listening = [True]

    def hook(event, arguments):
        if event == "pickle.find_class" and listening:
            found.append(".".join(map(str, arguments)))

    sys.addaudithook(hook)
    yield found
    listening.clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run_arguments(made, base_arguments, command):
    """The command of a run that was stopped short of its end, whose folder is to be copied and spoilt."""
    arguments = [*base_arguments, "scheduler=constant", "warmup_proportion=0", "sink=jsonl", "save_every=1"]
    if not (made / "run").exists():
        code, _, err = command([*arguments, f"output_dir={made / 'run'}", "max_steps=2"])
        assert code == 0, err
    return [*arguments, "max_steps=3"]


def put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_the_payload_works(payload, unpickled):
    """Otherwise the others would show nothing."""
    import torch

    content, victim = payload
    pickle.loads(content)
    assert victim.exists()
    assert unpickled
    victim.unlink()
    torch.save(Payload(victim), victim.with_suffix(".pt"))
    torch.load(victim.with_suffix(".pt"), weights_only=False)
    assert victim.exists()


@pytest.mark.parametrize("task", ["generation", "export"])
def test_pickles_beside_a_model_stay_unopened(task, tiny_model, payload, unpickled, command, tmp_path):
    content, victim = payload
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name in BESIDE:
        put(folder / name, content)
    given = [f"task={task}", "sequence_length=32", "generation.max_new_tokens=2", f"output_dir={tmp_path / 'out'}"]
    code, _, err = command([*given, f"model_name={folder}"])
    assert code == 0, err
    assert not victim.exists()
    assert not [name for name in unpickled if "Path" in name]
    assert not {f.name for f in (tmp_path / "out").rglob("*")} & {Path(name).name for name in BESIDE}


def test_pickles_beside_a_checkpoint_stay_unopened(run_arguments, made, payload, command, tmp_path):
    content, victim = payload
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    for name in BESIDE:
        put(run / "checkpoints/step-00000002" / name, content)
    forge(run / "checkpoints/step-00000002")
    code, _, err = command([*run_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert json.loads((run / "run.json").read_text())["steps"] == 3
    assert not victim.exists()


MODEL = {  # what is replaced by the pickle → what the line says
    "model.safetensors": "is not a complete safetensors file",
    "config.json": "can't be read",
    "tokenizer.json": "is not a valid tokenizer",
    "tokenizer_config.json": "no usable tokenizer",
    "pytorch_model.bin": "is pickled",
}


@pytest.mark.parametrize("name", MODEL)
def test_a_pickle_in_the_place_of_a_model_s_file(name, tiny_model, payload, command, tmp_path):
    content, victim = payload
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    put(folder / name, content)
    given = ["task=generation", "sequence_length=32", f"output_dir={tmp_path / 'out'}"]
    assert_mistake(command([*given, f"model_name={folder}"]), MODEL[name])
    assert not victim.exists()


CHECKPOINT = {
    "state.json": "state.json can't be read",
    "model.safetensors": "model.safetensors can't be read",
    "optimizer.safetensors": "optimizer.safetensors can't be read",
    MARKER: f"unreadable {MARKER}",
}


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_pickle_in_the_place_of_a_checkpoint_s_file(name, run_arguments, made, payload, command, tmp_path):
    content, victim = payload
    checkpoint = Path(shutil.copytree(made / "run/checkpoints/step-00000002", tmp_path / "checkpoint"))
    put(checkpoint / name, content)
    if name != MARKER:
        forge(checkpoint)
    outcome = command([*run_arguments, f"resume={checkpoint}", f"output_dir={tmp_path / 'out'}"])
    assert_mistake(outcome, CHECKPOINT[name])
    assert not victim.exists()


@pytest.mark.parametrize("kind", ["pickle", "yaml"])
def test_code_in_the_config_yaml_of_a_checkpoint(kind, run_arguments, made, payload, command, tmp_path):
    """It is read only to say what has changed."""
    content, victim = payload
    if kind == "yaml":
        content = f"seed: !!python/object/apply:os.mkdir ['{victim}']\n".encode()
    checkpoint = Path(shutil.copytree(made / "run/checkpoints/step-00000002", tmp_path / "checkpoint"))
    put(checkpoint / "config.yaml", content)
    forge(checkpoint)
    outcome = command([*run_arguments, "seed=5", f"resume={checkpoint}", f"output_dir={tmp_path / 'out'}"])
    assert_mistake(outcome, "config.yaml: can't be read as YAML")
    assert not victim.exists()
