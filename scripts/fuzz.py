"""Random edits of every kind of input, thousands an hour: each must end in the same result, the checkpoint before, or exit code 2
with one line that names what it is about; never in a traceback, a hang, or another result.

    python scripts/fuzz.py --minutes 60 [--seed 0] [--kind data --kind models ...] [--findings DIR]
    python scripts/fuzz.py --seed 0 --input 1234          # that one input again

Kinds: data (files of every format and compression), models (folders), tokenizers, checkpoints, configs (flat YAML,
--config-dir, command lines), runs (what else lies in output_dir, and the token cache), corpora (token ids of other programs),
mixtures (weights, phases, replay, conditions, templates, lists of places). An input is an unedited one that works
with one to three edits: bits, bytes and pieces of files, values inside JSON, YAML, safetensors headers and compressed files,
files that are gone, exchanged, folders or links. It is run in a fork of this process, which has imported torch, with limits of
memory and time; every 40th by the real command. Everything follows from the seed: kind, variant and edits of input number N.

same: the result of the unedited input · valid: another input that is as good, with the result that other code than the
project's works out (by kind: see scripts/fuzzing) · before: the checkpoint before was used · refused: exit code 2 with one line ·
tracebacks, hangs, other: findings. Each is written to --findings once, with as few edits as still find it: the edited files,
command.sh, and what.txt. Ctrl-C and SIGTERM end it early, with the figures so far.

Exit code 0: nothing found; 1: something.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}

from fuzzing.campaign import Campaign
from fuzzing.checkpoints import Checkpoints, Runs
from fuzzing.configs import Configs
from fuzzing.corpora import Corpora
from fuzzing.data import Data
from fuzzing.kind import Kind, ask
from fuzzing.mixtures import Mixtures
from fuzzing.models import Models
from fuzzing.sample import make_model
from fuzzing.sandbox import warm_up
from fuzzing.tokenizers import Tokenizers
from fuzzing.values import Values

CLASSES = (Data, Models, Tokenizers, Checkpoints, Configs, Runs, Corpora, Mixtures)
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in CLASSES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="again for each; default: all")
    parser.add_argument("--inputs", type=int, help="so many at most")
    parser.add_argument("--input", type=int, help="this one alone (with the same --seed and --kind)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--verbose", action="store_true", help="say of every input what came of it")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began_at = time.monotonic()
    warm_up()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary)
        ask(folder, lambda: make_model(folder / "model"))
        values = Values(given.seed)
        kinds = [KINDS[name](folder, folder / "model", values) for name in given.kind or KINDS]
        campaign = Campaign(kinds, given.seed, folder, given.findings.resolve(), given.verbose)
        one = {"first": given.input, "inputs": 1} if given.input is not None else {"inputs": given.inputs}
        try:
            campaign.run(seconds=given.minutes * 60, **one)
        except KeyboardInterrupt:
            print("stopped; the figures so far:")
    minutes = (time.monotonic() - began_at) / 60
    print(
        f"\n{campaign.table()}\n\nseed {given.seed}, {minutes:.1f} minutes, {campaign.total / minutes * 60:,.0f} inputs an hour"
    )
    for (kind, key), numbers in campaign.found.items():
        print(f"{len(numbers)} × {kind}: {key} (inputs {', '.join(map(str, numbers[:5]))})")
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
