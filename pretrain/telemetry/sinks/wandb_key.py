"""Find out whether W&B would find an API key, and for which server, without importing wandb. The places are those from which
wandb itself reads them.

No config key of this project names the server, because a config file from another person could send the API key to their
server. For the same reason only the mode is read from ``wandb/settings`` of the current folder, which may belong to another
user.
"""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from pretrain.runtime.filesystem import expanded

CLOUD = "https://api.forge.coreweave.com"  # of wandb 0.31
FORMER_CLOUD = "api.wandb.ai"  # the same servers: wandb accepts a key under this name too


def server() -> str:
    """Return the URL of W&B's cloud, or of the user's own server (``WANDB_BASE_URL``, ``wandb login --host``)."""
    return os.environ.get("WANDB_BASE_URL") or settings().get("base_url", CLOUD)


def has_key() -> bool:
    """Return whether there is a key (or an identity token) for ``server()`` in the environment, netrc or W&B's settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings().get("api_key"):
        return True
    home = expanded("~/.netrc")
    file = expanded(os.environ.get("NETRC") or (home if home.exists() else "~/_netrc"))
    try:
        entries, host = netrc.netrc(file), urlsplit(server()).netloc
    except (OSError, netrc.NetrcParseError):
        return False
    entry = entries.authenticators(host) or (host == urlsplit(CLOUD).netloc and entries.authenticators(FORMER_CLOUD))
    return bool(entry and entry[2])


def settings() -> dict[str, str]:
    """Return the settings that ``wandb login`` and ``wandb offline`` saved for this user."""
    return _read(expanded(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb") / "settings")


def mode() -> str | None:
    """Return the mode that ``wandb offline`` or ``wandb online`` saved for this folder, else for this user."""
    folder = Path(os.environ.get("WANDB_DIR", "."), "wandb")
    return _read(folder / "settings").get("mode") or settings().get("mode")


def _read(file: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file)
        return dict(parser["default"]) if "default" in parser else {}
    except (configparser.Error, UnicodeDecodeError):
        return {}
