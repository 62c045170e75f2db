"""Two domains that are available on every machine: the source code of the standard library (``Python``) and English prose from
the documentation in installed packages (``English``). They have no file in common, and therefore no held-out document."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.data.reading.units import SourceFile
from pretrain.data.sources.base import FileSource
from pretrain.runtime.errors import UserError

# Folders of tests, third-party code, applications, character set tables, and text that belongs to the other domain.
NOT_LIBRARY = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "__pycache__", "__phello__", "lib-dynload"),
}
# Packages that are always installed with this project and have long documentation.
PROSE_PACKAGES = (
    *("numpy", "pandas", "sympy", "networkx", "torch", "datasets", "huggingface_hub", "pyarrow", "mpmath", "fsspec"),
    *(
        "hydra-core",
        "omegaconf",
        "pydantic",
        "rich",
        "Jinja2",
        "httpx",
        "filelock",
        "safetensors",
        "tokenizers",
        "regex",
    ),
    *("PyYAML", "requests", "tqdm", "typer", "click", "packaging", "multiprocess", "dill", "xxhash", "zstandard"),
)
PROSE_FORMATS = {".md": "text", ".rst": "text", ".py": "docstrings"}
NOT_PROSE = {"tests", "test", "testing", "_vendor", "vendor", "licenses", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Python(FileSource):
    """The new domain of the default run: the source code of the standard library."""

    source: Literal["sample"] = "sample"
    name: str | None = "python"
    train_data_ratio: Annotated[float, Field(gt=0, le=1)] = 0.13
    deduplicate: bool | Literal["exact", "near"] = True

    def default_name(self) -> str:
        return "python"

    def described(self) -> str:
        return f"the standard library in {_library()}"

    def identity(self) -> list[Any]:
        return ["python", str(_library())]

    def files(self) -> list[SourceFile]:
        found = []
        for folder, folders, names in os.walk(_library()):
            folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY and not name.startswith("config-"))
            code = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
            found += [os.path.join(folder, name) for name in code]
        if not found:
            raise UserError(
                f"dataset=sample: this Python installation has no library sources in {_library()}; use dataset=local"
            )
        return [SourceFile(name, "text") for name in sorted(found)]


@dataclass(frozen=True, kw_only=True)
class English(FileSource):
    """The base domain of the default run: the text on which the sample model was trained."""

    source: Literal["sample_base"] = "sample_base"
    name: str | None = "english"
    deduplicate: bool | Literal["exact", "near"] = True
    errors: Literal["strict", "replace"] = "replace"
    max_document_chars: Annotated[int, Field(ge=16)] = 8_000

    def default_name(self) -> str:
        return "english"

    def described(self) -> str:
        return "the documentation of Python and of installed packages"

    def identity(self) -> list[Any]:
        return ["english", str(_library()), [str(path) for path in _package_roots()]]

    def files(self) -> list[SourceFile]:
        topics = _library() / "pydoc_data" / "topics.py"
        found = [SourceFile(str(topics), "topics")] if topics.exists() else []
        for package in PROSE_PACKAGES:
            try:
                found += _package_files(importlib.metadata.distribution(package))
            except importlib.metadata.PackageNotFoundError:
                continue
        if not found:
            raise UserError(
                "dataset=sample_base: no documentation found in this Python installation; use dataset=local"
            )
        return found


def _package_files(package: importlib.metadata.Distribution) -> list[SourceFile]:
    """Return the files of a package that hold prose, sorted by name."""
    root, found = str(package.locate_file("")), []
    for name in _names(package):
        kind = PROSE_FORMATS.get(name[name.rfind(".") :]) or ("description" if name.endswith("/METADATA") else None)
        if kind is None or NOT_PROSE.intersection(parts := name.split("/")):
            continue
        if not parts[-1].upper().startswith(("LICENSE", "NOTICE")):
            found.append((name, SourceFile(os.path.abspath(os.path.join(root, name)), kind)))
    return [file for _, file in sorted(found, key=lambda pair: pair[0]) if os.path.isfile(file.path)]


def _names(package: importlib.metadata.Distribution) -> list[str]:
    """Return the names of the package's files from RECORD. ``package.files`` creates an object per file, which takes a quarter of
    a second for the 15,000 files of torch."""
    record = package.read_text("RECORD")
    return (
        [row[0] for row in csv.reader(record.splitlines())] if record else [str(path) for path in package.files or ()]
    )


def _library() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _package_roots() -> list[Path]:
    """Return the site-packages folders."""
    return sorted({Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")})
