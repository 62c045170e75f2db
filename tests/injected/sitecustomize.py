"""Makes one call of a run the moment of a fault, so that it is known to hit that very phase. See ``tests.runs.at_call``."""

import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

ORDER = json.loads(os.environ.get("PRETRAIN_FAULT", "null"))
FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill all": lambda: os.killpg(0, signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
}


def arm(module, /, *, function, at, after, rank, paths, fault, mark, **_):
    *owners, name = function.split(".")
    owner = functools.reduce(getattr, owners, module)
    real, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(real)
    def called(*given, **named):
        about = " ".join(str(value) for value in given if isinstance(value, str | os.PathLike))
        due = os.environ.get("RANK", "0") == rank and re.search(paths, about) and next(calls) == at
        if due and not after:
            happen(fault, mark)
        result = real(*given, **named)
        if due and after:
            happen(fault, mark)
        return result

    setattr(owner, name, called)
    if not owners:  # where the process is forked, other modules may have imported the function already
        for other in list(sys.modules.values()):
            for key in [key for key, value in vars(other).items() if value is real]:
                setattr(other, key, called)


def happen(fault, mark):
    """Once: not again in a process that takes the place of this one."""
    if not Path(mark).exists():
        Path(mark).touch()
        FAULTS[fault]()


class Finder:
    """Arms the module as soon as it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != ORDER["module"]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            arm(module, **ORDER)

        spec.loader.exec_module = exec_module
        return spec


if ORDER and ORDER["module"] in sys.modules:
    arm(sys.modules[ORDER["module"]], **ORDER)
elif ORDER:
    sys.meta_path.insert(0, Finder())
