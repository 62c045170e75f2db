"""What becomes of the metrics of evaluation tasks: records, run.json, the console, tables, charts and the numbers of a sweep."""

import csv
import json

import pytest

from pretrain.sweep.measure import measures_of, objective_in, objectives
from pretrain.telemetry.events import Evaluated, MetricsEvent, RolledBack, RunFinished, RunStarted
from pretrain.telemetry.history import History
from pretrain.telemetry.metric import Metric
from pretrain.telemetry.monitor import Monitor
from pretrain.telemetry.record import scalars
from pretrain.telemetry.report.folder import read_run
from pretrain.telemetry.report.page import run_page
from pretrain.telemetry.run_file import RunFile
from pretrain.telemetry.sinks.csv import Csv
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records
from pretrain.telemetry.sinks.terminal_tables import measured


def measurement(step, value, stderr=0.1):
    accuracy = Metric("accuracy", value, "", "higher", stderr=stderr)
    return MetricsEvent(step, (accuracy, Metric("length", 10.0 * step, "tokens", domain="es")), 0.5)


@pytest.fixture
def run(tmp_path):
    monitor = Monitor({"jsonl": Jsonl(), "csv": Csv()}, run=tmp_path, log_every=1)
    file = RunFile(tmp_path, monitor.summary)
    events = [
        *(RunStarted(0, 8, resumed=False), Evaluated(0, (), 0.0), measurement(0, 0.25)),
        *(measurement(4, 0.5), measurement(8, float("nan"))),
    ]

    def feed(*more):
        for event in [*events, *more]:
            monitor(event)
            file(event)
        return tmp_path

    return feed


def test_records(run):
    found = [r for r in read_records(run() / "metrics.jsonl") if r["event"] == "metric"]
    assert {k: v for k, v in found[0].items() if k != "time"} == {
        "event": "metric",
        "step": 0,
        "name": "accuracy",
        "domain": None,
        "value": 0.25,
        "unit": "",
        "better": "higher",
        "stderr": 0.1,
    }
    assert [(r["step"], r["name"], r["domain"], r["value"]) for r in found[3:]] == [
        *((4, "length", "es", 40.0), (8, "accuracy", None, None), (8, "length", "es", 80.0))
    ]


def test_run_json_and_the_numbers_of_a_sweep(run):
    folder = run(RunFinished(8, "finished", 1))
    facts = json.loads((folder / "run.json").read_text())
    assert facts["metrics"]["es/length"] == {
        "name": "length",
        "domain": "es",
        "value": 80.0,
        "unit": "tokens",
        "better": "lower",
        "stderr": None,
        "step": 8,
    }
    assert facts["metrics"]["accuracy"]["value"] is None
    measures = measures_of(folder)
    assert (measures["metric/es/length"], measures["metric/accuracy"]) == (80.0, None)
    assert objective_in(measures, "metric/es/length") == 80.0
    assert objective_in(measures, "metric/no-such") is None
    assert objectives(folder, "metric/es/length") == {4: 40.0, 8: 80.0}
    assert objectives(folder, "metric/accuracy") == {4: 0.5}


def test_a_rollback_takes_them_back(run):
    folder = run(RolledBack(4, 8, "spike"))
    assert json.loads((folder / "run.json").read_text())["metrics"]["accuracy"]["value"] == 0.5
    assert json.loads((folder / "run.json").read_text())["metrics"]["es/length"]["step"] == 4
    with (folder / "metric.csv").open() as file:
        assert [(row["step"], row["name"], row["value"]) for row in csv.DictReader(file)] == [
            *(("0", "accuracy", "0.25"), ("0", "length", "0.0"), ("4", "accuracy", "0.5"), ("4", "length", "40.0"))
        ]


def test_paths_of_dashboards(run):
    found = [scalars(r) for r in read_records(run() / "metrics.jsonl") if r["event"] == "metric"]
    assert found[:2] == [{"metric/accuracy": 0.25, "metric/accuracy/stderr": 0.1}, {"metric/es/length": 0.0}]
    assert found[4] == {"metric/accuracy/stderr": 0.1}


def test_what_people_read(run):
    assert measured({"value": 0.4375, "stderr": 0.02, "unit": "points"}) == "0.4375 ± 0.02 points"
    assert measured({"value": 12345678.0}) == "1.2346e+07"
    assert measured({"value": None}) == "nan"
    folder = run()
    page = run_page(read_run(folder))
    assert "Metrics of evaluation tasks" in page
    assert "es/length" in page
    assert "lower is better" in page
    assert "Metrics of evaluation tasks" not in run_page(read_run(empty(folder)))


def empty(folder):
    records = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"metric"' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")
    return folder


def test_a_history_read_from_the_file_is_that_of_the_run(run):
    history = History(read_records(run() / "metrics.jsonl"))
    assert history.measured["accuracy"].first["value"] == 0.25
    assert history.metrics()["metric/es/length"] == 80.0
