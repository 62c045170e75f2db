"""Files of a web server: one that loses connections, and answers that are hostile."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.remote import stream
from pretrain.data.remote.web import _found_addresses, _opener, _Redirections
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.runtime.errors import UserError
from tests.data.formats import WRITERS, documents_of
from tests.data.servers import WebServer
from tests.data.texts import TEXTS, some_text

StoreOf = Callable[..., TokenStore]


def test_a_lost_connection_is_resumed_at_its_byte(web: WebServer, tmp_path: Path, store_of: StoreOf) -> None:
    text = some_text(3, 100_000).encode()
    web.files = {"/a b.txt": text, "/ünï.jsonl": WRITERS["jsonl"](TEXTS[:50])}
    web.drops, web.dropped_after = 4, 100_001
    (tmp_path / "a b.txt").write_bytes(text)
    there = store_of(f"{web.url}/a b.txt?download=1")
    assert web.drops == 0
    assert web.sent - web.requests < 1.05 * len(text), "no byte is sent twice, but for the stamps' single ones"
    assert [part.path for part in there.parts] == [part.path for part in store_of(tmp_path / "a b.txt").parts]
    assert documents_of(f"{web.url}/ünï.jsonl") == list(TEXTS[:50])


def test_a_connection_that_is_always_lost(web: WebServer) -> None:
    web.files = {"/a.txt": b"some text"}
    source = Local(nameOrPath=f"{web.url}/a.txt")
    (piece,) = cut(source.files()[0], source.options())
    web.drops, web.dropped_after = 10**9, 0
    with pytest.raises(
        UserError, match=r"/a.txt: can't be read at byte 0 after 6 attempts \(.*the same command continues"
    ):
        list(read(piece, source.options()))
    web.drops, web.status, before = 0, 503, web.requests
    with pytest.raises(UserError, match=r"after 6 attempts \(HTTP 503\)"):
        source.files()
    assert web.requests - before == 6


def test_a_web_file_that_changes_while_it_is_read(web: WebServer) -> None:
    web.files = {"/a.txt": b"first"}
    source = Local(nameOrPath=f"{web.url}/a.txt")
    (piece,) = cut(source.files()[0], source.options())
    web.files["/a.txt"] = b"other"
    with pytest.raises(UserError, match="the file changed while it was being read"):
        list(read(piece, source.options()))


def test_a_file_without_an_etag_is_read_at_each_start(web: WebServer, store_of: StoreOf) -> None:
    web.files, web.headers = {"/a.txt": b"first"}, {"ETag": None}
    before = store_of(f"{web.url}/a.txt").parts
    web.files["/a.txt"] = b"other"
    stream.KEPT.clear()
    assert store_of(f"{web.url}/a.txt").parts != before


HOSTILE: dict[str, tuple[int | None, dict[str, str | None], str]] = {
    "no ranges": (200, {"Content-Length": "9"}, "does not send parts of a file"),
    "another range": (None, {"Content-Range": "bytes 5-9/10"}, "does not send parts of a file"),
    "a size that is no number": (None, {"Content-Range": "bytes 0-9/*"}, "does not send parts of a file"),
    "to a file": (302, {"Location": "file:///etc/passwd"}, "can't be read (HTTP 302)"),
    "to another protocol": (302, {"Location": "ftp://127.0.0.1/x"}, "which is not followed"),
    "to no address": (302, {"Location": "http://[bad/"}, "not an address"),
    "to credentials by IPv6": (302, {"Location": "http://[::ffff:169.254.169.254]/"}, "which is not followed"),
    "to credentials": (302, {"Location": "http://169.254.169.254/latest"}, "169.254.169.254, which is not followed"),
    "to credentials by the header URI": (302, {"URI": "http://169.254.169.254/x"}, "which is not followed"),
    "to a file by the header URI": (302, {"URI": "file:///etc/passwd"}, "can't be read (HTTP 302)"),
    "to an encoded host": (302, {"Location": "http://169.254.169%2E254/x"}, "169.254.169.254, which is not followed"),
    "to an encoded name": (302, {"Location": "http://local%68ost/x"}, "which is not followed"),
    "to a host with a backslash": (302, {"Location": "http://127.0.0.1\\@a/x"}, "which is not followed"),
    "nowhere": (302, {}, "can't be read (HTTP 302)"),
    "in a circle": (302, {"Location": "/a.txt"}, "can't be read (HTTP 302)"),
    "not there": (404, {}, "no such file (404)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_hostile_server_answers(case: str, web: WebServer) -> None:
    web.status, web.headers, says = HOSTILE[case]
    web.files = {"/a.txt": b"some text."}
    with pytest.raises(UserError) as refused:
        Local(nameOrPath=f"{web.url}/a.txt").files()
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_redirection_inward_through_a_proxy_of_this_network(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The host of the address counts, not that of the proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", web.url)
    _opener.cache_clear()
    request.addfinalizer(_opener.cache_clear)
    web.status, web.headers = 302, {"Location": "http://127.0.0.1/x"}
    with pytest.raises(UserError, match=r"^http://1.1.1.1/a.txt: it redirects to http://127.0.0.1, which is not"):
        Local(nameOrPath="http://1.1.1.1/a.txt").files()
    assert web.requests == 1


@pytest.mark.parametrize("redirected", [False, True])
def test_a_name_that_stands_for_another_address_at_each_look(
    redirected: bool, web: WebServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The address that was checked is one of the internet; the connection would lead to a server of this machine. It gets no
    request, also where a server on the internet redirects to that name."""
    looked_up, port = [], web.url.rpartition(":")[2]
    resolve = socket.getaddrinfo

    def changing(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(host)
        first = host == "rebound.example.com" and looked_up.count(host) == 1
        return resolve("1.1.1.1" if first else "127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    _found_addresses.cache_clear()
    request.addfinalizer(_found_addresses.cache_clear)
    web.files = {"/a.txt": b"a secret of this network"}
    url = f"http://rebound.example.com:{port}/a.txt"
    with pytest.raises(
        UserError, match=r"rebound.example.com: its name stands for another address now, 127.0.0.1, which is"
    ):
        if redirected:
            handler, first = _Redirections(), Request("http://1.1.1.1/b.txt")
            onward = handler.redirect_request(first, None, 302, "", {}, url)
            _opener().open(onward)
        else:
            Local(nameOrPath=url).files()
    assert web.requests == 0
    _found_addresses.cache_clear()
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **o: resolve("127.0.0.1", *a, **o))
    (file,) = Local(nameOrPath=url).files()
    assert file.stamp is not None, "a name of this network that the user gives is read"
    assert file.stamp[0] == 24


def test_a_server_that_sends_without_end(web: WebServer) -> None:
    """Only the requested bytes are read."""
    web.files, web.headers = {"/a.txt": b"x" * 5_000_000}, {"Content-Range": "bytes 0-1/5", "Content-Length": None}
    source = Local(nameOrPath=f"{web.url}/a.txt")
    (piece,) = cut(source.files()[0], source.options())
    assert list(read(piece, source.options())) == ["xxxxx"]
