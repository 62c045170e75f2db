# ruff: noqa: E501  (a row of a table is one line)
"""Folders as strangers have them: what a dataset's own files may make a run read, links, and what a run wrote there."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from pretrain.data.loader import Loader
from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.sources import listing
from pretrain.data.sources.huggingface import HuggingFace, repository
from pretrain.data.sources.local import Local
from pretrain.data.sources.own_files import check_data_files
from pretrain.data.statistics import DataStatistics
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError
from tests.data.formats import documents_of, jsonl

SECRET = "the secret of another folder"


def card(*lines: str) -> str:
    return "\n".join(
        ["---", "configs:", "- config_name: default", *(f"  {line}" for line in lines), "---", "# Data", ""]
    )


def named(path: str) -> Callable[[Path], object]:
    return lambda d: (d / "README.md").write_text(card(f"data_files: {json.dumps(path)}"))


def linked(d: Path) -> None:
    (d / "train.jsonl").unlink()
    (d / "train.jsonl").symlink_to(d.parent / "elsewhere" / "secret.jsonl")


def linked_folder(d: Path) -> None:
    (d / "train.jsonl").unlink()
    (d / "data").symlink_to(d.parent / "elsewhere")


def zipped(d: Path, name: str) -> None:
    (d / "train.jsonl").unlink()
    with zipfile.ZipFile(d / name, "w") as file:
        file.writestr("train.jsonl", jsonl([SECRET]))


def tarred(d: Path, name: str, mode: str) -> None:
    (d / "train.jsonl").unlink()
    with tarfile.open(d / name, mode) as file:
        info = tarfile.TarInfo("a.txt")
        info.size = len(SECRET)
        file.addfile(info, io.BytesIO(SECRET.encode()))


# what is done to a folder with one train.jsonl → words of the refusal
LEADING_OUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "an absolute path": (lambda d: named(str(d.parent / "elsewhere" / "secret.jsonl"))(d), r"README\.md: it names data outside its folder \('/"),
    "a path upwards": (named("../elsewhere/*.jsonl"), r"outside its folder \('\.\./elsewhere"),
    "a path down and up": (named("data/../../elsewhere/secret.jsonl"), "outside its folder"),
    "a file URL": (lambda d: named(f"file://{d.parent}/elsewhere/secret.jsonl")(d), r"outside its folder \('file:///"),
    "the web": (named("https://example.invalid/x.jsonl"), r"outside its folder \('https://"),
    "the Hub": (named("hf://datasets/nobody/nothing/x.jsonl"), r"outside its folder \('hf://"),
    "inside an archive elsewhere": (named("zip://*.jsonl::/tmp/x.zip"), r"outside its folder \('zip://"),
    "the home folder": (named("~/x.jsonl"), r"outside its folder \('~/"),
    "a list of them": (lambda d: (d / "README.md").write_text(card("data_files:", "- split: train", "  path: [train.jsonl, /etc/passwd]")), r"outside its folder \('/etc/passwd'\)"),
    "a second configuration": (lambda d: (d / "README.md").write_text(card("data_files: train.jsonl") .replace("---\n# Data", "- config_name: b\n  data_files: /etc/passwd\n---\n# Data")), "outside its folder"),
    "data_dir": (lambda d: (d / "README.md").write_text(card("data_dir: ../elsewhere")), r"outside its folder \('\.\./elsewhere'\)"),
    "a card of its own": (lambda d: (d / ".huggingface.yaml").write_text("configs:\n- config_name: default\n  data_files: /etc/passwd\n"), r"\.huggingface\.yaml: it names data outside"),
    "a link to a file": (linked, "its data is outside of it"),
    "a link to a folder": (linked_folder, "its data is outside of it|any data file|no data files"),
    "YAML that is none": (lambda d: (d / "README.md").write_text("---\nconfigs: [\n---\n"), r"README\.md: its YAML cannot be read"),
    "a configuration that is none": (lambda d: (d / "README.md").write_text("---\nconfigs: 3\n---\n"), "d, split train: "),
    "a script": (lambda d: ((d / "train.jsonl").unlink(), (d / "d.py").write_text("open('ran', 'w')")), "split train: .*scripts are no longer supported"),
    "infos that are no JSON": (lambda d: (d / "dataset_infos.json").write_text("["), "split train: "),
    "infos nested deep": (lambda d: (d / "dataset_infos.json").write_text("[" * 200_000), "split train: "),
    "a zip": (lambda d: zipped(d, "train.zip"), r"train\.zip: archives are not unpacked"),
    "a zip of another name": (lambda d: zipped(d, "train.jsonl"), r"train\.jsonl: archives are not unpacked"),
    "a tar": (lambda d: tarred(d, "train.tar", "w"), r"train\.tar: archives are not unpacked"),
    "a tar of another name": (lambda d: tarred(d, "train.jsonl", "w"), r"train\.jsonl: archives are not unpacked"),
    "a tar.gz": (lambda d: tarred(d, "train.jsonl.gz", "w:gz"), r"train\.jsonl\.gz: archives are not unpacked"),
    "an HDF5 file, which may name others": (lambda d: (d / "train.jsonl").rename(d / "train.h5"), "datasets of type 'hdf5' are not supported, only arrow, csv, json"),
    "a folder of tasks, whose files name others": (lambda d: ((d / "train.jsonl").unlink(), (d / "task.toml").write_text("")), "datasets of type 'harbor' are not supported"),
    "a saved dataset": (lambda d: (d / "state.json").write_text("{}"), "is read with dataset=local"),
    "broken records": (lambda d: (d / "train.jsonl").write_text('{"text": "a"}\n{oops\n'), "split train: "),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``d`` with one record, beside ``elsewhere``; a cache of its own for ``datasets``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for name, text in (("d/train", "a"), ("elsewhere/secret", SECRET)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([text]))
    return tmp_path / "d"


@pytest.mark.parametrize("case", LEADING_OUT)
def test_a_dataset_folder_reads_nothing_elsewhere(case: str, folder: Path) -> None:
    spoil, words = LEADING_OUT[case]
    spoil(folder)
    with pytest.raises(UserError) as raised:
        HuggingFace(nameOrPath=str(folder)).files()
    message = str(raised.value)
    assert re.search(words, message), message
    assert "\n" not in message
    written = [
        path
        for path in folder.parent.joinpath("hf").rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert not written, "not even in the cache of datasets"


@pytest.mark.parametrize(("found", "words"), [
    ("/etc/passwd", "its data is outside of it"),
    ("hf://datasets/a/other@0123/x.jsonl", "its data is outside of it"),
    ("https://example.invalid/x.jsonl", "its data is outside of it"),
    ("hf://datasets/a/b@0123/x.tar.gz", "archives are not unpacked"),
])  # fmt: skip
def test_a_dataset_of_the_hub_reads_nothing_elsewhere(found: str, words: str) -> None:
    """What ``datasets`` has found for it, before anything is fetched: a README.md of the Hub can name the same."""
    mine = "hf://datasets/a/b@0123/x.jsonl"
    check_data_files({"train": [mine]}, None, repository("a/b"))
    with pytest.raises(UserError, match=words):
        check_data_files({"train": [mine, found]}, None, "datasets/a/b")


@pytest.mark.parametrize("name", ["pandas", "webdataset", "lance", "generator", "spark"])
def test_no_builder_that_unpickles_or_follows(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` takes the name of one of its builders for one over the files of the current folder."""
    (folder / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=name):
        HuggingFace(nameOrPath=name).files()
    assert not (folder / "ran").exists()


def test_a_folder_that_is_called_like_a_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "json")
    monkeypatch.chdir(folder.parent)
    assert len(HuggingFace(nameOrPath="json").files()) == 1


def test_a_dataset_folder_with_a_card_is_read(folder: Path) -> None:
    (folder / "README.md").write_text(card("data_files:", "- split: train", "  path: data/*.jsonl"))
    (folder / "data").mkdir()
    (folder / "data" / "x.jsonl").write_bytes(jsonl(["x", "y"]))
    source = HuggingFace(nameOrPath=str(folder))
    pieces = [piece for file in source.files() for piece in cut(file, source.options())]
    assert [text for piece in pieces for text in read(piece, source.options())] == ["x", "y"]


def test_a_snapshot_in_the_cache_of_the_hub_is_read(folder: Path) -> None:
    """Its files are links into the ``blobs`` of the same repository."""
    repository = folder.parent / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (folder / "train.jsonl").rename(repository / "blobs" / "0123")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to("../../blobs/0123")
    assert len(HuggingFace(nameOrPath=str(snapshot)).files()) == 1


# Links and doubles in local folders ----------------------------------------------------------------------------------


def texts(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    folder = texts(tmp_path / "d", {"b.txt": "one", "c.jsonl": '{"text": "two"}', "sub/e.txt": "one"})
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "a2.txt").symlink_to("c.jsonl")  # a link with another ending: its own name counts
    os.link(folder / "b.txt", folder / "d.txt")
    assert documents_of(folder) == ["one", "two", "one"], "a copy is another file"
    assert documents_of(f"{folder}/*.txt") == ['{"text": "two"}', "one"], "the only name of its file here"
    assert [Path(file.path).name for file in Local(nameOrPath=str(folder)).files()] == ["b.txt", "c.jsonl", "e.txt"]


def test_folders_that_lead_in_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = texts(tmp_path / "d", {"a.txt": "one", "sub/b.txt": "two"})
    texts(tmp_path / "other", {"c.txt": "three"})
    for number in range(20):  # 20 to the power of 40 paths
        (folder / "sub" / f"up{number}").symlink_to("..")
    (folder / "there").symlink_to(tmp_path / "other")
    assert documents_of(f"{folder}/**/*.txt") == ["one", "two", "three"]
    assert documents_of(f"{folder}/**") == ["one", "two", "three"]
    assert documents_of(folder) == ["one", "two"]
    said = " ".join(capsys.readouterr().err.split())
    assert "skipped 21 links to folders, which a glob such as" in said


def test_links_to_files_elsewhere_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = texts(tmp_path / "d", {"a.txt": "one"})
    texts(tmp_path / "other", {"b.txt": "two"})
    (folder / "b.txt").symlink_to(tmp_path / "other" / "b.txt")
    assert documents_of(folder) == ["one", "two"]
    assert "1 of its files are links out of the folder, such as" in " ".join(capsys.readouterr().err.split())


RUN = {
    ".lock": "",
    "logs/rank-0.log": "",
    "config.yaml": "",
    "metrics.jsonl": "{}",
    "run.json": "{}",
    "model/config.json": "{}",
}
SWEEP = {"sweep.json": "{}", "0/.lock": "", "0/logs/x": "", "0/metrics.jsonl": "{}"}


def test_what_a_run_wrote_is_no_text(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``dataset.nameOrPath=.`` the second time, when ``outputs/`` and the cache are there."""
    folder = texts(tmp_path / "d", {"a.txt": "one", "books/b.json": '{"text": "two"}'})
    texts(folder / "outputs" / "run", RUN)
    texts(folder / "outputs" / "copied", {name: text for name, text in RUN.items() if name[0] != "."})
    texts(folder / "multirun" / "now", SWEEP)
    texts(folder / "cache", {"tokenizers/a.json": "{}", "files/a.json": "[]"})
    texts(folder / "m", {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}", "vocab.txt": "a"})
    texts(folder / "t", {"config.json": "{}", "tokenizer.json": "{}"})
    monkeypatch.setenv("PRETRAIN_CACHE", str(folder / "cache"))
    for path in (folder, f"{folder}/**/*"):
        assert documents_of(path) == ["one", "two"]
    said = " ".join(capsys.readouterr().err.split())
    assert "skipped 6 folders of runs, models or caches, such as" in said
    assert documents_of(folder, pattern="**/*.txt") == documents_of(folder, pattern="*.txt") == ["one"]


def test_files_that_are_not_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = texts(tmp_path / "d", {"a.txt": "one", "b.jsonl.bz2": "", "c.jsonl.bz2": "", "d.pdf": ""})
    assert documents_of(folder) == ["one"]
    assert "3 files are not read (2 × .bz2, 1 × .pdf); dataset.pattern" in " ".join(capsys.readouterr().err.split())
    say_nothing = documents_of(folder / "a.txt"), documents_of(folder, pattern="*.txt")
    assert say_nothing == (["one"], ["one"])
    assert capsys.readouterr().err == ""


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        documents_of(tmp_path / "pipe")


def test_a_name_that_is_not_utf8(tmp_path: Path, tokenizer) -> None:
    """As people bring it from an old machine: read, and named with U+FFFD in records."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for number in range(2):
        (folder / os.fsdecode(b"%d\xe9.jsonl" % number)).write_bytes(jsonl([f"text {number} " * 9] * 40))
    source = Local(nameOrPath=str(folder), held_out=0)
    assert source.domain == "caf\ufffd"
    store = prepare(source, tokenizer_json=tokenizer.backend_tokenizer.to_str(), eot=0, cache=tmp_path / "cache")
    view, _ = store.views(held_out=0)
    found = DataStatistics(Loader(view, sequence_length=16, seed=0, batch_size=1)).sources(4)
    assert set(found) == {"0\ufffd.jsonl", "1\ufffd.jsonl"}
    json.dumps([*found, source.domain], ensure_ascii=False).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder; run it as another user")
def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = texts(tmp_path / "d", {"a.txt": "one", "closed/b.txt": "two"})
    (folder / "closed").chmod(0)
    assert documents_of(folder) == ["one"]
    assert "closed: not read" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def said_again() -> None:
    listing.notice_once.cache_clear()
