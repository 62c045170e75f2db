"""A mixture of eight parts beside one part of the same text, and beside ``datasets.interleave_datasets``: medians of rounds that
take turns in one process.

    python scripts/bench_mixture.py [--rounds 7] [--sequence-length 1024]

The text is the source code of this Python's standard library, in a BPE of 4,096 tokens. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
import numpy as np

WEIGHTS = (0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)
ROWS = 64  # sequences of a batch
WARM_UP, BATCHES = 20, 200
SAMPLES = 1_000  # the first samples, after each of which the shares are compared
LATE = 900_000_000  # 90 % of a run of 10⁹ samples, in whole batches below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequence-length", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), arguments.rounds, arguments.sequence_length)


def report(folder: Path, rounds: int, length: int) -> None:
    views, whole = tokenized(folder)
    ours = of_parts(views)
    packed = [view.gather(np.arange(view.num_tokens // length) * length, length) for view in views]
    measures: dict[str, Callable[[], float]] = {
        "one part": lambda: loader_rate(whole, length),
        "eight parts": lambda: loader_rate(ours, length),
        "`interleave_datasets` of the same eight, packed before": lambda: interleaved(packed)[0],
        "first batch, fresh": lambda: first_batch(ours, length, 0),
        "first batch at 90 % of 10⁹ samples": lambda: first_batch(ours, length, LATE - LATE % ROWS),
    }
    runs = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    medians = {name: statistics.median(run[name] for run in runs) for name in measures}
    print("| measure | value | ratio |\n|---|---|---|")
    one, mixed, other, fresh, late = medians.values()
    names = list(measures)
    print(f"| loader, {names[0]} | {one / 1e6:.0f} M tokens/s | |")
    print(f"| loader, {names[1]} | {mixed / 1e6:.0f} M tokens/s | {mixed / one:.2f} × one part |")
    print(f"| {names[2]} | {other / 1e6:.1f} M tokens/s | ours is {mixed / other:.1f} × as fast |")
    print(f"| {names[4]}, against a fresh start | {late * 1000:.1f} ms | {late / fresh:.2f} × |")
    print(
        f"| largest error of a share within the first {SAMPLES:,} samples | {our_error(ours, length):.2f} samples | |"
    )
    print(f"| the same of `interleave_datasets` | {interleaved(packed)[1]:.0f} samples | |")


def tokenized(folder: Path) -> tuple[list[Any], Any]:
    """Return the views of eight parts of the text, and of all of it."""
    from pretrain.data.sources.local import Local
    from pretrain.data.tokenization.tokenize import prepare

    text = bench_data.library_sources()
    content = bench_data.train_tokenizer(text, folder).read_text()
    size = len(text) // len(WEIGHTS)

    def view(name: str, part: str) -> Any:
        (folder / name).mkdir()
        (folder / name / "text.txt").write_text(part)
        source = Local(nameOrPath=str(folder / name))
        return prepare(source, tokenizer_json=content, eot=0, cache=folder / "cache").views(held_out=0.0)[0]

    parts = [view(f"part{n}", text[n * size : (n + 1) * size]) for n in range(len(WEIGHTS))]
    return parts, view("whole", text)


def of_parts(views: list[Any]) -> Any:
    from pretrain.data.training_data import MixturePhase, Part, TrainingData

    parts = tuple(Part(f"part{number}", view) for number, view in enumerate(views))
    return TrainingData(parts, (MixturePhase(0.0, WEIGHTS),))


def loader_rate(data: Any, length: int) -> float:
    """Return the tokens per second of processor time of the loader's thread and its reader."""
    from pretrain.data.loader import Loader

    batches = iter(Loader(data, sequence_length=length, seed=1, batch_size=8, accumulation=ROWS // 8))
    for _ in range(WARM_UP):
        next(batches)
    started_at = time.process_time()
    for _ in range(BATCHES):
        next(batches)
    seconds = time.process_time() - started_at
    batches.close()
    return BATCHES * ROWS * length / seconds


def first_batch(data: Any, length: int, sample: int) -> float:
    """Return the seconds from a new loader to its first batch."""
    from pretrain.data.loader import Loader

    started_at = time.perf_counter()
    batches = iter(Loader(data, sequence_length=length, seed=1, batch_size=8, accumulation=8, first_sample=sample))
    next(batches)
    seconds = time.perf_counter() - started_at
    batches.close()
    return seconds


def our_error(data: Any, length: int) -> float:
    """Return the largest error of a share in the first samples."""
    from pretrain.data.loader import Loader

    return largest_error(Loader(data, sequence_length=length, seed=1, batch_size=1).order(np.arange(SAMPLES))[0])


def largest_error(parts: Any) -> float:
    """Return how far, after any of the samples from these parts, a part's count is from its share of the samples so far."""
    counts = np.cumsum(np.asarray(parts)[:, None] == np.arange(len(WEIGHTS)), axis=0)
    return float(np.abs(counts - np.arange(1, len(counts) + 1)[:, None] * WEIGHTS).max())


def interleaved(packed: list[Any]) -> tuple[float, float]:
    """Return tokens per second of processor time, and the largest error of a share after the first samples."""
    import datasets

    parts = [
        datasets.Dataset.from_dict({"input_ids": rows, "part": [number] * len(rows)})
        for number, rows in enumerate(packed)
    ]
    mixed = datasets.interleave_datasets(parts, list(WEIGHTS), seed=1, stopping_strategy="all_exhausted").with_format(
        "torch"
    )
    error = largest_error(mixed[:SAMPLES]["part"].numpy())
    started_at, tokens = time.process_time(), 0
    for start in range(0, min(len(mixed), 40 * ROWS), ROWS):
        tokens += mixed[start : start + ROWS]["input_ids"].numel()
    return tokens / (time.process_time() - started_at), error


if __name__ == "__main__":
    main()
