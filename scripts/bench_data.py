"""How fast is the data side, measured against others in the same minutes: medians of alternating runs, each in a
fresh process.

    python scripts/bench_data.py [--text FILE --tokenizer FOLDER] [--rounds 5]
    python scripts/bench_data.py --formats 20 200 [--reading-alone] [--rounds 5]

The second form puts the formats beside plain text, with so many MB of the same documents in each, tokenized and only read.
Without ``--text`` the text is the source code of this Python's standard library, without ``--tokenizer`` a BPE of 4,096
tokens is trained on it first. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 512
LARGE_BYTES = 80_000_000  # enough text that worker processes are used


# Each of these runs in a process of its own and returns seconds or other numbers --------------------------------------


def ours(corpus: str, tokenizer: str, cache: str, workers: int) -> dict[str, float]:
    from pretrain.data.sources.local import Local
    from pretrain.data.tokenization.tokenize import prepare

    started_at = time.perf_counter()
    source = Local(nameOrPath=corpus, num_workers=workers)
    store = prepare(source, tokenizer_json=Path(tokenizer).read_text(), eot=0, cache=Path(cache))
    seconds = time.perf_counter() - started_at
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {"seconds": seconds, "tokens": store.num_tokens, "parent_mib": usage[0], "worker_mib": usage[1]}
    return found | {"processor_seconds": processor_seconds()}


def reading_alone(corpus: str, tokenizer: str, cache: str, workers: int) -> dict[str, float]:
    """What is done with files before the tokenizer: cut, named by a digest, made into documents."""
    from pretrain.data.reading.cut import cut
    from pretrain.data.reading.readers import digest, read
    from pretrain.data.sources.local import Local

    source, before = Local(nameOrPath=corpus), processor_seconds()
    started_at = time.perf_counter()
    characters = 0
    for file in source.files():
        for piece in cut(file, source.options()):
            digest(piece, source.options())
            characters += sum(map(len, read(piece, source.options())))
    seconds = time.perf_counter() - started_at
    return {"seconds": seconds, "characters": characters, "processor_seconds": processor_seconds() - before}


def encode_alone(corpus: str, tokenizer: str, cache: str, workers: int) -> dict[str, float]:
    """The floor: texts that are already in memory through ``encode_batch_fast`` on all cores, the result thrown
    away."""
    from tokenizers import Tokenizer

    documents, encoder = documents_of(corpus), Tokenizer.from_file(tokenizer)
    started_at = time.perf_counter()
    tokens = 0
    for start in range(0, len(documents), 1000):
        tokens += sum(
            len(e) for e in encoder.encode_batch_fast(documents[start : start + 1000], add_special_tokens=False)
        )
    return {"seconds": time.perf_counter() - started_at, "tokens": tokens}


def datasets_map(corpus: str, tokenizer: str, cache: str, workers: int) -> dict[str, float]:
    """The usual way: ``datasets.map`` with a fast tokenizer, then with ``group_texts``."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    encoder = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
    data = datasets.Dataset.from_dict({"text": documents_of(corpus)})
    data.save_to_disk(f"{cache}/raw")
    data = datasets.load_from_disk(f"{cache}/raw")

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        total = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        return {
            name: [tokens[i : i + SEQUENCE_LENGTH] for i in range(0, total, SEQUENCE_LENGTH)]
            for name, tokens in joined.items()
        }

    started_at = time.perf_counter()
    data = data.map(lambda rows: encoder(rows["text"]), batched=True, num_proc=workers, remove_columns=["text"])
    data = data.map(group_texts, batched=True, num_proc=workers)
    return {"seconds": time.perf_counter() - started_at, "tokens": len(data) * SEQUENCE_LENGTH}


def loading(corpus: str, tokenizer: str, cache: str, workers: int) -> dict[str, float]:
    """Batches of 8 x 8 sequences, as one process takes them; and the time to the first one, fresh and at 90 % of
    1000 epochs."""
    from pretrain.data.loader import Loader
    from pretrain.data.sources.local import Local
    from pretrain.data.tokenization.tokenize import prepare

    store = prepare(Local(nameOrPath=corpus), tokenizer_json=Path(tokenizer).read_text(), eot=0, cache=Path(cache))
    view = store.views(held_out=0.05)[0]
    options: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "seed": 1, "batch_size": 8, "accumulation": 8}
    found = {}
    for name, mask in (("tokens_per_second", False), ("masked_tokens_per_second", True)):
        batches = iter(Loader(view, **options, document_mask=mask))
        next(batches)
        started_at = time.perf_counter()
        for _ in range(300):
            next(batches)
        found[name] = 300 * 64 * SEQUENCE_LENGTH / (time.perf_counter() - started_at)
        batches.close()
    late = int(900 * (view.num_tokens // SEQUENCE_LENGTH))
    for name, sample in [("fresh_seconds", 0), ("resumed_seconds", late)]:
        started_at = time.perf_counter()
        next(iter(Loader(view, **options, first_sample=sample)))
        found[name] = time.perf_counter() - started_at
    return found


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    f.__name__: f for f in (ours, reading_alone, encode_alone, datasets_map, loading)
}


def processor_seconds() -> float:
    """Of this process and of those it has waited for: on a machine that others load, steadier than the clock."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def documents_of(corpus: str) -> list[str]:
    """The same documents that our side makes of the corpus."""
    from pretrain.data.reading.sections import sections

    return [part for path in sorted(Path(corpus).glob("*.txt")) for part in sections(path.read_text(), 20_000)]


# The parent ----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, folder: Path, tokenizer: Path, workers: int) -> None:
        self.folder, self.tokenizer, self.workers = folder, tokenizer, workers

    def run(self, name: str, corpus: Path, *, cache: Path | None = None) -> dict[str, float]:
        """One measure in a fresh process, with an empty cache unless one is given."""
        used = cache or Path(tempfile.mkdtemp(dir=self.folder))
        arguments = [name, str(corpus), str(self.tokenizer), str(used), str(self.workers)]
        answer = subprocess.run(
            [sys.executable, __file__, "--child", *arguments], stdout=subprocess.PIPE, check=True, text=True
        ).stdout
        if cache is None:
            shutil.rmtree(used)
        return dict(json.loads(answer.splitlines()[-1]))

    def alternate(self, names: list[str], corpus: Path, rounds: int) -> dict[str, float]:
        """Median seconds of each measure, their runs taken in turn."""
        runs = [{name: self.run(name, corpus)["seconds"] for name in names} for _ in range(rounds)]
        return {name: statistics.median(run[name] for run in runs) for name in names}


def copies(text: str, folder: Path, total_bytes: int) -> Path:
    """The text over and over, each copy another file with other documents, until there is enough of it."""
    folder.mkdir()
    size = len(text.encode())
    for number in range(max(1, round(total_bytes / size))):
        (folder / f"{number:03}.txt").write_text(f"copy {number}\n" + text)
    return folder


# Formats -------------------------------------------------------------------------------------------------------------


def write_text(path: Path, documents: list[str]) -> None:
    path.with_suffix(".txt").write_text("".join(documents))


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def write_jsonl_zst(path: Path, documents: list[str]) -> None:
    import zstandard

    write_jsonl(path, documents)
    plain = path.with_suffix(".jsonl")
    path.with_suffix(".jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    plain.unlink()


def write_csv(path: Path, documents: list[str]) -> None:
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(documents)])


def write_parquet(path: Path, documents: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": documents}), path.with_suffix(".parquet"), row_group_size=1000)


FORMATS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "jsonl.zst": write_jsonl_zst,
    "csv": write_csv,
    "parquet": write_parquet,
}


def report_formats(
    folder: Path, text: str, tokenizer: Path, megabytes: list[int], rounds: int, measures: list[str]
) -> None:
    """The same documents in each format: tokenized in one process (``ours``), and only read."""
    bench = Bench(folder, tokenizer, workers=1)
    print("| measure | MB of text | format | MB/s | time × text | processor time × text |\n|---|---|---|---|---|---|")
    for size in megabytes:
        source, corpora = in_formats(text, folder, size)
        real = sum(path.stat().st_size for path in source.iterdir()) / 1e6
        for measure in measures:
            runs = [{name: bench.run(measure, corpus) for name, corpus in corpora.items()} for _ in range(rounds)]
            medians = {
                name: [statistics.median(run[name][what] for run in runs) for what in ("seconds", "processor_seconds")]
                for name in FORMATS
            }
            for name, times in medians.items():
                ratios = " | ".join(f"{own / plain:.2f}" for own, plain in zip(times, medians["text"], strict=True))
                print(f"| {measure} | {real:.0f} | {name} | {real / times[0]:.1f} | {ratios} |", flush=True)


def in_formats(text: str, folder: Path, megabytes: int) -> tuple[Path, dict[str, Path]]:
    """(the text, format → a folder with the same documents)."""
    from pretrain.data.reading.sections import sections

    source = copies(text, folder / f"source{megabytes}", megabytes * 1_000_000)
    corpora = {name: folder / f"{name}{megabytes}" for name in FORMATS}
    for name, corpus in corpora.items():
        corpus.mkdir()
        for path in sorted(source.iterdir()):
            FORMATS[name](corpus / path.stem, list(sections(path.read_text(), 20_000)))
    return source, corpora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", type=int, nargs="+", metavar="MB")
    parser.add_argument("--reading-alone", action="store_true", help="of the formats: without tokenizing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, corpus, tokenizer, cache, workers = arguments.child
        print(json.dumps(MEASURES[name](corpus, tokenizer, cache, int(workers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text.read_text() if arguments.text else library_sources()
        own = arguments.tokenizer
        tokenizer = own / "tokenizer.json" if own else train_tokenizer(text, Path(folder))
        if arguments.formats:
            measures = ["reading_alone"] if arguments.reading_alone else ["ours", "reading_alone"]
            report_formats(Path(folder), text, tokenizer, arguments.formats, arguments.rounds, measures)
        else:
            report(Path(folder), text, tokenizer, arguments.rounds)


def report(folder: Path, text: str, tokenizer: Path, rounds: int) -> None:
    from pretrain.data.tokenization.tokenize import usable_cores

    bench = Bench(folder, tokenizer, usable_cores())
    small = copies(text, folder / "small", 1)
    large = copies(text, folder / "large", LARGE_BYTES)
    huge = copies(text, folder / "huge", 4 * LARGE_BYTES)
    rows: list[tuple[str, str, str]] = []
    for name, corpus in (("in one process", small), (f"{bench.workers} workers", large)):
        megabytes = sum(path.stat().st_size for path in corpus.iterdir()) / 1e6
        seconds = bench.alternate(["ours", "encode_alone", "datasets_map"], corpus, rounds)
        label = f"{megabytes:.0f} MB of text, {name}"
        rate = f"{megabytes / seconds['ours']:.1f} MB/s"
        alone, usual = seconds["encode_alone"] / seconds["ours"], seconds["datasets_map"] / seconds["ours"]
        rows.append((f"tokenizing {label}, against `encode_batch_fast` alone", rate, f"{alone:.2f} ×"))
        rows.append(
            (f"the same against `datasets.map` + `group_texts`, {bench.workers} processes", rate, f"{usual:.2f} ×")
        )
    cache = folder / "kept"
    peaks = [bench.run("ours", large, cache=cache), bench.run("ours", huge)]
    for who in ("parent_mib", "worker_mib"):
        sizes = " → ".join(f"{peak[who]:.0f}" for peak in peaks)
        label = f"peak memory of the {who[:6]}, {LARGE_BYTES / 1e6:.0f} MB → 4 × the text"
        rows.append((label, f"{sizes} MiB", f"{peaks[1][who] / peaks[0][who]:.2f} ×"))
    again = statistics.median(bench.run("ours", large, cache=cache)["seconds"] for _ in range(rounds))
    rows.append(("second start", f"{again * 1000:.0f} ms", f"{again / peaks[0]['seconds']:.4f} × the first"))
    loads = [bench.run("loading", large, cache=cache) for _ in range(rounds)]
    load = {name: statistics.median(run[name] for run in loads) for name in loads[0]}
    rows.append(("loader, one process", f"{load['tokens_per_second'] / 1e6:.0f} M tokens/s", ""))
    rows.append(("loader with document mask", f"{load['masked_tokens_per_second'] / 1e6:.0f} M tokens/s", ""))
    milliseconds = f"{load['resumed_seconds'] * 1000:.1f} ms"
    ratio = f"{load['resumed_seconds'] / load['fresh_seconds']:.2f} ×"
    rows.append(("first batch when resumed at 90 % of 1000 epochs, against a fresh start", milliseconds, ratio))
    print("| measure | value | ratio |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def library_sources() -> str:
    from pretrain.data.sources.sample import Python

    return "".join(Path(file.path).read_text(errors="replace") for file in Python().files())


def train_tokenizer(text: str, folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator((text[i : i + 10_000] for i in range(0, len(text), 10_000)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


if __name__ == "__main__":
    main()
