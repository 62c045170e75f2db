"""Object stores, by the file systems of ``fsspec``. Credentials, endpoints and regions are those of the user's environment."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from pretrain.data.reading.units import Stamp
from pretrain.data.remote.addresses import PACKAGES
from pretrain.data.remote.backend import Backend, Interrupted, remote_stamp
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.redact import redact

VERSIONS = ("ETag", "etag", "blob_id", "generation", "md5Hash", "content_md5")  # keys of what changes with the content
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
MOST_CAUSES = 10
BUGS = (TypeError, AttributeError, NameError, AssertionError, MemoryError, RecursionError)
CREDENTIALS = {
    "s3fs": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket",
    "gcsfs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "adlfs": "set AZURE_STORAGE_ACCOUNT_NAME and the variables of azure-identity",
    None: "set HF_TOKEN, or run hf auth login",
}


class ObjectStore(Backend):
    """A file system of ``fsspec``."""

    def __init__(self, protocol: str) -> None:
        import fsspec

        self._protocol, self._package = protocol, PACKAGES[protocol]
        try:
            # Its own cache of listings would hide changes and grow with the number of files; one of another part of this
            # process may have other credentials.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            self._files: Any = fsspec.filesystem(protocol, **options)
            # The file that the general method opens would read 5 MB more than it is asked for, at each request.
            is_general = getattr(self._files.cat_file, "__func__", None) is fsspec.AbstractFileSystem.cat_file
            self._options = {"cache_type": "none"} if is_general else {}
        except ImportError as error:
            raise UserError(
                f"{protocol}://: reading it needs the package {self._package}: pip install {self._package}"
            ) from error

    def stamp(self, url: str) -> Stamp | None:
        with self._errors(url):
            self._files.invalidate_cache()
            try:
                found = self._files.info(self._path(url))
            except FileNotFoundError:
                return None
            return _stamp(found) if found["type"] == "file" else None

    def below(self, url: str, depth: int | None = None) -> Iterator[tuple[str, Stamp]]:
        with self._errors(url):
            self._files.invalidate_cache()
            found = self._files.find(self._path(url), maxdepth=depth, detail=True)
        for name, facts in found.items():
            if facts["type"] == "file" and not name.endswith("/"):
                yield f"{self._protocol}://{name.lstrip('/')}", _stamp(facts)

    def fetch(self, url: str, start: int, stop: int, stamp: Stamp) -> bytes:
        with self._errors(url):
            return bytes(self._files.cat_file(self._path(url), start=start, end=stop, **self._options))

    def _path(self, url: str) -> str:
        from fsspec.core import strip_protocol

        return str(strip_protocol(url))

    @contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        """Convert the errors of any file system, each of which has its own."""
        try:
            yield
        except (UserError, *BUGS):
            raise
        except FileNotFoundError as error:
            raise UserError(f"{url}: no such file, folder or bucket") from error
        except Exception as error:
            reason = redact(one_line(error))
            is_denied = isinstance(error, PermissionError) or _status(error) in (401, 403)
            if is_denied or "Credential" in type(error).__name__:
                hint = CREDENTIALS.get(self._package, "set its credentials")
                raise UserError(f"{url}: access denied ({reason}); {hint}") from error
            if "Offline" in type(error).__name__ or _is_unknown_host(error):
                raise UserError(f"{url}: can't be read ({reason})") from error
            raise Interrupted(reason) from error


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an answer that is an error; ``None`` where there was no answer."""
    found = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _is_unknown_host(error: BaseException) -> bool:
    """Return whether an error was caused by the name of a host that does not exist."""
    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None or isinstance(cause, socket.gaierror):
            break
        cause = cause.__cause__ or cause.__context__
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME


def _stamp(facts: dict[str, Any]) -> Stamp:
    """Return the stamp of a file from the facts that ``fsspec`` has of it, whose keys depend on the file system."""
    size = facts["size"]
    if not isinstance(size, int) or size < 0:
        raise UserError(f"{facts['name']}: the server does not tell its size")
    version = next((str(facts[key]).strip('"') for key in VERSIONS if facts.get(key)), None)
    changed = next((_seconds(facts[key]) for key in TIMES if facts.get(key)), None)
    return remote_stamp(size, version=version, changed=changed)


def _seconds(time: Any) -> float | None:
    if isinstance(time, datetime):
        return time.timestamp()
    if isinstance(time, str):
        return datetime.fromisoformat(time).timestamp()
    return float(time)
