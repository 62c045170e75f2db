"""Which URLs are read. Only file systems that list and read bytes are allowed, by name: others of ``fsspec`` write files
(``simplecache``), follow what a file names (``reference``), accept any host's key (``sftp``) or unpack archives (``zip``)."""

from __future__ import annotations

import re

from pretrain.runtime.errors import UserError
from pretrain.runtime.redact import find_secret, redact

# protocol → the package of its file system; None: it is always installed
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "hf": None,
    "http": None,
    "https": None,
    "memory": None,
}
WEB = ("http", "https")
MAGIC = re.compile(r"[*?\[]")


def protocol_of(url: str) -> str:
    """Return the protocol of ``url`` in lower case."""
    return url.partition(":")[0].lower()


def is_web(url: str) -> bool:
    """Return whether ``url`` is an address of a web server, which has files but no list of them."""
    return protocol_of(url) in WEB


def check_url(url: str) -> None:
    """Raise ``UserError`` for a URL that is not read: a protocol that is not allowed, a chain of them, or one with a secret."""
    name, protocol = f"dataset.nameOrPath={redact(url)}", protocol_of(url)
    if secret := find_secret(url, {}):
        raise UserError(
            f"{name}: holds {secret}; credentials are read from the environment and from their usual files only"
        )
    # The host of an address may be one of IPv6, which has "::" too.
    chained = "::" in (url.partition("://")[2].partition("/")[2] if protocol in WEB else url)
    if chained or not url[len(protocol) :].startswith("://"):
        raise UserError(f"{name}: chained file systems are not read; name the file itself")
    if protocol in ("file", "local"):
        raise UserError(f"{name}: name a file of this machine by its path alone")
    if protocol not in PACKAGES:
        raise UserError(f"{name}: {protocol}:// is not read, only {', '.join(f'{known}://' for known in PACKAGES)}")
    if not url.isprintable():
        raise UserError(f"{name!a}: it contains a control character")
    if not _place(url):
        raise UserError(f"{name}: it names no {'host' if protocol in WEB else 'bucket'}")
    if protocol in WEB and is_disguised(_place(url)):
        raise UserError(f"{name}: the host of an address can't contain % or a backslash")
    path = path_of(url).partition("://")[2].partition("/")[2]
    if protocol in WEB and ("@" in _place(url) or "#" in url or MAGIC.search(path)):
        raise UserError(
            f"{name}: an address of a web server can't contain *, [, # or a user name; name each file, in a list"
        )


def is_disguised(host: str) -> bool:
    """Return whether a host has characters that programs read differently: ``169.254.169%2E254``, or a backslash."""
    return "%" in host or "\\" in host


def path_of(url: str) -> str:
    """Return the path in a URL, from which a file's name and format follow: without the query of an address."""
    return url.partition("?")[0] if is_web(url) else url


def _place(url: str) -> str:
    """Return the host or bucket."""
    rest = path_of(url).partition("://")[2]
    return rest.lstrip("/") if protocol_of(url) == "memory" else rest.partition("/")[0]
