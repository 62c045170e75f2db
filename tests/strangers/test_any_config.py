"""`test_any_word` and `test_any_file` draw words and edit our own YAML at random: whatever comes, it is a config that passes
the check or a mistake that is said, never another exception.
"""

import contextlib

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from pretrain.cli.flags import parse
from pretrain.cli.flat_yaml import overrides_from
from pretrain.config.check import GROUPS, check
from pretrain.config.compose import compose, forced, in_plain_words, resolve
from pretrain.config.quoting import quoted_word
from pretrain.config.trust import MULTI_SELECT
from pretrain.runtime.errors import UserError
from tests.config.test_conf import FILES

SMALL = settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
LARGE = settings(SMALL, derandomize=False, max_examples=300)


def composed(arguments: list[str]) -> dict:
    """The checked config of a command line. Raises ``UserError`` for any mistake, as one line."""
    try:
        given = parse(arguments)
        words = [forced(quoted_word(word, sweeping=False)) for word in given.overrides]
        resolved = resolve(compose(words, given.config_dir))
        check(resolved, here=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_plain_words(error)) from None
    return resolved


def said(arguments: list[str]) -> str:
    """The message of a mistake, of one line; nothing where there is none."""
    try:
        composed(arguments)
    except UserError as error:
        message = str(error)
        assert message
        message.encode(errors="surrogateescape")
        return message
    return ""


KEYS = ["lr", "seed", "max_steps", "name", "output_dir", "batch_size", "resume_allow", "allow_targets", "sink", "model"]
KEYS += [
    "optimizer._target_",
    "scheduler._partial_",
    "evaluation.domains",
    "evaluation.domains.base",
    "model.overrides",
]
KEYS += [
    "dataset",
    "dataset.nameOrPath",
    "sink.console.level",
    "generation.prompts",
    "hydra.mode",
    "a.b",
    "experiment",
    "",
]
VALUES = [
    "1",
    "-1",
    "1e-3",
    "1e400",
    "nan",
    "null",
    "true",
    "''",
    "[]",
    "{}",
    "[1,a]",
    "{a:1}",
    "{_target_:x}",
    "???",
    "${lr}",
]
VALUES += [
    "${nope}",
    "${oc.env:HOME}",
    "${oc.create:{a:1}}",
    "a,b",
    "choice(a)",
    "~/x",
    "~",
    "[",
    "}",
    "'",
    "\\",
    "=",
    "9" * 25,
]
VALUES += [
    "pretrain.strategy.single.Single",
    "local",
    "sample",
    "[console]",
    "single",
    "{_target_:pretrain.cli.main.main}",
    " ",
    "",
]
values = st.one_of(st.sampled_from(VALUES), st.text(max_size=8))
words = st.builds(
    "{}{}{}{}".format, st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS), st.just("="), values
)


def any_word(drawn):
    said(["task=tokenization", *drawn])


test_any_word = SMALL(given(st.lists(st.one_of(words, words, st.text(max_size=6)), min_size=1, max_size=3))(any_word))
test_very_many_words = pytest.mark.slow(
    LARGE(given(st.lists(st.one_of(words, st.text(max_size=6)), min_size=1, max_size=4))(any_word))
)

JUNK = [
    "null",
    "[]",
    "{}",
    "-1",
    "1e400",
    ".nan",
    "9" * 30,
    '"\\ud800"',
    "${nope}",
    "${lr}",
    "&a [*a]",
    "*a",
    "!!binary aGk=",
]
JUNK += [
    "!!python/name:os.system",
    "2020-01-01",
    "0x10",
    "'",
    "{",
    "\t",
    "~",
    "yes",
    "[[1], {a: b}]",
    "{_target_: x}",
    "<<: 1",
]
JUNK += ["pretrain.optim.adamw.AdamW", "???", "a: b: c", "{_partial_: true}", "!!set {a}", "? x"]
junk = st.one_of(st.sampled_from(JUNK), st.text(max_size=6))


@st.composite
def edited(draw):
    """One of our own files with a few lines changed: (group, text)."""
    file = draw(st.sampled_from(FILES))
    lines = file.read_text().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        indent, key = lines[place][: len(lines[place]) - len(lines[place].lstrip())], lines[place].partition(":")[0]
        change = draw(st.sampled_from(["value", "value", "key", "delete", "double", "indent", "text"]))
        new = draw(junk)
        lines[place : place + 1] = {
            "value": [f"{key}: {new}"],
            "key": [f"{indent}{new}:{lines[place].partition(':')[2]}"],
            "delete": [],
            "double": [lines[place]] * 2,
            "indent": [f"  {lines[place]}"],
            "text": [lines[place], new],
        }[change] or [""]
    return file.parent.name, "\n".join(lines)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    for group in (*GROUPS, "experiment"):
        (folder / group).mkdir()
    return folder


def any_file(theirs, drawn):
    group, text = drawn
    (theirs / group / "mine.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    chosen = f"{group}=[mine]" if group in MULTI_SELECT else f"{group}=mine"
    said(["--config-dir", str(theirs), chosen])
    with contextlib.suppress(UserError):
        overrides_from(theirs / group / "mine.yaml", [])


test_any_file = SMALL(given(drawn=edited())(any_file))
test_very_many_files = pytest.mark.slow(LARGE(given(drawn=edited())(any_file)))
