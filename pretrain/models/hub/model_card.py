"""The model card: training data, settings and results of a model, in the Hub's format of YAML followed by Markdown.
Source: https://huggingface.co/docs/hub/model-cards"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain.runtime.places import each
from pretrain.runtime.redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pretrain.checkpoint.train_state import TrainState
    from pretrain.telemetry.events import PartCount

SETTINGS = (
    *("sequence_length", "batch_size", "gradient_accumulation_steps", "lr", "warmup_proportion", "weight_decay"),
    *("beta1", "beta2", "grad_clip", "seed"),
)
MACHINE_KEYS = {"task", "name", "output_dir", "resume", "devices", "launch", "sink", "generation", "merge"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key)$", re.IGNORECASE)

USE = (
    "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'folder = "."  # the folder of this file\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n'
    "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n"
)
TRANSFORMED_USE = (  # of a checkpoint of a run with transforms
    "## Use\n\nThe weights in this folder have the names and shapes that the run's transforms gave them, so `from_pretrained` "
    "can't read them. To write a model that it reads, with the same `transform=` as the run:\n\n```bash\n"
    "python -m pretrain task=export model_name=<this folder> output_dir=<folder> transform=[…]\n```\n"
)


def model_card(
    config: dict[str, Any],
    progress: TrainState,
    *,
    data: dict[str, int | None],
    facts: dict[str, Any],
    total_steps: int,
    parts: Callable[[int], dict[str, PartCount]] = lambda samples: {},
) -> str:
    """Return the text of the model card. It contains no path of this machine and no secret.

    ``config`` is the resolved config. ``data`` holds documents, tokens and bytes of the training text, and the sequences of a
    global batch. ``facts`` is the content of run.json. ``parts`` maps a number of samples to what they hold of each part of the
    training data.
    """
    model, dataset = config["model_name"], config["dataset"]
    trained = "random weights" if _is_scratch(config) else f"`{public(model)}`"
    settings = [(key, facts.get(key, config[key])) for key in SETTINGS]  # batch_size=auto has become a number
    settings += [(part, _choice(config[part])) for part in ("scheduler", "optimizer")]
    settings += [
        ("precision", facts["precision"]),
        ("strategy", f"{facts['strategy']}, {facts['world_size']} processes"),
    ]
    shown = {key: value for key, value in config.items() if key not in MACHINE_KEYS}
    text = (
        _front_matter(config),
        f"# {public(config['name'])}\n",
        f"A causal language model of {facts['parameters']:,} parameters, trained from {trained} with pretrain: "
        f"step {progress.step:,} of {total_steps:,}, {progress.tokens:,} target tokens "
        f"({progress.samples:,} sequences, {data['global_batch']:,} a step).\n",
        USE,
        "## Results\n",
        _results(progress),
        "## Data\n",
        f"{', '.join(map(_named, _datasets(dataset)))}: "
        f"{data['documents']:,} documents, {data['tokens']:,} tokens{_bytes(data['bytes'])}.\n",
        *_parts(parts(progress.samples)),
        "## Settings\n",
        _table(("setting", "value"), settings),
        "<details><summary>The full configuration</summary>\n",
        f"```yaml\n{yaml.safe_dump(public(shown), sort_keys=False, allow_unicode=True)}```\n\n</details>\n",
        "## Versions\n",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".\n",
    )
    return redact("\n".join(text))


def merge_card(
    models: Sequence[tuple[str, float]], *, method: str, base: str | None, settings: Mapping[str, Any]
) -> str:
    """Return the text of the model card of a merged model. It contains no path of this machine and no secret.

    Args:
        models: The merged models, each with its weight.
        method: How they were merged.
        base: The base model to which changes were added, if any.
        settings: Further numbers of the method, by name.
    """
    names = [*(name for name, _ in models), *([base] if base else [])]
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if on_hub := [name for name in names if _on_the_hub(name)]:
        matter["base_model"] = list(dict.fromkeys(on_hub))
    matter["tags"] = ["pretrain", "merge"]
    rows = [*settings.items(), *([("base", f"`{public(base)}`")] if base else [])]
    text = (
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n",
        "# Merged model\n",
        f"Merged from {len(models)} models with pretrain, method `{method}`.\n",
        _table(("model", "weight"), [(f"`{_origin(name)}`", f"{weight:.6g}") for name, weight in models]),
        *([_table(("setting", "value"), rows)] if rows else []),
        USE,
    )
    return redact("\n".join(text))


def _origin(name: str) -> str:
    """Return the name of a model for others: of a checkpoint also its run."""
    path = Path(name)
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else str(public(name))


def public(value: Any) -> Any:
    """Return ``value`` without secrets. Of a path on this machine only the last component is kept."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "../")):
        return Path(value).name
    return value


def _is_scratch(config: dict[str, Any]) -> bool:
    return bool(config["model"]["_target_"].endswith(".Scratch"))


def _choice(node: dict[str, Any]) -> str:
    """Return a part of the config as the name of its class or function with its own values."""
    own = ", ".join(f"{key} {value}" for key, value in node.items() if not key.startswith("_"))
    return f"{node['_target_'].rpartition('.')[2]}" + (f" ({own})" if own else "")


def _front_matter(config: dict[str, Any]) -> str:
    """Return the YAML front matter, which the Hub shows and links. It names only models and datasets that exist on the Hub."""
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not _is_scratch(config) and _on_the_hub(config["model_name"]):
        matter["base_model"] = config["model_name"]
    from_hub = [part for part in _datasets(config["dataset"]) if part.get("source") == "huggingface"]
    on_hub = [name for part in from_hub for name in each(part.get("nameOrPath")) if _on_the_hub(name)]
    if on_hub:
        matter["datasets"] = list(dict.fromkeys(on_hub))
    matter["tags"] = ["pretrain", "from-scratch" if _is_scratch(config) else "continual-pretraining"]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n"


def _datasets(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the config of a dataset, or those of all parts of a mixture."""
    parts = dataset.get("parts")
    return [inner for part in parts.values() for inner in _datasets(part)] if isinstance(parts, dict) else [dataset]


def _named(dataset: dict[str, Any]) -> str:
    """Return the name of a dataset, and the kind of its source: the key ``source`` of ours, or the class of another's."""
    kind = dataset.get("source") or dataset["_target_"].rpartition(".")[2]
    places = each(dataset.get("nameOrPath")) or [dataset.get("name") or kind]
    return f"{', '.join(f'`{public(place)}`' for place in places)} ({kind})"


def _parts(counts: dict[str, PartCount]) -> list[str]:
    """Return the table of what the run has read of each part of its training data; nothing for a single part."""
    if len(counts) < 2:
        return []
    rows = [(n, f"{c.tokens:,}", f"{c.share:.1%}", f"{c.wanted:.1%}", f"{c.epochs:.2f}") for n, c in counts.items()]
    return [_table(("part", "target tokens read", "share", "share by the weights", "epochs"), rows)]


def _on_the_hub(name: str) -> bool:
    """Return whether a valid name is a Hub id, that is, neither the shipped model nor a path on this disk."""
    return name != "sample" and bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _results(progress: TrainState) -> str:
    """Return the table of results, with every domain before and after training."""
    if not progress.scores:
        return "No text was scored.\n"
    head = ("domain", "loss (nats per token)", "change", "perplexity", "bits per byte")
    if progress.evaluated_at == 0:
        rows = [
            (
                f"{s['domain']} ({s['role']})",
                _number(s["loss"]),
                "—",
                _number(s["perplexity"], 2),
                _number(s["bits_per_byte"]),
            )
            for s in progress.scores
        ]
        since = "; it was not scored since" if progress.step else ""
        return f"{_table(head, rows)}\nHeld-out text, at step 0: the model before this run{since}.\n"
    note = f"Held-out text, before → at step {progress.evaluated_at:,}. A base domain's rise is what was forgotten.\n"
    unknown = [f"{s['domain']}: {s['delta_reason']}" for s in progress.scores if s.get("delta_reason")]
    if unknown:
        note += f"Changes that are not known: {_cell('; '.join(unknown))}.\n"
    return f"{_table(head, [_before_after(s) for s in progress.scores])}\n{note}"


def _before_after(s: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the results, from a domain's last score and its difference from the base model's score on the same text."""
    loss, delta, bits = s["loss"], s.get("delta_loss"), s["bits_per_byte"]
    before = None if loss is None or delta is None else loss - delta
    earlier_bits = bits * before / loss if bits and before and loss else None  # the text and its tokens are the same
    losses, bits_per_byte = f"{_number(before)} → {_number(loss)}", f"{_number(earlier_bits)} → {_number(bits)}"
    perplexity = f"{_number(_exp(before), 2)} → {_number(s['perplexity'], 2)}"
    change = "—" if delta is None else f"{round(delta, 4) + 0.0:+.4f}"  # + 0.0 removes the minus of a negative zero
    return f"{s['domain']} ({s['role']})", losses, change, perplexity, bits_per_byte


def _exp(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _bytes(count: int | None) -> str:
    return "" if count is None else f", {count:,} bytes of text"


def _number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(c) for c in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(public(value)).replace("|", "\\|").split())
