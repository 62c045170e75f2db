"""Every command in the README and in docs/ runs, made small, in a folder with the files it names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import zstandard

from pretrain.telemetry.run_file import read_run_file
from tests.conftest import sentences
from tests.preloaded import run_preloaded

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SLOW = "slurm search mixtures transforms means strategies sinks".split()  # the README has a command of each kind
# beginnings of words of commands that have tests of their own
LEVERS = ("transform=", "objective=", "optimizer=muon", "stop_when.", "merge.curve", "task=merge")


def commands():
    """Each once, however many pages have it."""
    met = set()
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.splitlines() if language in ("", "bash") else ():
                if (
                    line.startswith(("python -m pretrain ", "torchrun --nproc_per_node"))
                    or line == "python -m pretrain"
                ):
                    words = shlex.split(line, comments=True)
                    words = words[3:] if words[0] == "python" else words
                    if tuple(words) in met:
                        continue
                    met.add(tuple(words))
                    is_slow = page.stem in SLOW or any(word.startswith(LEVERS) for word in words)
                    slow = pytest.mark.slow if is_slow else ()
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:120], marks=slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, corpus):
    """A checkpoint of a run that the pages speak of as if it had been made."""
    run = tmp_path_factory.mktemp("poems")
    arguments = [f"model_name={tiny_model}", "dataset=local", f"dataset.nameOrPath={corpus}", f"output_dir={run}"]
    small = ["sequence_length=32", "batch_size=2", "max_steps=200", "evaluation=new_only", "checkpoint.export=never"]
    small += ["evaluate_every=null", "save_every=null", "log_every=200"]
    run_preloaded(["-m", "pretrain", *arguments, *small, "sink=jsonl"]).check_returncode()
    return run / "checkpoints/step-00000200"


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus, other_corpus, tiny_model, checkpoint):
    """What the commands name."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(corpus, folder / "books")
    shutil.copytree(other_corpus, folder / "old")
    shutil.copytree(tiny_model, folder / "path/to/model")
    lines = "".join(json.dumps({"content": sentences(i, 30)}) + "\n" for i in range(40))
    (folder / "corpus").mkdir()
    (folder / "corpus/a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "src").mkdir()
    shutil.copy(ROOT / "pretrain/training/trainer.py", folder / "src")
    shutil.copy(ROOT / "pretrain/run/build.py", folder / "src")
    Dataset.from_dict({"text": [sentences(i, 30) for i in range(40)]}).save_to_disk(folder / "saved")
    rows = [{"text": sentences(i, 30), "lang": "es" if i % 4 else "en", "score": 0.9} for i in range(40)]
    (folder / "web").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "web/a.parquet")
    (folder / "tokens").mkdir()
    (folder / "tokens/a.ds").write_bytes(bytes([7, 0, 8, 0, 9, 0]) * 400)
    (folder / "tokens/a.ds.index").write_bytes(b"".join((3 * end).to_bytes(8, "little") for end in range(1, 401)))
    (folder / "nano").mkdir()
    (folder / "nano/train.bin").write_bytes(bytes([7, 0, 8, 0, 9, 0]) * 400)
    (folder / "papers.jsonl").write_text(
        "".join(json.dumps({"title": f"Paper {i}", "abstract": sentences(i, 9)}) + "\n" for i in range(9))
    )
    (folder / "notes").mkdir()
    (folder / "notes/a.md").write_text(sentences(7, 30))
    (folder / "extra.jsonl").write_text(json.dumps({"text": sentences(8, 30)}))
    shutil.copytree(checkpoint, folder / "outputs/poems/checkpoints/step-00000200")
    (folder / "run.yaml").write_text(
        "output_dir: outputs/flat\ndataset: {source: local, nameOrPath: books/}\nlr_scheduler: cosine\n"
    )
    return folder


def small_settings(words: list[str], tiny_model: Path) -> list[str]:
    """Return what makes a command of the pages a run of seconds."""
    small = ["max_steps=2", "sequence_length=32", "evaluation.max_tokens=200", "evaluation.sample_tokens=4"]
    if not any(w.startswith("batch_size=") for w in words):
        small.append("batch_size=2")
    if not any(w.startswith(("model_name=", "model=")) for w in words):
        small.append(f"model_name={tiny_model}")
    if not any(w.startswith(("evaluation", "dataset@evaluation")) for w in words) and words != [
        "-m",
        "lr=1e-4,3e-4",
    ]:  # the default's base domain is large
        small += ["dataset@evaluation.domains.base=local", "evaluation.domains.base.nameOrPath=old"]
    if words and not any(w.startswith(("sink", "+sink", "task=", "experiment=")) for w in words):
        small.append("sink=[console,jsonl]")  # the page of the default run is enough
    if "task=generation" in words:
        return ["sequence_length=32", "generation.max_new_tokens=4"]
    return small


@pytest.mark.parametrize("words", commands())
def test_command(words, place, command, spawn, monkeypatch, tiny_model, tmp_path):
    monkeypatch.chdir(place)
    if "--help" in words or "--cfg" in words:
        assert command(words)[0] == 0
        return
    if any(w.startswith("launch.nodes=") for w in words):  # tests/launch/test_nodes.py has the nodes
        words = [w.replace("/shared/books", "books").replace("/shared/", "") for w in words if "launch." not in w]
    small = small_settings(words, tiny_model)
    if any(
        "owner/name" in w or "://" in w for w in words
    ):  # the network is out of reach here: all but reading it is checked
        code, _, err = command([*words, *small])
        assert code == 2
        assert any(name in err for name in ("owner/name", "s3://bucket", "package gcsfs", "https://host/a.parquet")), (
            err
        )
        return
    if "hydra/launcher=slurm" in words:  # in processes of this machine
        small += ["hydra.launcher.cluster=local", "hydra.launcher.nodes=1", "hydra.launcher.gpus_per_node=0"]
    if "hydra/sweeper=optuna" in words:
        small.append("hydra.sweeper.n_trials=2")
    if words[0] == "torchrun":
        done = run_preloaded(["-m", "torch.distributed.run", *words[1:], *small])
        assert done.returncode == 0, done.stderr
        return
    if "task=advise" in words:  # tests/advise/test_advise_run.py makes the probes
        small += ["advise.steps=[look]", "advise.budget=50"]
    if "-m" in words or any(w.startswith(("hydra/launcher=", "hydra/sweeper=")) for w in words):
        process = spawn([*words, *small])
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return
    if not any(w.startswith(("dataset", "name=", "output_dir=", "resume", "task=")) for w in words):
        small.append(f"output_dir={tmp_path}")  # out of the way of others on the same text
    if any(w.startswith("number_epochs=") for w in words):
        small[0] = "max_steps=3"  # the longer run of the recipe
    code, out, err = command([*words, *small])
    assert code == 0, err
    named = re.search(r"records +(\S+)/metrics.jsonl", out)
    if named and "task=evaluation" not in words:
        assert read_run_file(Path(named[1]))["status"] == "finished"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(to), f"{page.name}: {target}#{anchor}"


def test_the_parameter_groups_of_the_page():
    """They hold each parameter once, with the rates and the schedule that the page says."""
    from torch.optim import AdamW

    from tests.models.tiny import tiny

    page = (ROOT / "docs/optimizers.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def groups(" in block)
    names: dict = {}
    exec(code, names)
    model = tiny("llama")
    rest, embeddings = AdamW(names["groups"](model.named_parameters())).param_groups
    assert (rest["lr"], embeddings["lr"]) == (1e-2, 1e-3)
    assert embeddings["schedule"](99, total_steps=100, warmup_steps=0) == pytest.approx(0.1)
    assert len(embeddings["params"]) == 1
    assert len(rest["params"]) == len(list(model.parameters())) - 1
