"""Edits of a checkpoint: what disks, kills, people and attackers may do to its files. Each function changes the folder it is
given; `forge` then makes a marker that believes what lies there, as anybody who can change a checkpoint can do."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.checkpoint.marker import MARKER, checksum, entry_of, write_marker

Edit = Callable[[Path], object]


def forge(checkpoint: Path) -> None:
    """A marker of today's format that fits the files as they are."""
    files = sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.name != MARKER)
    write_marker(checkpoint, {str(f.relative_to(checkpoint)): entry_of(f) for f in files})


def as_format_3(checkpoint: Path) -> None:
    """The checkpoint as the version before wrote it: no checksum of the marker, no list of tensors."""
    edit_state(lambda state: [state.pop(key, None) for key in ("tensors", "ranks")])(checkpoint)
    files = sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.name != MARKER)
    entries = {str(f.relative_to(checkpoint)): {"bytes": f.stat().st_size, "xxh3_128": checksum(f)} for f in files}
    (checkpoint / MARKER).write_text(json.dumps({"format": 3, "files": entries}, indent=1))


# -- bytes ----------------------------------------------------------------------------------------------------------------


def flip(name: str, at: int | None = None, bit: int = 0) -> Edit:
    """One bit of a file; ``at``: its byte (``None``: the one in the middle)."""

    def edit(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2 if at is None else at] ^= 1 << bit
        (checkpoint / name).write_bytes(content)

    return edit


def put(name: str, content: bytes | str) -> Edit:
    """Other content in a file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda checkpoint: (checkpoint / name).write_bytes(raw)


def swap_text(name: str, old: str, new: str) -> Edit:
    """Other words in a text, which must be there."""

    def edit(checkpoint: Path) -> None:
        text = (checkpoint / name).read_text()
        assert old in text
        (checkpoint / name).write_text(text.replace(old, new))

    return edit


def remove(name: str) -> Edit:
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(name: str, count: int = 1) -> Edit:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - count)


def pipe(name: str) -> Edit:
    """A FIFO in the place of a file: who opens it waits."""

    def edit(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return edit


def folder(name: str) -> Edit:
    """A folder in the place of a file."""

    def edit(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return edit


def from_another(name: str) -> Edit:
    """The same file of the checkpoint before."""

    def edit(checkpoint: Path) -> None:
        others = sorted(p for p in checkpoint.parent.glob("step-*") if p != checkpoint)
        shutil.copy(others[-1] / name, checkpoint / name)

    return edit


# -- JSON -----------------------------------------------------------------------------------------------------------------


def edit_state(change: Callable[[dict[str, Any]], object]) -> Edit:
    """``change`` of state.json's content."""

    def edit(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        change(state)
        (checkpoint / "state.json").write_text(json.dumps(state))

    return edit


def set_at(path: str, value: Any) -> Edit:
    """Another value at a dotted path of state.json; a number is an index."""

    def change(state: Any) -> None:
        *parents, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
        for key in parents:
            state = state[key]
        state[last] = value

    return edit_state(change)


def drop(path: str) -> Edit:
    def change(state: Any) -> None:
        *parents, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
        for key in parents:
            state = state[key]
        del state[last]

    return edit_state(change)


def edit_marker(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(checkpoint: Path) -> None:
        marker = json.loads((checkpoint / MARKER).read_text())
        change(marker)
        (checkpoint / MARKER).write_text(json.dumps(marker))

    return edit


# -- tensors --------------------------------------------------------------------------------------------------------------


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Edit:
    """``change`` of a safetensors file's tensors and metadata, and the file written anew."""

    def edit(checkpoint: Path) -> None:
        with safe_open(checkpoint / name, framework="pt") as file:
            found, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata())  # noqa: SIM118
        change(found, metadata)
        save_file(found, checkpoint / name, metadata=metadata)

    return edit


def edit_header(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """``change`` of a safetensors header as JSON; the data stays as it is."""

    def edit(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        (checkpoint / name).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    return edit


def in_two(checkpoint: Path) -> None:
    """A checkpoint of one process as two that shard would have written it: each has half of the rows."""
    for kind in ("model", "optimizer"):
        with safe_open(checkpoint / f"{kind}.safetensors", framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for rank in range(2):
            own, pieces = {}, {}
            for key, tensor in found.items():
                half = -(-len(tensor) // 2) if tensor.ndim else 0
                if tensor.ndim:
                    own[key] = tensor[half * rank : half * (rank + 1)].clone()
                    pieces[key] = [half * rank, list(tensor.shape)]
                elif rank == 0:
                    own[key] = tensor
            metadata = {"format": "pt", "pieces": json.dumps(pieces)}
            save_file(own, checkpoint / f"{kind}.rank-{rank}.safetensors", metadata=metadata)
        (checkpoint / f"{kind}.safetensors").unlink()
    edit_state(lambda state: state.update(rng=state["rng"] * 2, ranks=2))(checkpoint)
    forge(checkpoint)


def edit_pieces(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """``change`` of what a file says its pieces are."""

    def change_metadata(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        pieces = json.loads(metadata["pieces"])
        change(pieces)
        metadata["pieces"] = json.dumps(pieces)

    return edit_tensors(name, change_metadata)


# -- anything -------------------------------------------------------------------------------------------------------------

STRANGE: list[Any] = [None, [], {}, "", "x", -1, 2**70, 10**400, 1e400, float("nan"), True, 0.5, [[]], {"a": []}]


def random_edit(checkpoint: Path, draw: random.Random) -> str:
    """One edit drawn at random, with or without a forged marker; what it was, in words."""
    files = sorted(str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file())
    name = draw.choice(files)
    size = (checkpoint / name).stat().st_size
    kind = draw.choice(["flip", "flip", "truncate", "remove", "swap", "state", "state", "drop", "header", "deep"])
    forged = draw.random() < 0.5
    words = f"{kind} {name}"
    if kind == "flip" and size:
        at, bit = draw.randrange(size), draw.randrange(8)
        flip(name, at, bit)(checkpoint)
        words += f" byte {at} bit {bit}"
    elif kind == "truncate" and size:
        truncate(name, draw.randint(1, size))(checkpoint)
    elif kind == "remove":
        remove(name)(checkpoint)
    elif kind == "swap":
        (checkpoint / name).write_bytes((checkpoint / draw.choice(files)).read_bytes())
    elif kind in ("state", "drop"):
        path, value = (
            draw.choice(list(_paths(json.loads((checkpoint / "state.json").read_text())))),
            draw.choice(STRANGE),
        )
        (drop(path) if kind == "drop" else set_at(path, value))(checkpoint)
        words = f"{kind} {path} {value!r:.40}"
    elif kind == "header":
        name = draw.choice([n for n in files if n.endswith(".safetensors")])
        words = f"header {name} " + _edit_header_at_random(checkpoint / name, draw)
    elif kind == "deep":
        put(name, "[" * 200_000)(checkpoint)
    if forged and name != MARKER:
        forge(checkpoint)
        words += ", forged"
    return words


def _paths(node: Any, prefix: str = "") -> list[str]:
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())[:50]
    found = []
    for key, value in items:
        if "." not in str(key):
            found += [f"{prefix}{key}", *_paths(value, f"{prefix}{key}.")]
    return found


def _edit_header_at_random(file: Path, draw: random.Random) -> str:
    words = ""

    def change(header: dict[str, Any]) -> None:
        nonlocal words
        name = draw.choice(sorted(header))
        if name == "__metadata__":
            header[name] = {"pieces": draw.choice(["{", "[]", "{}", '{"a": 1}', '{"a": [0, [1]]}'])}
        else:
            key = draw.choice(["dtype", "shape", "data_offsets", "name"])
            if key == "name":
                header[name + "x"] = header.pop(name)
            else:
                wrong = {
                    "dtype": ["F64", "I32", "F99"],
                    "shape": [[], [0], [2**70], [1, 1]],
                    "data_offsets": [[0, 0], [8]],
                }
                header[name][key] = draw.choice(wrong[key])
            words = f"{name} {key}"

    edit_header(file.name, change)(file.parent)
    return words
