"""From where the processes that a run starts import their modules."""

import os
import subprocess
import sys

import pytest

from pretrain.runtime.python import module_command


@pytest.mark.parametrize("as_module", [False, True])
def test_the_current_folder_is_imported_from_only_where_this_process_does(as_module, tmp_path, monkeypatch):
    """The command ``pretrain`` imports nothing of the folder in which it is typed; no more do the processes that it starts."""
    theirs, installed = tmp_path / "theirs", tmp_path / "installed"
    for folder, name, text in ((theirs, "yaml", "print('theirs')"), (installed, "started", "import yaml")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(theirs)
    monkeypatch.setattr(sys, "path", [*([os.getcwd()] if as_module else []), str(installed)])
    command = module_command("started")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == ("theirs\n" if as_module else "")
