"""train.csv and its like: whole tables, each row once, whatever happened on the way."""

import csv
import sys

import pandas
import pytest

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.sinks.csv import Csv

FRESH = RunStarted(0, 9, resumed=False)


def train(step, **more):
    return {"event": "train", "step": step, "time": 1.5, "loss": 0.1 * step, "mfu": None, **more}


def evaluation(step, domain="books"):
    return {"event": "evaluation", "step": step, "time": 2.0, "domain": domain, "loss": 1 / 3}


def written(folder, start, *records):
    sink = Csv()
    sink.open(folder, start)
    for record in records:
        sink.write(record)
    sink.close()


def table(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text, strict=True))


def test_tables(tmp_path):
    hard = 'a "b", c\nd; é'
    written(tmp_path, FRESH, {"event": "run_started", "step": 0}, evaluation(0, hard), train(1), train(2))
    assert (tmp_path / "train.csv").read_bytes() == b"step,time,loss,mfu\r\n1,1.5,0.1,\r\n2,1.5,0.2,\r\n"
    (row,) = table(tmp_path / "evaluation.csv")
    assert row["domain"] == hard
    frame = pandas.read_csv(tmp_path / "evaluation.csv")
    assert (frame.domain[0], frame.loss[0]) == (hard, 1 / 3)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["evaluation.csv", "train.csv"]


def test_a_row_for_each_layer_and_source(tmp_path):
    layers = {"event": "layers", "step": 2, "time": 1.0, "layers": {"a": {"norm": 1.0}, "b": {"norm": 2.0}}}
    data = {"event": "data", "step": 2, "time": 1.0, "tokens_per_document": 9.5, "sources": {"x": {"tokens": 5}}}
    written(tmp_path, FRESH, layers, data)
    assert [(r["step"], r["layer"], r["norm"]) for r in table(tmp_path / "layers.csv")] == [
        ("2", "a", "1.0"),
        ("2", "b", "2.0"),
    ]
    (row,) = table(tmp_path / "data.csv")
    assert (row["source"], row["tokens"], row["tokens_per_document"]) == ("x", "5", "9.5")


@pytest.mark.parametrize("torn", [b"", b"4,1.5,0.", b"4,1.5,0.4,\r"])
def test_a_resumed_run_has_each_row_once(torn, tmp_path):
    written(tmp_path, FRESH, evaluation(0), train(1), train(2), evaluation(2), train(3))
    with (tmp_path / "train.csv").open("ab") as file:
        file.write(torn)
    again = [evaluation(2), train(3), train(4)]
    written(tmp_path, RunStarted(2, 9, resumed=True, pending_evaluation=True), *again)
    assert [r["step"] for r in table(tmp_path / "train.csv")] == ["1", "2", "3", "4"]
    assert [r["step"] for r in table(tmp_path / "evaluation.csv")] == ["0", "2"]
    written(tmp_path, FRESH, train(1))
    assert [r["step"] for r in table(tmp_path / "train.csv")] == ["1"]
    assert not (tmp_path / "evaluation.csv").exists()


@pytest.mark.parametrize(
    "line",
    [
        *(b"1", b'1,"2,3', b"x,1.5,0.4,0.3", b"", b"1,2,3,4,5", b"\xff,1,2,3", b"\0\0\0", b"4,1\n5,2,3"),
        *("²,1,2,3".encode(), b"9" * 5000 + b",1,2,3", pytest.param(b"4,1,2," + b"3" * 200_000, id="a long cell")),
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_broken_row_anywhere_loses_no_other(line, tmp_path, capsys):
    csv.field_size_limit(sys.maxsize)  # as after reading data of this format
    written(tmp_path, FRESH, train(1), train(2), train(3))
    path = tmp_path / "train.csv"
    header, first, *rest = path.read_bytes().split(b"\r\n")
    path.write_bytes(b"\r\n".join([header, first, line, *rest]))
    spoilt = path.read_bytes()
    written(tmp_path, RunStarted(3, 9, resumed=True), train(4))
    assert [r["step"] for r in table(path)] == ["1", "2", "3", "4"]
    assert (tmp_path / "train.csv.broken").read_bytes() == spoilt
    assert f"{path}:3: not a row" in capsys.readouterr().err


@pytest.mark.parametrize("appended", [[], [b"2,1.5,0.2,\r\n"]], ids=["saved", "saved while the run appended"])
def test_a_table_that_another_program_has_saved_with_its_own_ends_of_lines_keeps_its_rows(appended, tmp_path):
    path = tmp_path / "train.csv"
    written(tmp_path, FRESH, train(1), *([] if appended else [train(2)]))
    path.write_bytes(b"".join([path.read_bytes().replace(b"\r\n", b"\n"), *appended]))
    written(tmp_path, RunStarted(2, 9, resumed=True), train(3))
    assert path.read_bytes() == b"step,time,loss,mfu\r\n1,1.5,0.1,\r\n2,1.5,0.2,\r\n3,1.5,0.30000000000000004,\r\n"
    assert [file.name for file in tmp_path.iterdir()] == ["train.csv"]


def test_records_that_have_gained_keys_and_lost_some(tmp_path):
    """Another version continues the run."""
    written(tmp_path, FRESH, train(1), train(2))
    later = train(3, goodput=0.9)
    del later["mfu"]
    written(tmp_path, RunStarted(2, 9, resumed=True), later, train(4))
    rows = table(tmp_path / "train.csv")
    assert list(rows[0]) == ["step", "time", "loss", "mfu", "goodput"]
    assert [(r["step"], r["goodput"]) for r in rows] == [("1", ""), ("2", ""), ("3", "0.9"), ("4", "")]


def test_a_full_disk_costs_no_row(tmp_path, capsys):
    sink = Csv()
    sink.open(tmp_path, FRESH)
    sink.write(train(1))
    file = sink._tables["train"]._file
    real = file._file
    with open("/dev/full", "ab", buffering=0) as full:
        file._file = full
        sink.write(train(2))
        sink.write(train(3))
    file._file = real
    sink.write(train(4))
    sink.close()
    assert [r["step"] for r in table(tmp_path / "train.csv")] == ["1", "2", "3", "4"]
    assert (
        capsys.readouterr().err.count(
            "can't be written: No space left on device; its records are kept and written later"
        )
        == 1
    )


def test_the_parts_of_a_mixture_have_a_table_of_their_own(tmp_path):
    """It is cut on a resume like data.csv; a single dataset has none."""
    part = {"tokens": 5, "share": 0.5, "wanted": 0.75, "epochs": 1.5}
    data = {"event": "data", "time": 1.0, "sources": {"es/x": {"tokens": 5}}, "parts": {"es": part, "replay": part}}
    written(tmp_path, FRESH, data | {"step": 2}, data | {"step": 4})
    rows = [(r["step"], r["part"], r["tokens"], r["wanted"], r["epochs"]) for r in table(tmp_path / "parts.csv")]
    assert rows == [(step, name, "5", "0.75", "1.5") for step in ("2", "4") for name in ("es", "replay")]
    assert "parts" not in table(tmp_path / "data.csv")[0]
    written(tmp_path, RunStarted(2, 9, resumed=True), data | {"step": 4})
    assert [r["step"] for r in table(tmp_path / "parts.csv")] == ["2", "2", "4", "4"]
    (tmp_path / "alone").mkdir()
    written(tmp_path / "alone", FRESH, data | {"step": 2, "parts": {"es": part}})
    assert not (tmp_path / "alone" / "parts.csv").exists()
