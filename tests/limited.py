"""``python tests/limited.py MIB <arguments>``: the command line with so much address space beyond the libraries'.

Beyond it torch's allocator is refused, as on a machine that has no more: nothing is pretended.
"""

import re
import resource
import sys
from pathlib import Path

import transformers.models.auto.modeling_auto  # noqa: F401

from pretrain.cli import program

if __name__ == "__main__":
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(size[1]) * 1024 + int(sys.argv.pop(1)) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    program()
