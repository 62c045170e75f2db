"""Parse the options of the command line, which are Hydra's but for a few, and explain an unknown one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from typing import NoReturn

from pretrain.config.check import GROUPS, OTHER_NAMES
from pretrain.config.hydra_internals import get_args_parser
from pretrain.config.schema import RootKeys
from pretrain.runtime.errors import UserError

WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd"}
# Options of Hydra that are refused, with the number of their values. The last one would load a pickle.
UNSUPPORTED = {"--config-path": 1, "-cp": 1, "--config-name": 1, "-cn": 1, "--experimental-rerun": 1}
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
COMMANDS = ("multirun", "run", "cfg", "info", "hydra_help", "shell_completion")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options with their values, and the words, which are ``key=value`` or ``~key``."""
    options: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            options += [argument, *islice(rest, int(argument in WITH_VALUE or argument in UNSUPPORTED))]
        elif argument in INFOS and options[-1:] in (["--info"], ["-i"]):
            options.append(argument)
        else:
            words.append(argument)
    return options, words


def config_dir_of(arguments: Sequence[str]) -> str | None:
    """Return the value of ``--config-dir``; the last one counts, as in `parse`."""
    options, _ = split(arguments)
    found = None
    for i, option in enumerate(options):
        if option in ("--config-dir", "-cd"):
            found = next(iter(options[i + 1 : i + 2]), None)
        elif option.startswith("--config-dir="):
            found = option.partition("=")[2]
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options under the names of Hydra's parser, and the words as ``overrides``.

    Raises ``UserError`` for an unknown option, a word that is not ``key=value``, and options that exclude each other.
    """
    options, words = split(arguments)
    for option in options:
        name = option.partition("=")[0]
        if name in UNSUPPORTED:
            raise UserError(f"{name}: not supported; a flat YAML is --config FILE, a folder --config-dir")
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = _raise_mistake  # type: ignore[method-assign]
    given, unknown = parser.parse_known_args(options)
    for option in unknown:
        _explain(option, words)
    for word in [*given.overrides, *words]:
        if "=" not in word and not word.startswith("~"):
            hint = (
                f"a flat YAML is --config {word}"
                if word.endswith((".yaml", ".yml"))
                else "words are key=value; see --help"
            )
            raise UserError(f"{word}: not a setting; {hint}")
    asked = [name for name in COMMANDS if getattr(given, name)]
    if len(asked) > 1 and given.multirun:
        raise UserError(f"--{asked[1]} shows one configuration: omit -m and the lists of values")
    if len(asked) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in asked[:2])
        raise UserError(f"{first} and {second}: only one of them is allowed")
    if (given.resolve or given.package) and not given.cfg:
        raise UserError(f"{'--resolve' if given.resolve else '--package'}: only with --cfg job")
    given.overrides = words
    return given


def _raise_mistake(message: str) -> NoReturn:
    raise UserError(message)


def _explain(option: str, words: list[str]) -> NoReturn:
    """Raise ``UserError`` for an unknown option. For one such as ``--lr=1e-3`` or ``--lr 1e-3`` it names our form."""
    name, equals, value = option.lstrip("-").partition("=")
    name = name.replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    known = name.partition(".")[0] in {*GROUPS, *(field.name for field in fields(RootKeys))}
    value = value if equals else next((word for word in words if "=" not in word), "...")
    here = f"here it is {name}={value}" if known else "keys are key=value, without dashes; see --help"
    raise UserError(f"{option}: no such option; {here}")
