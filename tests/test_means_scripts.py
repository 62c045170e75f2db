"""The scripts that write the pages on means against forgetting."""

import importlib.util
import json
import re
import struct
import sys
import zlib

import pytest

from tests.conftest import sentences
from tests.test_scripts import SCRIPTS, script


def module(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look it up there
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def study():
    return module("make_means_study")


@pytest.fixture(scope="module")
def matrix():
    return module("make_means_matrix")


def test_chapters_of_a_bible(study, tmp_path):
    """Of every book of both testaments in order, without markup, titles and notes."""
    genesis = '<title>G</title><chapter n="1" sID="a"/><w lemma="x">EN el</w> principio<note>n</note>.'
    genesis += '<chapter n="2" sID="b"/>Y &amp;\n fué'
    for testament, books in (("ot", ["intro", genesis]), ("nt", ['<chapter sID="c"/>Amén'])):
        packed = [zlib.compress(book.encode()) for book in books]
        places = [sum(map(len, packed[:i])) for i in range(len(packed))]
        index = [struct.pack("<III", p, len(z), len(b)) for p, z, b in zip(places, packed, books, strict=True)]
        (tmp_path / f"{testament}.bzs").write_bytes(b"".join(index))
        (tmp_path / f"{testament}.bzz").write_bytes(b"".join(packed))
    assert [*study.chapters(tmp_path)] == ["EN el principio.", "Y & fué", "Amén"]


def shift(study):
    """Two seeds: full training gains 2 and forgets 1, halfway it gains 1.5 and forgets 0.2."""
    R = study.Result
    ends = [R(1.9, 0.9, 0.7, 0.6), R(2.1, 1.1, 0.9, 0.8)]
    curve = {0.0: [R(0, 0)] * 2, 0.5: [R(1.4, 0.1), R(1.6, 0.3)], 1.0: ends}
    results = {"full": ends, "lora": [R(1.8, 0.7, 0.4, 0.5), R(1.7, 0.7, 0.4, 0.5)], "ema": [R(1, 0.1), R(1, 0.1)]}
    results["merge"] = [R(1.4, 0.1, 0.2, 0.9, "0.5"), R(1.6, 0.3, 0.2, 0.9, "0.5")]
    return study.Shift(results, curve, {"full": "1.6 M", "lora": "0.2 M"}, R(0, 0, 0, 1.25))


def test_what_the_same_gain_costs_on_the_merge_curve(study):
    found = shift(study)
    assert found.on_curve(1.5) == pytest.approx(0.2)
    assert found.on_curve(1.75) == pytest.approx(0.6)
    assert found.on_curve(2.5) is None, "more than the result gains"
    rows = {cells[0]: cells[1:] for cells in (r.strip("| ").split(" | ") for r in study.table(found).splitlines())}
    assert rows["LoRA, rank 16"] == ["0.2 M", "1.800 · 1.700", "0.700 · 0.700", "0.600", "0.40", "0.50"]
    assert rows["merge α* = 0.5 · 0.5"][1:4] == ["1.400 · 1.600", "0.100 · 0.300", ""]
    assert rows["EMA 0.95"][4:] == ["–", "–"], "not measured"


def test_the_picture_follows_the_readers_colours(study, tmp_path):
    study.draw({"python": shift(study), "spanish": shift(study)}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "prefers-color-scheme:dark" in text
    assert not {study.INK, study.SOFT, study.GRID} & {*text.replace('"', " ").replace(";", " ").split()}
    study.draw({"python": shift(study), "spanish": shift(study)}, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == text, "drawn again it is the same"


@pytest.mark.slow
def test_a_small_study(tmp_path):
    """Both sweeps, of two steps. Settings of one's own leave the page as it is."""
    (tmp_path / "es").mkdir()
    for i in range(40):
        (tmp_path / f"es/{i}.txt").write_text(sentences(i, 30))
    page = (SCRIPTS.parent / "docs/results.md").read_text()
    small = ["experiment/means=full,lora", "seed=0", "max_steps=2", "sequence_length=64", "evaluation.max_tokens=500"]
    words = ["--spanish", tmp_path / "es", "--folder", tmp_path / "runs", "--jobs", "2", *small]
    done = script("make_means_study.py", *words)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| full", "| LoRA", "| merge", "| EMA"))]
    assert len(rows) == 8, "of two shifts"
    assert (SCRIPTS.parent / "docs/results.md").read_text() == page


def test_holes_have_their_reasons(matrix, monkeypatch):
    monkeypatch.setattr(matrix, "LEVERS", {"a": [], "b": [], "c": []})
    monkeypatch.setattr(matrix, "STRATEGIES", {"single": [], "ddp": []})
    whole = dict.fromkeys(matrix.CHECKS, True)
    hole = {"runs": False, "code": 2, "why": "needs c"}
    cells = {
        "a / single": whole,
        "a / ddp": whole | {"equal": False},
        "b / single": hole,
        "b / ddp": {"runs": False, "code": 1},
    }
    assert matrix.table(cells).splitlines()[2:] == [
        "| a | all | not: equal |",
        "| b | no (1) | not: runs, equal, resumes, exports, loads |",
        "| c | – | – |",
        "",
        "(1) needs c  ",
    ]


@pytest.mark.slow
def test_two_cells_of_the_matrix(tmp_path):
    """A second start repeats no cell; the page is not written before all cells are there."""
    page = (SCRIPTS.parent / "docs/means.md").read_text()
    words = ["make_means_matrix.py", "--only", "lora", "--strategies", "single,ddp", "--folder", tmp_path]
    done = script(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["lora / single all ", "lora / ddp all "]
    losses = [found["losses"] for found in json.loads((tmp_path / "cells.json").read_text()).values()]
    assert losses[0].keys() == {f"{domain} {step}" for domain in ("new", "base") for step in (0, 4)}
    assert script(*words).stdout == ""
    assert (SCRIPTS.parent / "docs/means.md").read_text() == page


@pytest.mark.slow
def test_bench_transforms():
    """The number of processor seconds is of one thread that may wait for others."""
    shape = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 4096}"
    words = ["--rounds", "1", "--steps", "40", "--only", "full", "--only", "lora, rank 16", f"model.overrides={shape}"]
    done = script("bench_transforms.py", *words)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\| (full|lora, rank 16) \| ([\d,]+) .*? \| ([\d,]+) \| ([\d,]+) \|", done.stdout, re.M)
    rows = {name: [int(cell.replace(",", "")) for cell in cells] for name, *cells in found}
    assert rows["lora, rank 16"][0] < rows["full"][0] / 4, "are trained"
    assert all(per_second > 0 for *_, per_second in rows.values())
