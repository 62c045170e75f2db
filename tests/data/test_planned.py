"""The table before the start: what a run will read of each part is what its loader then reads."""

import numpy as np
import pytest
from texts import some_text

from pretrain.data import planned as module
from pretrain.data.loader import Loader
from pretrain.data.planned import planned_parts, table_and_warnings
from pretrain.data.statistics import DataStatistics
from pretrain.data.training_data import MixturePhase, Part, TrainingData

RUN = {"global_batch": 8, "sequence_length": 16, "document_mask": False}


@pytest.fixture
def views(tmp_path, store_of):
    """Three sets of documents, of which the first two share 7."""
    found = []
    for name, numbers in {"a": range(40), "b": range(33, 60), "c": range(100, 104)}.items():
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number}.txt").write_text(some_text(number, 60))
        found.append(store_of(tmp_path / name).views(held_out=0.0)[0])
    return found


def mixture(views, *phases) -> TrainingData:
    parts = tuple(Part(name, view) for name, view in zip("abc", views, strict=True))
    return TrainingData(parts, phases or (MixturePhase(0.0, (0.5, 0.3, 0.2)),))


PHASES = (MixturePhase(0.0, (0.5, 0.3, 0.2)), MixturePhase(0.75, (0.0, 0.0, 1.0)))


def test_what_is_planned_is_what_is_read(views):
    data = mixture(views, *PHASES)
    found = planned_parts(data, steps=40, **RUN)
    one = Loader(data, sequence_length=16, seed=3, batch_size=8, steps=40)
    read = DataStatistics(one).parts(40 * 8)
    assert [(row.part.name, row.tokens, row.epochs) for row in found] == [
        (name, count.tokens, count.epochs) for name, count in read.items()
    ]
    assert sum(row.tokens for row in found) == 40 * 8 * 16
    assert [row.shares for row in found] == [(0.5, 0.0), (0.3, 0.0), (0.2, 1.0)]


def test_the_table(views):
    lines = table_and_warnings(
        planned_parts(mixture(views, *PHASES), steps=40, **RUN), mixture(views, *PHASES), steps=40
    )
    assert lines[0].split() == ["part", "training", "tokens", "weight", "from", "step", "30", "epochs"]
    rows = [line.split() for line in lines[1:4]]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("a", "50.0%", "0.0%"),
        ("b", "30.0%", "0.0%"),
        ("c", "20.0%", "100.0%"),
    ]
    assert [row[1] for row in rows] == [f"{view.num_tokens:,}" for view in views]
    assert len({len(line) for line in lines[:4]}) == 1, "aligned"


def test_one_part_has_no_table(views):
    data = TrainingData((Part("a", views[0]),))
    assert table_and_warnings(planned_parts(data, steps=9999, **RUN), data, steps=9999) == []


@pytest.mark.parametrize(
    ("epochs", "says"), [(3, None), (7, "bears 15 to 20"), (24, "more than the 15 to 20 that even")]
)
def test_a_part_that_is_repeated_too_often_is_warned_of(epochs, says, views):
    data = mixture(views)
    steps = round(epochs * (views[2].num_tokens - 1) // 16 / 0.2 / 8)
    found = planned_parts(data, steps=steps, **RUN)
    assert found[2].epochs == pytest.approx(epochs, rel=0.1)
    warned = [line for line in table_and_warnings(found, data, steps=steps) if "will be seen" in line]
    assert len(warned) == sum(row.epochs > 4 for row in found)
    if says:
        assert f"part 'c' will be seen {found[2].epochs:.1f} times" in warned[-1]
        assert says in warned[-1]


def test_documents_that_two_parts_share_are_counted(views, monkeypatch):
    data = mixture(views)
    found = planned_parts(data, steps=2, **RUN)
    common = [line for line in table_and_warnings(found, data, steps=2) if "in common" in line]
    assert common == ["parts 'a' and 'b' have 7 documents in common, which are trained on in both"]
    documents = np.random.default_rng(0).integers(0, 2**64, (3, 20_000), dtype=np.uint64)
    documents[1, :8000] = documents[0, :8000]

    class Many:
        def __init__(self, hashes):
            self.num_documents, self._hashes = len(hashes), hashes

        def hashes(self):
            yield from np.split(self._hashes, 4)

    monkeypatch.setattr(module, "MAX_HASHES", 12_000)
    (line,) = module._common([Part(name, Many(hashes)) for name, hashes in zip("abc", documents, strict=True)])
    number = int(line.partition("about ")[2].split()[0].replace(",", ""))
    assert 7600 < number < 8400, "a fifth of the documents is compared"
