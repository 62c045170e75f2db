"""``torch.compile`` block by block, and the folder in which compiled code is kept.

All blocks of one kind run the same code, so one compilation serves all of them; the start of a run then does not grow with the
number of layers, as that of one graph for the whole model does. torchtitan compiles in the same way.
Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pretrain.data.cache import cache_dir, cache_errors
from pretrain.models.torch_internals import allow_compilations, default_folder_of_compiled_code, try_one_vector_set
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.folders import SHARED, check_private, exchangeable_at, trusts_shared_folders

Compile = bool | Literal["blocks", "graph"]

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
PRIVATE = 0o700
FOLDER = "compiled-{}"  # with the number of the user
# Compilations of one function before torch stops compiling it. Its default of 8 is too few for models whose blocks differ from
# each other, each of which is compiled twice at most (with and without document masks).
KINDS_OF_BLOCKS = 256


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Replace the forward of each block by a compiled one, which is used in training steps. Without gradients and in eval mode,
    a block runs eagerly: evaluation has other shapes, and it scores the same model before and after.

    Names of weights stay as they are. Hooks of a block, as those of FSDP, run outside of the compiled code, and its activation
    checkpointing inside. Call it after checkpointing has been enabled and before the model is sharded or wrapped.
    """
    allow_compilations(KINDS_OF_BLOCKS)
    compiled = torch.compile(_run, dynamic=False)
    for block in blocks:
        block.forward = _forward(block, compiled)


def _run(forward: Callable[..., Any] | None, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run one block. This is the function that is compiled, once for all blocks of a kind. The class is read at each call,
    because FSDP replaces it; ``forward`` is that of a block which has one of its own."""
    return type(block).forward(block, *args, **kwargs) if forward is None else forward(*args, **kwargs)


def _forward(block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    own = vars(block).get("forward")

    @wraps(block.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training or not torch.is_grad_enabled():
            return _run(own, block, *args, **kwargs)
        before_first_compilation()
        return compiled(own, block, *args, **kwargs)

    return forward


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled for the exact shapes that it is called with."""
    return torch.compile(function, dynamic=False)


@cache
def before_first_compilation() -> None:
    """Set what torch needs before this process compiles anything."""
    if not torch.cuda.is_available():
        try_one_vector_set()


def prepare_compilation() -> None:
    """Check that there is a compiler, and a private folder for what it compiles. Raises ``UserError`` otherwise."""
    check_compiler()
    keep_compiled_code()


def check_compiler() -> None:
    """Raise ``UserError`` if torch has no C++ compiler for a CPU: ``CXX``, or g++ (macOS: clang++)."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not torch.cuda.is_available() and shutil.which(name) is None:
        raise UserError(
            f"model.compile: torch needs a C++ compiler on a CPU, and there is no {name}; install one, name it in CXX, or use "
            "model.compile=false"
        )


def keep_compiled_code() -> None:
    """Make torch keep compiled code in this user's own folder of the cache, where a later start of a run finds it. By
    default that is the folder of temporary files, which machines empty, and in which any user may have created it. Where other
    users could exchange that folder, it is below the user's home instead. A ``TORCHINDUCTOR_CACHE_DIR`` of the environment is
    respected.

    torch finds code there by a hash of the graph, its options and its own version, and runs it. Raises ``UserError`` if another
    user could write into the folder or exchange it.
    """
    given = os.environ.get(CACHE_VARIABLE)
    folder = _real(cache_dir() / FOLDER.format(os.geteuid()))  # a cache may be shared
    home = expanded("~")
    spare = _real(home / ".cache/pretrain" / folder.name) if home.is_absolute() else folder
    # torch itself sets the variable to its default when it first needs the folder, which is on import of some libraries.
    if given and _real(Path(given)) not in (folder, spare, _real(default_folder_of_compiled_code())):
        folder = Path(os.path.realpath(given))
        _check_folder(folder, CACHE_VARIABLE)
    else:
        with cache_errors(folder):
            make_folder(folder.parent)
        if spare != folder and not trusts_shared_folders() and exchangeable_at(folder):
            _say_elsewhere(folder.parent, spare)
            folder = spare
        _check_folder(folder, "PRETRAIN_CACHE")
        with cache_errors(folder):
            folder.chmod(PRIVATE)
    os.environ[CACHE_VARIABLE] = str(folder)


@cache
def _say_elsewhere(place: Path, spare: Path) -> None:
    notice(f"PRETRAIN_CACHE={place}: other users could exchange folders there; compiled code is kept in {spare}")


def _real(folder: Path) -> Path:
    """Return the path with the links of its parents followed, but not the folder's own."""
    return Path(os.path.realpath(folder.parent)) / folder.name


def _check_folder(folder: Path, key: str) -> None:
    """Create ``folder``, the value of ``key`` or in it, if it is missing. Raises ``UserError`` if it is a link, if it belongs to
    another user, or if another user could put another folder in its place: they could make this process run any code."""
    with cache_errors(folder):
        make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(PRIVATE)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{key}: {folder} is {'a link' if folder.is_symlink() else 'no folder'}; remove it")
    check_private(folder, key)
    if trusts_shared_folders():
        return
    if found.st_uid != os.geteuid():
        reason = "belongs to another user"
    elif place := exchangeable_at(folder):
        reason = f"can be exchanged by others, who can write in {place} (chmod go-w prevents that)"
    else:
        return
    raise UserError(
        f"{key}: {folder} {reason}, and compiled code is run from it; choose another folder, or set {SHARED}=1 if all of them "
        "are trusted"
    )
