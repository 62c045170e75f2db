"""Whether W&B would find a key, and for which server, without importing wandb: from where wandb itself takes them.

No key of ours names the server: a config file from somebody else could have the key sent to a server of theirs. For the
same reason ``wandb/settings`` of the current folder, which may be a stranger's, says nothing but the mode.
"""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from pretrain.runtime.filesystem import expanded

CLOUD = "https://api.forge.coreweave.com"  # of wandb 0.31
FORMER_CLOUD = "api.wandb.ai"  # the same servers: wandb takes a key of this name too


def server() -> str:
    """The URL of W&B's cloud, or of a server of one's own (``WANDB_BASE_URL``, ``wandb login --host``)."""
    return os.environ.get("WANDB_BASE_URL") or settings().get("base_url", CLOUD)


def has_key() -> bool:
    """Whether there is a key (or an identity token) for ``server()``: in the environment, netrc or W&B's settings."""
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
    """What ``wandb login`` and ``wandb offline`` have left for this user."""
    return _read(expanded(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb") / "settings")


def mode() -> str | None:
    """What ``wandb offline`` or ``wandb online`` have said for this folder, else for this user."""
    folder = Path(os.environ.get("WANDB_DIR", "."), "wandb")
    return _read(folder / "settings").get("mode") or settings().get("mode")


def _read(file: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file)
        return dict(parser["default"]) if "default" in parser else {}
    except (configparser.Error, UnicodeDecodeError):
        return {}
