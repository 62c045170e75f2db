"""References in a config that stand for more and more are refused before they fill the memory."""

import pytest
from omegaconf import OmegaConf

from pretrain.config.compose import resolve
from pretrain.config.interpolation import bounded_interpolation
from pretrain.runtime.errors import UserError

DOUBLING = {
    "a text": "{0}: '${{{1}}}${{{1}}}'",
    "a mapping": "{0}: {{a: '${{{1}}}', b: '${{{1}}}'}}",
    "a list": "{0}: ['${{{1}}}', '${{{1}}}']",
    "by a resolver": "{0}: '${{oc.select:{1}}}${{oc.select:{1}}}'",
}


@pytest.mark.parametrize("kind", DOUBLING)
def test_what_doubles_with_every_line(kind):
    lines = [DOUBLING[kind].format(f"x{i}", f"x{i + 1}") for i in range(30)]
    config = OmegaConf.create("\n".join([*lines, "x30: a", "name: x"]))
    with pytest.raises(UserError, match="expand to more than fits into a config"):
        resolve(config)


def test_a_long_text_many_times():
    config = OmegaConf.create({"name": "x", "a": "b" * 200_000, "c": "${a}" * 1000})
    with pytest.raises(UserError, match="expand to more than fits into a config"):
        resolve(config)


def test_what_people_write_is_followed():
    config = OmegaConf.create({"name": "x", "a": "${b}/${name}", "b": "c", "d": {f"k{i}": "${a}" for i in range(1000)}})
    assert set(resolve(config)["d"].values()) == {"c/x"}
    with bounded_interpolation(), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
