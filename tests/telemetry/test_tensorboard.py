"""The event files, read back by TensorBoard's own reader."""

import pytest

from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.sinks.base import require
from pretrain.telemetry.sinks.tensorboard import TensorBoard


def train(step, loss):
    return {"event": "train", "step": step, "time": 1e9 + step, "loss": loss, "mfu": None}


def evaluation(step):
    return {"event": "evaluation", "step": step, "time": 1e9, "domain": "books", "role": "new", "perplexity": 9.0}


def written(folder, start, *records):
    sink = TensorBoard()
    sink.open(folder, start)
    for record in records:
        sink.write(record)
    sink.close()


@pytest.fixture
def read(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(tag):
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        return [(e.step, round(e.value, 4), e.wall_time) for e in events.Scalars(tag)], events

    return scalars


def test_a_resumed_run_has_each_step_once(tmp_path, read):
    """Stopped, gone on from step 2, and back from a checkpoint: all in the same second."""
    written(tmp_path, RunStarted(0, 9, resumed=False), evaluation(0), *(train(i, 1.0) for i in (1, 2, 3, 4)))
    written(tmp_path, RunStarted(2, 9, resumed=True), train(3, 2.0), train(4, 2.0), evaluation(4))
    written(tmp_path, RunStarted(3, 9, resumed=True), train(4, 3.0), {"event": "run_finished", "step": 4, "time": 1e9})
    losses, events = read("train/loss")
    assert losses == [(1, 1.0, 1e9 + 1), (2, 1.0, 1e9 + 2), (3, 2.0, 1e9 + 3), (4, 3.0, 1e9 + 4)]
    assert [step for step, _, _ in read("evaluation/books/perplexity")[0]] == [0]
    assert sorted(events.Tags()["scalars"]) == ["evaluation/books/perplexity", "train/loss"]


def test_a_run_that_starts_over_starts_its_curves_over(tmp_path, read):
    written(tmp_path, RunStarted(0, 9, resumed=False), train(1, 1.0), train(2, 1.0))
    written(tmp_path, RunStarted(0, 9, resumed=False), train(1, 2.0))
    assert [(s, v) for s, v, _ in read("train/loss")[0]] == [(1, 2.0)]


def test_layers_data_and_samples(tmp_path, read):
    layers = {"event": "layers", "step": 2, "time": 1e9, "layers": {"head": {"grad_norm": 0.5}}}
    data = {"event": "data", "step": 2, "time": 1e9, "tokens_per_document": 9.5, "sources": {"x": {"share": 1.0}}}
    sample = {
        "event": "sample",
        "step": 2,
        "time": 1e9,
        "domain": "books",
        "role": "new",
        "prompt": "The ",
        "text": "sea",
    }
    written(tmp_path, RunStarted(0, 9, resumed=False), layers, data, sample)
    losses, events = read("layers/head/grad_norm")
    assert losses == [(2, 0.5, 1e9)]
    assert {"data/tokens_per_document", "data/x/share"} < set(events.Tags()["scalars"])
    assert events.Tensors("sample/books")[0].tensor_proto.string_val == [b"**The **sea"]
    assert events.SummaryMetadata("sample/books").plugin_data.plugin_name == "text"


def test_a_killed_run_has_all_it_wrote(tmp_path, read):
    """Nothing waits in a buffer: the sink is never closed."""
    sink = TensorBoard()
    sink.open(tmp_path, RunStarted(0, 9, resumed=False))
    sink.write(train(1, 1.0))
    assert [(s, v) for s, v, _ in read("train/loss")[0]] == [(1, 1.0)]


def test_a_package_that_is_missing_is_said(tmp_path, monkeypatch):
    """A folder of that name, as W&B leaves one, is no package."""
    (tmp_path / "a_board").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"sink=board needs the package a_board: pip install 'pretrain\[a_board\]'"):
        require("a_board", sink="board")
