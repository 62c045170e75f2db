"""The recipe: a few keys with the reason, as a sentence, a command and the YAML of an experiment."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.config.quoting import quoted_word

Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Prediction:
    """What is expected of a domain's loss.

    Attributes:
        role: new or base.
        change: Change of the loss from the base model, with the ends of its interval, in nats per token.
        steps: After how many steps.
        by: law (extrapolated to that length) or probe (measured at that length).
    """

    role: str
    change: Interval
    steps: int
    by: str


@dataclass(frozen=True)
class Recipe:
    """What is advised.

    Attributes:
        keys: Dotted keys of the config and their values.
        choices: Groups and their choices, such as objective → kl_to_base.
        reasons: A sentence for each decision.
        predicted: What is expected, by domain.
        probe_steps: Steps of the probes.
    """

    keys: dict[str, Any]
    choices: dict[str, Any]
    reasons: list[str]
    predicted: dict[str, Prediction] = field(default_factory=dict)
    probe_steps: int = 0

    @property
    def words(self) -> list[str]:
        """Return the words of a command line."""
        words = [f"{group}={_value(choice)}" for group, choice in self.choices.items()]
        return words + [quoted_word(f"{key}={_value(value)}", sweeping=False) for key, value in self.keys.items()]

    def experiment_command(self, words: Sequence[str], folder: str) -> str | None:
        """Return the command of the run with the experiment in ``folder``: without the user's words for the keys of the recipe,
        which would win; ``None`` where the command has an experiment or a folder of configs already."""
        if any(word == "--config-dir" or word.lstrip("+").startswith("experiment=") for word in words):
            return None
        return shlex.join(
            ["python", "-m", "pretrain", *self._shared(words), "--config-dir", folder, "experiment=advised"]
        )

    def command(self, words: Sequence[str]) -> str:
        """Return the command of the run; ``words`` are those of the user's command."""
        return shlex.join(["python", "-m", "pretrain", *self._shared(words), *self.words])

    def _shared(self, words: Sequence[str]) -> list[str]:
        own = {word.partition("=")[0] for word in self.words}
        return [word for word in words if word.partition("=")[0] not in own]

    def sentence(self) -> str:
        """Return the recipe and what is expected of it in one sentence."""
        return f"Use {_listed(self._decisions())}{self._expectation()}."

    def _decisions(self) -> list[str]:
        found = []
        for group, choice in self.choices.items():
            found.append(f"{group} {_value(choice)}")
        if "lr" in self.keys:
            found.append(f"a peak learning rate of {self.keys['lr']:g}")
        if "replay.share" in self.keys:
            found.append(f"{self.keys['replay.share']:.0%} old text")
        if "max_steps" in self.keys:
            found.append(f"{self.keys['max_steps']:,} steps")
        if "merge.choose" in self.keys:
            found.append("a merge with the base model at the end")
        return found or ["the command as it is"]

    def _expectation(self) -> str:
        parts = []
        for role in ("new", "base"):
            for name, one in self.predicted.items():
                if one.role == role:
                    improves = one.change[0] < 0
                    verb = "gains" if improves else ("loses" if role == "new" else "forgets")
                    value, *ends = (-x if improves else x for x in one.change)
                    low, high = sorted(ends)
                    parts.append(f"{verb} {value:.2f} ({low:.2f} to {high:.2f}) nats per token on {name}")
        if not parts:
            return ""
        steps = {one.steps for one in self.predicted.values()}
        by = {one.by for one in self.predicted.values()}
        after = f" after {max(steps):,} steps" if by == {"law"} else f" in the {max(steps):,} steps of a probe"
        return f": the model {_listed(parts)}{after}"

    def yaml(self, command: str) -> str:
        """Return the experiment: data only, with the reasons on top."""
        import yaml

        tree: dict[str, Any] = {}
        for key, value in self.keys.items():
            node = tree
            *path, last = key.split(".")
            for name in path:
                node = node.setdefault(name, {})
            node[last] = value
        if self.predicted:
            tree["advise"] = {
                "predicted": {
                    name: [one.role, one.steps, *(round(x, 5) for x in one.change)]
                    for name, one in self.predicted.items()
                }
            }
        head = ["# @package _global_", *_comments([self.sentence(), *self.reasons]), f"# {_plain(command)}"]
        defaults = {"defaults": [{f"override /{group}": choice} for group, choice in self.choices.items()]}
        content = (defaults if self.choices else {}) | tree
        return "\n".join(head) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plain(text: str) -> str:
    """Return ``text`` without line breaks, which would end a comment."""
    return " ".join(text.split())


def _comments(sentences: Sequence[str]) -> list[str]:
    import textwrap

    return [f"# {line}" for text in sentences for line in textwrap.wrap(_plain(text), 118)]
