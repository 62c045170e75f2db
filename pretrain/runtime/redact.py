"""Secrets. A config must not contain any, and everything that is printed or logged passes through `redact`.

No key accepts a token: libraries read tokens from the environment, the Hub's token file and netrc. The secrets that are
recognised are the values found there, in each form in which a log may quote them, and every text that has the form of a
token or of a password in a URL.
"""

from __future__ import annotations

import base64
import json
import logging
import netrc
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import quote, quote_plus

from pretrain.runtime.filesystem import expanded

NAMES = re.compile(  # of environment variables
    r"TOKEN(?!IZER|S_|S$)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SECRET|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|CONNECTION_STRING"
    r"|_PWD$|_PASS$|_PAT$|_AUTH$",
    re.IGNORECASE,
)
SHORTEST = 8  # characters; a shorter value may occur in ordinary words
WORD = r"[^\s/:@\"'<>,]"  # of a URL, before the host
SHAPES = {  # the match is replaced, or only its group `secret` if there is one
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "a W&B key": re.compile(r"\bwandb_v\d_\w{16,}|\blocal-[0-9a-f]{40}\b"),
    "a key": re.compile(  # hex digits alone may be a commit or a checksum, so a word before them is required
        r"(?i:(?:wandb|api|access|secret|private|auth)[\w. -]{0,20}?(?:key|token)|\b(?:token|passwd|password|passphrase))"
        r"""(?:["']?\s*[=:]\s*["']?|\s+(?:is\s+)?)(?P<secret>[0-9a-f]{40}|[0-9a-f]{32})\b"""
    ),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}"),
    "a GitLab token": re.compile(r"\bgl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-[\w-]{20,}"),
    "a Slack token": re.compile(
        r"\bxox[abeoprs]-[\w-]{10,}|\bxapp-\d-[\w-]{10,}|(?<=hooks\.slack\.com/services/)[\w/]{20,}"
    ),
    "an API key": re.compile(  # OpenAI, Anthropic; Stripe; Google; SendGrid; PyPI; npm; Databricks
        r"\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|\b[sr]k_(?:live|test)_\w{16,}|\bAIza[\w-]{35}"
        r"|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bpypi-AgE[\w-]{20,}|\bnpm_[A-Za-z0-9]{36}|\bdapi[0-9a-f]{32}\b"
    ),
    "a JSON web token": re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    "a private key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\\\s]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
    ),
    "an authorization": re.compile(
        r"(?i:\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+|\bbearer\s+(?=\S*\d))(?P<secret>[\w.~+/=-]{16,})"
    ),
    # A password may contain slashes; `host:8080/` is not a password.
    "a password in a URL": re.compile(rf"(?<=://)(?P<secret>{WORD}*:(?!\d{{1,5}}[/?#])[^\s@\"'<>,]*)(?=@[\w.\[-])"),
    "a token in a URL": re.compile(rf"\bhttps?://(?P<secret>(?={WORD}*\d){WORD}{{8,}}|{WORD}{{20,}})(?=@[\w.\[-])"),
    "a key in a URL": re.compile(
        r"(?i:[?&](?:access_token|api_?key|password|secret|sig|signature|token|x-(?:amz|goog)-(?:signature|security-token))=)(?P<secret>[^\s&\"'<>]{8,})"
    ),
}


def secrets() -> dict[str, str]:
    """Return every secret that this process can find, with its location. A path is not a secret, since it only names a file."""
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
    return {v: where for v, where in found.items() if len(v) >= SHORTEST and not _is_path(v)}


def _is_path(value: str) -> bool:
    """Return whether a value is a path; a secret in base64 may start like one."""
    return value[0] in "/~" and (re.fullmatch(r"[\w./~@ -]+", value) is not None or os.path.exists(value))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _forms(secret: str) -> tuple[str, ...]:
    return tuple(forms(secret))


def forms(secret: str) -> Iterator[str]:
    """Yield the forms in which a text may quote ``secret``: unchanged, as repr, in JSON, in a URL, in base64, and each line."""
    yield secret
    yield repr(secret)[1:-1]
    yield repr(secret.encode(errors="surrogateescape"))[2:-1]
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield quote(secret, safe="", errors="surrogateescape")
    yield quote(secret, errors="surrogateescape")
    yield quote_plus(secret, errors="surrogateescape")
    yield re.sub("%..", lambda match: match[0].lower(), quote(secret, safe="", errors="surrogateescape"))
    raw = secret.encode(errors="surrogateescape")
    yield from (encode(raw).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode))
    yield from (line.strip() for line in secret.splitlines()[1:-1] if len(line.strip()) >= 2 * SHORTEST)


def find_secret(text: str, known: dict[str, str]) -> str | None:
    """Return a description of a secret in ``text``, or ``None``; ``known`` is the result of ``secrets()``."""
    where = next((where for value, where in known.items() if any(form in text for form in _forms(value))), None)
    return where or next((what for what, shape in SHAPES.items() if shape.search(text)), None)


def redact(text: str) -> str:
    """Return ``text`` with every secret replaced by ``***``."""
    for form in sorted({form for value in secrets() for form in _forms(value)}, key=len, reverse=True):
        text = text.replace(form, "***")
    for shape in SHAPES.values():
        text = shape.sub(_without_secret, text)
    return text


def _without_secret(match: re.Match[str]) -> str:
    if "secret" not in match.re.groupindex:
        return "***"
    start, end = (place - match.start() for place in match.span("secret"))
    return f"{match[0][:start]}***{match[0][end:]}"


class RedactingFormatter(logging.Formatter):
    """A formatter that removes secrets from log messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
