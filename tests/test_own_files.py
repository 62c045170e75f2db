"""The small JSON files of a run and a sweep, edited or damaged: read as if they were not there, or one line says so."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import changed_files as fingerprint
from pretrain.runtime import locks
from pretrain.runtime.errors import UserError
from pretrain.sweep import job, measure, table
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records

DEEP = "[" * 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
KNOWN = st.sampled_from(
    ["step", "event", "domain", "results", "overrides", "status", "metric", "command", "jobs", "pid"]
)
SHAPES = JSON | st.dictionaries(KNOWN, JSON, max_size=4)


def read_all(folder, text):
    """Every reader of such a file."""
    for name in ("run.json", "job.json", "sweep.json", "data.json", "metrics.jsonl", "lock.held"):
        (folder / name).write_text(text)
    assert isinstance(fingerprint.load_files(folder / "data.json"), dict)
    assert isinstance(job._read(folder), dict)
    assert isinstance(locks._read(folder / "lock.held"), dict)
    facts = read_run_file(folder)
    assert isinstance(facts, dict)
    assert isinstance(facts.get("results", {}), dict)
    assert all("step" in record for record in measure.records_of(folder / "metrics.jsonl", "evaluation"))
    assert all(
        isinstance(record, dict) for record in read_records(folder / "metrics.jsonl", on_invalid=lambda line: None)
    )
    with pytest.raises(UserError, match=r"sweep\.json"):
        table.read(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '"evaluation"', DEEP, '{"evaluation": ' + DEEP, "\0", "NaN"]
)
def test_texts(text, tmp_path):
    read_all(tmp_path, text)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_shapes(tmp_path_factory, content):
    read_all(tmp_path_factory.mktemp("files"), json.dumps(content))


def test_a_stamp_that_is_a_number_is_no_list_of_files(tmp_path):
    (tmp_path / "data.json").write_text('{"/d/a.txt": [1.5, "x"]}')
    assert fingerprint.load_files(tmp_path / "data.json") == {}
