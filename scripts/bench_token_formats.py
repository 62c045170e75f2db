"""Corpora of token ids and text behind a URL beside plain text of the same documents: tokenize, and read one epoch as batches.

    python scripts/bench_token_formats.py [--megabytes 20] [--rounds 3]

The text is the source code of this Python's standard library, the tokenizer a BPE of 4,096 tokens. Every run is a process of its
own with an empty cache, their turns alternate. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_data import copies, library_sources, processor_seconds, train_tokenizer
from fuzzing.corpora import write

EOT = 0
TOKENS = ("megatron", "datatrove", "npy", "nanogpt")
LENGTH, BATCH = 512, 8


def make(folder: Path, text: str, tokenizer_path: Path, megabytes: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Write the corpora. Return name → (place, options of the source)."""
    import pyarrow as pa
    from tokenizers import Tokenizer

    from pretrain.data.reading.sections import sections

    source = copies(text, folder / "text", megabytes * 1_000_000)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    documents = [part for path in sorted(source.iterdir()) for part in sections(path.read_text(), 20_000)]
    ids = [[*one.ids, EOT] for one in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]
    found: dict[str, tuple[str, dict[str, Any]]] = {"text": (str(source), {})}
    for kind in TOKENS:
        (folder / kind).mkdir()
        write(folder / kind, kind, ids, "uint16")
        options = {"npy": {"pattern": "*.npy"}, "nanogpt": {"format": "tokens"}}.get(kind, {})
        found[kind] = (str(folder / kind), options)
    (folder / "ids").mkdir()
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))})
    with pa.OSFile(str(folder / "ids/a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
    found["arrow, input_ids"] = (str(folder / "ids"), {})
    found["text behind a URL (memory://)"] = (f"memory://{source}", {})
    return found


def measure(place: str, options: dict[str, Any], tokenizer: Path, cache: Path) -> dict[str, float]:
    """Tokenize, and read an epoch. Run in a process of its own."""
    import fsspec

    from pretrain.data.loader import Loader
    from pretrain.data.sources.local import Local
    from pretrain.data.tokenization.tokenize import prepare

    if place.startswith("memory://"):
        files = fsspec.filesystem("memory")
        for path in Path(place.removeprefix("memory://")).iterdir():
            files.pipe_file(str(path), path.read_bytes())
    started_at, before = time.perf_counter(), processor_seconds()
    source = Local(nameOrPath=place, num_workers=1, **options)
    store = prepare(source, tokenizer_json=tokenizer.read_text(), eot=EOT, cache=cache)
    view = store.views(held_out=0.05)[0]
    batches = iter(Loader(view, sequence_length=LENGTH, seed=1, batch_size=BATCH))
    for _ in range(view.num_tokens // LENGTH // BATCH):
        next(batches)
    seconds = {"seconds": time.perf_counter() - started_at, "processor_seconds": processor_seconds() - before}
    return seconds | {"tokens": store.num_tokens, "in_place": sum(part.tokens_at is not None for part in store.parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        place, options, tokenizer, cache = asked.child
        print(json.dumps(measure(place, json.loads(options), Path(tokenizer), Path(cache))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = library_sources()
        tokenizer = train_tokenizer(text, folder)
        corpora = make(folder, text, tokenizer, asked.megabytes)
        runs: dict[str, list[dict[str, float]]] = {corpus: [] for corpus in corpora}
        for turn in range(asked.rounds):
            for number, (corpus, (place, options)) in enumerate(corpora.items()):
                words = [place, json.dumps(options), str(tokenizer), str(folder / f"cache-{turn}-{number}")]
                done = subprocess.run([sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, check=True)
                runs[corpus].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        corpus: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for corpus, found in runs.items()
    }
    print(
        "| corpus | tokens | read in place | seconds | × text | processor seconds | × text |\n|---|---|---|---|---|---|---|"
    )
    first = medians["text"]
    for corpus, found in medians.items():
        ratios = [f"{found[key]:.2f} | {found[key] / first[key]:.2f}" for key in ("seconds", "processor_seconds")]
        print(f"| {corpus} | {found['tokens']:,.0f} | {'yes' if found['in_place'] else 'no'} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
