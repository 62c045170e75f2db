"""Records for a process that does not take them, or ends."""

import pytest

from pretrain.telemetry.sinks.subprocess_queue import SubprocessQueue


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """``sent(name, code, count, seconds)``: the queue of a process that runs ``code``, after ``count`` records and its end."""

    def run(name, code, count, *, seconds):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        messages = SubprocessQueue(name, log=tmp_path / "logs" / f"{name}.log")
        for _ in range(count):
            messages.send({"record": "x" * 10_000})
        messages.finish(seconds=seconds)
        messages._reader.join(10)
        return messages

    return run


def test_records_that_nobody_takes_are_dropped_and_said_once(sent, monkeypatch, capsys):
    """A process that reads nothing: the sender continues, and the end is waited for only so long."""
    monkeypatch.setattr("pretrain.telemetry.sinks.subprocess_queue.MAX_QUEUED", 10)
    monkeypatch.setattr("pretrain.telemetry.sinks.subprocess_queue.NOTICE_AFTER_SECONDS", 0.1)
    messages = sent("deaf", "import time\ntime.sleep(3600)\n", 100, seconds=0.2)
    err = capsys.readouterr().err
    assert err.count("deaf does not accept records fast enough") == 1
    assert "deaf did not exit within 0.2 s and was killed" in err
    assert "has ended" not in err
    assert messages._process.wait(10) == -9


def test_a_process_that_dies_is_said(sent, tmp_path, capsys):
    sent("dying", "import sys\nprint('a last word')\nsys.stdin.readline()\nsys.exit(3)\n", 1000, seconds=60)
    err = capsys.readouterr().err
    assert "a last word\n" in err
    assert f"dying exited with code 3, see {tmp_path}/logs/dying.log" in err
