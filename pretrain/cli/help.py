"""The text of `--help`: the comments of the YAML files, which scripts/make_comments.py writes from docstrings."""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.cli.flags import config_dir_of
from pretrain.config.check import GROUPS, conf_dir
from pretrain.config.choices import choice_files, chosen, groups
from pretrain.config.yaml_file import checked_text
from pretrain.runtime.console import visible
from pretrain.runtime.errors import UserError

USE = """\
Use
  python -m pretrain                                      the embedded default: a small English model learns Python
  python -m pretrain model_name=gpt2 dataset=local dataset.nameOrPath=texts/ precision=bf16-mixed lr=1e-4
  python -m pretrain --config run.yaml lr=3e-4            a flat YAML; later keys win
  python -m pretrain strategy=fsdp devices=2              two processes; devices=auto: every visible GPU
  python -m pretrain -m lr=1e-4,3e-4                      a sweep, each job in a fresh process; docs/sweeps.md
  python -m pretrain hydra/sweeper=optuna 'lr=tag(log,interval(1e-5,1e-2))'   a search; hydra/sweeper=optuna --help
  python -m pretrain hydra/launcher=joblib ...            jobs in parallel on this machine
  python -m pretrain hydra/launcher=slurm ...             the same as SLURM jobs; hydra/launcher=slurm --help
  python -m pretrain task=evaluation model_name=outputs/sample-python/model
  python -m pretrain task=generation model_name=outputs/sample-python/model 'generation.prompts=["def "]'
  python -m pretrain task=export model_name=outputs/sample-python output_dir=exported
  python -m pretrain task=merge 'merge.models=[sample,outputs/sample-python]' output_dir=merged
  python -m pretrain task=plan model_name=gpt2 strategy=fsdp devices=8 plan.device=H100   memory and time before a run
  python -m pretrain task=advise dataset=local dataset.nameOrPath=texts/ max_steps=2000   a recipe from short runs

  Run the same command again to continue an interrupted run.
  --cfg job prints the complete configuration of a run; group=choice --help the keys of a choice; --version
  the version; --hydra-help the rest. Paths and names need quotes only for your shell; ~ is your home folder.
  Exit codes: 0 done · 2 a mistake in the command · 75 stopped by a signal, the same command continues · 1 a bug.
"""


def help_text(arguments: list[str]) -> str:
    """Return the help of the program, or that of each ``group=choice`` among the arguments.

    Names and comments in the folder of --config-dir may be another person's, so the text has no control characters.
    """
    return visible(_help_text(arguments))


def _help_text(arguments: list[str]) -> str:
    config_dir = config_dir_of(arguments)
    files = [
        (group.lstrip("+"), file)
        for group, _, chosen in (argument.partition("=") for argument in arguments)
        for file in (choice_files(group.lstrip("+"), config_dir) if re.fullmatch(r"\+?[\w/-]+", group) else ())
        if file.stem in re.findall(r"[\w-]+", chosen)
    ]
    if files:
        return "\n".join(f"{group}={file.stem}\n\n{_indented(_text(file))}" for group, file in files)
    title = "Continual pretraining of causal language models."
    parts = _groups(config_dir)
    return f"{title}\n\n{USE}\nKeys: key=value\n{_knobs()}\nParts: group=choice, then group.key=value\n{parts}"


def _knobs() -> str:
    """Return the root keys with their comments, as they are in conf/config.yaml."""
    text = (conf_dir() / "config.yaml").read_text()
    keys = text.split("\n\n", 1)[1].split("\nhydra:", 1)[0]
    return _indented(keys)


def _groups(config_dir: str | None) -> str:
    """Return every group's choices with the first comment line of each; a star marks a default choice."""
    defaults = set(chosen())
    lines = []
    for group in sorted({*GROUPS, *groups(config_dir)}):
        files = choice_files(group, config_dir)
        for file in files:
            star = "*" if (group, file.stem) in defaults else " "
            comments = (line[2:] for line in _text(file).splitlines() if line.startswith("# ") and "@" not in line)
            lines.append(f"  {group:<11} {star} {file.stem:<12} {next(comments, '')}")
    return "\n".join(lines) + "\n"


def _text(file: Path) -> str:
    """Return the text of a YAML file, or why it can't be read."""
    try:
        return checked_text(file)
    except UserError as error:
        return f"# {error}"


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.rstrip().splitlines())
