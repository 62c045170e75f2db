"""Names and phrases that were replaced by standard words do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.md", "conf/**/*.yaml", "pretrain/**/*.py", "scripts/**/*.py", "scripts/*.sh")

# Old word → what to write. The list grows: a change that renames something adds the old word once no line has it any more.
WORDS = {
    "add_up": "all_reduce",
    "Blueprint": "ModelFactory",
    "Census": "DataStatistics",
    "computes_alone": "independent_forward",
    "Courier": "SubprocessQueue",
    "DataSeen": "DataStatisticsEvent",
    "held_back": "signals_blocked",
    "LayerWatch": "LayerStatistics",
    "missing_or_torn": "validation_error",
    "on_main": "on_main_rank",
    "Outlet": "NonBlockingStream",
    "own_piece": "local_shard",
    "owes_evaluation": "pending_evaluation",
    "passes_over": "is_blocklisted",
    "PatientFile": "RetryingAppendFile",
    "Scorer": "InferenceEngine",
    "set_aside_after": "archive_after",
    "SourceSeen": "SourceCount",
    "StepClock": "StepTimer",
    "StoodStill": "TrainingPaused",
    "Tally": "History",
    "goes on": "continues, resumes",
    "stands still": "is stalled",
    "type of the products": "matmul dtype",
    "whoever": "the process that",
}
KEPT = {("pretrain/checkpoint/train_state.py", "owes_evaluation")}  # a key of checkpoints of earlier versions
OLD = re.compile(rf"\b({'|'.join([*WORDS, 'Whoever'])})\b")


def old_words(text: str) -> list[str]:
    return OLD.findall(text)


def test_old_words_do_not_come_back():
    files = {file for pattern in PATTERNS for file in ROOT.glob(pattern)} - {ROOT / "CHANGELOG.md"}  # it names the past
    found = {(str(file.relative_to(ROOT)), word) for file in files for word in old_words(file.read_text())}
    assert [f"{file}: {old}, write {WORDS.get(old, WORDS['whoever'])}" for file, old in sorted(found - KEPT)] == []
    assert found >= KEPT, "an exception that is not needed any more"


def test_no_merge_was_left_half_done():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("scripts/*")]
    text = {file: file.read_text() for file in files if file.suffix in (".md", ".rst", ".yaml", ".sh", ".py")}
    assert [str(file) for file, t in text.items() if re.search(r"^(<{7}|>{7}) ", t, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("if guard.passes_over(batch):", ["passes_over"]),
        ("Tally, `Census`", ["Tally", "Census"]),
        ("on_main_rank: the courier's tally", []),
    ],
)
def test_old_words_are_seen(text, found):
    assert old_words(text) == found
