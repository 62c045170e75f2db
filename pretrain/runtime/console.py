"""Output on the terminal: notices on stderr, and a progress bar for long work if stderr is a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from pretrain.runtime.files import open_append, open_file
from pretrain.runtime.redact import RedactingFormatter, redact

LATER_SECONDS = 5.0  # by how much a rank may be slower than another to find the same mistake

_muted = False
_captured: Path | None = None  # the file that receives stderr before there is a log
_unlogged: list[logging.LogRecord] = []  # notices from before there is a log


def mute() -> None:
    """Print nothing on the terminal from now on, only write to the log: of several processes only one prints."""
    global _muted
    _muted = True


@contextmanager
def quietly() -> Iterator[None]:
    """Print nothing on the terminal inside, only write to the log, because another process has already printed it."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def notice(message: str) -> None:
    """Write one line to stderr and to the run's log. A closed terminal does not stop the run."""
    _emit(message, on_terminal=not _muted)


def complain(message: str) -> None:
    """Print why this command exits. If torchrun has started several ranks, one rank per machine prints it, because another
    machine may have other files and a terminal of its own.

    When the first rank exits, torchrun ends the others. Therefore the ranks that print nothing wait for the one that does.
    """
    on_terminal = os.environ["LOCAL_RANK"] == "0" if "LOCAL_RANK" in os.environ else not _muted
    _emit(message, on_terminal=on_terminal)
    if not on_terminal and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(LATER_SECONDS)


def visible(text: str) -> str:
    """Return ``text`` with escapes such as ``\\x1b`` in place of its control characters, except for line feeds.

    A terminal executes them, and names and values may come from another person's files.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _emit(message: str, *, on_terminal: bool) -> None:
    message = visible(redact(message))
    logger = logging.getLogger("pretrain")
    if logger.handlers:
        logger.info(message)
    else:
        _unlogged.append(logging.makeLogRecord({"levelno": logging.INFO, "levelname": "INFO", "msg": message}))
    if on_terminal:
        with suppress(OSError):
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()


def log_error(message: str) -> None:
    """Write ``message`` and the traceback of the current exception to the run's log."""
    logging.getLogger("pretrain").error(message, exc_info=True)


def shows_progress() -> bool:
    """Return whether the output of this command, including progress bars, goes to a terminal."""
    return sys.stderr.isatty() and sys.stdout.isatty()


@contextmanager
def progress_bar(description: str, *, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Yield ``advance(amount)``, which moves a progress bar. Without a terminal nothing is drawn.

    ``total`` is in the same unit as the amounts (``None``: unknown). The unit ``"B"`` shows amounts as sizes in bytes.
    """
    if _muted or not sys.stderr.isatty():  # not `shows_progress`: stdout may be a file while a person sees stderr
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


class _Log(logging.FileHandler):
    """A log file that reports once if it can't be written. logging itself prints a traceback for every lost line."""

    failed = False

    def _open(self) -> TextIOWrapper:
        return open_append(Path(self.baseFilename), mode="a", encoding="utf-8")  # type: ignore[return-value]

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed and not _muted:
            self.failed = True
            with suppress(OSError):
                sys.stderr.write(f"{self.baseFilename} can't be written: {sys.exc_info()[1]}; the run continues\n")
                sys.stderr.flush()


def end_log() -> None:
    """Close the log of `log_to`; the logger passes records on again, as before."""
    logger = logging.getLogger("pretrain")
    logger.propagate = True
    for handler in [h for h in logger.handlers if isinstance(h, _Log)]:
        logger.removeHandler(handler)
        with suppress(OSError):  # its disk may be full
            handler.close()


def log_to(file: Path) -> None:
    """Append the notices of this process, earlier and later ones, to ``file``."""
    handler = _Log(file, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pretrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for earlier in list(logger.handlers):  # of an earlier run in this process
        logger.removeHandler(earlier)
        with suppress(OSError):  # its disk may be full
            earlier.close()
    logger.addHandler(handler)
    for record in _unlogged:
        handler.handle(record)
    _unlogged.clear()
    global _captured
    if _captured is not None:
        with suppress(OSError), open_append(file, mode="ab") as log:  # a full disk
            log.write(_captured.read_bytes())
        _stderr_into(file)
        _captured = None


def capture_stderr(early: Path, *, keep_terminal: bool) -> None:
    """Redirect what C++ libraries write to stderr to the log, and to ``early`` until there is a log.

    With ``keep_terminal``, what Python writes to stderr still goes to the terminal; otherwise it is redirected too.
    """
    global _captured
    if keep_terminal:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    _captured = early
    _stderr_into(early)


def _stderr_into(file: Path) -> None:
    descriptor = open_file(file, os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def quiet_libraries() -> None:
    """Keep libraries' messages for their own developers off the terminal. Errors and this program's messages stay."""
    warnings.filterwarnings("ignore", module="torch|transformers")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
    )
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
