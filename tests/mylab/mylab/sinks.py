"""A sink: the losses in a file of its own."""

from pathlib import Path
from typing import Any

from pretrain import Sink


class Losses(Sink):
    """losses.txt in the run folder: one line per step."""

    def __init__(self, digits: int = 4) -> None:
        self.digits = digits

    def open(self, run: Path, start: Any) -> None:
        path = run / "losses.txt"
        kept = path.read_text().splitlines(keepends=True)[: start.step] if path.exists() else []
        path.write_text("".join(kept))
        self.file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        if record["event"] == "train":
            self.file.write(f"{record['step']} {record['loss']:.{self.digits}f}\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()
