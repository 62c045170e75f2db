"""Records for a process that does not take them, or ends."""

from pretrain.telemetry.sinks.subprocess_queue import SubprocessQueue


def test_records_that_nobody_takes_are_dropped_and_said_once(tmp_path, monkeypatch, capsys):
    """A process that reads nothing: the sender continues, and the end is waited for only so long."""
    (tmp_path / "deaf.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("pretrain.telemetry.sinks.subprocess_queue.MAX_QUEUED", 10)
    monkeypatch.setattr("pretrain.telemetry.sinks.subprocess_queue.NOTICE_AFTER_SECONDS", 0.1)
    messages = SubprocessQueue("deaf", log=tmp_path / "logs" / "deaf.log")
    for _ in range(100):
        messages.send({"record": "x" * 10_000})
    messages.finish(seconds=0.2)
    messages._reader.join(10)
    err = capsys.readouterr().err
    assert err.count("deaf does not accept records fast enough") == 1
    assert "deaf did not exit within 0.2 s and was killed" in err
    assert "has ended" not in err
    assert messages._process.wait(10) == -9


def test_a_process_that_dies_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "dying.py").write_text("import sys\nprint('a last word')\nsys.stdin.readline()\nsys.exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    messages = SubprocessQueue("dying", log=tmp_path / "logs" / "dying.log")
    for _ in range(1000):
        messages.send({"record": "x" * 10_000})
    messages.finish(seconds=60)
    messages._reader.join(10)
    err = capsys.readouterr().err
    assert "a last word\n" in err
    assert f"dying exited with code 3, see {tmp_path}/logs/dying.log" in err
