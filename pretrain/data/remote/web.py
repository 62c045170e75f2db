"""Files of web servers, by ``http`` and ``https``, read by ranges. The server may be anybody's: an answer is read up to the bytes
that were requested, and a redirection leads neither to another protocol nor into this machine's own network."""

from __future__ import annotations

import http.client
import ipaddress
import netrc
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import quote, urlsplit

from pretrain.data.reading.opening import changed_while_read
from pretrain.data.reading.units import Stamp
from pretrain.data.remote.addresses import WEB, is_disguised
from pretrain.data.remote.backend import Backend, Interrupted, remote_stamp
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.redact import redact

TIMEOUT_SECONDS = 30.0
RESERVED = "/:?&=%+,;@~!$'()[]"  # what a URL keeps: a name with a space or an umlaut is quoted
METADATA = ("fd00:ec2::254", "100.100.100.200")
RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")
MAY_PASS = {408, 425, 429, *range(500, 600)}  # status codes of an overloaded or restarted server


class Web(Backend):
    """The files of web servers. A folder of a web server has no list of its files."""

    def stamp(self, url: str) -> Stamp | None:
        with _errors(url):
            try:
                with _opened(url, 0, 1) as answer:
                    return _stamp(url, answer, 0)
            except urllib.error.HTTPError as error:
                if error.code == 416 and error.headers.get("Content-Range") == "bytes */0":  # it has no first byte
                    return remote_stamp(0, version=error.headers.get("ETag") or "empty")
                raise

    def below(self, url: str, depth: int | None = None) -> Iterator[tuple[str, Stamp]]:
        raise UserError(f"{url}: a web server does not list its files; name each file, in a list")

    def fetch(self, url: str, start: int, stop: int, stamp: Stamp) -> bytes:
        found = bytearray()
        with _errors(url), _opened(url, start, stop) as answer:
            if _stamp(url, answer, start) != stamp:
                raise UserError(changed_while_read(url))
            try:
                while len(found) < stop - start and (block := answer.read(min(stop - start - len(found), 64 << 10))):
                    found += block
            except (OSError, http.client.HTTPException):
                if not found:
                    raise
        return bytes(found)


def _opened(url: str, start: int, stop: int) -> Any:
    """Return the answer to a request of bytes [start, stop)."""
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(quote(url, safe=RESERVED), headers=headers)
    host = _host(request)
    if _keeps_credentials(host):
        raise UserError(f"{url}: an address at which clouds keep credentials; it is not read")
    if login := _login(host):
        request.add_unredirected_header("Authorization", login)  # not sent to where the server redirects
    return _opener().open(request, timeout=TIMEOUT_SECONDS)


def _stamp(url: str, answer: Any, start: int) -> Stamp:
    """Return the stamp of the file from the headers of an answer. Raises ``UserError`` for an answer that is not a range from
    byte ``start``."""
    headers = answer.headers
    found = RANGE.fullmatch(headers.get("Content-Range", ""))
    if answer.status == 206 and found and found[1] == str(start):
        size = int(found[2])
    elif answer.status == 200 and headers.get("Content-Length") == "0":
        size = 0
    else:
        raise UserError(f"{url}: the server does not send parts of a file; download it and name the copy")
    version = headers.get("ETag")
    try:
        changed = parsedate_to_datetime(headers["Last-Modified"]).timestamp() if headers.get("Last-Modified") else None
    except (ValueError, OverflowError):
        changed = None
    return remote_stamp(size, version=version.removeprefix("W/") if version else None, changed=changed)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Convert the errors of ``urllib`` and ``http``."""
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            _raise_for(url, error)
    except UserError:
        raise
    except (ValueError, http.client.InvalidURL) as error:  # also UnicodeError
        raise UserError(f"{url}: not an address ({one_line(error)})") from error
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLCertVerificationError) or getattr(reason, "errno", None) == socket.EAI_NONAME:
            raise UserError(f"{url}: can't be read ({redact(one_line(error))})") from error
        raise Interrupted(redact(one_line(error))) from error
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(redact(one_line(error))) from error


def _raise_for(url: str, error: urllib.error.HTTPError) -> None:
    if error.code in (401, 403):
        raise UserError(f"{url}: access denied ({error.code}); a login is read from ~/.netrc") from error
    if error.code in (404, 410):
        raise UserError(f"{url}: no such file ({error.code})") from error
    if error.code in MAY_PASS:
        raise Interrupted(f"HTTP {error.code}") from error
    if error.code == 416:
        raise UserError(f"{url}: the file is empty, or became shorter while it was being read") from error
    raise UserError(f"{url}: can't be read (HTTP {error.code})") from error


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Redirections to ``http`` or ``https``, not from ``https`` to ``http``, and not into a private network from outside."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            self._check(urllib.request.Request(req.full_url), request)  # `req.host` may be that of a proxy
        return request

    @staticmethod
    def _check(before: urllib.request.Request, after: urllib.request.Request) -> None:
        host = _host(after)
        inward = _keeps_credentials(host) or (_is_internal(host) and not _is_internal(_host(before)))
        downward = (before.type, after.type) == ("https", "http")
        if after.type not in WEB or downward or inward or is_disguised(urlsplit(after.full_url).netloc):
            raise UserError(f"{before.full_url}: it redirects to {after.type}://{host}, which is not followed")


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


def _check_peer(connection: http.client.HTTPConnection) -> None:
    """Raise ``UserError``, before anything is requested, if a connection leads further inward than its host did when it was
    checked: the owner of a name may let it stand for another address each time."""
    peer = str(connection.sock.getpeername()[0]).partition("%")[0]
    for is_inward in (_keeps_credentials, _is_internal):
        if is_inward(peer) and not is_inward(connection.host):
            connection.close()
            raise UserError(
                f"http://{connection.host}: its name stands for another address now, {peer}, which is not read"
            )


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=ssl.create_default_context())


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener of ``http`` and ``https`` alone; the default one also opens ``file:`` and ``ftp:``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(),
        _Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirections(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "pretrain")]
    return opener


def _host(request: urllib.request.Request) -> str:
    """Return the host to which a request is sent; ``urllib`` decodes it."""
    return urlsplit(f"//{request.host or ''}").hostname or ""


def _keeps_credentials(host: str) -> bool:
    """Return whether clouds keep the credentials of their machines at this host: link-local addresses and two others."""
    return any(address.is_link_local or str(address) in METADATA for address in _addresses(host))


def _is_internal(host: str) -> bool:
    return any(not address.is_global for address in _addresses(host))


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses that a host had when it was first met; none where it is not found here, as behind a proxy."""
    try:
        return _found_addresses(host)
    except (OSError, ValueError, UnicodeError):
        return []


@cache
def _found_addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    addresses = [ipaddress.ip_address(address) for address in sorted(found)]
    return [getattr(address, "ipv4_mapped", None) or address for address in addresses]


@cache
def _login(host: str) -> str | None:
    """Return the value of the header ``Authorization`` for a host in ~/.netrc; ``None`` if it is not there."""
    try:
        found = netrc.netrc(str(expanded(os.environ.get("NETRC", "~/.netrc")))).hosts.get(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return f"Basic {b64encode(f'{found[0]}:{found[2]}'.encode()).decode()}" if found else None
