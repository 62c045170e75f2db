"""The data that a run really gets from its config."""

import sys

import pytest

from tests.training.test_trainer import prepared_of

opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def test_every_choice_of_documents_reaches_the_run_and_its_identity(base_arguments, corpus, tmp_path):
    """Ten documents, three of them twice."""
    texts = [(corpus / f"{number:02}.txt").read_text() for number in [*range(10), 0, 1, 2]]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)

    def counted(*choices):
        _, data = prepared_of([*base_arguments, f"dataset.nameOrPath={tmp_path}", *choices])
        held_out = sum(view.num_documents for _, role, view in data.domains if role == "new")
        return data.train.num_documents, held_out, data.identity["data"]

    train, held_out, identity = counted("dataset.held_out=0.3")
    assert train + held_out == 13
    fewer_train, fewer_held_out, deduplicated = counted("dataset.held_out=0.3", "dataset.deduplicate=true")
    assert fewer_train + fewer_held_out == 10
    all_of_it, none, larger = counted("dataset.held_out=0")
    assert (all_of_it, none) == (13, 0)
    part, same, smaller = counted("dataset.held_out=0.3", "dataset.train_data_ratio=0.5")
    assert part < train
    assert same == held_out
    _, _, masked = counted("dataset.held_out=0.3", "dataset.document_mask=true")
    _, _, packed = counted("dataset.held_out=0.3", "dataset.packing=best_fit")
    assert len({identity, deduplicated, larger, smaller, masked, packed}) == 6
    assert counted("dataset.held_out=0.3", "dataset.packing=stream")[2] == identity
    assert counted("dataset.held_out=0.3")[2] == identity


def test_a_second_start_of_a_mixture_with_replay_opens_no_text(base_arguments, corpus, other_corpus, tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").write_text(
            f'{{"text": "number {number} and some words {"x" * number}"}}\n' * 3
        )
    words = [word for word in base_arguments if not word.startswith(("dataset=", "dataset.nameOrPath"))]
    words += ["dataset=mixture", "dataset@dataset.parts.es=local", f"dataset.parts.es.nameOrPath={corpus}"]
    words += ["dataset@dataset.parts.more=local", f"dataset.parts.more.nameOrPath={tmp_path}", "replay.share=0.1"]
    words += ["dataset.parts.more.deduplicate=exact", "dataset.parts.more.where='len(text) > 3'"]
    own = {str(path) for path in tmp_path.iterdir()}
    texts = {
        str(path) for folder in (corpus, other_corpus) for path in folder.iterdir()
    }  # other tests may have read them
    starts = []
    for _ in range(3):
        del opened[:]
        _, data = prepared_of(words)
        starts.append(((own | texts).intersection(opened), data.identity["data"]))
    assert starts[0][0] >= own, "the files are those that the run reads"
    assert starts[2] == (set(), starts[0][1]), (
        "the second one may still read files that were written just before the first"
    )


@pytest.mark.parametrize("epochs", [1, 1.5, 2])
def test_sequences_left_over_in_an_epoch_are_taken_by_the_next(base_arguments, epochs):
    """Only the last step is rounded down, as docs/data.md has it."""
    _, data = prepared_of([*base_arguments, "max_steps=null", f"number_epochs={epochs}"])
    sequences = (data.train.num_tokens - 1) // 32
    assert data.global_batch == 4
    assert sequences % 4, "else nothing is left over"
    assert data.total_steps == int(sequences * epochs) // 4


def test_removed_documents_are_reported_before_the_start(base_arguments, corpus, tmp_path):
    """Eleven documents, of which one is too short and two occur twice."""
    texts = [(corpus / f"{number:02}.txt").read_text() for number in [*range(8), 0, 1]] + ["short"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    arguments = [*base_arguments, f"dataset.nameOrPath={tmp_path}", "dataset.name=poems", "dataset.held_out=0.3"]
    assert not prepared_of(arguments)[1].notices
    _, data = prepared_of([*arguments, "dataset.where='len(text) > 5'", "dataset.deduplicate=exact"])
    held_out = data.domains[0][2].num_documents
    assert list(data.notices) == [
        f"dataset 'poems': 11 documents: 1 removed by dataset.where, 2 removed as duplicates, {held_out} held out, "
        f"{8 - held_out} to train on"
    ]


def test_another_loss_weight_is_another_run(base_arguments, corpus):
    """Objective weights change what is trained, as a mask does; weights of 1 are no weights."""
    mixture = [word for word in base_arguments if not word.startswith("dataset")] + ["dataset=mixture"]
    for name in "ab":
        mixture += [f"dataset@dataset.parts.{name}=local", f"dataset.parts.{name}.nameOrPath={corpus}"]
    plain, ones, lower = (
        prepared_of([*mixture, "~evaluation.domains.base", *more])[1].identity["data"]
        for more in ([], ["dataset.loss_weights.a=1"], ["dataset.loss_weights.a=0.5"])
    )
    assert plain == ones != lower
