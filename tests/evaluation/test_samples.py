"""Samples at every evaluation: the model's own greedy continuation, and nothing of the run changes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.distributed.context import DistributedContext
from pretrain.evaluation.config import EvaluationConfig
from pretrain.evaluation.perplexity import Domain
from pretrain.evaluation.samples import PROMPTS_PER_BATCH, Prompt, Sampler, prompts_of
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.errors import UserError
from pretrain.strategy.engine import InferenceEngine
from pretrain.strategy.precision import Precision
from pretrain.telemetry.sinks.jsonl import read_records
from tests.models.tiny import CONFIGS, tiny
from tests.runs import numbers


class Numbers:
    """A tokenizer whose text is the tokens' numbers, with 0 to end a text."""

    eos_token_id = 0

    def decode(self, tokens: Any, **options: Any) -> str:
        return "".join(f" {t}" for t in tokens if t != 0)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(t) for t in text.split()]}


def scorer(hf: Any) -> InferenceEngine:
    return InferenceEngine(
        LanguageModel(hf),
        precision=Precision("32-true", "float32", "float32"),
        world=DistributedContext(),
    )


PROMPTS = [Prompt("a", "new", (0, 5, 6, 7, 8, 9)), Prompt("b", "base", (0, 11)), Prompt("b", "base", (0, 21, 22, 23))]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_it_is_the_model_s_own_greedy_continuation(name: str) -> None:
    """Of prompts of unlike lengths at once, against transformers' `generate` of each one alone, with its cache."""
    hf = tiny(name)
    samples = Sampler(PROMPTS, Numbers(), 12, 0).run(scorer(hf)) or []
    assert hf.training, "as it was"
    assert [(s.domain, s.role) for s in samples] == [(p.domain, p.role) for p in PROMPTS]
    hf.eval()
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([prompt.tokens])
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        expected = hf.generate(ids, **given, use_cache=True)[0, len(prompt.tokens) :].tolist()
        assert sample.prompt == Numbers().decode(prompt.tokens)
        assert sample.text == Numbers().decode(expected)
    assert any(s.text for s in samples)


def test_many_prompts_and_none() -> None:
    engine = scorer(tiny("llama"))
    many = [Prompt("d", "new", (0, n)) for n in range(1, 2 * PROMPTS_PER_BATCH)]
    samples = Sampler(many, Numbers(), 3, 0).run(engine) or []
    assert [s.prompt for s in samples] == [f" {n}" for n in range(1, 2 * PROMPTS_PER_BATCH)]
    assert Sampler([], Numbers(), 3, 0).run(engine) == []


def test_it_ends_where_the_positions_end() -> None:
    (sample,) = Sampler([Prompt("d", "new", (0, *range(1, 60)))], Numbers(), 32, 0).run(scorer(tiny("gpt2"))) or []
    assert 0 < len(sample.text.split()) <= 4  # of 64 positions 60 are the prompt's


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stop_signal_ends_it_at_once_with_nothing(after: int) -> None:
    asked: list[int] = []
    moved: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > after

    found = Sampler(PROMPTS, Numbers(), 12, 0).run(
        scorer(tiny("llama")), interrupted=interrupted, alive=lambda: moved.append(1)
    )
    assert found is None
    assert len(moved) == after


def test_a_user_s_prompt_that_leaves_no_position() -> None:
    domains = [Domain("d", "new", [], [list(range(1, 20))])]
    policy = EvaluationConfig(batch_size=1, sample_prompts=["1 2 3"])
    prompts = prompts_of(domains, policy, Numbers(), first=0, num_positions=16)
    assert [p.tokens for p in prompts] == [(0, *range(1, 9)), (0, 1, 2, 3)]
    with pytest.raises(UserError, match=r"evaluation.sample_prompts: one of 4 tokens leaves no room.* 4 positions"):
        prompts_of([], policy, Numbers(), first=0, num_positions=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("samples")


def test_a_run_with_samples_is_the_run_without(base_arguments, command, folders) -> None:
    """Bit for bit: records, weights, moments. The model has dropout, so that a changed random state shows."""
    given = [*base_arguments, "sink=[jsonl]", "evaluation.sample_tokens=8"]
    more = {"with": ["evaluation.sample_prompts=[The sea, A ship]"], "without": ["evaluation.samples=0"]}
    for name, options in more.items():
        code, _, err = command([*given, *options, f"output_dir={folders / name}"])
        assert code == 0, err
    samples = [r for r in numbers(folders / "with") if r["event"] == "sample"]
    assert {r["step"] for r in samples} == {0, 8, 16, 20}
    assert [r["role"] for r in samples[:4]] == ["new", "base", "user", "user"]
    assert [r["prompt"] for r in samples[2:4]] == ["The sea", "A ship"]
    assert all(r["text"] for r in samples)
    assert [r for r in numbers(folders / "with") if r["event"] != "sample"] == numbers(folders / "without")
    for file in ("model", "optimizer"):
        ours, theirs = (load_file(folders / name / f"checkpoints/step-00000020/{file}.safetensors") for name in more)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_task_evaluation_has_samples_too(base_arguments, command, tmp_path) -> None:
    code, _, err = command([*base_arguments, "task=evaluation", f"output_dir={tmp_path}", "evaluation.sample_tokens=4"])
    assert code == 0, err
    events = [r["event"] for r in read_records(tmp_path / "metrics.jsonl")]
    assert events == ["run_started", *2 * ["evaluation"], *2 * ["positions"], "sample", "sample", "run_finished"]
