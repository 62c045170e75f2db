"""How tokenizing scales with processes that share the cache, each on one thread; and what that means for more of them.

    python scripts/bench_shared_tokenizing.py [--together 1 2] [--megabytes 48] [--rounds 3]

The text is the source code of this Python's standard library, repeated with another beginning in each file, the tokenizer a BPE
of 4,096 tokens that is trained on it. The rows alternate. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_data import copies, library_sources, processor_seconds, train_tokenizer

CHILD = """
import sys; from pathlib import Path
from pretrain.data.sources.local import Local
from pretrain.data.tokenization.tokenize import prepare
corpus, tokenizer, cache = sys.argv[1:]
prepare(Local(nameOrPath=corpus, num_workers=1), tokenizer_json=Path(tokenizer).read_text(), eot=0, cache=Path(cache))
"""
PROJECTED = 64


def seconds_of(number: int, corpus: Path, tokenizer: Path, cache: Path) -> tuple[float, float]:
    """Return how long ``number`` processes take together, from the start of the first to the end of the last, and their processor
    time."""
    threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(corpus), str(tokenizer), str(cache)]
    started_at, before = time.perf_counter(), processor_seconds()
    processes = [subprocess.Popen(command, env=os.environ | threads) for _ in range(number)]
    if sum(process.wait() != 0 for process in processes):  # waits for all of them
        raise SystemExit("a process failed")
    return time.perf_counter() - started_at, processor_seconds() - before


def overhead(folder: Path, number: int = 300) -> tuple[float, float]:
    """Return the seconds of a unit's lock and record, and those of a look at a unit that another process has."""
    from pretrain.data.reading.units import FileRange, WorkUnit
    from pretrain.data.tokenization.shared_work import UnitRecords

    records = UnitRecords(folder, folder / "memory", time.time())
    units = [WorkUnit((FileRange(f"/text/{i}", "text", 0, 1, 1, (1, 0, i)),)) for i in range(number)]
    started_at = time.perf_counter()
    for unit in units:
        lock = records.lock(unit)
        records.record(unit, ["0" * 32])
        assert lock is not None
        lock.release()
    own = time.perf_counter() - started_at
    held = [records.lock(unit) for unit in units]
    others = UnitRecords(folder, folder / "memory", time.time())
    started_at = time.perf_counter()
    for unit in units:
        others.digests(unit)
        assert others.lock(unit) is None
    look = time.perf_counter() - started_at
    del held
    return own / number, look / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2], metavar="PROCESSES")
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = library_sources()
        tokenizer = train_tokenizer(text, folder)
        corpus = copies(text, folder / "corpus", asked.megabytes * 1_000_000)
        megabytes = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()) / 1e6
        found: dict[int, list[tuple[float, float]]] = {number: [] for number in asked.together}
        for turn in range(asked.rounds):
            for number in found:
                found[number].append(seconds_of(number, corpus, tokenizer, folder / f"cache-{turn}-{number}"))
        own, look = overhead(folder / "progress")
    first = min(found)
    medians = {
        number: [statistics.median(column) for column in zip(*rows, strict=True)] for number, rows in found.items()
    }
    print(f"{megabytes:.0f} MB of text\n")
    print("| processes | seconds | MB/s | of ideal | MB per second of a core |\n|---|---|---|---|---|")
    for number, (seconds, processor) in medians.items():
        ideal = medians[first][0] * first / number
        row = (f"{seconds:.1f}", f"{megabytes / seconds:.2f}", f"{ideal / seconds:.2f}", f"{megabytes / processor:.2f}")
        print(f"| {number} | {' | '.join(row)} |")
    unit = 8.4 / megabytes * medians[first][1]
    efficiency = unit / (unit + own + (PROJECTED - 1) * look)
    print(f"\nA unit of 8.4 MB takes {unit:.1f} s, its lock and record {own * 1e3:.2f} ms,")
    print(
        f"a look at another process's unit {look * 1e3:.2f} ms: {PROJECTED} processes with a core each reach {efficiency:.1%}"
    )
    print(f"of {PROJECTED} × one, as far as the file system and the last units allow.")


if __name__ == "__main__":
    main()
