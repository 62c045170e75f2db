"""DeepSpeed as it is installed: nothing is compiled for it, and what it refuses is a mistake, not a crash."""

import os
import shutil

import pytest


@pytest.fixture
def run(base_arguments, spawn, tmp_path):
    def start(*more, **environment):
        given = [*base_arguments, f"output_dir={tmp_path / 'run'}", "strategy=deepspeed", "max_steps=1", *more]
        process = spawn(given, env=os.environ | environment)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["strategy.zero_stage=0"],
        ["strategy.zero_stage=1"],
        ["strategy.zero_stage=2", "strategy.offload_optimizer=true"],
        ["strategy.zero_stage=3", "strategy.offload_optimizer=true", "strategy.offload_parameters=true"],
    ],
    ids=" ".join,
)
def test_no_compiler_is_needed(more, run, tmp_path):
    programs, extensions = tmp_path / "programs", tmp_path / "extensions"
    programs.mkdir()
    extensions.mkdir()
    assert shutil.which("c++", path=str(programs)) is None
    code, said = run(*more, "devices=2", PATH=str(programs), TORCH_EXTENSIONS_DIR=str(extensions))
    assert code == 0, said
    assert not list(extensions.iterdir())


@pytest.mark.slow
def test_a_config_that_deepspeed_refuses(run):
    code, said = run("strategy.config.data_types.keep_in_fp32_modules=5", "devices=2")
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == [
        'error: strategy.config: DeepSpeed rejects it: data_types.keep_in_fp32_modules must be "auto" or a list of name '
        "patterns, got 5"
    ]
