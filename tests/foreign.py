"""A stranger's configs, and a module of theirs, which leaves a mark when it is imported."""

import textwrap
from pathlib import Path

MARK = "code ran"


def foreign_module(folder: Path) -> Path:
    """Write the module into ``folder/site``; return where its code leaves its mark."""
    mark, site = folder / MARK, folder / "site"
    site.mkdir()
    (site / "foreign.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "def run(*a, **k): pass\n"
        "class Sink:\n"
        "    def open(self, run, start): self.file = (run / 'foreign.txt').open('w')\n"
        "    def write(self, record): self.file.write(record['event'] + ' ')\n"
        "    def close(self): self.file.close()\n"
    )
    return mark


def experiment(tmp_path: Path, text: str, name: str = "experiment/theirs.yaml") -> list[str]:
    """The arguments that put a file of somebody else's among the configs."""
    file = tmp_path / "theirs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return ["--config-dir", str(tmp_path / "theirs")]
