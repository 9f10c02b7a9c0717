"""Makes forks of a large process cheap.

A fork copies the page table of all private memory that has been written to, and at its end the
child takes its copy apart again: for 60 MB of python objects that takes longer than most programs
run. Memory of a file that is mapped privately, and not written to since, the kernel leaves out: the
child maps what it looks at, as it does. So what this process holds is written to a memory file, and
that is mapped in its place.
"""

import ctypes
import fcntl
import mmap
import os
import re
from collections.abc import Sequence

_MIN_BYTES = 2**17
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(?:\[heap\])?$")
_READ_WRITE, _PRIVATE_FIXED = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | 0x10
_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_libc = ctypes.CDLL(None, use_errno=True)


def move_to_file() -> bool:
    """Moves this process's own large and dense parts of memory to a file that nobody else has.

    For a process of one thread, before it limits the size of its files. What is written from then
    on stays private to this process and each of its copies, as before.

    Returns: whether it did; not where there is no /proc, or the C library lacks makecontext(3).

    Raises:
      OSError: there is not enough memory to have it twice for a moment.
    """
    regions = _regions()
    if not regions or not hasattr(_libc, "makecontext"):
        return False
    fd = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, sum(size for _, size in regions))
        calls: list[tuple] = []
        done = 0
        for start, size in regions:
            calls.append((_libc.pwrite, fd, start, size, done))
            calls.append((_libc.mmap, start, size, _READ_WRITE, _PRIVATE_FIXED, fd, done))
            done += size
        _call_in_a_row(calls)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALED)
    finally:
        os.close(fd)
    return True


def _regions() -> list[tuple[int, int]]:
    """Address and size of each part that is worth it: most of it has been written to."""
    found = []
    region = None
    try:
        with open("/proc/self/smaps") as file:
            for line in file:
                if line[0] in "0123456789abcdef":
                    region = _REGION.match(line.rstrip())
                elif region and line.startswith("Anonymous:"):
                    start, end = (int(number, 16) for number in region.groups())
                    size = end - start
                    if size >= _MIN_BYTES and 2 * 1024 * int(line.split()[1]) >= size:
                        found.append((start, size))
    except OSError:
        return []
    return found


# More than struct ucontext takes on any machine: 968 bytes on x86_64, 4560 on aarch64.
_CONTEXT_BYTES = 2**13
_STACK_BYTES = 2**14


def _call_in_a_row(calls: Sequence[tuple]) -> None:
    """Calls functions of the C library without the interpreter running, and so writing to its
    memory, between the first and the last. Args: of each call, the function and its arguments.

    Each is a context (makecontext(3)) that goes on with the next as it returns. Their results are
    not to be had.
    """
    each = _CONTEXT_BYTES + _STACK_BYTES
    place = mmap.mmap(-1, each * len(calls) + _CONTEXT_BYTES)
    start = ctypes.addressof(ctypes.c_char.from_buffer(place))
    contexts = [start + i * each for i in range(len(calls) + 1)]  # the last: of this function
    for context, following, (function, *args) in zip(contexts, contexts[1:], calls, strict=False):
        _libc.getcontext(ctypes.c_void_p(context))
        # uc_flags, uc_link, uc_stack: where it is, flags, its size.
        fields = (ctypes.c_size_t * 5).from_address(context)
        fields[1:] = following, context + _CONTEXT_BYTES, 0, _STACK_BYTES
        longs = [ctypes.c_size_t(arg) for arg in args]
        _libc.makecontext(ctypes.c_void_p(context), function, len(longs), *longs)
    _libc.swapcontext(ctypes.c_void_p(contexts[-1]), ctypes.c_void_p(contexts[0]))
