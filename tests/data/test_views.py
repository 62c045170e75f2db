"""The store and its views against a plain list of documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pretrain.data.batch import IGNORE
from pretrain.data.blocks import Blocks
from pretrain.data.evaluation import evaluation_batches, first_tokens
from pretrain.data.store.token_shards import PartWriter, _mapped, open_part
from pretrain.data.store.token_store import TokenStore, TokenView
from pretrain.runtime.files import replace_file

EOT = 0
documents_strategy = st.lists(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 12)), max_size=6), min_size=1, max_size=4
)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def store_with(
    folder: Path, parts: list[list[tuple[int, int]]]
) -> tuple[TokenStore, list[tuple[int, NDArray[np.int64]]]]:
    """A store with documents given as (hash, length), and the same documents as a list."""
    documents, paths, value = [], [], 1
    for number, part in enumerate(parts):
        path = folder / f"{number}.tokens"
        with open(path, "wb") as file:
            writer = PartWriter(file, np.dtype(np.uint16))
            for index, (digest, length) in enumerate(part):
                tokens = np.array([*range(value, value + length), EOT])
                value += length
                documents.append((digest, tokens))
                writer.append(tokens, digest=digest, size=length, piece=0, index=index)
            writer.finish({})
        paths.append(str(path))
    manifest = {"name": "x", "eot": EOT, "parts": paths, "units": [[[f"{n}.txt", 0]] for n in range(len(parts))]}
    replace_file(folder / "manifest.json", json.dumps(manifest))
    _mapped.cache_clear()  # the files were written over
    return TokenStore(folder / "manifest.json"), documents


def stream(documents: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *documents])


@same_folder
@given(parts=documents_strategy, held_out=st.sampled_from([0.0, 0.3, 0.9]), ratio=st.sampled_from([1.0, 0.5]))
def test_views_read_what_the_documents_hold(tmp_path: Path, parts, held_out: float, ratio: float) -> None:
    store, documents = store_with(tmp_path, parts)
    assert store.num_tokens == sum(len(tokens) for _, tokens in documents)
    train, held = store.views(held_out=held_out, train_data_ratio=ratio)
    assert held.num_documents + train.num_documents <= store.num_documents
    if ratio == 1:
        assert held.num_documents + train.num_documents == store.num_documents
    for view in (train, held):
        numbers = view.document_ids(0, view.num_tokens) if view.num_tokens else []
        chosen = [documents[number][1] for number in numbers]
        assert np.array_equal(view.read(0, view.num_tokens), stream(chosen))
        assert view.num_bytes == sum(len(tokens) - 1 for tokens in chosen)
        ends = np.cumsum([len(tokens) for tokens in chosen])
        assert np.array_equal(view.document_starts(0, view.num_tokens), np.concatenate([[0], ends[:-1]])[: len(chosen)])


@same_folder
@given(parts=documents_strategy, data=st.data())
def test_any_window_is_a_slice_of_the_stream(tmp_path: Path, parts, data: st.DataObject) -> None:
    view, _ = store_with(tmp_path, parts)[0].views(held_out=0.3)
    whole = view.read(0, view.num_tokens)
    starts = set(view.document_starts(0, view.num_tokens).tolist())
    start = data.draw(st.integers(0, view.num_tokens))
    stop = data.draw(st.integers(start, view.num_tokens))
    assert np.array_equal(view.read(start, stop), whole[start:stop])
    assert view.document_starts(start, stop).tolist() == sorted(s for s in starts if start <= s < stop)


@same_folder
@given(parts=documents_strategy, held_out=st.floats(0.001, 0.999))
def test_two_different_documents_are_never_all_on_one_side(tmp_path: Path, parts, held_out: float) -> None:
    store, documents = store_with(tmp_path, parts)
    train, held = store.views(held_out=held_out)
    if len({digest for digest, _ in documents}) >= 2:
        assert train.num_documents >= 1
        assert held.num_documents >= 1
    else:
        assert held.num_documents == 0


@given(data=st.data())
@same_folder
def test_adding_documents_moves_none_across_the_split(tmp_path: Path, data: st.DataObject) -> None:
    hashes = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=30, max_size=60, unique=True))
    low, high = [h for h in hashes if h <= 0.2 * 2**64], [h for h in hashes if h > 0.2 * 2**64]
    if len(low) < 2 or len(high) < 2:
        return

    def held(some: list[int]) -> set[int]:
        store, _ = store_with(tmp_path, [[(h, 3) for h in some]])
        view = store.views(held_out=0.2)[1]
        return {store.document(int(n)).hash for n in view.document_ids(0, view.num_tokens)}

    fewer = [low[0], high[0], *hashes[: len(hashes) // 2]]
    assert held(fewer) == held(hashes) & set(fewer)


@same_folder
@given(parts=documents_strategy, length=st.integers(1, 9))
def test_blocks_cover_the_stream_once(tmp_path: Path, parts, length: int) -> None:
    view, _ = store_with(tmp_path, parts)[0].views(held_out=0)
    blocks = Blocks(view, length)
    assert len(blocks) == max(view.num_tokens - 1, 0) // length
    batch = blocks.batch(np.arange(len(blocks)), document_mask=False)
    whole = view.read(0, view.num_tokens)
    assert np.array_equal(batch.input_ids.reshape(-1), whole[: len(blocks) * length])
    assert np.array_equal(batch.labels.reshape(-1), whole[1 : len(blocks) * length + 1])
    assert batch.num_targets == len(blocks) * length


@same_folder
@given(parts=documents_strategy, length=st.integers(1, 9))
def test_document_mask_restarts_positions_and_predicts_no_first_token(tmp_path: Path, parts, length: int) -> None:
    view, _ = store_with(tmp_path, parts)[0].views(held_out=0.2)
    blocks = Blocks(view, length)
    batch = blocks.batch(np.arange(len(blocks)), document_mask=True)
    plain = blocks.batch(np.arange(len(blocks)), document_mask=False)
    assert batch.position_ids is not None
    assert np.array_equal(batch.input_ids, plain.input_ids)
    starts = set(view.document_starts(0, view.num_tokens).tolist())
    for row in range(len(blocks)):
        position = 0
        for column in range(length):
            at = row * length + column
            position = 0 if at in starts or column == 0 else position + 1
            assert batch.position_ids[row, column] == position
            expected = IGNORE if at + 1 in starts else plain.labels[row, column]
            assert batch.labels[row, column] == expected
    assert batch.num_targets == int((batch.labels != IGNORE).sum())


@same_folder
@given(parts=documents_strategy, length=st.integers(1, 9), rows=st.integers(1, 4), mask=st.booleans())
def test_evaluation_scores_every_token_once(tmp_path: Path, parts, length: int, rows: int, mask: bool) -> None:
    view, _ = store_with(tmp_path, parts)[0].views(held_out=0)
    scored = evaluation_batches(view, length, rows, document_mask=mask)
    batches = list(scored)
    assert len(batches) == len(scored)
    targets = [batch.labels[batch.labels != IGNORE] for batch in batches]
    whole = view.read(0, view.num_tokens)
    if mask:
        whole = np.delete(whole, view.document_starts(0, view.num_tokens))
    assert np.array_equal(stream([t.numpy() for t in targets]), whole)
    assert sum(batch.num_targets for batch in batches) == scored.num_tokens == len(whole)
    assert all(len(batch.input_ids) <= rows for batch in batches)
    if batches and not mask:  # each target stands behind the token before it, the first behind the end of a document
        inputs = stream([b.input_ids[b.labels != IGNORE].numpy() for b in batches])
        assert np.array_equal(inputs, np.concatenate([[EOT], view.read(0, view.num_tokens)[:-1]]))


def test_evaluation_takes_whole_documents_with_the_smallest_hashes(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, [[(50, 9), (10, 4)], [(30, 4), (40, 4), (20, 100)]])
    view: TokenView = store.views(held_out=0)[0]
    assert evaluation_batches(view, 4, 2, max_tokens=None).num_bytes == 121
    limited = evaluation_batches(view, 4, 2, max_tokens=110)  # 10 and 20 have 5 + 101 tokens
    assert (limited.num_bytes, limited.num_tokens, limited.num_documents) == (104, 106, 2)
    assert evaluation_batches(view, 4, 2, max_tokens=1).num_tokens == 5  # at least one document


def test_duplicates_are_left_out_when_asked(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, [[(2**63, 3), (2**63 + 1, 2)], [(2**63, 3), (5, 1), (5, 1)]])
    train, held = store.views(held_out=0.1, deduplicate=True)
    assert (train.num_documents, held.num_documents) == (2, 1)
    assert train.read(0, train.num_tokens).tolist() == [1, 2, 3, EOT, 4, 5, EOT]


def test_a_document_is_found_again(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, [[(1, 3), (2, 2)], [(3, 3), (4, 1)]])
    found = store.document(3)
    assert (found.path, found.index, found.hash) == ("1.txt", 1, 4)


@pytest.mark.parametrize("lost", [1, 8, 16, 40, 100])
def test_a_torn_part_is_no_part(tmp_path: Path, lost: int) -> None:
    store, _ = store_with(tmp_path, [[(1, 30), (2, 20)]])
    path = store.parts[0].path
    path.write_bytes(path.read_bytes()[:-lost])
    assert open_part(path) is None


@same_folder
@example(parts=[[(0, 0), (1, 1)]], count=1, length=2)  # an empty document takes no prompt's place
@given(parts=documents_strategy, count=st.integers(0, 4), length=st.integers(1, 9))
def test_prompts_are_beginnings_of_documents(tmp_path: Path, parts, count: int, length: int) -> None:
    store, documents = store_with(tmp_path, parts)
    texts = [tokens[:-1].tolist() for _, tokens in documents]
    long = [text[:length] for text in texts if len(text) >= length]
    short = [text for text in texts if 0 < len(text) < length]
    found = first_tokens(store.views(held_out=0)[0], count, length)
    assert found[: len(long)] == long[:count]
    assert all(prompt in short for prompt in found[len(long) :])
    assert len(found) == min(count, len(long) + len(short))
