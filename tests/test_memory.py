"""A process whose memory has been moved to a file is the same process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# 40 MB of objects of all sizes: a digest of them before and after.
MOVED = """
import gc, hashlib, os, pickle, re
from cir_jax.sandbox import memory

objects = [{i: (str(i), [i] * (i % 50), bytes(i % 3000))} for i in range(20_000)]
digest = lambda: hashlib.sha256(pickle.dumps(objects)).hexdigest()

def count():
    # MB that a fork copies the page table of, and of the file.
    kinds = {"private": 0, "file": 0}
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-", line):
            is_file = "/memfd:memory" in line
        elif line.startswith("Anonymous:"):
            kinds["private"] += int(line.split()[1]) / 1024
        elif is_file and line.startswith("Size:"):
            kinds["file"] += int(line.split()[1]) / 1024
    return kinds

gc.freeze()
before, want = count(), digest()
assert before["private"] > 40 and before["file"] == 0, before
fds = os.listdir("/proc/self/fd")
assert memory.move_to_file()
after = count()
assert after["file"] > 40 and after["private"] < 10, after
assert os.listdir("/proc/self/fd") == fds
assert digest() == want
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    for thing in objects:
        thing.clear()
    os.write(writer, b"x" * (objects[7] == {}))
    os._exit(0)
assert os.read(reader, 1) == b"x"
assert os.waitpid(pid, 0)[1] == 0
assert digest() == want  # what a child writes is its own
objects += [bytearray(10**6) for _ in range(50)]
del objects[:10_000]
gc.collect()
assert not any(map(any, objects[-50:]))  # new memory is empty
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_moved_process_is_the_same():
    run(MOVED)


def test_without_what_it_takes_nothing_is_moved():
    run(
        "import types\nfrom cir_jax.sandbox import memory\n"
        "x = [str(i) for i in range(100_000)]\n"
        "memory._libc = types.SimpleNamespace()\nassert not memory.move_to_file()\n"
    )
