"""A package of somebody else's, with one part of each kind (tests/mylab): installed, chosen on the command line, trained with,
killed and resumed bit for bit."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.store import KINDS, load
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.conftest import sentences
from tests.runs import assert_same_numbers, at_call, starts

PACKAGE = Path(__file__).parent / "mylab"
slow = pytest.mark.slow
STRATEGIES = {  # their strategy, and the processes
    "single": ["strategy=alone"],
    "ddp": ["strategy=small_buckets", "devices=2", "batch_size=1"],
    "fsdp": ["strategy=sharded", "devices=2", "batch_size=1"],
}
LAST = "checkpoints/step-00000008"
SAVED = "pretrain.checkpoint.store:CheckpointStore._prune"  # is called after each complete checkpoint


PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("extending.md", "data.md")]


def blocks(page, language):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)\n```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_pages_show_what_runs_here():
    """Each piece of code and YAML of the page is in the package, which the tests below train with."""
    files = [file.read_text() for file in PACKAGE.rglob("*") if file.suffix in (".py", ".yaml")]
    shown = [block for language in ("python", "yaml") for block in blocks(PAGES[0], language)]
    shown += [block for block in blocks(PAGES[1], "python") if "class Letters" in block]
    pieces = [piece for block in shown for piece in block.split("\n\n\n")]
    assert len(pieces) > 15
    assert [piece for piece in pieces if not any(piece in file for file in files)] == []


LINES = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
COMMANDS = [line.removeprefix("$ python -m pretrain ") for line in LINES]


@pytest.fixture
def anew(monkeypatch):
    """No package of this name has been imported in this process, as another test may have done."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_of_the_pages(words, site, monkeypatch, tmp_path, command):
    """They compose, and every key is one of the part that they name."""
    monkeypatch.syspath_prepend(site)
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab/conf").symlink_to(PACKAGE / "conf")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(words)
    if "--help" not in arguments:
        arguments += ["--cfg", "job"]
    code, _, err = command(arguments)
    assert code == 0, err


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder into which pip has installed the package."""
    copy, site = tmp_path_factory.mktemp("mylab"), tmp_path_factory.mktemp("site")
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            target = copy / file.relative_to(PACKAGE)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, copy], check=True)
    return site


@pytest.fixture
def everything(tiny_model, tmp_path):
    """The arguments of a run of 8 steps with all of their parts."""
    (tmp_path / "post").mkdir()
    for i in range(30):
        (tmp_path / "post" / f"letter-{i:02}").write_text(sentences(i, 30))
    return [
        *("--config-dir", str(PACKAGE / "conf"), "allow_targets=[mylab,torch.optim]", "experiment=everything"),
        f"model_name={tiny_model}",
        "evaluation.domains.base={_target_: mylab.letters.Letters, folder: " + str(tmp_path / "post") + "}",
        *("evaluation.max_tokens=300", "sequence_length=32", "batch_size=2", "gradient_accumulation_steps=2"),
        *("max_steps=8", "log_every=1", "evaluate_every=4", "save_every=3", "lr=1e-3"),
    ]


@pytest.fixture
def train(spawn, site):
    """``train(arguments, folder, environment)``: run the command line in a process that can import the package."""

    def run(arguments, folder, environment=os.environ):
        path = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
        environment = {**environment, "PYTHONPATH": path}
        process = spawn([*arguments, f"output_dir={folder}"], env=environment, start_new_session=True)
        output, _ = process.communicate(timeout=280)
        return process.returncode, output

    return run


OPTIMIZERS = {
    "muon and adamw": [],
    "rowwise": ["optimizer=rowwise"],
    "adafactor": ["optimizer=adamw", "optimizer._target_=torch.optim.Adafactor"],
    "lion": ["optimizer=adamw", "optimizer._target_=mylab.optim.Lion"],
}
DEFAULT = ("single", "muon and adamw")
ROWS = [
    pytest.param(
        strategy, optimizer, id=f"{strategy}, {optimizer}", marks=() if (strategy, optimizer) == DEFAULT else slow
    )
    for strategy in STRATEGIES
    for optimizer in OPTIMIZERS
    if (strategy, optimizer) != ("fsdp", "adafactor")  # torch's does not work on DTensors
]


@pytest.mark.parametrize(("strategy", "optimizer"), ROWS)
def test_one_part_of_each_kind(train, everything, tmp_path, tiny_model, strategy, optimizer):
    """All at once, uninterrupted, and killed after a checkpoint and resumed."""
    arguments = [*everything, *STRATEGIES[strategy], *OPTIMIZERS[optimizer]]
    code, output = train(arguments, tmp_path / "run")
    assert code == 0, output
    check_records(read_records(tmp_path / "run/metrics.jsonl"))
    check_files(tmp_path / "run", STRATEGIES[strategy][0].partition("=")[2].replace("_", ""))
    check_export(tmp_path / "run/model", tiny_model)
    mark = tmp_path / "mark"
    killed = at_call(SAVED, "kill all", mark, at=2, after=True)
    assert train(arguments, tmp_path / "killed", killed)[0] != 0
    assert mark.exists()
    code, output = train(arguments, tmp_path / "killed")
    assert code == 0, output
    check_equal(tmp_path / "killed", tmp_path / "run")


@pytest.mark.slow
def test_a_dataset_as_the_page_on_data_shows(train, everything, tmp_path):
    """Trained on, killed, and resumed."""
    words = ["dataset=local", "dataset._target_=mylab.letters.Letters", f"dataset.folder={tmp_path / 'post'}"]
    arguments = [*everything, *words, "evaluation=new_only", "optimizer=rowwise", "strategy=alone"]
    arguments = [word for word in arguments if not word.startswith("evaluation.domains")]
    killed = at_call(SAVED, "kill all", tmp_path / "mark", at=1, after=True)
    assert train(arguments, tmp_path / "run", killed)[0] != 0
    code, output = train(arguments, tmp_path / "run")
    assert code == 0, output
    assert "`Letters` (Letters)" in (tmp_path / "run/model/README.md").read_text()


def check_records(records):
    """Of every part, what it has left in the records."""
    rates = [r["lr"] for r in records if r["event"] == "train"]
    assert [rate / rates[0] for rate in rates[:3]] == pytest.approx([1.0, 0.8**0.5, (4 / 6) ** 0.5])
    metrics = [(r["step"], r["name"], r["better"]) for r in records if r["event"] == "metric"]
    assert metrics == [
        (s, *m)
        for s in (0, 4, 8)
        for m in (("repetition", "higher"), ("first_prediction", "lower"), ("continued", "higher"))
    ]
    assert all(0 <= r["value"] <= 1 and 0 <= r["stderr"] < 1 for r in records if r.get("name") == "repetition")
    assert {r["domain"] for r in records if r["event"] == "evaluation"} == {"stories", "letters"}


def check_files(run, strategy):
    """Of the sink, the transforms, the strategy and the dataset, what is left on disk."""
    assert len((run / "losses.txt").read_text().splitlines()) == 8
    state = load(run / LAST)
    assert state["hooks"] == {"average": {"updates": 8}}
    average, weights = state["engine"]["hook"], state["engine"]["model"]
    adapters = {f"model.layers.{i}.self_attn.{name}_proj.{key}" for i in (0, 1) for name in "qv" for key in "AB"}
    assert adapters <= weights.keys()
    assert (
        {f"average/{name}" for name in adapters}
        <= average.keys()
        < {f"average/{name}" for name in sorted(weights.keys())}
    )
    name = "model.layers.0.self_attn.q_proj.B"
    assert 0 < average.read(f"average/{name}").norm() < weights.read(name).norm(), "it began at zero and follows"
    assert read_run_file(run)["strategy"] == strategy
    assert "`stories` (Stories)" in (run / "model/README.md").read_text()


def check_export(folder, tiny_model):
    """The plain architecture reads the trained weights: adapters are merged, what was frozen is unchanged."""
    from transformers import AutoModelForCausalLM

    model, before = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tiny_model))
    after, old = model.state_dict(), before.state_dict()
    assert after.keys() == old.keys()
    changed = {name for name in old if not torch.equal(after[name], old[name])}
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"} <= changed
    change = after["model.layers.0.self_attn.q_proj.weight"] - old["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4


def check_equal(run, reference):
    """Final weights, records and every tensor of the last checkpoint are equal bit for bit."""
    assert_same_numbers(run, reference)
    before, after = load(reference / LAST), load(run / LAST)
    for kind in KINDS:
        tensors = before["engine"][kind]
        assert tensors.keys() == after["engine"][kind].keys() != set()
        assert [
            n for n in sorted(tensors.keys()) if not torch.equal(tensors.read(n), after["engine"][kind].read(n))
        ] == []
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run / "losses.txt").read_text() == (reference / "losses.txt").read_text()
    assert [resumed for _, resumed in starts(run)][-1]
