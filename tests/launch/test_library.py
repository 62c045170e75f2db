"""A run from Python: the example of docs/library.md, and a process that is left as it was."""

import contextlib
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pretrain
from pretrain.runtime.console import end_log
from pretrain.runtime.signals import SIGNALS
from pretrain.telemetry.events import StepDone
from pretrain.telemetry.run_file import read_run_file

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
PUBLIC = """DistributedContext EvaluationTask Hook Loader Metric ModelFactory ModelTransform RunConfig RunResult Sink Source
StepConfig Strategy Trainer UserError compose evaluate tokenize train""".split()


@pytest.fixture(autouse=True)
def as_at_a_prompt():
    """As the process of a person is before the first run: pytest's workers ignore Ctrl-C, and commands that other tests have run
    in this process have frozen objects and opened a log."""
    gc.unfreeze()
    end_log()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def state_of_the_process():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    logger = logging.getLogger("pretrain")
    return (
        dict(os.environ),
        handlers,
        gc.get_threshold(),
        gc.get_freeze_count(),
        warnings.filters[:],
    ), logger.handlers[:]


def test_the_public_names():
    assert set(PUBLIC) <= set(dir(pretrain))
    assert sorted(pretrain.__all__) == PUBLIC
    assert all(getattr(pretrain, name) is not None for name in PUBLIC)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pretrain.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pretrain.nothing  # noqa: B018


def test_importing_it_imports_no_torch():
    code = "import sys, pretrain; dir(pretrain); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_of_the_page(base_arguments, tmp_path, monkeypatch, corpus, capsys):
    (tmp_path / "books").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    own, compose = (
        [a for a in base_arguments if not a.startswith(("dataset=", "dataset.", "max_steps"))],
        pretrain.compose,
    )
    monkeypatch.setattr(pretrain, "compose", lambda words: compose([*own, *words]), raising=False)
    code, _ = examples()
    before = state_of_the_process()
    exec(compile(code, str(PAGE), "exec"), {})
    assert state_of_the_process() == before
    shown = capsys.readouterr().out
    assert "finished 20 outputs/from-python" in shown
    assert read_run_file(tmp_path / "outputs/from-python")["status"] == "finished"


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_loop_from_its_parts(tmp_path, monkeypatch, corpus, capsys):
    """At most 15 lines. It trains: the loss of the last steps is below that of the first."""
    (tmp_path / "books").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    _, code = examples()
    assert len([line for line in code.splitlines() if line]) <= 15
    before = state_of_the_process()
    names: dict = {}
    exec(
        compile(code.replace("listeners=[print]", "listeners=[events.append]"), str(PAGE), "exec"),
        names | {"events": (events := [])},
    )
    assert state_of_the_process() == before
    losses = [float(event.loss) for event in events if isinstance(event, StepDone)]
    assert len(losses) == 20
    assert sum(losses[-3:]) < sum(losses[:3])
    assert capsys.readouterr().out == f"{20 * 8 * 64}\n"


def test_an_evaluation_from_python(base_arguments, tmp_path):
    words = [*base_arguments, "task=evaluation", f"output_dir={tmp_path / 'scores'}"]
    before = state_of_the_process()
    result = pretrain.evaluate(pretrain.compose(words))
    assert state_of_the_process() == before
    assert (result.status, result.step) == ("finished", 0)
    assert {name: score["loss"] > 0 for name, score in result.metrics["results"].items()} == {
        "corpus0": True,
        "other": True,
    }
    with pytest.raises(pretrain.UserError, match="task=pretraining: this function needs a config with task=evaluation"):
        pretrain.evaluate(pretrain.compose(base_arguments))


def test_a_mistake_raises_and_exits_nothing(base_arguments, tmp_path):
    with pytest.raises(pretrain.UserError, match="unknown key 'learning_rate'; here it is 'lr'"):
        pretrain.compose(["learning_rate=1"])
    with pytest.raises(pretrain.UserError, match="no such choice"):
        pretrain.compose(["strategy=nope"])
    before = state_of_the_process()
    config = pretrain.compose([*base_arguments, f"output_dir={tmp_path}", "dataset.nameOrPath=/nowhere"])
    with pytest.raises(pretrain.UserError, match="/nowhere"):
        pretrain.train(config)
    assert state_of_the_process() == before


def test_a_stopped_run_is_resumed(base_arguments, tmp_path):
    run = tmp_path / "run"
    words = [*base_arguments, f"output_dir={run}", "max_steps=8", "sink=[jsonl]"]
    stop = "+sink.stop={_target_: tests.stopper.Stopper, event: train, at: 3}"
    config = pretrain.compose([*words, "allow_targets=[tests.stopper.Stopper]", stop])
    before = state_of_the_process()
    result = pretrain.train(config)
    assert (result.status, result.step) == ("stopped", 3)
    assert state_of_the_process() == before
    result = pretrain.train(pretrain.compose(words))
    assert (result.status, result.step, result.folder) == ("finished", 8, run)
    assert result.metrics["train_loss"] > 0


def test_ctrl_c_works_in_the_next_cell(base_arguments, tmp_path):
    pretrain.train(pretrain.compose([*base_arguments, f"output_dir={tmp_path}", "max_steps=1"]))
    reached = False
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert not reached
