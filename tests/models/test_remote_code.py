"""Code in a model's folder runs only if the command line trusts it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_cli import assert_mistake
from tests.foreign import MARK


def with_code(tiny_model: Path, folder: Path, mark: Path, **config: str) -> Path:
    """A model folder that brings code for its config and its tokenizer."""
    shutil.copytree(tiny_model, folder)
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Theirs: pass\n")
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.Theirs")}
    tokenizer = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    for name, more in (("config.json", code | config), ("tokenizer_config.json", tokenizer)):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


def test_code_in_a_model_folder_does_not_run(command, base_arguments, tiny_model, tmp_path, monkeypatch):
    """Refused where the model can't be had without it; where transformers knows the model, passed over."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, run = tmp_path / MARK, [*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=2"]
    folder = with_code(tiny_model, tmp_path / "needed", mark, model_type="theirs")
    assert_mistake(command([*run, f"model_name={folder}"]), "if you trust its author: model.trust_remote_code=true")
    assert not mark.exists()
    folder = with_code(tiny_model, tmp_path / "superfluous", mark)
    assert command([*run, f"model_name={folder}"])[0] == 0
    assert not mark.exists()


def test_code_in_a_trusted_model_folder_runs(tiny_model, tmp_path):
    """What the test above looks for would have happened."""
    from pretrain.models.causal_lm import Pretrained

    mark = tmp_path / MARK
    folder = with_code(tiny_model, tmp_path / "needed", mark, model_type="theirs")
    with pytest.raises(Exception):  # noqa: B017, PT011 (the class is no config)
        Pretrained(name_or_path=str(folder), trust_remote_code=True).hf_config()
    assert mark.exists()
