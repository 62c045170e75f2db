"""The lm-evaluation-harness on an engine: the same numbers as its own Hugging Face model, from tasks in a local folder."""

import json
from importlib.util import find_spec

import pytest

from pretrain.evaluation.lm_eval import LmEval, metrics_of
from pretrain.runtime.errors import UserError
from pretrain.strategy.engine import InferenceEngine
from pretrain.telemetry.metric import Metric
from pretrain.telemetry.sinks.jsonl import read_records
from tests.engines import ALONE, FULL

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is missing: pip install 'pretrain[lm-eval]'"
)
ROWS = [
    {"q": "def add(a, b):\n    return", "good": "a + b", "bad": "class x"},
    {"q": "import", "good": "os", "bad": "zzzz qqq"},
    {"q": "for i in", "good": "range(10):", "bad": "(((("},
    {"q": "The list is", "good": "empty", "bad": "}}}"},
]
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{good}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "answer": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{good}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with three tasks of four documents."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def test_metrics_of_the_harness():
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "bpb,none": 2, "bpb_stderr,none": "N/A"}
    }
    results["gsm"] = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.2}
    assert metrics_of(results, {"arc": {"acc": True, "bpb": False}}) == [
        Metric("acc", 0.5, better="higher", domain="arc", stderr=0.1),
        Metric("bpb", 2.0, better="lower", domain="arc"),
        Metric("exact_match, strict", 0.25, better="higher", domain="gsm", stderr=0.2),
    ]


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("pretrain.evaluation.lm_eval.find_spec", lambda name: None)
    assert LmEval().task(None, bos=None, separator=0, batch_size=1) is None
    with pytest.raises(UserError, match=r"lm_eval\.tasks=\[arc\]: the package lm-eval is missing; pip install"):
        LmEval(tasks=["arc"]).task(None, bos=None, separator=0, batch_size=1)


@needs_harness
@pytest.mark.slow
def test_equals_the_harness_own_model(tasks, monkeypatch):
    """Also for a task that does not exist."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pretrain.models.hub.files import model_folder
    from pretrain.models.language_model import LanguageModel

    folder = str(model_folder("sample"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = InferenceEngine(
        LanguageModel(AutoModelForCausalLM.from_pretrained(folder, dtype="float32")), precision=FULL, world=ALONE
    )
    engine.model.eval()
    names = ["own_choice", "own_text", "own_answer"]
    settings = LmEval(tasks=names, include_path=str(tasks))
    own = settings.task(tokenizer, bos=None, separator=tokenizer.eos_token_id, batch_size=3)
    found = {(m.domain, m.name): m for m in own.evaluate(engine)}
    args = f"pretrained={folder},dtype=float32"
    theirs = simple_evaluate("hf", args, tasks=names, task_manager=own.manager, device="cpu", batch_size=1)
    expected = metrics_of(theirs["results"], theirs["higher_is_better"])
    assert {(m.domain, m.name) for m in expected} == set(found)
    assert {d for d, _ in found} == set(names)
    for metric in expected:
        ours = found[metric.domain, metric.name]
        assert (ours.value, ours.stderr, ours.better) == (
            pytest.approx(metric.value, rel=1e-5),
            metric.stderr if metric.stderr is None else pytest.approx(metric.stderr, rel=1e-4),
            metric.better,
        )
    with pytest.raises(UserError, match=r"has no task 'own_choise'; did you mean 'own_choice'"):
        LmEval(tasks=["own_choise"], include_path=str(tasks)).task(tokenizer, bos=None, separator=0, batch_size=1)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_run_measures_before_and_after(strategy, base_arguments, command, tasks, tmp_path, monkeypatch):
    """The harness at both ends and own questions at every evaluation."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"question": "In the", "choices": ["beginning", "of"], "answer": 0}) + "\n")
    run = tmp_path / "run"
    words = [*base_arguments, f"output_dir={run}", "max_steps=4", "evaluate_every=2", "sink=[jsonl,report]"]
    words += [f"strategy={strategy}", f"evaluation.questions.quiz={quiz}", "evaluation.lm_eval.tasks=[own_choice]"]
    words += [f"evaluation.lm_eval.include_path={tasks}"]
    words += ["devices=2", "batch_size=2"] if strategy == "fsdp" else ["batch_size=4"]
    code, _, err = command(words)
    assert code == 0, err
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "metric"]
    steps = {}
    for record in records:
        steps.setdefault(f"{record['domain']}/{record['name']}", []).append(record["step"])
    assert steps == {
        "quiz/accuracy": [0, 2, 4],
        "quiz/accuracy_norm": [0, 2, 4],
        "own_choice/acc": [0, 4],
        "own_choice/acc_norm": [0, 4],
    }
    assert "own_choice/acc" in (run / "report.html").read_text()
