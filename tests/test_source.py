"""Our own source runs nothing of what it reads: no call of it unpickles or evaluates."""

import ast
from pathlib import Path

import pytest

import pretrain

UNPICKLING = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
LOADERS = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "os.system"}


def dangers(source: str) -> list[str]:
    """Calls and imports that run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [name for name in names if name.split(".")[0] in UNPICKLING]
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            weights = name == "torch.load" and given.get("weights_only") == "True"
            if (name in {"eval", "exec"} | LOADERS and not weights) or "True" in (
                given.get("allow_pickle"),
                given.get("shell"),
            ):
                found.append(ast.unparse(node))
    return found


def test_nothing_that_runs_what_it_reads():
    package = Path(pretrain.__file__).parent
    found = {str(file.relative_to(package)): dangers(file.read_text()) for file in package.rglob("*.py")}
    restricted = {
        "launch/rendezvous_pickle.py": ["pickle"]
    }  # its Unpickler finds a few classes alone: tests/launch/test_sockets.py
    assert {file: calls for file, calls in found.items() if calls} == restricted


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from dill import loads",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "eval(text)",
        ),
        *("np.load(f)", "yaml.load(f)", "read(f, allow_pickle=True)", "run('ls', shell=True)", "os.system('ls')"),
    ],
)
def test_dangers_are_seen(line):
    assert dangers(line)


def test_no_false_alarm():
    assert dangers("model.eval()\ntorch.load(f, weights_only=True)\nast.literal_eval(t)\nyaml.safe_load(t)") == []


def modules_started(source: str) -> list[str]:
    """Commands that begin with `sys.executable`, ..., "-m": without -P Python imports from the current folder first."""
    sequences = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.List | ast.Tuple)]
    return [s for s in map(ast.unparse, sequences) if "sys.executable" in s and "'-m'" in s]


def test_modules_are_started_by_module_command_alone():
    package = Path(pretrain.__file__).parent
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if modules_started(file.read_text())}
    assert found == {"runtime/python.py"}
    assert modules_started('run([sys.executable, "-I", "-m", "pretrain"])')


def test_what_the_quick_tests_leave_out_is_there():
    """A file under another name would be among them again."""
    from tests.conftest import NOT_QUICK

    folder = Path(__file__).parent
    assert NOT_QUICK - {path.name for path in folder.rglob("*")} == {folder.name}
