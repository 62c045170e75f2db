"""A config file from somebody else runs no code of theirs, whatever it says and wherever it says it (docs/security.md).

Every foreign target is a module of the test's own that leaves a mark when it is imported or called.
"""

import ast
import json
import shutil
import textwrap
from pathlib import Path

import pytest

import pretrain
from tests.test_cli import assert_mistake

MARK = "code ran"


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """Where the foreign code leaves its mark. It can be imported, so only a refusal keeps it from running."""
    mark, folder = tmp_path / MARK, tmp_path / "site"
    folder.mkdir()
    (folder / "foreign.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "def run(*a, **k): pass\n"
        "class Sink:\n"
        "    def open(self, run, start): self.file = (run / 'foreign.txt').open('w')\n"
        "    def write(self, record): self.file.write(record['event'] + ' ')\n"
        "    def close(self): self.file.close()\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "foreign", raising=False)
    return mark


CONFIGS = {
    "a part": ["optimizer._target_=foreign.run"],
    "a function of Python's": ["optimizer._target_=os.system"],
    "a partial": ["scheduler._target_=foreign.run", "scheduler._partial_=true"],
    "inside free keys": ["model=scratch", "+model.overrides.deep.er={_target_: foreign.run}"],
    "inside a list": ["strategy=deepspeed", "+strategy.config.some=[1, [{_target_: foreign.run}]]"],
    "a new domain": ["+evaluation.domains.more={_target_: foreign.run}"],
    "a sink": ["+sink.mine={_target_: foreign.Sink}"],
    "through one of our modules": ["optimizer._target_=pretrain.cli.os.system", "+optimizer.command=true"],
    "a method of ours": ["optimizer._target_=pretrain.optim.adamw.AdamW.__call__"],
    "a function of ours": ["dataset._target_=pretrain.checkpoint.atomic.replace_folder"],
    "our command line": ["dataset._target_=pretrain.cli.main", "+dataset.argv=['allow_targets=[os.system]']"],
    "a private name": ["dataset._target_=pretrain.cli._hydra_main"],
    "no name": ["optimizer._target_={_target_: foreign.run}"],
    "an interpolation of one": [r"optimizer._target_=\${oc.decode:foreign.run}"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_our_own_parts_are_made(name, command, base_arguments, tmp_path, mark):
    outcome = command([*base_arguments, f"output_dir={tmp_path / 'run'}", *CONFIGS[name]])
    assert_mistake(outcome, "_target_")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_the_message_says_how_to_trust(command, mark):
    says = "optimizer._target_='foreign.run': a config may name pretrain's own parts only"
    outcome = command(["optimizer._target_=foreign.run"])
    assert_mistake(outcome, says)
    assert "'allow_targets=[foreign.run]' to the command line" in outcome[2]


def test_a_node_that_appears_when_resolved_again(command, mark):
    """Hydra's instantiate resolves once more; what the first time was text would be a node by then."""
    hidden = r"+model.overrides.x='\${oc.create:{_target_: foreign.run}}'"
    assert_mistake(command(["model=scratch", hidden]), "the mark of an interpolation")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["_args_=[1]", "_recursive_=false", "_convert_=none"])
def test_no_other_key_of_hydras(key, command):
    assert_mistake(command([f"+optimizer.{key}"]), f"AdamW has no {key.split('=')[0]!r}")


def experiment(tmp_path: Path, text: str, name: str = "experiment/theirs.yaml") -> list[str]:
    """The arguments that put a file of somebody else's among the configs."""
    file = tmp_path / "theirs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return ["--config-dir", str(tmp_path / "theirs")]


FOREIGN = "_target_: foreign.run"
HYDRA_NODES = {
    "callbacks": f"callbacks: {{x: {{{FOREIGN}}}}}",
    "job_logging": "job_logging: {version: 1, formatters: {x: {(): foreign.run}}, disable_existing_loggers: false}",
    "hydra_logging": "hydra_logging: {version: 1, formatters: {x: {(): foreign.run}}}",
    "sweeper": "sweeper: {params: {allow_targets: '[foreign.run]'}}",
    "launcher.setup": "launcher: {setup: ['touch mark']}",
    "job.env_set": "job: {env_set: {LD_PRELOAD: /tmp/x.so}}",
    "overrides": "overrides: {task: ['allow_targets=[foreign.run]']}",
}


@pytest.mark.parametrize(
    "sweep", [["experiment=theirs"], ["-m", "experiment=theirs"], ["-m", "experiment=good,theirs"]]
)
@pytest.mark.parametrize("key", HYDRA_NODES)
def test_what_hydra_would_execute(key, sweep, command, tmp_path, mark, monkeypatch):
    """Hydra instantiates callbacks and calls the factories of logging configs before a job is ours to check."""
    monkeypatch.chdir(tmp_path)
    launcher = "defaults: [{override /hydra/launcher: slurm}]\n" if key.startswith("launcher") else ""
    theirs = experiment(tmp_path, f"# @package _global_\n{launcher}hydra:\n  {HYDRA_NODES[key]}\n")
    experiment(tmp_path, "# @package _global_\nlr: 1e-4\n", "experiment/good.yaml")
    assert_mistake(command([*theirs, *sweep, "lr=0"]), f"hydra.{key}: set by a config file")
    assert not mark.exists()


SWEEPERS = {
    "a key of the command line's": "{params: {++launch.endpoint: 'elsewhere:1'}}",
    "a node": "{params: {lr: {_target_: foreign.run}}}",
    "an interpolation": "{params: {lr: '${oc.create:{_target_: foreign.run}}'}}",
    "Hydra's keys": "{params: {hydra.job.env_set.LD_PRELOAD: /tmp/x.so}}",
    "a flag": "{params: {--config-dir: /tmp}}",
    "another sweeper": "{_target_: foreign.run}",
}


@pytest.mark.parametrize("name", SWEEPERS)
def test_an_experiment_that_is_a_sweep_lets_nothing_in(name, command, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = f"hydra: {{mode: MULTIRUN, sweeper: {SWEEPERS[name]}}}\n"
    theirs = experiment(tmp_path, f"# @package _global_\n{sweep}")
    assert_mistake(command([*theirs, "experiment=theirs"]), "hydra.sweeper: set by a config file")
    assert not mark.exists()


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_an_experiment_may_be_a_sweep(sweeper, command, tmp_path, monkeypatch):
    """It gets past this check, to a mistake of its own."""
    monkeypatch.chdir(tmp_path)
    params = "{lr: '1e-4,1e-3', strategy: 'ddp,fsdp', lerning_rate: 1}"
    defaults = f"defaults: [{{override /hydra/sweeper: {sweeper}}}]\n"
    sweep = f"hydra: {{mode: MULTIRUN, sweeper: {{params: {params}}}}}\n"
    theirs = experiment(tmp_path, f"# @package _global_\n{defaults}{sweep}")
    assert_mistake(command([*theirs, "experiment=theirs"]), "lerning_rate")


@pytest.mark.parametrize("flag", ["--config-name", "--config-path", "--experimental-rerun"])
def test_no_other_primary_config(flag, command, tmp_path):
    assert_mistake(command([flag, str(tmp_path)]), f"{flag}: not here")


FILES = {
    "allow_targets": "allow_targets: [foreign.Sink]\nsink: {{mine: {{_target_: foreign.Sink}}}}",
    "model.trust_remote_code": "model: {{trust_remote_code: true}}",
    "launch.endpoint": "launch: {{endpoint: 'elsewhere:29500', nodes: 2}}",
}


@pytest.mark.parametrize("where", ["experiment/theirs.yaml", "local/default.yaml"])
@pytest.mark.parametrize("key", FILES)
def test_trust_is_given_on_the_command_line_only(key, where, command, base_arguments, tmp_path, mark):
    theirs = experiment(tmp_path, "# @package _global_\n" + FILES[key].format(), where)
    chosen = ["experiment=theirs"] if where.startswith("experiment") else []
    assert_mistake(command([*theirs, *base_arguments, f"output_dir={tmp_path / 'run'}", *chosen]), f"{key}=")
    assert not mark.exists()


def test_a_trusted_part_is_made(command, base_arguments, tmp_path, mark):
    """A sink of the user's own, named in a file, works with the word on the command line."""
    theirs = experiment(tmp_path, "# @package _global_\nsink: {mine: {_target_: foreign.Sink}}\n")
    arguments = [*theirs, *base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=2", "experiment=theirs"]
    assert command(arguments)[0] == 2
    assert not mark.exists()
    assert command([*arguments, "allow_targets=[foreign.Sink]"])[0] == 0
    assert "run_finished" in (tmp_path / "run" / "foreign.txt").read_text()


FLAT = {
    "a target": ("dataset: {source: local, _target_: foreign.run}", "only; if you trust"),
    "trust": ("allow_targets: [foreign.run]", "unknown key 'allow_targets'"),
    "remote code": ("parallelization_config: {trust_remote_code: true}", "no strategy has such a key"),
    "a Python object": ("seed: !!python/object/apply:foreign.run []", "can't be read as YAML"),
}


@pytest.mark.parametrize("mode", [[], ["-m"]])
@pytest.mark.parametrize("name", FLAT)
def test_flat_files(name, mode, command, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, says = FLAT[name]
    (tmp_path / "flat.yaml").write_text(content + "\n")
    code, _, err = command(["--config", "flat.yaml", "dataset.nameOrPath=texts", *mode])
    assert code == 2
    assert says in err or (mode and "left with exit code 2" in err)
    assert not mark.exists()


# Models -------------------------------------------------------------------------------------------------------------


def with_code(tiny_model: Path, folder: Path, mark: Path, **config: str) -> Path:
    """A model folder that brings code for its config and its tokenizer."""
    shutil.copytree(tiny_model, folder)
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Theirs: pass\n")
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.Theirs")}
    tokenizer = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    for name, more in (("config.json", code | config), ("tokenizer_config.json", tokenizer)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


def test_code_in_a_model_folder_does_not_run(command, base_arguments, tiny_model, tmp_path, monkeypatch):
    """Refused where the model can't be had without it; where transformers knows the model, passed over."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, run = tmp_path / MARK, [*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=2"]
    folder = with_code(tiny_model, tmp_path / "needed", mark, model_type="theirs")
    assert_mistake(command([*run, f"model_name={folder}"]), "if you trust its author: model.trust_remote_code=true")
    assert not mark.exists()
    folder = with_code(tiny_model, tmp_path / "superfluous", mark)
    assert command([*run, f"model_name={folder}"])[0] == 0
    assert not mark.exists()


def test_code_in_a_trusted_model_folder_runs(tiny_model, tmp_path):
    """What the test above looks for would have happened."""
    from pretrain.models.causal_lm import Pretrained

    mark = tmp_path / MARK
    folder = with_code(tiny_model, tmp_path / "needed", mark, model_type="theirs")
    with pytest.raises(Exception):  # noqa: B017, PT011 (the class is no config)
        Pretrained(name_or_path=str(folder), trust_remote_code=True).hf_config()
    assert mark.exists()


# Our own source -----------------------------------------------------------------------------------------------------

UNPICKLING = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
LOADERS = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "os.system"}


def dangers(source: str) -> list[str]:
    """Calls and imports that run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [name for name in names if name.split(".")[0] in UNPICKLING]
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            weights = name == "torch.load" and given.get("weights_only") == "True"
            if (name in {"eval", "exec"} | LOADERS and not weights) or "True" in (
                given.get("allow_pickle"),
                given.get("shell"),
            ):
                found.append(ast.unparse(node))
    return found


def test_nothing_that_runs_what_it_reads():
    package = Path(pretrain.__file__).parent
    found = {str(file.relative_to(package)): dangers(file.read_text()) for file in package.rglob("*.py")}
    assert {file: calls for file, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from dill import loads",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "eval(text)",
        ),
        *("np.load(f)", "yaml.load(f)", "read(f, allow_pickle=True)", "run('ls', shell=True)", "os.system('ls')"),
    ],
)
def test_dangers_are_seen(line):
    assert dangers(line)


def test_no_false_alarm():
    assert dangers("model.eval()\ntorch.load(f, weights_only=True)\nast.literal_eval(t)\nyaml.safe_load(t)") == []
