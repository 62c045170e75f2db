"""The command line of a tool, its mistakes, and the page that it writes."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.runtime.console import complain
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import replace_file


def tool_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the tool ``name``, whose help shows ``description`` as it is written.

    It accepts no abbreviated options, because a tool may pass on the words that it does not know to a run.
    """
    return argparse.ArgumentParser(
        f"python -m pretrain.tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Exit with code 2 and one line on stderr for a ``UserError`` inside the block. Where the reader of stdout, such as `head`,
    has exited, end the block without a message."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from None


def write_page(path: Path, text: str) -> Path:
    """Write the file that ``--output`` names, or its default, and return its path. Raises ``UserError`` if that is not
    possible."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output names the file")
    try:
        replace_file(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    return path
