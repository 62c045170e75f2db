"""A safetensors file that is written tensor by tensor. Layout: https://huggingface.co/docs/safetensors"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.models.hub.files import BITS

NAMES = {  # dtype → its name in the header
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes to which the header is padded


def write_stream(
    path: Path, outline: Mapping[str, Tensor], tensor: Callable[[str], Tensor], *, alive: Callable[[], None]
) -> None:
    """Write the tensors of ``outline`` (names, shapes and dtypes, on the meta device) to ``path``, with one of them in memory.

    ``tensor`` returns the values of a name, which are cast to the dtype in ``outline``; ``alive`` is called after each.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(outline, key=lambda name: (-BITS[NAMES[outline[name].dtype]], name))  # keeps each tensor aligned
    end = 0
    for name in order:
        start, end = end, end + outline[name].numel() * outline[name].element_size()
        header[name] = {
            "dtype": NAMES[outline[name].dtype],
            "shape": list(outline[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            values = tensor(name).to(outline[name].dtype).contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy().data)
            del values
            alive()
