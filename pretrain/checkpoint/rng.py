"""The random state of this process as JSON: of Python, NumPy, torch on the CPU, and torch on this rank's GPU."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMPY_KEYS = 624  # words in the state of NumPy's Mersenne Twister
BETWEEN_RANKS = 1_000_003  # difference of the seeds of two ranks; larger than the seeds that users choose


def rng_state() -> dict[str, Any]:
    """Return the state with which ``set_rng_state`` continues at exactly the next random number."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def check_rng_state(state: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a state that ``set_rng_state`` could not set. This sets nothing."""
    try:
        version, internal, gauss = state["python"]
        random.Random().setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        if not (0 <= position <= NUMPY_KEYS and has_gauss in (0, 1)):  # NumPy does not check these two
            raise ValueError("numpy: out of range")
        np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, float(cached)))
        torch.Generator().set_state(_decode(state["torch"]))
        if state["cuda"] is not None and len(_decode(state["cuda"])) == 0:
            raise ValueError("cuda: empty")
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, AttributeError) as error:
        raise ValueError(f"not a random state: {type(error).__name__}: {error}".splitlines()[0][:200]) from None


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seed Python, NumPy and torch. Ranks draw different numbers, because dropout must differ between them; rank 0 draws
    those of a single process."""
    seed += rank * BETWEEN_RANKS
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
