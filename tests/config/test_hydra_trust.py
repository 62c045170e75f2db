"""What Hydra itself would execute of a stranger's config file is refused before it starts."""

import copy
import functools
import json

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from pretrain.config.check import conf_dir
from pretrain.config.hydra_configs import compose_config, composing
from pretrain.config.hydra_trust import SET_BY_HYDRA, _check_node
from pretrain.runtime.errors import UserError
from tests.cli.test_cli import assert_mistake
from tests.foreign import experiment

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
    assert_mistake(outcome, {"sweep_dir": "sweep_dir='x", "hydra.sweep.dir": "SLURM does not accept a line end"}[key])
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "site"}


def test_results_of_jobs_are_read_from_a_folder_of_this_command_alone(tmp_path):
    """submitit unpickles them, and what lies in a sweep's folder may be anybody's."""
    from pretrain.sweep.launchers.slurm import fresh_folder

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
    assert_mistake(command([flag, str(tmp_path)]), f"{flag}: not supported")
