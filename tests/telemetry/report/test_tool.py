"""`python -m pretrain.tools.report`: pages of any run folders, and one line about what is none."""

import json
import os
import subprocess
import sys

import pytest

from pretrain.runtime.errors import UserError
from pretrain.telemetry.report.folder import read_run
from tests.preloaded import run_preloaded
from tests.telemetry.report.records import eventful, started, train, write_run

PROGRAM = [sys.executable, "-m", "pretrain.tools.report"]


def script(*arguments, cwd):
    return run_preloaded(["-m", "pretrain.tools.report", *arguments], cwd=cwd)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [started(total=9), train(1), train(2)])


def test_a_run_still_going_with_a_torn_last_line(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    done = script("run", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "run/report.html"
    assert done.stderr.startswith("run/metrics.jsonl:4: incomplete line")
    assert done.stderr.count("\n") == 1
    text = (run / "report.html").read_text()
    assert "running" in text
    assert "step 2 of 9" in text


def test_several_runs_and_another_place(run):
    write_run(run.parent / "other", eventful(100))
    done = script("run", "other", "other/", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "report.html"
    text = (run.parent / "report.html").read_text()
    assert "<h1>2 runs</h1>" in text
    assert not (run / "report.html").exists()


def test_a_mistake_is_one_line(run):
    done = script(run.parent, cwd=run.parent)
    assert done.returncode == 2
    assert done.stderr == f"error: {run.parent}: not a run folder: it has no metrics.jsonl\n"
    done = script("run", "--output", "no/such/folder/page.html", cwd=run.parent)
    assert done.returncode == 2
    assert "no/such/folder/page.html: can't be written: No such file" in done.stderr
    assert done.stderr.count("\n") == 1


BROKEN = {
    '{"event": "evaluation", "step": 1}': "record 2 can't be read: KeyError: 'domain'",
    '{"event": "layers", "step": 1, "layers": 7}': "record 2 can't be read",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_record_that_lacks_something_is_named(line, tmp_path):
    first, last = json.dumps(started()), json.dumps(train(1))
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{line}\n{last}\n")
    with pytest.raises(UserError) as error:
        read_run(tmp_path)
    assert BROKEN[line] in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ['{"event": "train", "st', "3", '{"event": "train"}'])
def test_a_broken_line_in_the_middle_is_left_out(line, tmp_path, capsys):
    first, last = json.dumps(started()), json.dumps(train(1))
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{line}\n{last}\n")
    assert read_run(tmp_path).history.num_train == 1
    assert f"{tmp_path}/metrics.jsonl:2: not a record" in capsys.readouterr().err


def test_a_page_that_cannot_go_there_and_a_reader_that_has_left(run):
    done = script("run", "--output", ".", cwd=run.parent)
    assert (done.returncode, done.stderr) == (2, "error: .: is a folder; --output names the file\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, run], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", ["[1]", '{"status"', "null"])
def test_a_run_json_that_is_none_is_passed_over(text, run):
    (run / "run.json").write_text(text)
    assert read_run(run).status == "running"


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        read_run(tmp_path / "file")


def test_what_else_lies_in_the_folder_may_be_torn(run):
    for name in ("run.json", "config.yaml", "quarantine.jsonl"):
        (run / name).write_text('{"a: [')
    found = read_run(run)
    assert (found.facts, found.config, found.quarantine) == ({}, {}, [])
    assert found.name == "law-llama"
