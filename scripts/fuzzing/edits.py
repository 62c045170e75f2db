"""Random edits of bytes and of the values inside JSON, YAML, safetensors headers and compressed files.

Every edit is a function of the `random.Random` it is given; it returns the new content, or ``None`` where it does not fit.
"""

from __future__ import annotations

import copy
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import yaml
import zstandard

from fuzzing.values import BYTES, MARKS, Values

Content = bytes
DUPLICATE = "@@again@@"


# Bytes ------------------------------------------------------------------------------------------------------------------


def edit_bytes(draw: Random, raw: Content) -> Content:
    """One edit anywhere: a bit, a byte, a cut, a piece twice, a piece moved, odd bytes put in, much of the same."""
    if not raw:
        return draw.choice(BYTES)
    at = draw.randrange(len(raw))
    to = min(len(raw), at + draw.choice([1, 2, 8, 64, 1024]))
    kind = draw.choice(
        ["bit", "byte", "cut", "remove", "twice", "insert", "swap", "zeros", "empty", "append", "all twice"]
    )
    if kind == "bit":
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
    if kind == "byte":
        return raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "remove":
        return raw[:at] + raw[to:]
    if kind == "twice":
        return raw[:to] + raw[at:to] + raw[to:]
    if kind == "insert":
        return raw[:at] + draw.choice(BYTES) + raw[at:]
    if kind == "swap":
        return raw[to:] + raw[:to]
    if kind == "zeros":
        return raw[:at] + bytes(to - at) + raw[to:]
    if kind == "append":
        return raw + draw.choice([*BYTES, raw[:64], b"\n"])
    return b"" if kind == "empty" else raw + raw


# Values -----------------------------------------------------------------------------------------------------------------


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside ``value``; of a long list the first and last 20 items."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += nodes(value[key], (*path, key))
    if isinstance(value, list):
        for index in [*range(min(20, len(value))), *range(max(20, len(value) - 20), len(value))]:
            found += nodes(value[index], (*path, index))
    return found


def edit_value(draw: Random, value: Any, values: Values) -> Any:
    """One edit of a tree of mappings and lists: another value, a key gone, renamed, twice or new, items gone, doubled, moved."""
    value = copy.deepcopy(value)
    path = draw.choice(nodes(value))
    if not path:
        return (
            values.any(draw)
            if draw.random() < 0.3 or not isinstance(value, dict | list)
            else _new_item(draw, value, values)
        )
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    key, old = path[-1], parent[path[-1]]
    kind = draw.choice(["near", "near", "near", "any", "gone", "renamed", "twice", "wrapped", "item", "swapped"])
    if kind == "gone":
        del parent[key]
    elif kind == "renamed" and isinstance(parent, dict):
        parent[draw.choice([f"{key}x", str(key).upper(), "", str(key)[:-1]])] = parent.pop(key)
    elif kind == "twice":
        if isinstance(parent, dict):
            parent[f"{DUPLICATE}{key}"] = values.near(draw, old)
        else:
            parent.insert(key, old)
    elif kind == "wrapped":
        parent[key] = draw.choice([[old], {"a": old}, {str(key): old}])
    elif kind == "item" and isinstance(old, dict | list):
        parent[key] = _new_item(draw, old, values)
    elif kind == "swapped":
        other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = values.any(draw) if kind == "any" else values.near(draw, old)
    return value


def _new_item(draw: Random, value: Any, values: Values) -> Any:
    if isinstance(value, dict):
        value[draw.choice(["new", "", "_target_", "auto_map", "0"])] = values.any(draw)
    else:
        value.insert(draw.randint(0, len(value)), values.any(draw))
    return value


def json_text(value: Any, *, indent: int | None = None) -> bytes:
    """JSON, with what json.dumps can't write: keys that are there twice, and what ``MARKS`` stand for."""
    text = json.dumps(value, ensure_ascii=True, indent=indent).replace(DUPLICATE, "")
    for mark, meant in MARKS.items():
        text = text.replace(f'"{mark}"', meant)
    return text.encode()


def yaml_text(value: Any) -> bytes:
    """YAML in its usual form, in which 1e-4 has no quotes."""
    text = yaml.safe_dump(value, sort_keys=False).replace(DUPLICATE, "")
    for mark, meant in MARKS.items():
        text = text.replace(f"'{mark}'", meant)
    return text.encode()


def edit_json(draw: Random, raw: Content, values: Values) -> Content | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return json_text(edit_value(draw, value, values), indent=draw.choice([None, 1]))


def edit_json_lines(draw: Random, raw: Content, values: Values) -> Content | None:
    """A value inside one line, or lines gone, doubled or moved."""
    lines = raw.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.choice(["value", "value", "value", "gone", "twice", "joined", "cut"])
    if kind == "value":
        changed = edit_json(draw, lines[at], values)
        if changed is None:
            return None
        lines[at] = changed.replace(b"\n", b" ")
    elif kind == "joined" and at + 1 < len(lines):
        lines[at : at + 2] = [lines[at] + lines[at + 1]]
    elif kind == "cut":
        lines[at] = lines[at][: draw.randint(0, len(lines[at]))]
    else:
        lines[at : at + 1] = [] if kind == "gone" else [lines[at]] * 2
    return b"\n".join(lines)


def edit_yaml(draw: Random, raw: Content, values: Values) -> Content | None:
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if value is None:
        return None
    if draw.random() < 0.1:
        return raw + draw.choice(
            [b"\n\ta: b\n", b"\n<<: *x\n", b"\n--- \na: 1\n", b"\n? [a]\n: 1\n", b"\n!!python/object:os.x {}\n"]
        )
    changed = edit_value(draw, value, values)
    return json_text(changed, indent=1) if draw.random() < 0.2 else yaml_text(changed)  # JSON is YAML


def edit_safetensors(draw: Random, raw: Content, values: Values) -> Content | None:
    """A value of the header, or the header's length."""
    if len(raw) < 8:
        return None
    (length,) = struct.unpack("<Q", raw[:8])
    if draw.random() < 0.1:
        return struct.pack("<Q", draw.choice([0, 1, 2**63, 2**40, length + 1, length - 1])) + raw[8:]
    changed = edit_json(draw, raw[8 : 8 + length], values)
    return None if changed is None else struct.pack("<Q", len(changed)) + changed + raw[8 + length :]


# Files of a kind ----------------------------------------------------------------------------------------------------------

Edit = Callable[[Random, Content, Values], Content | None]
BY_ENDING: dict[str, Edit] = {
    ".json": edit_json,
    ".jsonl": edit_json_lines,
    ".ndjson": edit_json_lines,
    ".yaml": edit_yaml,
    ".safetensors": edit_safetensors,
}


def edit_file(draw: Random, name: str, raw: Content, values: Values) -> Content:
    """One edit of a file's content that fits its name: of what is inside it, or of its bytes."""
    stem, _, ending = name.rpartition(".")
    if ending in ("gz", "zst") and draw.random() < 0.5:
        inner = unpacked(ending, raw)
        if inner is not None:
            return packed(draw, ending, edit_file(draw, stem, inner, values))
    structured = BY_ENDING.get(f".{ending}")
    if structured is not None and draw.random() < 0.65:
        changed = structured(draw, raw, values)
        if changed is not None:
            return changed
    return edit_bytes(draw, raw)


def unpacked(ending: str, raw: Content) -> Content | None:
    """What a compressed file holds; ``None`` where it is broken already."""
    try:
        return gzip.decompress(raw) if ending == "gz" else zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, ValueError):
        return None


def packed(draw: Random, ending: str, raw: Content) -> Content:
    """Compressed again: in one piece or two, with a checksum or without."""
    cut = draw.randint(0, len(raw)) if draw.random() < 0.2 else 0
    if ending == "gz":
        return b"".join(gzip.compress(part, mtime=0) for part in (raw[:cut], raw[cut:]) if part or not cut)
    compressor = zstandard.ZstdCompressor(write_checksum=draw.random() < 0.5, write_content_size=draw.random() < 0.5)
    return b"".join(compressor.compress(part) for part in (raw[:cut], raw[cut:]) if part or not cut)
