"""metrics.jsonl: each step once, whatever was lost in between."""

import json

import pytest

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records, records_until, tail


def lines(path, steps):
    path.write_text("".join(json.dumps({"event": "train", "step": s, "time": 0.0}) + "\n" for s in steps))


def test_a_resumed_run_drops_the_records_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines(path, [0, 1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"event": "train", "st')  # killed in the middle of a line
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(2, 9, resumed=True))
    sink.write({"event": "train", "step": 3, "time": 1.0})
    sink.close()
    assert [r["step"] for r in read_records(path)] == [0, 1, 2, 3]
    assert read_records(path)[-1]["time"] == 1.0


def test_a_run_that_starts_over_starts_its_file_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines(path, [0, 0, 1])
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(0, 9, resumed=False))
    sink.close()
    assert read_records(path) == []


BROKEN = [
    b'{"st',
    b"3",
    b"null",
    b"[]",
    b'{"event": "train"}',
    b'{"step": "1"}',
    b"\xff\xfe",
    b"[" * 30_000,
    b"\0" * 64,
]


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: repr(line[:12]))
def test_a_broken_line_anywhere_is_named_and_loses_no_other(line, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n' + line + b'\n{"event": "train", "step": 2}\n')
    assert [r["step"] for r in read_records(path)] == [1, 2]
    assert capsys.readouterr().err.startswith(f"{path}:2: not a record")
    assert [r["step"] for r in tail(path)] == [1, 2]


def test_a_run_goes_on_behind_a_broken_line_and_keeps_the_file(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines(path, [0, 1, 2, 3])
    spoilt = path.read_text().replace('"step": 1', '"st\0p": 1')
    path.write_text(spoilt)
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(2, 9, resumed=True))
    sink.write({"event": "train", "step": 3, "time": 0.0})
    sink.close()
    assert [r["step"] for r in read_records(path)] == [0, 2, 3]
    assert (tmp_path / "metrics.jsonl.broken").read_text() == spoilt
    assert f"{path}:2: not a record" in capsys.readouterr().err


def test_not_a_number_is_refused(tmp_path):
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(0, 1, resumed=False))
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write({"event": "train", "step": 1, "time": 0.0, "loss": float("nan")})


def test_a_run_that_goes_on_has_not_finished_and_evaluates_again_what_it_owes(tmp_path):
    """Killed between its last record and its run.json, a finished run comes to its end a second time."""
    path = tmp_path / "metrics.jsonl"
    records = [{"event": "train", "step": 2}, {"event": "evaluation", "step": 1}, {"event": "evaluation", "step": 2}]
    ends = [{"event": "run_finished", "step": 1, "status": "stopped"}]
    ends += [{"event": "run_finished", "step": 2, "status": "finished"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records + ends))
    assert records_until(path, RunStarted(2, 9, resumed=True)) == [*records, ends[0]]
    assert records_until(path, RunStarted(2, 9, resumed=True, pending_evaluation=True)) == [*records[:2], ends[0]]


def test_a_line_torn_in_the_middle_of_a_character(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"event": "evaluation", "step": 1, "domain": "да"}, ensure_ascii=False)
    path.write_bytes(f"{whole}\n{whole[:-4]}".encode()[:-1])
    assert read_records(path) == [json.loads(whole)]


def test_records_that_a_checkpoint_brought_are_put_back_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines(path, [0, 1, 2])
    brought = tuple({"event": "train", "step": s, "time": 0.0} for s in (2, 3, 4, 5))
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(4, 9, resumed=True, records=brought))
    sink.close()
    assert [r["step"] for r in read_records(path)] == [0, 1, 2, 3, 4]


def test_without_a_file_the_records_that_a_checkpoint_brought_stand_first(tmp_path):
    brought = tuple({"event": "train", "step": s, "time": 0.0} for s in (3, 4, 5))
    sink = Jsonl()
    sink.open(tmp_path, RunStarted(4, 9, resumed=True, records=brought))
    sink.write({"event": "train", "step": 5, "time": 1.0})
    sink.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [3, 4, 5]
