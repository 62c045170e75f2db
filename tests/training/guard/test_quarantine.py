"""What is written of a bad batch: all its documents, each with what of it was in the batch."""

from pathlib import Path

import numpy as np
import pytest

from pretrain.data.loader import Loader
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.guard.guard import BadStep
from pretrain.training.guard.quarantine import Quarantine
from tests.training.test_trainer import view_of


@pytest.fixture
def loader(base_arguments):
    return Loader(view_of(base_arguments), sequence_length=32, seed=3, batch_size=2, accumulation=2)


def bad(first_sample: int, step: int = 1) -> BadStep:
    return BadStep(step, first_sample, "spike", "skip", 9.0, float("inf"), 12.5)


def documents_by_token(loader, first_sample):
    """The numbers of the documents that its tokens belong to, looked up one by one."""
    length, view = loader.sequence_length, loader.blocks[0].view
    starts = loader.order(np.arange(first_sample, first_sample + loader.global_batch_size))[1] * length
    return {
        int(view.document_ids(at, at + 1)[0]) for start in starts.tolist() for at in range(start, start + length + 1)
    }


def test_the_texts_are_the_documents_of_the_batch(loader):
    for first_sample in range(0, 400, 4):
        found = list(loader.texts(first_sample))
        assert {document.number for document, _ in found} == documents_by_token(loader, first_sample)
        batch = loader.batch(first_sample)
        rows = np.concatenate([batch.input_ids.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
        for _, tokens in found:
            windows = np.lib.stride_tricks.sliding_window_view(rows, len(tokens), axis=1)
            assert (windows == tokens).all(-1).any()


def test_the_excerpt_is_of_that_document(loader, tokenizer, tmp_path):
    write = Quarantine(tmp_path / "quarantine.jsonl", loader=loader, tokenizer=tokenizer)
    for first_sample in range(0, 200, 4):
        write(bad(first_sample))
    records = read_records(tmp_path / "quarantine.jsonl")
    assert [r["first_sample"] for r in records] == list(range(0, 200, 4))
    for record in records:
        assert (record["loss"], record["grad_norm"], record["zscore"]) == (9.0, None, 12.5)
        for document in record["documents"]:
            excerpt = document["excerpt"].removesuffix(tokenizer.eos_token)
            assert excerpt in Path(document["path"]).read_text()
            assert document["hash"] == f"{int(document['hash'], 16):016x}"


def test_a_batch_is_there_once(loader, tokenizer, tmp_path):
    write = Quarantine(tmp_path / "quarantine.jsonl", loader=loader, tokenizer=tokenizer)
    for first_sample, step in ((0, 1), (8, 3), (0, 7)):
        write(bad(first_sample, step))
    assert [(r["first_sample"], r["step"]) for r in read_records(tmp_path / "quarantine.jsonl")] == [(8, 3), (0, 7)]


def test_other_ranks_write_nothing_and_say_the_same(loader, tokenizer, tmp_path):
    silent, writing = (
        Quarantine(path, loader=loader, tokenizer=tokenizer) for path in (None, tmp_path / "quarantine.jsonl")
    )
    assert silent(bad(0)) == writing(bad(0))
    assert ".txt#0" in silent(bad(0))


def test_a_broken_line_costs_no_other_batch(loader, tokenizer, tmp_path, capsys):
    path = tmp_path / "quarantine.jsonl"
    write = Quarantine(path, loader=loader, tokenizer=tokenizer)
    write(bad(0))
    with path.open("a") as file:
        file.write('{"first_sa\n')
    write(bad(8, 3))
    assert [r["first_sample"] for r in read_records(path)] == [0, 8]
    assert f"{path}:2: not a record" in capsys.readouterr().err
    assert '{"first_sa\n' in (tmp_path / "quarantine.jsonl.broken").read_text()
