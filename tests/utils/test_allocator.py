"""Memory that is freed stays with the process, in every thread."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
from vlm_safeguard.utils.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def count():
    import numpy
    for n in range(20):
        if n == 5:
            found.append(-resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        numpy.empty(100 << 20, numpy.uint8)[:] = 1
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
found = []
thread = threading.Thread(target=count)
thread.start()
thread.join()
print(sum(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_buffers_are_faulted_in_once() -> None:
    bare = {"PATH": "", "HOME": "/"}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], env=bare))
        for how in ("kept", "given back")
    )
    assert 5 * kept < given_back
