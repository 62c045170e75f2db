"""When report.html is written, and of which records."""

import pytest

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.report.sink import Report
from pretrain.telemetry.sinks.jsonl import Jsonl
from tests.telemetry.fed import Fed
from tests.telemetry.report.records import evaluation, eventful, sample, started, train, write_run

DATA = {"event": "data", "step": 5, "time": 5.0, "tokens_per_document": 9.0, "sources": {"statutes": {"tokens": 9}}}


def test_it_is_written_once_an_evaluation_with_all_that_comes_with_it(tmp_path):
    report, page = Fed(Report()), tmp_path / "report.html"
    report.open(tmp_path, RunStarted(0, 9, resumed=False))
    start = [
        started(total=9),
        evaluation(0, "law", "new", 3.0, 0.0),
        evaluation(0, "english", "base", 2.0, 0.0),
        sample(0, " as it was."),
        train(1),
    ]
    scores = [evaluation(5, "law", "new", 2.5, -0.5), evaluation(5, "english", "base", 2.25, 0.25)]
    for record in [*start, *scores, sample(5, " as it is now.")]:
        report.write(record)
    assert not page.exists()
    report.write(DATA)
    written = page.read_text()
    assert "learned law (perplexity 20.09 → 12.18" in written
    assert "forgot some of english" in written
    assert "as it is now." in written
    assert "statutes" in written
    assert "running" in written
    report.write(train(6))
    for domain, role in (("law", "new"), ("english", "base")):
        report.write(evaluation(6, domain, role, 2.0, -1.0))
    report.write(DATA | {"step": 6})  # so soon that drawing would take most of the time
    assert page.read_text() == written
    report.write({"event": "run_finished", "step": 9, "time": 9.0, "status": "stopped"})
    assert "stopped" in page.read_text()
    assert "perplexity 20.09 → 7.39" in page.read_text()


@pytest.mark.parametrize("after", [train(6), {"event": "checkpoint", "step": 5, "time": 5.0}])
def test_where_no_data_comes_with_an_evaluation(after, tmp_path):
    report, page = Fed(Report()), tmp_path / "report.html"
    report.open(tmp_path, RunStarted(0, 9, resumed=False))
    for record in (train(5), evaluation(5, "law", "new", 2.5, -0.5), sample(5, " as it is now.")):
        report.write(record)
    assert not page.exists()
    report.write(after)
    assert "as it is now." in page.read_text()


def test_it_goes_on_from_the_records_of_the_run_it_continues(tmp_path):
    write_run(tmp_path, eventful(400))
    jsonl, report = Jsonl(), Fed(Report())
    again = RunStarted(200, 400, resumed=True, pending_evaluation=True)
    for sink in (report, jsonl):
        sink.open(tmp_path, again)
    assert report.history.train.steps[-1] == 200
    assert report.history.domains["law"].last["step"] == 100, "that of step 200 is made again"
    for record in (started(200, resumed=True), evaluation(200, "law", "new", 2.0, -1.0), train(201)):
        for sink in (report, jsonl):
            sink.write(record)
    jsonl.close()
    assert report.history.train.steps == [*range(1, 202)]
    assert report.history.domains["law"].change() == -1.0


def test_what_could_not_be_written_is_tried_again_and_not_drawn_again(tmp_path, monkeypatch):
    """With every record of a run of several days: what that costs must not be a drawing."""
    report, page, drawn = Fed(Report()), tmp_path / "report.html", []
    monkeypatch.setattr("pretrain.telemetry.report.page.run_page", lambda run: drawn.append(run) or "page")
    report.open(tmp_path, RunStarted(0, 9, resumed=False))
    page.mkdir()  # no file can take its place
    report.write(evaluation(5, "law", "new", 2.5, -0.5))
    for step in (6, 7):
        with pytest.raises(OSError, match=r"report\.html"):
            report.write(train(step))
    page.rmdir()
    report.write(train(8))
    assert page.read_text() == "page"
    assert len(drawn) == 1


def test_without_metrics_jsonl_a_resumed_run_shows_what_came_with_its_checkpoint(tmp_path):
    """The perplexity before the run is computed from the change, if the record of step 0 is not among the records."""
    report = Fed(Report())
    saved = (train(4), evaluation(5, "law", "new", 2.5, -0.5))
    report.open(tmp_path, RunStarted(5, 9, resumed=True, records=saved))
    assert report.history.train.steps == [4]
    for record in (started(5, resumed=True, total=9), evaluation(9, "law", "new", 2.0, -1.0)):
        report.write(record)
    report.write({"event": "run_finished", "step": 9, "time": 9.0, "status": "finished"})
    assert "learned a lot of law (perplexity 20.09 → 7.39" in (tmp_path / "report.html").read_text()
