"""``COMPLETE.json``, the marker of a complete folder. It lists the folder's files with sizes and checksums.

Its content is ``{"format": 4, "files": {name: {"bytes", "xxh3_128", "quick_xxh3_128"}}, "xxh3_128": …}``, where the last is
the checksum of "format" and "files". Format 3 has neither this checksum nor the quick ones; it can still be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.config import Verify
from pretrain.runtime.folders import MARKER, is_below
from pretrain.runtime.strict_json import read_json

FORMAT = 4
OLDEST_FORMAT = 3
SMALL_BYTES = 1 << 20  # weight files up to this size are always compared by their full checksum
CHUNK_BYTES = 1 << 24
SAMPLES = 16  # number of places in a large file that are always checked
SAMPLE_BYTES = 1 << 14

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Entry(BaseModel):
    """A file of the folder. Only large safetensors files have ``quick_xxh3_128``, see ``quick_checksum``."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    xxh3_128: Digest
    quick_xxh3_128: Digest | None = None


class Marker(BaseModel):
    """The content of ``COMPLETE.json``."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[3, 4]
    files: dict[str, Entry]
    xxh3_128: Digest | None = None


def entry_of(file: Path) -> dict[str, Any]:
    """Return the entry of a file in the marker."""
    entry: dict[str, Any] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
    if _is_large(file):
        entry["quick_xxh3_128"] = quick_checksum(file)
    return entry


def write_marker(folder: Path, entries: dict[str, dict[str, Any]]) -> Path:
    """Write the marker of ``folder`` and return its path."""
    path = folder / MARKER
    path.write_text(json.dumps({"format": FORMAT, "files": entries, "xxh3_128": _own_checksum(entries)}, indent=1))
    return path


def _own_checksum(entries: dict[str, dict[str, Any]]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT, entries], sort_keys=True).encode())


def checksum(file: Path) -> str:
    """Return the xxh3-128 of a file's bytes, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def quick_checksum(file: Path) -> str:
    """Return the xxh3-128 of a safetensors file's header and of a few places in its data. It distinguishes files of the same
    size and shapes, such as those of two steps, without reading all of a file."""
    digest, size = xxhash.xxh3_128(), file.stat().st_size
    with file.open("rb", buffering=0) as stream:
        length = stream.read(8)
        digest.update(length)
        digest.update(stream.read(min(int.from_bytes(length, "little"), size)))
        for number in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _is_large(file: Path) -> bool:
    return file.suffix == ".safetensors" and file.stat().st_size > SMALL_BYTES


def read_marker(folder: Path) -> Marker:
    """Read a folder's marker. Raises ``OSError`` if there is none and ``ValueError`` with the reason if it is invalid."""
    try:
        content = read_json(folder / MARKER)
    except ValueError as error:
        raise ValueError(f"unreadable {MARKER}: {error}") from None
    written = content.get("format") if isinstance(content, dict) else None
    if isinstance(written, int) and not OLDEST_FORMAT <= written <= FORMAT:
        raise ValueError(f"format {written!r}, this version reads {OLDEST_FORMAT} to {FORMAT}")
    try:
        marker = Marker.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"unreadable {MARKER}: {first_error(error)}") from None
    own = None if marker.format == OLDEST_FORMAT else _own_checksum(content["files"])
    if marker.xxh3_128 != own:
        raise ValueError(f"{MARKER} does not match its checksum")
    return marker


def first_error(error: ValidationError) -> str:
    """Return the first error as one line, such as ``files.state.json.bytes: input should be a valid integer``."""
    wrong = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in wrong["loc"])[:200]
    return f"{where}: {wrong['msg'][0].lower()}{wrong['msg'][1:]}".removeprefix(": ")


def incomplete_reason(path: Path, *, verify: Verify = "size") -> str | None:
    """Return why the folder is not complete and unchanged, or ``None``.

    It is complete if it has a marker and every file in it has its recorded size and checksum. Of large weight files only
    the header and a few places are compared, unless ``verify`` is "full".
    """
    try:
        for name, entry in read_marker(path).files.items():
            if reason := damage(path, name, entry, verify):
                return reason
    except FileNotFoundError:
        return f"no {MARKER}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"unreadable {MARKER}: {error}"
    return None


def damage(folder: Path, name: str, entry: Entry, verify: Verify) -> str | None:
    """Return why the file ``name`` is not the one of its ``entry``, or ``None``. For ``verify`` see `incomplete_reason`."""
    if not is_below(name):
        return f"{MARKER} names {name!r}, which is outside the folder"
    file = folder / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != entry.bytes:
            return f"{name} has {size} bytes, {entry.bytes} were written"
        if file.suffix == ".safetensors":
            safe_open(file, framework="numpy")
        if not _same_bytes(file, entry, verify):
            return f"{name} does not match its checksum"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{name} can't be read: {error}"
    return None


def _same_bytes(file: Path, entry: Entry, verify: Verify) -> bool:
    if verify == "full" or not _is_large(file):
        return checksum(file) == entry.xxh3_128
    return entry.quick_xxh3_128 in (None, quick_checksum(file))
