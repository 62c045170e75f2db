"""A config file from somebody else runs no code of theirs, whatever it says and wherever it says it (docs/security.md).

Every foreign target is a module of the test's own that leaves a mark when it is imported or called.
"""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pretrain.config.check import conf_dir
from pretrain.config.compose import compose, resolve
from pretrain.config.group_keys import GROUP_KEYS
from pretrain.config.schema import build_part
from pretrain.config.trust import MULTI_SELECT, PARTS, locate
from pretrain.runtime.errors import UserError
from tests.cli.test_cli import assert_mistake
from tests.config.test_conf import NEEDS
from tests.foreign import experiment

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "a part": ["optimizer._target_=foreign.run"],
    "a function of Python's": ["optimizer._target_=os.system"],
    "a partial": ["scheduler._target_=foreign.run", "scheduler._partial_=true"],
    "inside free keys": ["model=scratch", "+model.overrides.deep.er={_target_: foreign.run}"],
    "inside a list": ["strategy=deepspeed", "+strategy.config.some=[1, [{_target_: foreign.run}]]"],
    "a new domain": ["+evaluation.domains.more={_target_: foreign.run}"],
    "a sink": ["+sink.mine={_target_: foreign.Sink}"],
    "through one of our modules": ["optimizer._target_=pretrain.cli.main.os.system", "+optimizer.command=true"],
    "a method of ours": ["optimizer._target_=pretrain.optim.adamw.AdamW.__call__"],
    "a function of ours": ["dataset._target_=pretrain.runtime.files.finish_folder"],
    "our command line": ["dataset._target_=pretrain.cli.main.main", "+dataset.argv=['allow_targets=[os.system]']"],
    "a private name": ["dataset._target_=pretrain.cli.main._hydra_main"],
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
        "optimizer={_target_: pretrain.config.trust.locate, _partial_: true, path: x, base: x, trusted: [foreign.run]}"
    ],
    "our sweeps as an optimizer": [
        "optimizer={_target_: pretrain.sweep.command.sweep, _partial_: true, arguments: [-m]}"
    ],
    "a part of another group": ["optimizer={_target_: pretrain.strategy.single.Single}"],
    "a class of none": ["checkpoint={_target_: pretrain.checkpoint.writer.AsyncCheckpointWriter}"],
    "the base class": ["strategy={_target_: pretrain.strategy.base.Strategy}"],
    "the base class of models": ["model={_target_: pretrain.models.causal_lm.CausalLM, name_or_path: x}"],
    "the protocol of sinks": ["+sink.mine={_target_: pretrain.telemetry.sinks.base.Sink}"],
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
    "what a module of ours imports": [
        "optimizer={_target_: pretrain.data.tokenization.workers.subprocess.Popen, args: [touch, x]}"
    ],
    "the base class, where a module of ours imports it": ["dataset={_target_: pretrain.data.sources.local.Source}"],
    "a part, where another module of ours imports it": [
        "checkpoint={_target_: pretrain.checkpoint.store.CheckpointConfig}"
    ],
    "a name that is imported for annotations only": ["dataset={_target_: pretrain.run.prepare.Source}"],
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


@pytest.mark.parametrize("name", ["tools.data_order.sitecustomize.Finder", "tools.soak.Process", "cli.main.main"])
@pytest.mark.parametrize("group", PARTS)
def test_no_module_outside_the_group_is_imported(name, group, monkeypatch):
    for module in [module for module in sys.modules if module.startswith(("pretrain.tools", "pretrain.cli"))]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match="not a part that is allowed here"):
        locate(group, f"pretrain.{name}", PARTS[group])
    assert not [module for module in sys.modules if module.startswith(("pretrain.tools", "pretrain.cli"))]


def test_the_module_of_the_data_order_acts_under_pythons_name_only(tmp_path):
    """Under its name it watches the trainer and executes the module that it hides."""
    (tmp_path / "sitecustomize.py").write_text("print('hidden')\n")
    count = "import sys; print(sum(type(f).__name__ == 'Finder' for f in sys.meta_path))"
    code = f"import pretrain.tools.data_order.sitecustomize; {count}"
    outputs = []
    for path in (tmp_path, f"{ROOT / 'pretrain/tools/data_order'}:{tmp_path}"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": f"{path}:{ROOT}"},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.split())
    assert outputs == [["hidden", "0"], ["hidden", "1"]]


def test_no_function_by_another_name():
    """Without the comparison with its real name this would be something of Python's, called with what a file says."""
    with pytest.raises(UserError, match=r"math\.cos': a config may name pretrain's own parts only"):
        locate("optimizer", "pretrain.optim.schedule.math.cos", PARTS["optimizer"])
    with pytest.raises(UserError, match=r"store\.CheckpointConfig': a config may name pretrain's own parts only"):
        locate("checkpoint", "pretrain.checkpoint.store.CheckpointConfig", PARTS["checkpoint"])


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
        word = f"{group}=[{file.stem}]" if group in MULTI_SELECT else f"{group}={file.stem}"
        config = resolve(compose([word, *(NEEDS.get((group, file.stem)) or [])]))
        nodes = config[group].values() if group in MULTI_SELECT else [config[group]]
        of_all = {key.name for key in fields(GROUP_KEYS[group])} if group in GROUP_KEYS else set()
        nodes = [{key: value for key, value in node.items() if key not in of_all} for node in nodes]
        listening = True
        for node in nodes:
            build_part(node)
        listening = False
    assert events == []
    assert list(tmp_path.iterdir()) == []


THEIRS = {  # both ran a stranger's code once
    "a function of ours that imports a name": (
        "optimizer/mine.yaml",
        "{_target_: pretrain.config.trust.locate, _partial_: true, target: foreign.run, base: x, trusted: [foreign.run]}\n",
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
    (tmp_path / "mylab/sinks.py").write_text("from pretrain.telemetry.sinks.csv import Csv\nclass Sink(Csv): pass\n")
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
    assert_mistake(command(["model=scratch", hidden]), "the start of an interpolation")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["_args_=[1]", "_recursive_=false", "_convert_=none"])
def test_no_other_key_of_hydras(key, command):
    assert_mistake(command([f"+optimizer.{key}"]), f"AdamW has no {key.split('=')[0]!r}")


FILES = {
    "allow_targets": "allow_targets: [foreign.Sink]\nsink: {{mine: {{_target_: foreign.Sink}}}}",
    "model.trust_remote_code": "model: {{trust_remote_code: true}}",
    "evaluation.lm_eval.include_path": "evaluation: {{lm_eval: {{include_path: tasks}}}}",
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
