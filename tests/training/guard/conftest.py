"""A corpus with one bad document, and a model that it breaks: exactly one of a run's batches is bad."""

import json
import shutil
from pathlib import Path

import pytest

GARBAGE = "".join(f"{a}~{b}" for a in "QXZJKVYB" for b in "qxzjkvy01234567")[
    :200
]  # no other document has these characters


@pytest.fixture(scope="session")
def bad_corpus(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "garbage.txt").write_text(GARBAGE)
    return folder


@pytest.fixture(scope="session")
def overflowing_model(exact_model, tmp_path_factory):
    """``overflowing_model(dropout)``: a Llama in which the embedding of "~" has overflowed. A batch with it has no finite
    loss, all others have. Dropout in its attention makes a lost random state show."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    def make(dropout: float = 0.0) -> Path:
        folder = tmp_path_factory.mktemp("overflowing") / "model"
        shutil.copytree(exact_model("llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
        weights = load_file(folder / "model.safetensors")
        (token,) = AutoTokenizer.from_pretrained(folder).encode("~", add_special_tokens=False)
        weights["model.embed_tokens.weight"][token] = float("inf")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def steep_model(exact_model, tmp_path_factory) -> Path:
    """A Llama that finds the embedding of "~", whatever its size, by a norm without an epsilon: as small as it is here, the
    loss of a batch with it is finite and its gradient is not."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("steep") / "model"
    shutil.copytree(exact_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.0}))
    weights = load_file(folder / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(folder).encode("~", add_special_tokens=False)
    weights["model.embed_tokens.weight"][token] = 1e-18
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def bad_run(base_arguments, bad_corpus, exact_model):
    """``bad_run(first, last)``: the arguments of a run, and the one step from ``first`` to ``last`` (and the only one up to
    there and five beyond) whose batch has the bad document."""
    import numpy as np

    from pretrain.data.order import Permutation
    from tests.training.test_trainer import view_of

    given = [a for a in base_arguments if not a.startswith("model_name=")]
    given += [f"model_name={exact_model('llama')}", f"dataset.nameOrPath={bad_corpus}", "grad_clip=0.5", "sink=jsonl"]
    view = view_of(given)
    num_blocks = (view.num_tokens - 1) // 32
    numbers = [view.document_ids(32 * block, 32 * block + 33) for block in range(num_blocks)]
    bad = [any(view.store.document(n).path.endswith("garbage.txt") for n in found) for found in numbers]
    assert any(bad), "the bad document must not be among those held out"

    def find(first: int, last: int) -> tuple[list[str], int]:
        for seed in range(10_000):
            order = Permutation(num_blocks, seed)(np.arange(4 * (last + 6)))
            steps = np.flatnonzero(np.array(bad)[order].reshape(-1, 4).any(1)) + 1
            if len(steps) == 1 and first <= steps[0] <= last:
                return [*given, f"seed={seed}"], int(steps[0])
        raise AssertionError("no seed brings the bad document once, and there")

    return find
