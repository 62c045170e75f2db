"""A mistake is exit code 2 and one clear line, never a traceback; help and mistakes answer without importing torch."""

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from tests.preloaded import run_preloaded
from tests.runs import run_code


def make(tmp: Path, name: str, content: bytes | str = b"") -> Path:
    path = tmp / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def local(path: Path, *more: str) -> list[str]:
    return ["dataset=local", f"dataset.nameOrPath={path}", *more]


def broken_model(tmp: Path, tiny_model: Path, damage) -> list[str]:
    folder = tmp / "broken"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    return [f"model_name={folder}"]


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def shrink_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))


def parquet(tmp: Path, cut: int = 0) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = tmp / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["some text"] * 100}), path)
    path.write_bytes(path.read_bytes()[: -cut or None])
    return path


# Keys and choices: nothing is read or imported before these are said.
KEYS = [
    (["lerning_rate=1"], "unknown key 'lerning_rate'; here it is 'lr'"),
    (["batch_sise=4"], "unknown key 'batch_sise'; did you mean 'batch_size'"),
    (["+anything=4"], "unknown key 'anything'"),
    (["stratgy=single"], "unknown key 'stratgy'; did you mean 'strategy'"),
    (["optimizer.beta9=0.9"], "optimizer: AdamW has no 'beta9'; did you mean 'beta2' or 'beta1'"),
    (["dataset.helt_out=0.1"], "dataset: Python has no 'helt_out'; did you mean 'held_out'"),
    (["dataset.nameOrPath=b"], "Python has no 'nameOrPath'; it is a key of dataset=huggingface and dataset=local"),
    (["evaluation.domains.base.nameOrPath=b"], "; it is a key of dataset@evaluation.domains.base=huggingface and"),
    (["evaluation.domains.base.helt_out=0.1"], "evaluation.domains.base: English has no 'helt_out'"),
    (["sink.console.colour=red"], "sink.console: Terminal has no 'colour'"),
    (["scheduler=cosin"], "scheduler=cosin: no such choice; did you mean 'cosine'"),
    (["sink=[consol]"], "sink=consol: no such choice; did you mean 'console'"),
    (["sink.console.level=9"], "sink.console.level=9: input should be 1, 2, 3 or 4"),
    (["sink=[console,wandbb]"], "sink=wandbb: no such choice; did you mean 'wandb'"),
    (["sink=wandb", "sink.wandb.projekt=x"], "sink.wandb: Wandb has no 'projekt'; did you mean 'project'"),
    (["sink=wandb", "sink.wandb.mode=on"], "sink.wandb.mode='on': input should be 'online', 'offline' or 'disabled'"),
    (["sink=wandb", "sink.wandb.timeout=0"], "sink.wandb.timeout=0: input should be greater than 0"),
    (
        ["sink=wandb", "sink.wandb.mode=online"],
        "sink.wandb.mode=online: there is no key for https://api.forge.coreweave.com",
    ),
    (["sink.wandb.mode=offline"], "sink.wandb: 'wandb' is not among the chosen sinks; add it: sink=[…,wandb]"),
    (["sink=csv", "sink.csv.columns=[step]"], "sink.csv: Csv has no 'columns'"),
    (["sink=tensorboard", "sink.tensorboard.folder=x"], "sink.tensorboard: TensorBoard has no 'folder'"),
    (["dataset=mixture"], "dataset.parts: a mixture needs a part: dataset@dataset.parts.NAME=local"),
    (["replay.share=1"], "replay.share=1: input should be less than 1"),
    (
        ["phases=[{from: 0.5, replay_shar: 0.1}]"],
        "phases[0]: a phase has no 'replay_shar'; did you mean 'replay_share'",
    ),
    (["experiment=nope"], "experiment=nope: no such choice; allowed: "),
    (["model=null"], "model=null: model is a group; choose pretrained · scratch, or set one of its keys: model.KEY=…"),
    (["dataset=mixture", "dataset.parts=3"], "dataset.parts=3: input should be a valid dictionary"),
    (
        ["dataset=mixture", "dataset.parts.es=es/"],
        "dataset.parts.es='es/': not a dataset; choose its kind: dataset@dataset.parts.es",
    ),
    (
        ["replay.source.nameOrPath=x"],
        ": not a dataset; choose its kind: dataset@replay.source=local replay.source.nameOrPath=…",
    ),
    (["replay=0.25"], "replay=0.25: replay is a group; choose default, or set one of its keys: replay.KEY=…"),
    (["lr=fast"], "lr='fast': input should be a valid number"),
    (["lr=0"], "lr=0: input should be greater than 0"),
    (["lr=-1e-3"], "lr=-0.001: input should be greater than 0"),
    (["lr=inf"], "lr=inf: input should be a finite number"),
    (["lr=[1"], "lr=[1: can't be read (no viable alternative"),
    (["lr==1"], "lr==1: can't be read (extraneous input '='); a text with such characters needs quotes: "),
    (["lr=${nope}"], "Interpolation key 'nope' not found"),
    (["batch_size=0"], "batch_size=0: input should be greater than 0"),
    (["batch_size=1.5"], "batch_size=1.5: input should be a valid integer"),
    (["sequence_length=-5"], "sequence_length=-5: input should be greater than or equal to 2"),
    (["max_steps=0"], "max_steps=0: input should be greater than 0"),
    (["warmup_proportion=1.5"], "warmup_proportion=1.5: input should be less than or equal to 1"),
    (["scheduler.min_lr_ratio=2"], "scheduler.min_lr_ratio=2: input should be less than or equal to 1"),
    (["dataset.held_out=1"], "dataset.held_out=1: input should be less than 1"),
    (
        ["model.compile=yes-please"],
        "model.compile='yes-please': input should be 'blocks' or 'graph' or ",
    ),
    (["model.attention=fast"], "model.attention='fast': input should be 'auto', 'sdpa'"),
    (["task=training"], "task='training': input should be 'pretraining'"),
    (["precision=16-mixed"], "precision=16-mixed needs a GPU"),
    (["dataset=local"], "dataset.nameOrPath has no value"),
    (
        ["dataset=local", "dataset.nameOrPth=x"],
        "give it one: dataset.nameOrPath=... (there is dataset.nameOrPth; a misspelling?)",
    ),
    (["hydra.run.dir=there"], "the run folder is output_dir="),
    (["optimizer._target_=pretrain.optim.adamw.Adam"], "optimizer._target_='pretrain.optim.adamw.Adam'"),
    (["--config"], "--config: needs a file"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("arguments", "says"), KEYS, ids=[" ".join(a) for a, _ in KEYS])
def test_mistakes_in_keys(arguments, says, command, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NETRC", "/nowhere")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert_mistake(command(arguments), says)


def assert_mistake(outcome, says: str) -> None:
    code, _, err = outcome
    assert code == 2, err
    assert says in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err


# What is found when the files are looked at. (arguments from (tmp_path, tiny_model), what the line says)
FILES = {
    "no such file": (lambda t, m: local(t / "nope.txt"), "nope.txt"),
    "empty folder": (lambda t, m: local(make(t, "e/x", b"").parent, "dataset.pattern=*.md"), "no file"),
    "folder without text": (lambda t, m: local(make(t, "p/photo.jpg", b"\xff\xd8").parent), "p"),
    "only empty documents": (lambda t, m: local(make(t, "empty.txt", b"")), "no text"),
    "not UTF-8": (
        lambda t, m: local(make(t, "latin.txt", "caf\u00e9 ".encode("latin-1") * 9)),
        "latin.txt: not UTF-8 at byte 3",
    ),
    "broken JSON line": (
        lambda t, m: local(make(t, "a.jsonl", '{"text": "fine"}\n{"text": "cut\n')),
        "a.jsonl:2",
    ),
    "torn gzip": (
        lambda t, m: local(make(t, "a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 99)[:-20])),
        "a.jsonl.gz",
    ),
    "missing text column": (
        lambda t, m: local(make(t, "a.jsonl", '{"body": "x", "title": "y"}\n')),
        "body, title",
    ),
    "missing parquet column": (lambda t, m: local(parquet(t)), "body"),
    "parquet cut off": (lambda t, m: local(parquet(t, cut=30)), "data.parquet"),
    "too little text": (lambda t, m: local(make(t, "a.txt", "a few words. " * 3)), "global batch"),
    "no such model folder": (lambda t, m: [f"model_name={t}/nope"], "no such folder"),
    "a file for a model": (lambda t, m: [f"model_name={make(t, 'm', 'x')}"], "a model is a folder"),
    "model without config": (
        lambda t, m: broken_model(t, m, lambda f: (f / "config.json").unlink()),
        "has no config.json",
    ),
    "torn weights": (
        lambda t, m: broken_model(t, m, cut_weights),
        "model.safetensors is not a complete safetensors file",
    ),
    "weights that are no weights": (
        lambda t, m: broken_model(t, m, lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 3) + b"abc")),
        "model.safetensors is not a complete safetensors file",
    ),
    "no weights": (
        lambda t, m: broken_model(t, m, lambda f: (f / "model.safetensors").unlink()),
        "has no weights",
    ),
    "no tokenizer": (
        lambda t, m: broken_model(t, m, lambda f: [p.unlink() for p in f.glob("tokenizer*")]),
        "no usable tokenizer",
    ),
    "tokenizer too large": (lambda t, m: broken_model(t, m, shrink_embedding), "290 rows"),
    "sequence too long": (lambda t, m: [f"model_name={m}", "sequence_length=256"], "has 128 positions"),
    "Hub id without network": (lambda t, m: ["model_name=someone/some-model"], "model_name=sample, a local folder"),
    "a run without a checkpoint to resume": (
        lambda t, m: [f"resume={make(t, 'r/checkpoints/x', '').parents[1]}"],
        "a run without a complete checkpoint",
    ),
    "no checkpoint to resume": (lambda t, m: [f"resume={t}"], "not a checkpoint folder"),
    "output_dir below a file": (lambda t, m: [f"output_dir={make(t, 'f', 'x')}/run"], "output_dir="),
    "flat YAML that is a list": (lambda t, m: ["--config", str(make(t, "f.yaml", "- a\n- b\n"))], "not a YAML mapping"),
    "flat YAML that is no YAML": (
        lambda t, m: ["--config", str(make(t, "f.yaml", "a: [1\n"))],
        "can't be read as YAML",
    ),
    "unknown flat key": (
        lambda t, m: ["--config", str(make(t, "f.yaml", "batch_sise: 3\n"))],
        "unknown key 'batch_sise'; did you mean 'batch_size'",
    ),
    "flat value of a wrong type": (
        lambda t, m: ["--config", str(make(t, "f.yaml", "lr: [1]\n"))],
        "lr=[1]: input should be a valid number",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_files(name, command, tmp_path, tiny_model, base_arguments):
    arguments, says = FILES[name]
    more = arguments(tmp_path, tiny_model)
    assert_mistake(command([*base_arguments, f"output_dir={tmp_path / 'run'}", *more]), says)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; run the tests as another user")
def test_output_dir_without_permission(command, tmp_path, base_arguments):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_mistake(command([*base_arguments, f"output_dir={locked / 'run'}"]), "can't be written")


@pytest.mark.slow
def test_disk_full_during_a_checkpoint_keeps_the_last_good_one(base_arguments, tmp_path):
    """The kernel itself refuses: no file of this process may grow beyond 40 kB (the tokens are cached by then)."""
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}", "save_every=5"]
    first = run_process([*arguments, "max_steps=5", "dataset.held_out=0.1"])
    assert first.returncode == 0, first.stderr
    limited = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from pretrain.cli.main import main\nmain()"
    )
    second = run_preloaded(["-c", limited, *arguments, "max_steps=10", "dataset.held_out=0.1"])
    assert second.returncode == 2, second.stderr
    assert "step-00000010 could not be written" in second.stderr
    assert f"the last valid checkpoint is {run}/checkpoints/step-00000005" in second.stderr
    assert "Traceback" not in second.stderr
    third = run_process([*arguments, "max_steps=10", "dataset.held_out=0.1"])
    assert third.returncode == 0, third.stderr


def run_process(arguments):
    return run_preloaded(["-m", "pretrain", *arguments])


@pytest.mark.parametrize(
    "flags", [["--help"], ["--cfg", "job"], ["--info", "config"], ["scheduler=cosine", "--help"], ["lr=0"]]
)
def test_answers_without_torch(flags):
    """Import of torch, transformers or datasets is made an error."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "from pretrain.cli.main import main\nmain()"
    )
    done = run_code(code, *flags)
    assert done.returncode == (2 if flags == ["lr=0"] else 0), done.stderr
    assert "cosine" in done.stdout + done.stderr or "lr=0" in done.stderr or "hydra" in done.stdout


def test_help_names_every_group_and_key(command):
    from dataclasses import fields

    from pretrain.config.check import GROUPS
    from pretrain.config.schema import RootKeys

    code, out, _ = command(["--help"])
    assert code == 0
    for field in fields(RootKeys):
        assert f"  {field.name}: " in out
    for group in GROUPS:
        assert f"\n  {group} " in out


def test_a_bug_keeps_its_traceback(tmp_path, base_arguments):
    """An optimizer that breaks is no user's mistake: exit code 1."""
    code = (
        "import torch\n"
        "def broken(*a, **k): raise RuntimeError('broken on purpose')\n"
        "torch.optim.AdamW.step = broken\n"
        "from pretrain.cli.main import main\nmain()"
    )
    done = run_preloaded(["-c", code, *base_arguments, f"output_dir={tmp_path / 'run'}"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "broken on purpose" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_mistake_is_one_line_whatever_its_value_is(command):
    code, _, err = command(["task=evaluation", 'model_name="a\nb\n\n"'])
    assert code == 2
    assert err.splitlines()[-1].startswith("error: model_name=a b")
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1
