"""Whether the memory of `task=tokenization` depends on the size of the corpus: the peak of the whole command with generated text.

    python scripts/bench_tokenizing_memory.py [--megabytes 400 4000] [--folder FOLDER] [--workers 1]

The text is random words in files of 100 MB, the tokenizer has one token for each word, and the cache is empty. The text and the
tokens of one size are on the disk at a time, about 1.6 times its bytes. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS = [f"{a}{b}{c}" for a in ("st", "pl", "k", "m", "tr", "s", "v") for b in "aeiou" for c in ("n", "lto", "rs", "")]
FILE_BYTES = 100_000_000
DOCUMENT_WORDS = 300


def write_text(folder: Path, megabytes: int) -> None:
    """Write files of different documents, in jsonl and in plain text in turn."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    words = np.array(WORDS)
    for number in range(-(-megabytes * 1_000_000 // FILE_BYTES)):
        size = min(FILE_BYTES, megabytes * 1_000_000 - number * FILE_BYTES)
        is_json = number % 2 == 0
        with open(folder / f"{number:04}.{'jsonl' if is_json else 'txt'}", "w") as file:
            while file.tell() < size:
                text = " ".join(words[draw.integers(len(words), size=DOCUMENT_WORDS)])
                file.write(f'{{"text": "{text}"}}\n' if is_json else f"{text}\n\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def tokenized(folder: Path, megabytes: int, workers: int) -> tuple[float, float, float]:
    """Return the peak of the command and that of the largest of its processes in MiB, and its processor time in seconds."""
    text, cache = folder / "text", folder / "cache"
    write_text(text, megabytes)
    command = [sys.executable, "-m", "pretrain", "task=tokenization", "dataset=local", f"dataset.nameOrPath={text}"]
    command += ["model=scratch", f"model.tokenizer_name={folder / 'tokenizer'}", "evaluation=new_only"]
    command += [f"dataset.num_workers={workers}", f"output_dir={folder / 'run'}"]
    process = subprocess.Popen(command, env=os.environ | {"PRETRAIN_CACHE": str(cache)}, cwd=folder)
    largest = 0.0
    while process.poll() is None:
        time.sleep(0.5)
        largest = max([largest, *map(peak_of, children(process.pid))])
        if (own := peak_of(process.pid)) > 0:
            last = own
    if process.returncode:
        raise SystemExit("the command failed")
    times = os.times()
    shutil.rmtree(text)
    shutil.rmtree(cache)
    return last, largest, times.children_user + times.children_system


def children(pid: int) -> list[int]:
    """Return the children of a process; of a process that has ended none."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak_of(pid: int) -> float:
    """Return the largest resident memory of a process so far in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[400, 4000])
    parser.add_argument("--folder", type=Path, help="where the text and the cache are written; by default TMPDIR")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    print("| MB of text | peak MiB | of the largest worker | × the first | processor seconds |\n|---|---|---|---|---|")
    first, spent = 0.0, 0.0
    for megabytes in asked.megabytes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as name:
            write_tokenizer(Path(name) / "tokenizer")
            peak, worker, total = tokenized(Path(name), megabytes, asked.workers)
        first = first or peak + worker
        print(
            f"| {megabytes:,} | {peak:.0f} | {worker:.0f} | {(peak + worker) / first:.2f} | {total - spent:.0f} |",
            flush=True,
        )
        spent = total


if __name__ == "__main__":
    main()
