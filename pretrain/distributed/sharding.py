"""Named tensors in safetensors files, full or sharded along dim 0, so that every rank writes and reads its local shards.

Files written by several ranks can be read by any other number of ranks, because tensors are read by name and range of rows.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import read_at
from pretrain.runtime.open_files import OpenFiles
from pretrain.runtime.strict_json import parse_json

CHECKSUM_NUMBERS = 1 << 24
SHARE_BYTES = 1 << 28  # of the tensors that all ranks hold, the least that each of several ranks writes
PIECES = "pieces"  # metadata of a file: {name: [first row, full shape]} for the tensors that are sharded in it
DTYPES = dict(F64="float64", F32="float32", F16="float16", BF16="bfloat16", I64="int64", U8="uint8")  # noqa: C408
Manifest = dict[str, tuple[str, list[int]]]  # name → dtype and full shape


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A shard along dim 0: ``tensor`` holds the rows from ``start`` on of a tensor whose full shape is ``shape``. A 0-d tensor
    is never sharded."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a sharded tensor, sharing its memory; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (a collective); any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_rows(tensor: DTensor) -> bool:
    """Return whether ``tensor`` is sharded along dim 0 alone, or not at all."""
    return all(isinstance(p, Replicate) or p == Shard(0) for p in tensor.placements)


def start_of(tensor: Tensor) -> int:
    """Return the first row of the local shard."""
    if not isinstance(tensor, DTensor):
        return 0
    return start_in(tensor)[0] if tensor.ndim else 0


def start_in(tensor: DTensor) -> list[int]:
    """Return the index in each dimension of the full tensor at which the local shard starts. A mesh of several dimensions
    shards in their order, and an empty shard starts at the end."""
    start, size = [0] * tensor.ndim, list(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    for placement, ranks, rank in zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        assert type(placement) is Shard, f"{placement} is not supported"
        rows = -(-size[placement.dim] // ranks)  # of each shard but the last ones
        first = min(rank * rows, size[placement.dim])
        start[placement.dim] += first
        size[placement.dim] = min(rows, size[placement.dim] - first)
    return start


def is_replicated(tensor: Tensor) -> bool:
    """Return whether several ranks hold the same part of ``tensor``, given that there are several ranks."""
    if not isinstance(tensor, DTensor):
        return True
    sizes = (tensor.device_mesh.size(dim) for dim, p in enumerate(tensor.placements) if isinstance(p, Replicate))
    return any(size > 1 for size in sizes)


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the elements' bits, interpreted as integers: int64, 0-d, on the tensor's device. A single flipped bit
    changes it."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    sums = [part.sum(dtype=torch.int64) for part in bits.split(CHECKSUM_NUMBERS)]  # the sum's int64 copy stays small
    return torch.stack(sums).sum()  # an empty tensor has one part too


def local_shard(tensor: Tensor, *, is_main: bool) -> TensorShard | None:
    """Return the shard of ``tensor`` that this rank has to write, or ``None``. Of equal copies the first rank writes its own."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor.detach(), 0, tuple(tensor.shape)) if is_main else None
    mesh = tensor.device_mesh
    assert by_rows(tensor)
    if any(isinstance(p, Replicate) and mesh.get_local_rank(dim) for dim, p in enumerate(tensor.placements)):
        return None
    part = local(tensor).detach()
    return TensorShard(part, start_of(tensor), tuple(tensor.shape)) if part.numel() or is_main else None


def equal_part(tensor: Tensor, rank: int, ranks: int) -> TensorShard | None:
    """Return the rows that a rank writes of a full tensor which all ranks share, in equal parts as FSDP's; ``None``: no rows.
    Rank 0 writes a 0-d tensor."""
    if not tensor.ndim:
        return TensorShard(tensor, 0, ()) if rank == 0 else None
    size = -(-len(tensor) // ranks)
    first = min(rank * size, len(tensor))
    part = tensor[first : first + size]
    return TensorShard(part, first, tuple(tensor.shape)) if part.numel() or rank == 0 else None


def writers(named: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Return the rank that writes each of the tensors that all ``ranks`` hold in full, so that they write about the same number
    of bytes; the dict is empty if they are too small to be shared, and rank 0 writes all. Every rank finds the same: the
    largest tensor that is left goes to the rank that has the least so far."""
    sizes = {name: t.numel() * t.element_size() for name, t in named.items() if not isinstance(t, DTensor)}
    count = min(ranks, sum(sizes.values()) // SHARE_BYTES)
    if count < 2:
        return {}
    loads = [(0, rank) for rank in range(count)]
    found = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = heapq.heappop(loads)
        found[name] = rank
        heapq.heappush(loads, (load + size, rank))
    return found


def write(path: Path, shards: Mapping[str, TensorShard]) -> bool:
    """Write one safetensors file. If there is nothing to write, create no file and return False."""
    if not shards:
        return False
    parts = {n: [p.start, list(p.shape)] for n, p in shards.items() if p.tensor.shape != torch.Size(p.shape)}
    metadata = {"format": "pt"} | ({PIECES: json.dumps(parts)} if parts else {})
    save_file(_unshared({name: p.tensor.contiguous() for name, p in shards.items()}), path, metadata=metadata)
    return True


def _unshared(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``named`` with copies in place of tensors that are another one's memory, which safetensors rejects."""
    seen: set[int] = set()
    for name, tensor in named.items():
        if tensor.data_ptr() in seen:
            named[name] = tensor.clone()
        elif tensor.numel():
            seen.add(tensor.data_ptr())
    return named


class TensorFiles:
    """The tensors in several safetensors files, which stay the same files whatever takes their names. Only headers are read
    until `read` is called, which reads the file instead of mapping it: mapped pages would stay in the process's resident memory
    beside the tensors into which they are copied.

    With ``described``, dtype and full shape of every tensor in them, a file is opened when rows that it may hold are read. A
    rank that reads its own shards then opens few of the files of many ranks: that of the tensor's owner, or the one in whose
    place rows along dim 0 in equal parts would be, and then the next ones to it, until all rows are found.
    """

    def __init__(
        self, files: Iterable[Path], described: Manifest | None = None, owners: Mapping[str, int] | None = None
    ) -> None:
        """Open ``files``, or with ``described`` none of them yet. ``owners`` is the index in ``files`` of the one that holds a
        tensor in full, where it is known. Raises ``UserError`` for a file that can't be read, and for shards that do not make
        full tensors."""
        self._parts: dict[str, list[tuple[int, Any]]] = {}  # name → (first row, open file), by row
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._places: dict[tuple[int, str], tuple[Path, int]] = {}  # file and first byte, by handle and name
        self._opened = OpenFiles()
        self._paths, self._owners, self._described = list(files), owners or {}, described
        self._unopened = set(range(len(self._paths)))
        if described is not None:
            self._shapes = {name: tuple(shape) for name, (_, shape) in described.items()}
            return
        for file in self._paths:
            self._open(file)
        for name, parts in self._parts.items():
            self._sort(parts, name)
            if reason := self._gap(name):
                raise UserError(f"{self._paths[-1]}: {name}: {reason}")
        self._unopened.clear()

    def _open(self, file: Path) -> list[str]:
        """Open one of the files, and return the names in it. Raises ``UserError`` if it can't be read, or holds other tensors
        than were described."""
        try:
            return self._add(file)
        except (OSError, EOFError, ValueError, SafetensorError) as error:
            raise UserError(f"{file} can't be read: {error}") from None

    @staticmethod
    def _sort(parts: list[tuple[int, Any]], name: str) -> None:
        # Of two shards with the same first row, the empty one comes first.
        parts.sort(key=lambda part: (part[0], _shape_in(part[1], name)[:1]))

    def _open_for(self, name: str, start: int, stop: int) -> None:
        """Open the files that hold rows [start, stop) of a tensor, of which some are not open yet."""
        while self._unopened and (row := self._first_missing(name, start, stop)) is not None:
            rows, files = (self._shapes[name] or (1,))[0], len(self._paths)
            place = self._owners.get(name, row // -(-rows // files))
            nearest = min(self._unopened, key=lambda index: (abs(index - place), index))
            self._unopened.remove(nearest)
            for found in self._open(self._paths[nearest]):
                self._sort(self._parts[found], found)

    def _first_missing(self, name: str, start: int, stop: int) -> int | None:
        """Return the first of the rows [start, stop) that is in no open file; ``None`` if all are."""
        for first, handle in self._parts.get(name, []):
            if first <= start:
                start = max(start, first + (_shape_in(handle, name) or (1,))[0])
        return start if start < stop else None

    def opened(self) -> list[Path]:
        """Return the files that were opened."""
        return [file for place, file in enumerate(self._paths) if place not in self._unopened]

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Open all files, and yield (name, first row, row after the last one) of every shard in them; a 0-d tensor has one row.

        Raises ``UserError`` for a file that can't be read, and for a shard that is no part of the tensor that was described.
        """
        while self._unopened:
            self._open(self._paths[self._unopened.pop()])
        for name, parts in self._parts.items():
            for first, handle in parts:
                shape = _shape_in(handle, name)
                if shape[1:] != self._shapes[name][1:] or len(shape) != len(self._shapes[name]):
                    raise UserError(
                        f"{name}: a shard of shape {list(shape)} in a tensor of shape {list(self._shapes[name])}"
                    )
                yield name, first, first + (shape[0] if shape else 1)

    def _add(self, file: Path) -> list[str]:
        opened = self._opened.add(file)
        handle = safe_open(file, framework="pt", device="cpu")
        if not self._opened.is_current(file):
            raise ValueError("another file has taken its place meanwhile")
        pieces, offsets = _pieces_of(handle), _offsets(opened.number)
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            start, shape = pieces.pop(name) if name in pieces else (0, _shape_in(handle, name))
            dtype = str(handle.get_slice(name).get_dtype())
            if self._described is not None and _dtype_in(handle, name) != self._described.get(name, ("",))[0]:
                raise ValueError(f"{name} has another dtype than was saved, or was not saved")
            if self._shapes.setdefault(name, shape) != shape or self._dtypes.setdefault(name, dtype) != dtype:
                raise ValueError(f"{name} has another dtype or shape than in the other files")
            self._parts.setdefault(name, []).append((start, handle))
            self._places[id(handle), name] = (file, offsets[name])
        if pieces:
            raise ValueError(f"{min(pieces)} is not in it")
        return list(handle.keys())

    def _gap(self, name: str) -> str | None:
        """Return why the shards of a tensor do not hold every row exactly once, or ``None``."""
        parts, shape = self._parts[name], self._shapes[name]
        if not shape:
            return None if len(parts) == 1 and _shape_in(parts[0][1], name) == () else "more than one number"
        rows = 0
        for first, handle in parts:
            shard_shape = _shape_in(handle, name)
            if shard_shape[1:] != shape[1:] or len(shard_shape) != len(shape):
                return f"a shard of shape {list(shard_shape)} in a tensor of shape {list(shape)}"
            if first != rows:
                return (
                    f"rows {min(rows, first)} to {max(rows, first)} are {'missing' if first > rows else 'there twice'}"
                )
            rows += shard_shape[0]
        return None if rows == shape[0] else f"{rows} rows of {shape[0]}"

    def keys(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return the tensor's dtype, such as ``"float32"``."""
        return self._described[name][0] if self._described else _dtype_in(self._parts[name][0][1], name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor to the CPU; a 0-d tensor is read in full."""
        shape = self._shapes[name]
        stop = (shape or (1,))[0] if stop is None else stop
        self._open_for(name, start, stop)
        if not shape:
            tensor: Tensor = self._parts[name][0][1].get_tensor(name)
            return tensor
        read = torch.empty((max(0, stop - start), *shape[1:]), dtype=getattr(torch, self.dtype(name)))
        done = 0
        for first, handle in self._parts.get(name, []):
            begin, end = max(start - first, 0), min(stop - first, _shape_in(handle, name)[0])
            if begin < end:
                self._read_rows(read[done : done + end - begin], id(handle), name, begin)
                done += end - begin
        if not done:
            return read[:0]
        assert done == len(read), f"{name}: rows {start} to {stop} are not all in the files"
        return read

    def _read_rows(self, into: Tensor, handle: int, name: str, first: int) -> None:
        """Read the rows from ``first`` on of a file's shard of a tensor into ``into``. Raises ``UserError`` if the file has
        changed."""
        if not into.nbytes:
            return
        file, offset = self._places[handle, name]
        bytes_of = into.view(torch.uint8).numpy().data.cast("B")
        self._opened.read_into(file, bytes_of, offset + first * (into.nbytes // len(into)))


def _shape_in(handle: Any, name: str) -> tuple[int, ...]:
    """Return the shape of a file's shard of a tensor."""
    return tuple(handle.get_slice(name).get_shape())


def _dtype_in(handle: Any, name: str) -> str:
    """Return the dtype of a file's shard of a tensor, such as ``"float32"``."""
    found = handle.get_slice(name)
    if (known := DTYPES.get(str(found.get_dtype()))) is not None:
        return known  # without a slice, for which torch maps the whole file
    return described(found[:0] if found.get_shape() else handle.get_tensor(name))[0]


def _offsets(file: int) -> dict[str, int]:
    """Return the first byte of every tensor in an open safetensors file, whose header `safe_open` has checked.

    Source: https://github.com/huggingface/safetensors#format
    """
    size = int.from_bytes(read_at(file, 0, 8).tobytes(), "little")
    header = json.loads(read_at(file, 8, size).tobytes())
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _pieces_of(handle: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return ``PIECES`` of a file as name → (first row, full shape). Raises ``ValueError`` if it is invalid."""
    found = parse_json((handle.metadata() or {}).get(PIECES, "{}"))
    if not isinstance(found, dict) or not all(_is_piece(piece) for piece in found.values()):
        raise ValueError(f"its {PIECES} are not first rows and shapes")
    return {name: (start, tuple(shape)) for name, (start, shape) in found.items()}


def _is_piece(piece: Any) -> bool:
    if not (isinstance(piece, list) and len(piece) == 2 and isinstance(piece[1], list)):
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (piece[0], *piece[1]))


def described(tensor: Tensor) -> tuple[str, list[int]]:
    """Return dtype and full shape of a tensor, such as ``("float32", [5, 3])``."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def manifest(named: Mapping[str, Tensor]) -> Manifest:
    """Return dtype and full shape of each tensor, by name."""
    return {name: described(tensor) for name, tensor in named.items()}


def fill(tensor: Tensor, files: TensorFiles, name: str) -> None:
    """Copy the tensor ``name`` of ``files`` into ``tensor``; if that is sharded, only this rank's part.

    Raises ``UserError`` if the shapes differ.
    """
    with torch.no_grad():
        local(tensor).copy_(read_part(tensor, files, name))


def read_part(tensor: Tensor, files: TensorFiles, name: str) -> Tensor:
    """Return the part of ``name`` in ``files`` that this rank has of ``tensor``, on the CPU. Raises ``UserError`` if the shapes
    differ."""
    check_shape(name, files, tuple(tensor.shape))
    part, start = local(tensor), start_of(tensor)
    read = files.read(name, start, start + len(part)) if part.ndim else files.read(name)
    if isinstance(tensor, DTensor) and not by_rows(tensor):
        offsets = start_in(tensor)
        for dim in range(1, read.ndim):
            read = read.narrow(dim, offsets[dim], part.shape[dim])
    return read


def check_names(names: Iterable[str], files: TensorFiles) -> None:
    """Raise ``UserError`` if ``files`` hold other names than the model's ``names``."""
    if mismatched := set(names) ^ files.keys():
        raise UserError(f"weights that do not fit the model: {', '.join(sorted(mismatched)[:5])} on one side only")


def check_shape(name: str, files: TensorFiles, wanted: tuple[int, ...]) -> None:
    """Raise ``UserError`` if the tensor in ``files`` has another shape than ``wanted``."""
    if wanted != files.shape(name):
        raise UserError(f"weights that do not fit the model: {name} is {files.shape(name)}, the model's {wanted}")
