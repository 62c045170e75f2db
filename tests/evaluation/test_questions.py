"""Questions of one's own: how files are read, and what is measured."""

import json

import pytest

from pretrain.evaluation import questions as module
from pretrain.evaluation.likelihood import Likelihood
from pretrain.evaluation.questions import Question, Questions, read_questions
from pretrain.runtime.errors import UserError


def written(tmp_path, *lines):
    file = tmp_path / "quiz.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_read(tmp_path):
    file = written(
        tmp_path,
        {"question": "Two and two is", "choices": ["four", "five"], "answer": 0},
        "",
        {"question": "Water is", "choices": ["dry", "wet", "red"], "answer": "wet"},
        {"question": "The sky is", "answer": "blue"},
    )
    assert read_questions("quiz", file) == [
        Question("Two and two is", ("four", "five"), 0),
        Question("Water is", ("dry", "wet", "red"), 1),
        Question("The sky is", ("blue",), 0),
    ]


def test_a_space_before_a_choice_unless_there_is_one():
    assert Question("A", ("b",)).continuations == [" b"]
    assert Question("A\n", (" b",)).continuations == ["b"]
    assert Question("", ("b",)).continuations == ["b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 3000, "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ({"question": "a", "choice": ["b", "c"], "answer": 0}, "has no key 'choice'; did you mean 'choices'?"),
        ({"question": 3, "answer": "b"}, "question=3: a text is needed"),
        ({"question": "a"}, "answer=None: without choices, a text that continues the question is needed"),
        ({"question": "a", "answer": " "}, "answer=' ': without choices"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "choices=['b']: at least two texts"),
        ({"question": "a", "choices": ["b", 3], "answer": 0}, "choices=['b', 3]: at least two texts"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer=2: the index of a choice, 0 to 1"),
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "answer=True: the index"),
        ({"question": "a", "choices": ["b", "b"], "answer": "b"}, "answer='b': the index"),
    ],
)
def test_a_mistake_is_one_line_with_its_number(tmp_path, line, said):
    file = written(tmp_path, {"question": "a", "answer": "b"}, line)
    with pytest.raises(UserError) as caught:
        read_questions("quiz", file)
    assert str(caught.value).startswith(f"evaluation.questions.quiz={file}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_questions(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.questions\.quiz=.*none\.jsonl: can't be read: FileNotFoundError"):
        read_questions("quiz", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no questions"):
        read_questions("quiz", written(tmp_path, ""))


def test_metrics(monkeypatch):
    """Of two choices the longer one is likelier per byte; the cloze is a quarter of a nat per byte."""
    asked = [
        Question("a", ("bb", "bbbbbbb"), 1),
        Question("a", ("bbbbbbb", "bb"), 1),
        Question("a", ("bbb",)),
    ]
    logprobs = [-2.0, -4.0, -4.0, -2.0, -1.0]

    def found(engine, requests, batch_size):
        assert len(requests) == 5
        return [Likelihood(logprob, is_greedy=True) for logprob in logprobs]

    monkeypatch.setattr(module, "likelihoods", found)
    monkeypatch.setattr(module, "encode_pair", lambda *args, **more: args)
    metrics = {m.name: m for m in Questions("quiz", asked, None, 0, 4).evaluate(None)}
    assert {name: m.value for name, m in metrics.items()} == {
        "accuracy": 0.5,
        "accuracy_norm": 0.5,
        "exact_match": 1.0,
        "answer_loss": 0.25,
    }
    assert metrics["accuracy"].stderr == pytest.approx(0.5)
    assert metrics["exact_match"].stderr is None, "one question has no spread"
    assert {(m.domain, m.better) for m in metrics.values()} == {("quiz", "higher"), ("quiz", "lower")}
