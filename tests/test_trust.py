"""A config file from somebody else runs no code of theirs, whatever it says and wherever it says it (docs/security.md).

Every foreign target is a module of the test's own that leaves a mark when it is imported or called.
"""

import ast
import copy
import functools
import json
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

import pretrain
from pretrain.compose import compose, resolve
from pretrain.config import conf_dir
from pretrain.errors import UserError
from pretrain.hydra_configs import compose_config, composing
from pretrain.hydra_trust import SET_BY_HYDRA, _check_node
from pretrain.prepare import instantiate
from pretrain.trust import PARTS, locate
from tests.test_cli import assert_mistake
from tests.test_conf import NEEDS

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


OF_OURS = {  # classes and functions of pretrain that are no part of the group they are named in
    "trust.locate as an optimizer": [
        "optimizer={_target_: pretrain.trust.locate, _partial_: true, path: x, base: x, trusted: [foreign.run]}"
    ],
    "our sweeps as an optimizer": [
        "optimizer={_target_: pretrain.sweep.command.sweep, _partial_: true, arguments: [-m]}"
    ],
    "a part of another group": ["optimizer={_target_: pretrain.strategy.single.Single}"],
    "a class of none": ["checkpoint={_target_: pretrain.checkpoint.saver.Saver}"],
    "the base class": ["strategy={_target_: pretrain.strategy.base.Strategy}"],
    "the base class of models": ["model={_target_: pretrain.models.causal_lm.CausalLM, name_or_path: x}"],
    "the protocol of sinks": ["+sink.mine={_target_: pretrain.telemetry.sink.Sink}"],
    "a part that is no sink": ["+sink.mine={_target_: pretrain.strategy.single.Single}"],
    "a strategy as a domain": ["+evaluation.domains.more={_target_: pretrain.strategy.single.Single}"],
    "a domain that is none": ["+evaluation.domains.more=5"],
    "a domain without a target": ["+evaluation.domains.more={name: x}"],
    "a domain in free keys": ["model=scratch", "+model.overrides.x={_target_: pretrain.data.sources.sample.Python}"],
    "a domain in a free list": [
        "strategy=deepspeed",
        "+strategy.config.x=[[{_target_: pretrain.data.sources.sample.Python}]]",
    ],
    "a key of Hydra's in free keys": ["model=scratch", "+model.overrides.x={_args_: [1]}"],
    "a schedule that is none": ["scheduler={_target_: pretrain.optim.schedule.warmup, _partial_: true}"],
    "what the schedules import": ["scheduler={_target_: pretrain.optim.schedule.math.cos, _partial_: true}"],
    "a class as a schedule": ["scheduler={_target_: pretrain.optim.adamw.AdamW, _partial_: true, lr: 1}"],
    "a schedule that is called": ["scheduler={_target_: pretrain.optim.schedule.cosine, _partial_: false}"],
    "a class that is bound": ["+optimizer._partial_=true"],
    "a partial that is no boolean": ["scheduler._partial_=1"],
    "what a module of ours imports": ["optimizer={_target_: pretrain.data.workers.subprocess.Popen, args: [touch, x]}"],
    "what it imports, by its real name": ["dataset={_target_: pretrain.data.sources.local.Source}"],
    "what it imports of the same base": ["dataset={_target_: pretrain.prepare.Source}"],
    "a module": ["optimizer={_target_: pretrain.optim}"],
}


@pytest.mark.parametrize("name", OF_OURS)
def test_a_group_makes_its_own_parts_only(name, command, tmp_path, mark):
    overrides = [f"++{word}" if "={" in word and word[0] != "+" else word for word in OF_OURS[name]]
    code, _, err = command([f"output_dir={tmp_path / 'run'}", *overrides])
    assert code == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert any(key in err for key in ("_target_=", "_partial_=", "_args_=", "evaluation.domains"))
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


def test_no_function_by_another_name():
    """Without the comparison with its real name this would be a class of Python's, called with what a file says."""
    with pytest.raises(UserError, match=r"subprocess\.Popen': a config may name pretrain's own parts only"):
        locate("optimizer", "pretrain.data.workers.subprocess.Popen", PARTS["optimizer"])


@pytest.mark.parametrize("group", PARTS)
def test_every_part_is_made_without_a_trace(group, tmp_path, monkeypatch):
    """To make an object is all that a config file can do: it writes nothing and starts nothing."""
    monkeypatch.chdir(tmp_path)
    events = []
    watched = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "os.mkdir", "os.remove", "os.rename")

    def watch(event, arguments):
        if listening and (event in watched or (event == "open" and set(str(arguments[1])) & set("wax+"))):
            events.append((event, arguments))

    listening = False
    sys.addaudithook(watch)
    for file in (conf_dir() / group).glob("*.yaml"):
        word = f"{group}=[{file.stem}]" if group == "sink" else f"{group}={file.stem}"
        config = resolve(compose([word, *(NEEDS.get((group, file.stem)) or [])]))
        nodes = config["sink"].values() if group == "sink" else [config[group]]
        listening = True
        for node in nodes:
            instantiate(node)
        listening = False
    assert events == []
    assert list(tmp_path.iterdir()) == []


THEIRS = {  # both ran a stranger's code once
    "a function of ours that imports a name": (
        "optimizer/mine.yaml",
        "{_target_: pretrain.trust.locate, _partial_: true, target: foreign.run, base: x, trusted: [foreign.run]}\n",
        "defaults: [{override /optimizer: mine}]\n",
        [],
    ),
    "a sweep inside of a run": (
        "optimizer/mine.yaml",
        "{_target_: pretrain.sweep.command.sweep, _partial_: true, config_dir: null, spoken: {}, overrides: "
        "['+hydra.callbacks.x._target_=foreign.run']}\n",
        "defaults: [{override /optimizer: mine}]\n",
        ["strategy=ddp", "devices=2"],
    ),
    "callbacks in conf/local's place": (
        "local/default.yaml",
        "# @package _global_\nhydra: {callbacks: {x: {_target_: foreign.run}}}\n",
        "",
        [],
    ),
    "shell lines of a launcher of theirs": (
        "hydra/launcher/mine.yaml",
        "defaults: [submitit_local]\nsetup: ['touch ran']\n",
        "",
        ["hydra/launcher=mine"],
    ),
    "a launcher of theirs": (
        "hydra/launcher/mine.yaml",
        "{_target_: hydra_plugins.foreign.Launcher}\n",
        "defaults: [{override /hydra/launcher: mine}]\n",
        ["-m"],
    ),
    "logging of theirs": (
        "hydra/job_logging/mine.yaml",
        "{version: 1, formatters: {x: {(): foreign.run}}}\n",
        "",
        ["hydra/job_logging=mine"],
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_foreign_folder_of_configs_runs_nothing(name, command, base_arguments, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where, content, chosen, more = THEIRS[name]
    theirs = experiment(tmp_path, "# @package _global_\n" + chosen)
    (tmp_path / "theirs" / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "theirs" / where).write_text(content)
    output = [] if "-m" in more or "hydra/launcher=mine" in more else [f"output_dir={tmp_path / 'run'}"]
    code, _, err = command([*theirs, *base_arguments, *output, "experiment=theirs", *more])
    assert code == 2, err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "site"}


def test_a_package_is_trusted_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab/__init__.py").write_text("import os\n")
    (tmp_path / "mylab/sinks.py").write_text("class Sink: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("sink.x", "mylab.sinks.Sink", PARTS["sink"], trusted=["mylab"]).__name__ == "Sink"
    for name in ("mylab.os.system", "mylabs.Sink", "mylab"):
        with pytest.raises(UserError, match=r"sink\.x\._target_="):
            locate("sink.x", name, PARTS["sink"], trusted=["mylab"])


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
    outcome = command([*theirs, *sweep, "lr=0"])
    assert_mistake(outcome, f"hydra.{key}")
    assert "set by a config file, which Hydra would execute" in outcome[2]
    assert not mark.exists()


@pytest.mark.parametrize("key", ["sweep_dir", "hydra.sweep.dir"])
def test_no_line_of_a_batch_script(key, command, tmp_path, mark, monkeypatch):
    """SLURM's script names the folder of its logs: a line end in it would begin a line that the shell runs."""
    monkeypatch.chdir(tmp_path)
    path = json.dumps(f"x\ntouch {tmp_path}/ran\n#")
    chosen = "# @package _global_\ndefaults: [{override /hydra/launcher: submitit_local}]\n"
    nodes = {"sweep_dir": f"sweep_dir: {path}\n", "hydra.sweep.dir": f"hydra: {{sweep: {{dir: {path}}}}}\n"}
    theirs = experiment(tmp_path, chosen + nodes[key])
    outcome = command([*theirs, "-m", "experiment=theirs"])
    assert_mistake(outcome, {"sweep_dir": "sweep_dir='x", "hydra.sweep.dir": "SLURM takes no line end"}[key])
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "site"}


def test_results_of_jobs_are_read_from_a_folder_of_this_command_alone(tmp_path):
    """submitit unpickles them, and what lies in a sweep's folder may be anybody's."""
    from pretrain.launch.slurm import fresh_folder

    (tmp_path / "sweep/.submitit").mkdir(parents=True)
    (tmp_path / "sweep/.submitit/1_0_result.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    one, two = (fresh_folder(str(tmp_path / "sweep/.submitit")) for _ in range(2))
    assert one != two
    for folder in (one, two):
        assert folder.parent == tmp_path / "sweep/.submitit"
        assert list(folder.iterdir()) == []
        assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "linked").symlink_to(tmp_path / "sweep")
    with pytest.raises(UserError, match=r"hydra\.launcher\.folder=.*linked: can't be written"):
        fresh_folder(str(tmp_path / "linked"))


def hydra_keys(node: dict, path: str = "") -> list[str]:
    """Every key of Hydra's own node that holds a value, an empty mapping or a list."""
    found = []
    for key, value in node.items():
        deeper = hydra_keys(value, f"{path}{key}.") if isinstance(value, dict) else []
        found += deeper or [f"{path}{key}"]
    return found


def other_than(value: object) -> object:
    """Another value of the same kind, with a line that a shell would run where there are words."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return ["touch x"]
    return {"x": "touch x"} if isinstance(value, dict) else "touch x"


def test_no_key_of_hydras_is_left_to_a_file():
    """Hydra executes what many of its keys say, and its next release may have more: each one with another value is refused,
    but for those few that a file may set."""
    with composing(conf_dir(), None) as hydra:
        node = compose_config(hydra, ["hydra/launcher=slurm"], RunMode.RUN).hydra
    expected = OmegaConf.to_container(node)
    words = ["hydra/launcher=slurm"]
    keys = [key for key in hydra_keys(expected) if not key.startswith(SET_BY_HYDRA)]
    dangerous = {"callbacks", "searchpath", "job.env_set", "job.env_copy", "launcher.setup", "sweeper._target_"}
    dangerous |= {"launcher.additional_parameters", "launcher._target_", "launcher.folder"}
    assert dangerous <= set(keys)
    assert any(key.startswith("job_logging") for key in keys)
    _check_node(expected, expected, words)
    allowed = set()
    for key in keys:
        found = copy.deepcopy(expected)
        *parents, last = key.split(".")
        within = functools.reduce(dict.__getitem__, parents, found)
        within[last] = other_than(within[last])
        try:
            _check_node(found, expected, words)
        except UserError as error:
            assert f"hydra.{parents[0] if parents else last}" in str(error)  # noqa: PT017
        else:
            allowed.add(key)
    numbers = {"nodes", "timeout_min", "signal_seconds", "max_requeues", "array_parallelism"}
    assert allowed == {
        "mode",
        "sweep.dir",
        "sweeper.max_batch_size",
        *(f"launcher.{number}" for number in numbers),
    } & set(keys)


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
    restricted = {
        "launch/meeting.py": ["pickle"]
    }  # its Unpickler finds a few classes alone: tests/launch/test_sockets.py
    assert {file: calls for file, calls in found.items() if calls} == restricted


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
