from __future__ import annotations

import glob
import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from pretrain.data.prose import docstrings, without_code
from pretrain.data.sources.local import Local
from pretrain.data.sources.sample import English, Python
from pretrain.data.store.token_store import TokenStore, TokenView
from pretrain.data.tokenization.tokenize import prepare

Domain = tuple[TokenStore, TokenView, TokenView]
CONF = Path(__file__).parents[2] / "conf" / "dataset"


@pytest.mark.parametrize("path", glob.glob(str(CONF / "*.yaml")))
def test_every_yaml_names_all_fields_with_their_defaults_and_a_light_target(path: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(path))
    module, _, name = node.pop("_target_").rpartition(".")
    target = getattr(importlib.import_module(module), name)
    assert set(node) == {field.name for field in fields(target)}
    given = {key: "x" if value == "???" else value for key, value in node.items()}
    assert TypeAdapter(target).validate_python(given) == target(**{k: v for k, v in given.items() if v == "x"})
    heavy = f"import sys, {module}; print({{'torch', 'transformers', 'datasets', 'pyarrow'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("books/es.txt", "es"),
        ("books/a.jsonl.gz", "a"),
        ("books", "books"),
        ("books/*.txt", "books"),
        ("books/**/*", "books"),
    ],
)
def test_a_dataset_is_named_after_its_path(path: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    assert Local(nameOrPath=str(tmp_path / path)).domain == name
    assert Local(nameOrPath=str(tmp_path / path), name="mine").domain == "mine"


def test_docstrings_are_found_and_code_is_left_out() -> None:
    long = "Every good boy does fine, and so on, until the line is long enough. " * 6
    source = f'''x = """{long} not a docstring"""
def f():
    r"""{long}

    >>> f()
    'output'

    ```python
    code()
    ```

    The end.
    """
    def g():
        """Short."""
'''
    (found,) = docstrings(source, 10_000)
    assert found.split() == [*long.split(), "The", "end."]
    assert without_code(">>> 1 + 1\n2\n\ntext") == "text"


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> list[Domain]:
    cache = tmp_path_factory.mktemp("cache")
    found = []
    for source in (Python(), English()):
        store = prepare(source, tokenizer_json=tokenizer_json, eot=0, cache=cache)
        found.append((store, *store.views(held_out=source.held_out, deduplicate=source.deduplicate)))
    return found


def hashes(view: TokenView) -> set[int]:
    return {view.store.document(number).hash for number in view.document_ids(0, view.num_tokens).tolist()}


def test_the_sample_domains_are_large_and_share_nothing(domains: list[Domain]) -> None:
    (code, code_train, code_held), (prose, prose_train, prose_held) = domains
    assert code.num_bytes > 5e6
    assert prose.num_bytes > 5e6
    paths = [{path for unit in store._units for path, _ in unit} for store in (code, prose)]
    assert not paths[0] & paths[1]
    views = [hashes(view) for view in (code_train, code_held, prose_train, prose_held)]
    assert min(len(view) for view in views) >= 10
    assert len(set.union(*views)) == sum(len(view) for view in views)


def test_the_sample_domains_are_what_they_are_called(domains: list[Domain], tokenizer: Tokenizer) -> None:
    def share_of_lines(view: TokenView, marks: tuple[str, ...]) -> float:
        lines = tokenizer.decode(view.read(0, view.num_tokens).tolist()).splitlines()
        return float(np.mean([line.lstrip().startswith(marks) for line in lines]))

    marks = ("def ", "return ", "import ", "from ", "if ", "self.", "class ", ">>> ")
    assert share_of_lines(domains[0][2], marks) > 0.15
    assert share_of_lines(domains[1][2], marks) < 0.05
