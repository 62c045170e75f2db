"""``python tests/limited.py MIB <arguments>``: the command line with so much address space beyond the libraries'.

Beyond it torch's allocator is refused, as on a machine that has no more: nothing is pretended.
"""

import resource
import sys
from pathlib import Path

import transformers.models.auto.modeling_auto  # noqa: F401

from pretrain.cli.main import program
from pretrain.runtime.memory import read_kib

if __name__ == "__main__":
    limit = read_kib(Path("/proc/self/status"), "VmSize") + int(sys.argv.pop(1)) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    program()
