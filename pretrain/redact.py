"""Secrets: none may stand in a config, and what is said or logged goes through `redact`.

No key takes a token: the libraries read theirs from the environment, the Hub's token file and netrc. Known are the
values found there, and what looks like a token or a password in a URL wherever it comes from.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from pathlib import Path

from pretrain.filesystem import expanded

NAMES = re.compile(r"TOKEN(?!IZER)|API_?KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # of environment variables
SHORTEST = 8  # characters; a shorter value stands in innocent words
SHAPES = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a W&B key": re.compile(r"\bwandb_v\d_\w{16,}|\blocal-[0-9a-f]{40}\b"),
    "a password in a URL": re.compile(r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),
}


def secrets() -> dict[str, str]:
    """Value → where it stands, of every secret this process can know. A path is none: it says where one lies."""
    found = {value: f"the value of ${name}" for name, value in os.environ.items() if NAMES.search(name)}
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    file = expanded(os.environ.get("HF_TOKEN_PATH", f"{home}/token"))
    found[_text(file).strip()] = f"the token in {file}"
    file = expanded(os.environ.get("NETRC", "~/.netrc"))
    try:
        logins = netrc.netrc(str(file)).hosts if _text(file) else {}
    except netrc.NetrcParseError:
        logins = {}
    found |= {password: f"the password of {host} in {file}" for host, (_, _, password) in logins.items() if password}
    return {v: where for v, where in found.items() if len(v) >= SHORTEST and not v.startswith(("/", "~"))}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def held(text: str, known: dict[str, str]) -> str | None:
    """Which secret stands in ``text``, in words; ``known``: of ``secrets()``."""
    where = next((where for value, where in known.items() if value in text), None)
    return where or next((what for what, shape in SHAPES.items() if shape.search(text)), None)


def redact(text: str) -> str:
    """``text`` with ``***`` for every secret in it."""
    for value in sorted(secrets(), key=len, reverse=True):
        text = text.replace(value, "***")
    for shape in SHAPES.values():
        text = shape.sub("***", text)
    return text


class RedactingFormatter(logging.Formatter):
    """What is logged, tracebacks too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
