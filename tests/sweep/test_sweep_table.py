"""sweep.json and sweep.html from the folders of jobs."""

import json
import shutil

import pytest

from pretrain.runtime.errors import UserError
from pretrain.sweep import table
from pretrain.sweep.job import lock_of
from pretrain.sweep.measure import measures_of, objective_in
from pretrain.sweep.page import page, varying
from pretrain.sweep.show import show

FACTS = {"command": "python -m pretrain -m lr=1,2", "metric": "new_loss", "direction": "minimize"}


@pytest.fixture
def sweep(fabricate, tmp_path):
    """Six jobs: 0 gains most, 1 forgets least, 2 is beaten by both; 3 failed, 4 waits, 5 was killed in the middle."""
    way = [(0, "books", "new", 0.0), (5, "books", "new", -0.3), (0, "old", "base", 0.0), (5, "old", "base", 0.1)]
    fabricate("lr=0.1", "strategy=ddp", new=(3.0, -1.0), base=(5.0, 0.5), evaluated=way)
    fabricate("lr=0.01", "strategy=ddp", new=(3.5, -0.5), base=(4.6, 0.1), evaluated=way)
    fabricate("lr=0.001", "strategy=ddp", new=(3.6, -0.4), base=(4.7, 0.2))
    fabricate("lr=0.1", "strategy=<b>", status="failed", error="strategy: no <b>")
    fabricate("lr=0.1", "strategy=fsdp", status="waiting")
    fabricate("lr=0.01", "strategy=fsdp", status="running").write(locked=True)
    return tmp_path / "sweep"


def test_the_table(sweep):
    made = table.write(sweep, **FACTS)
    assert json.loads((sweep / "sweep.json").read_text()) == made
    assert [row["number"] for row in made["jobs"]] == list(range(6))
    assert [row["status"] for row in made["jobs"]] == ["finished"] * 3 + ["failed", "waiting", "stopped"]
    assert made["best"] == 0
    assert made["pareto"] == [0, 1]
    first = made["jobs"][0]
    assert first["folder"] == first["name"] == "lr=0.1,strategy=ddp"
    assert (first["objective"], first["new_loss"], first["new_delta"], first["forgetting"]) == (3.0, 3.0, -1.0, 0.5)
    assert first["command"] == "python -m pretrain lr=0.1 strategy=ddp"
    assert first["tokens_per_second"] == 1000.0
    assert made["jobs"][3]["error"] == "strategy: no <b>"
    assert made["jobs"][3]["objective"] is None


def test_another_metric_ranks_the_same_jobs_anew(sweep):
    assert table.write(sweep, **FACTS | {"metric": "forgetting"})["best"] == 1
    assert table.write(sweep, **FACTS | {"direction": "maximize"})["best"] == 2
    assert table.write(sweep, **FACTS | {"metric": "nobody.loss"})["best"] is None


def test_a_job_at_work_is_running(sweep):
    job, _ = table.jobs_in(sweep)[5]
    with job.exclusive():
        assert table.write(sweep, **FACTS)["jobs"][5]["status"] == "running"


def test_read_tells_how_things_stand_now(sweep, fabricate):
    table.write(sweep, **FACTS)
    fabricate("lr=0.01", "strategy=fsdp", new=(2.0, -2.0))
    told = table.read(sweep)
    assert (told["best"], told["status"]) == (5, "stopped"), "nobody is at work: the command was killed"


def test_a_job_that_nobody_beats_is_on_the_front_and_equals_stay():
    rows = [{"number": i, "status": "finished", "new_delta": g, "forgetting": f} for i, (g, f) in enumerate(POINTS)]
    assert table.pareto(rows) == [3, 0, 1, 4]
    rows[3]["status"] = "failed"
    assert table.pareto(rows) == [0, 1, 4]


POINTS = [(-1.0, 0.2), (-0.5, 0.1), (-0.4, 0.1), (-2.0, 0.9), (-0.5, 0.1), (-0.9, None)]


@pytest.mark.parametrize(
    ("metric", "value"),
    (
        {"new_loss": 4.0, "new_delta": -1.0, "forgetting": 0.5, "train_loss": 5.0, "tokens_per_second": 7.0}
        | {"books.loss": 4.0, "old.delta_loss": 0.5, "old.perplexity": None, "nobody.loss": None}
    ).items(),
)
def test_objectives(metric, value, fabricate):
    job = fabricate("lr=1", new=(4.0, -1.0), base=(6.0, 0.5), speed=7.0)
    assert objective_in(measures_of(job.folder), metric) == value


def test_a_torn_or_missing_file_is_no_number(fabricate):
    job = fabricate("lr=1", new=(4.0, -1.0))
    metrics = job.folder / "metrics.jsonl"
    metrics.write_bytes(b'5, "loss": 3}\n' + metrics.read_bytes() + b'{"event": "train", "los')
    assert measures_of(job.folder)["train_loss"] == 5.0
    for file in (metrics, job.folder / "run.json"):
        file.unlink()
    measures = measures_of(job.folder)
    assert {v for k, v in measures.items() if k != "results"} == {None}


@pytest.mark.parametrize(
    ("content", "says"), [(None, "it has no sweep.json"), ("{", "can't be read"), ("[]", "can't be read")]
)
def test_a_folder_that_is_no_sweep(content, says, tmp_path):
    if content:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=says):
        table.read(tmp_path)


def test_the_page_shows_the_jobs_ranked_and_escaped(sweep):
    made = table.write(sweep, **FACTS)
    (sweep / made["jobs"][1]["folder"] / "report.html").write_text("")
    html = page(sweep, made)
    order = [html.rindex(name) for name in ("lr=0.1,strategy=ddp", "lr=0.01,strategy=ddp<", "lr=0.001,strategy=ddp<")]
    assert order[1:] == sorted(order[1:])
    assert "Best of 3: lr=0.1,strategy=ddp, new-domain loss 3.0000; it gained 1.000" in html
    assert 'href="lr%3D0.01%2Cstrategy%3Dddp/report.html"' in html
    assert "strategy: no &lt;b&gt;" in html
    assert "<b>&" not in html
    assert "no <b>" not in html
    assert html.count("<figure") == 4, "parallel coordinates, the front, the way of both kinds of domains"
    assert "python -m pretrain lr=0.1 strategy=ddp" in html


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium (Debian's package of that name)")
def test_the_page_in_a_browser(sweep):
    from tests.telemetry.report.test_browser import look

    table.write(sweep, **FACTS)
    seen, console = look(sweep / "sweep.html")
    assert console == []
    assert [frame["width"] for frame in seen] == [frame["scrolled"] for frame in seen], "no sideways scrolling"
    for frame in seen:
        assert frame["scripts"] == 0
        assert len(frame["charts"]) == 4
        assert all(width > 250 and height > 140 and len(label) > 15 for width, height, label in frame["charts"])


def test_the_page_of_a_sweep_without_any_result(fabricate, tmp_path):
    fabricate("lr=1", status="failed", error="no")
    html = page(tmp_path / "sweep", table.write(tmp_path / "sweep", **FACTS))
    assert "No job has finished yet; 1 failed." in html
    assert "<figure" not in html


def test_the_script_draws_the_page_of_a_sweep(sweep, tmp_path, monkeypatch):
    """As things stand now, and sweep.json stays the sweep's own."""
    from pretrain.tools.report import write_report

    table.write(sweep, **FACTS)
    told = (sweep / "sweep.json").read_bytes()
    assert write_report([sweep], None) == sweep / "sweep.html"
    assert ">stopped</span></h1>" in (sweep / "sweep.html").read_text()
    assert write_report([sweep], tmp_path / "page.html").read_text() == (sweep / "sweep.html").read_text()
    assert (sweep / "sweep.json").read_bytes() == told


def test_the_script_does_not_write_into_a_table_being_written(sweep, monkeypatch):
    from pretrain.tools import report

    table.write(sweep, **FACTS)
    monkeypatch.setattr(report, "write_page", lambda path, text: lock_of(sweep, "table.lock", wait=False))
    assert report.write_report([sweep], None) is None, "it holds the lock while it writes"


def test_keys_that_vary():
    rows = [{"overrides": ["lr=1", "max_steps=3"]}, {"overrides": ["lr=2", "max_steps=3", "+a.b=x=y"]}]
    assert varying(rows) == {"lr": ["1", "2"], "a.b": [None, "x=y"]}


def test_the_table_on_the_terminal(sweep, capsys):
    show(sweep, table.write(sweep, **FACTS))
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if "strategy=" in line]
    assert names[:3] == ["lr=0.1,strategy=ddp", "lr=0.01,strategy=ddp", "lr=0.001,strategy=ddp"]
    assert [line for line in lines if line.endswith(" failed: strategy: no <b>")]
    assert str(sweep / "sweep.html") in lines[-1]
