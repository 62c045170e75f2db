"""Files behind URLs: a real S3 server, and URLs that are not read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.data.reading import cut as cutting
from pretrain.data.reading import units
from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.remote import stream
from pretrain.data.remote.backend import _backend
from pretrain.data.remote.object_store import ObjectStore
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import tokenize
from pretrain.runtime.errors import UserError
from tests.data.formats import WRITERS, documents_of, save_to_disk
from tests.data.servers import BUCKET, WebServer, s3_server
from tests.data.texts import TEXTS, parts_of, some_text

StoreOf = Callable[..., TokenStore]


def forget_file_systems() -> None:
    """Let no file system live on that was made with other variables of the environment."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    _backend.cache_clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as files:
        forget_file_systems()
        yield files
    forget_file_systems()


@pytest.fixture
def environment(s3: Any) -> Iterator[pytest.MonkeyPatch]:
    """Variables with which this test alone makes file systems."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    forget_file_systems()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of every format, two of plain text, and what a folder does not read."""
    folder = tmp_path / "corpus"
    for name, write in WRITERS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"a.{name.removeprefix('file.')}").write_bytes(write(TEXTS[:60]))
    (folder / "b.txt").write_text(some_text(1, 15_000))
    (folder / "c.md").write_text("short")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.txt").write_text("hidden")
    (folder / "run").mkdir()
    for name in ("config.yaml", "run.json", "notes.txt"):
        (folder / "run" / name).write_text("not text of the corpus")
    (folder / "empty.txt").write_text("")
    return folder


def upload(files: Any, folder: Path, to: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{to}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request."""
    found: list[int] = []
    fetch = ObjectStore.fetch

    def counting(self: ObjectStore, url: str, start: int, stop: int, stamp: Any) -> bytes:
        found.append(stop - start)
        return fetch(self, url, start, stop, stamp)

    monkeypatch.setattr(ObjectStore, "fetch", counting)
    return found


def test_a_bucket_gives_the_tokens_of_the_same_folder(
    s3: Any, corpus: Path, tmp_path: Path, store_of: StoreOf, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every format, with files that are cut; and the second start opens nothing."""
    monkeypatch.setattr(cutting, "UNIT_BYTES", 20 << 10)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 10 << 10)
    upload(s3, corpus, f"{BUCKET}/same")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "here"))
    here = store_of(corpus)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "there"))
    there = store_of(f"s3://{BUCKET}/same")
    assert len(there.parts) > 15
    assert [part.path.name for part in there.parts] == [part.path.name for part in here.parts]
    assert parts_of(tmp_path / "there") == parts_of(tmp_path / "here")
    size = sum(path.stat().st_size for path in corpus.rglob("*"))
    assert sum(counted) < 1.5 * size, "what is hashed is not requested again to be read"
    counted.clear()
    assert store_of(f"s3://{BUCKET}/same/").path == store_of(f"s3://{BUCKET}/same").path
    assert store_of(f"s3://{BUCKET}/same").path == there.path
    assert not counted


def test_a_glob_a_file_and_a_list(s3: Any, corpus: Path) -> None:
    upload(s3, corpus, f"{BUCKET}/places")
    top = f"s3://{BUCKET}/places"
    assert documents_of(f"{top}/c.md") == ["short"]
    assert documents_of(f"{top}/*.md") == ["short"]
    assert documents_of(f"{top}/**/a.csv") == documents_of(corpus / "csv")
    assert documents_of(f"{top}/[c]?v/*") == documents_of(corpus / "csv")
    assert documents_of(top, pattern="*.md") == ["short"]
    found = Local(nameOrPath=[f"{top}/c.md", str(corpus / "c.md"), f"{top}/c.md"])
    assert list(found.documents()) == ["short", "short"]
    assert (found.domain, Local(nameOrPath=f"{top}/*.md").domain, Local(nameOrPath=f"{top}/c.md").domain) == (
        "c",
        "places",
        "c",
    )
    for place, says in (("nothing", "no such file or folder"), ("*.bin", "no file matches")):
        with pytest.raises(UserError, match=rf"^dataset.nameOrPath={top}/{place.replace('*', '.')}: {says}"):
            Local(nameOrPath=f"{top}/{place}").files()
    with pytest.raises(UserError, match="no such file, folder or bucket"):
        Local(nameOrPath="s3://nothere/x/").files()


def test_a_saved_dataset(s3: Any, tmp_path: Path) -> None:
    save_to_disk(TEXTS[:20], tmp_path / "saved")
    upload(s3, tmp_path / "saved", f"{BUCKET}/saved")
    assert documents_of(f"s3://{BUCKET}/saved") == list(TEXTS[:20])
    s3.pipe_file(f"{BUCKET}/saved/state.json", b'{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(UserError, match="outside the folder"):
        Local(nameOrPath=f"s3://{BUCKET}/saved").files()


def test_worker_processes(s3: Any, tmp_path: Path, store_of: StoreOf, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        s3.pipe_file(f"{BUCKET}/many/{number}.txt", some_text(number, 3_000).encode())
    s3.get(f"{BUCKET}/many", str(tmp_path / "many"), recursive=True)
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 1)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1)
    there = store_of(f"s3://{BUCKET}/many", num_workers=2)
    assert len(there.parts) == 4
    assert [part.path for part in there.parts] == [part.path for part in store_of(tmp_path / "many").parts]


def test_an_object_that_changes_while_it_is_read(s3: Any) -> None:
    url = f"s3://{BUCKET}/change.txt"
    for after in (b"other", b"longer than before", b""):
        s3.pipe_file(url, b"first")
        source = Local(nameOrPath=url)
        (piece,) = cut(source.files()[0], source.options())
        s3.pipe_file(url, after)
        stream.KEPT.clear()
        with pytest.raises(UserError, match=rf"^{url}: the file changed while it was being read"):
            list(read(piece, source.options()))


def test_access_denied(web: WebServer, environment: pytest.MonkeyPatch) -> None:
    """One line without the key; also where there are no credentials at all."""
    web.status = 403
    for name, value in (("AWS_ENDPOINT_URL", web.url), ("AWS_ACCESS_KEY_ID", "AKIA" + "Q" * 16)):
        environment.setenv(name, value)
    forget_file_systems()
    with pytest.raises(UserError) as denied:
        Local(nameOrPath="s3://texts/x.txt").files()
    assert str(denied.value).startswith("s3://texts/x.txt: access denied (")
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    forget_file_systems()
    with pytest.raises(UserError) as missing:
        Local(nameOrPath="s3://texts/x.txt").files()
    assert "AWS_PROFILE" in str(missing.value)
    for message in (str(denied.value), str(missing.value)):
        assert "\n" not in message
        assert "QQQQ" not in message
        assert "not-so-secret" not in message
    with pytest.raises(UserError, match=rf"^{web.url}/a.txt: access denied \(403\); a login is read from ~/.netrc$"):
        Local(nameOrPath=f"{web.url}/a.txt").files()


# URLs that are not read ---------------------------------------------------------------------------------------------------

REFUSED = {
    "simplecache::s3://b/x.txt": "chained file systems",
    "filecache::https://h/x.txt": "chained file systems",
    "zip://a.txt::s3://b/x.zip": "chained file systems",
    "s3://b/x::file:///etc/passwd": "chained file systems",
    "zip://x.zip": "zip:// is not read, only s3://",
    "reference://x.json": "reference:// is not read",
    "github://org:repo@/x.txt": "github:// is not read",
    "sftp://host/x.txt": "sftp:// is not read",
    "dask://x": "dask:// is not read",
    "ftp://host/x.txt": "ftp:// is not read",
    "data://x": "data:// is not read",
    "pickle.loads://x": "pickle.loads:// is not read",
    "file:///etc/passwd": "name a file of this machine by its path alone",
    "local://etc/passwd": "name a file of this machine by its path alone",
    "gs://bucket/x.txt": "needs the package gcsfs: pip install gcsfs",
    "abfs://c/x.txt": "needs the package adlfs: pip install adlfs",
    "s3://": "names no bucket",
    "s3:///x.txt": "names no bucket",
    "s3://*/x.txt": "a glob in the name of the bucket",
    "https:///x": "names no host",
    "https://h/*.txt": "can't contain *",
    "https://user@h/x.txt": "a user name",
    "s3://b/x\x1b[2J.txt": "a control character",
    "http://169.254.169.254/latest/meta-data": "an address at which clouds keep credentials",
    "http://[::ffff:169.254.169.254]/latest": "an address at which clouds keep credentials",
    "http://169.254.169%2E254/latest": "can't contain %",
    "http://1.1.1.1\\.a.com/x.txt": "can't contain % or a backslash",
    "https::s3://b/x.txt": "chained file systems",
    "https://h/x.txt::file:///etc/passwd": "chained file systems",
    "http://[bad/x.txt": "not an address",
    "http://a b/x.txt": "not an address",
    "http://2852039166/latest": "an address at which clouds keep credentials",
    "http://[fd00:ec2::254]/latest": "an address at which clouds keep credentials",
    "hf://datasets/owner/name/x.txt": "offline mode is enabled",
}


@pytest.mark.parametrize("url", sorted(REFUSED))
def test_urls_that_are_not_read(url: str) -> None:
    with pytest.raises(UserError) as refused:
        Local(nameOrPath=url).files()
    assert REFUSED[url] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_files_of_tokens_are_local() -> None:
    fsspec.filesystem("memory").pipe_file("/tokens/a.npy", b"x")
    for place in ("memory://tokens/a.npy", "memory://tokens/*"):
        with pytest.raises(
            UserError, match=r"^memory://tokens/a.npy: a file of token ids is read on this machine only"
        ):
            Local(nameOrPath=place).files()
    with pytest.raises(UserError, match=r"dataset.format=tokens"):
        Local(nameOrPath="memory://tokens", format="tokens").files()


def test_secrets_in_urls() -> None:
    for url in (
        "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMIK7MDENG@bucket/x.txt",
        "https://bucket.s3.amazonaws.com/x.txt?X-Amz-Credential=abc&X-Amz-Signature=0123456789abcdef",
        "https://storage.googleapis.com/b/x.txt?X-Goog-Signature=0123456789abcdef",
        "https://a.blob.core.windows.net/c/x.txt?sv=2022&sig=abcdefgh%3D",
        "https://h/x.txt?X-Amz-Security-Token=IQoJb3JpZ2luX2VjE",
    ):
        with pytest.raises(UserError, match=r"holds .*; credentials are read from the environment") as refused:
            Local(nameOrPath=url).files()
        assert not any(secret in str(refused.value) for secret in ("wJalr", "0123456789abcdef", "abcdefgh", "IQoJ"))


# Listings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["**/*", "**", "*", "*/*", "d?/*.txt", "**/d1/**/*.txt", "[!d]*", "x.txt", "d0/**"])
def test_a_glob_matches_as_on_this_machine(pattern: str, tmp_path: Path) -> None:
    names = [
        "x.txt",
        "y.md",
        "d0/a.txt",
        "d1/b.txt",
        "d1/d2/c.txt",
        "d1/.h/e.txt",
        ".f.txt",
        "d1/d2/d1/g.txt",
        "d1/[x].txt",
    ]
    files = fsspec.filesystem("memory")
    shutil.rmtree(tmp_path / "tree", ignore_errors=True)
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
        files.pipe_file(f"/tree/{name}", name.encode())
    here = [os.path.relpath(file.path, tmp_path) for file in Local(nameOrPath=f"{tmp_path}/tree/{pattern}").files()]
    there = [file.path.removeprefix("memory://") for file in Local(nameOrPath=f"memory://tree/{pattern}").files()]
    assert there == here
