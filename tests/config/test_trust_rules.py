"""The rules by which a name in a config is judged, one by one; whole configs: test_trust.py."""

import functools

import pytest

from pretrain.config.check import RootKeys  # a name that is imported here, and so is not this module's own
from pretrain.config.trust import PARTS, SCHEDULES, check_command_line_only, command_line_only_values, locate, trusts
from pretrain.optim.adamw import AdamW
from pretrain.optim.base import OptimizerFactory
from pretrain.optim.schedule import cosine
from pretrain.runtime.errors import UserError
from pretrain.telemetry.sinks.jsonl import Jsonl

HERE = __name__
ADAMW = "pretrain.optim.adamw.AdamW"


def own_part() -> None:
    """What a trusted package may bring: any function."""


bound = functools.partial(own_part)  # has no name of its own


@pytest.mark.parametrize(
    ("target", "base", "found"),
    [
        (ADAMW, PARTS["optimizer"], AdamW),
        (ADAMW, OptimizerFactory, AdamW),
        ("pretrain.optim.schedule.cosine", SCHEDULES, cosine),
    ],
)
def test_parts_of_ours(target, base, found):
    assert locate("x", target, base) is found


def refusal(target) -> str:
    return (
        f"a.b._target_={target!r}: a config may name pretrain's own parts only; if you trust this one, add "
        f"'allow_targets=[{target}]' to the command line"
    )


@pytest.mark.parametrize(
    ("target", "base", "says"),
    [
        ("os.system", PARTS["optimizer"], refusal("os.system")),
        ("os.system", SCHEDULES, refusal("os.system")),
        ("xpretrain.optim.adamw.AdamW", PARTS["optimizer"], refusal("xpretrain.optim.adamw.AdamW")),
        ("pretrain.cli.main._hydra_main", PARTS["optimizer"], refusal("pretrain.cli.main._hydra_main")),
        ("pretrain", PARTS["optimizer"], refusal("pretrain")),
        (5, PARTS["optimizer"], refusal(5)),
        (None, PARTS["optimizer"], refusal(None)),
        ("pretrain.data.sources.local.FileSource", PARTS["dataset"], refusal("pretrain.data.sources.local.FileSource")),
        ("pretrain.optim", PARTS["optimizer"], "a.b._target_='pretrain.optim': not a class or a function"),
        (
            "pretrain.strategy.single.Single",
            PARTS["optimizer"],
            "a.b._target_='pretrain.strategy.single.Single': not a part that is allowed here; allowed are those of "
            "pretrain.optim.base.OptimizerFactory",
        ),
        (
            "pretrain.strategy.single.Single",
            OptimizerFactory,
            "a.b._target_='pretrain.strategy.single.Single': not a part that is allowed here; allowed are those of "
            "pretrain.optim.base.OptimizerFactory",
        ),
        (
            "pretrain.optim.base.OptimizerFactory",
            OptimizerFactory,
            "a.b._target_='pretrain.optim.base.OptimizerFactory': not a part that is allowed here; allowed are those of "
            "pretrain.optim.base.OptimizerFactory",
        ),
        *(  # a helper of the schedules' module, a class, and a function of another module are no schedules
            (
                name,
                SCHEDULES,
                f"a.b._target_={name!r}: not a part that is allowed here; allowed are those of {SCHEDULES}",
            )
            for name in ("pretrain.optim.schedule.warmup", ADAMW, "pretrain.config.trust.trusts")
        ),
    ],
)
def test_what_may_not_be_named(target, base, says):
    with pytest.raises(UserError) as refused:
        locate("a.b", target, base)
    assert str(refused.value) == says


def test_a_name_that_is_not_there_is_said_in_one_line():
    with pytest.raises(UserError) as refused:
        locate("a.b", "pretrain.optim.nowhere.X", PARTS["optimizer"])
    said_of_it = str(refused.value)
    assert said_of_it.startswith("a.b._target_='pretrain.optim.nowhere.X': ")
    assert "nowhere" in said_of_it.partition(": ")[2]
    assert "\n" not in said_of_it
    assert "  " not in said_of_it


def test_what_is_trusted_by_name_or_by_package():
    assert locate("x", f"{HERE}.own_part", PARTS["optimizer"], trusted=[f"{HERE}.own_part"]) is own_part
    assert locate("x", f"{HERE}.own_part", PARTS["optimizer"], trusted=["other", HERE]) is own_part
    # a name given in full is meant, wherever it comes from; a package vouches for its own only
    assert locate("x", f"{HERE}.RootKeys", PARTS["optimizer"], trusted=[f"{HERE}.RootKeys"]) is RootKeys
    assert locate("x", f"{HERE}.Jsonl", PARTS["sink"], trusted=[f"{HERE}.Jsonl"]) is Jsonl
    for name in ("RootKeys", "bound"):
        with pytest.raises(UserError) as refused:
            locate("a.b", f"{HERE}.{name}", PARTS["optimizer"], trusted=[HERE])
        assert str(refused.value) == refusal(f"{HERE}.{name}")


@pytest.mark.parametrize(
    ("trusted", "target", "expected"),
    [
        ([], "a.b", False),
        (["a.b"], "a.b", True),
        (["a"], "a.b", True),
        (["z", "a"], "a.b.c", True),
        (["a"], "ab.c", False),
        (["a.b"], "a", False),
        (["a"], 5, False),
        ([None], None, False),
    ],
)
def test_trusts(trusted, target, expected):
    assert trusts(trusted, target) is expected


def test_said_is_what_the_command_line_gives_those_keys():
    words = ["lr=1", "allow_targets=[a,b]", "model.trust_remote_code=false", "+launch.endpoint=h:1", "max_steps=3"]
    assert command_line_only_values(words) == {
        "allow_targets": ["a", "b"],
        "model.trust_remote_code": False,
        "launch.endpoint": "h:1",
    }
    assert command_line_only_values(["++model.trust_remote_code=true"]) == {"model.trust_remote_code": True}
    assert command_line_only_values(["allow_targets=[a]", "allow_targets=[b]"]) == {"allow_targets": ["b"]}, (
        "the last one counts"
    )
    assert command_line_only_values(["allow_targets", "~launch.endpoint", "launch=[x"]) == {}, "no value"
    assert command_line_only_values(["launch.endpoint='a=b'"]) == {"launch.endpoint": "a=b"}


@pytest.mark.parametrize(
    ("config", "spoken"),
    [
        ({}, {}),
        ({"model": None, "launch": 5}, {}),
        ({"allow_targets": [], "model": {"trust_remote_code": False}, "launch": {"endpoint": None}}, {}),
        ({"allow_targets": None, "model": {}}, {}),
        ({"allow_targets": ["x"]}, {"allow_targets": ["x"]}),
        ({"model": {"trust_remote_code": True}}, {"model.trust_remote_code": True}),
    ],
)
def test_what_a_file_may_leave_as_it_is(config, spoken):
    check_command_line_only(config, spoken)


@pytest.mark.parametrize(
    ("config", "spoken", "key"),
    [
        ({"allow_targets": ["x"]}, {}, "allow_targets=['x']"),
        ({"allow_targets": ["x", "y"]}, {"allow_targets": ["x"]}, "allow_targets=['x', 'y']"),
        ({"model": {"trust_remote_code": True}}, {}, "model.trust_remote_code=True"),
        ({"model": {"trust_remote_code": True}}, {"model.trust_remote_code": False}, "model.trust_remote_code=True"),
        ({"launch": {"endpoint": "h:1"}}, {"allow_targets": "h:1"}, "launch.endpoint=h:1"),
    ],
)
def test_what_a_file_may_not_set(config, spoken, key):
    with pytest.raises(UserError) as refused:
        check_command_line_only(config, spoken)
    name = key.partition("=")[0]
    assert str(refused.value) == f"{key}: set by a config file; if you trust it, put '{name}=…' on the command line"
