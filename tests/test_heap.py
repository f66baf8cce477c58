"""The memory of a replica's own objects."""

from __future__ import annotations

import subprocess
import sys

_CHILD = """
import gc, re
from pathlib import Path
from millpond.deployments.heap import keep_what_is_there

def of_memory(name):
    return int(re.search(rf"^{name}: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1]) // 1024

held = [f"object {n}" * 4 for n in range(400_000)]
seen, before = hash(tuple(held)), of_memory("Rss")
keep_what_is_there()
assert hash(tuple(held)) == seen
assert gc.get_freeze_count() > 1_000
print(before, of_memory("Rss"), of_memory("AnonHugePages"))
"""


def test_huge_pages_keep_the_objects_and_take_no_more_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    before, after, huge = map(int, done.stdout.split())
    assert before > 64
    # Whether the kernel has them is its business; what it fills up for them is a quarter at most.
    assert after - before <= huge / 3 + 4
