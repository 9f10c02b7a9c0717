"""prctl(2), by ctypes: what a process asks the kernel to do with itself."""

import ctypes
import os
import signal

SET_PDEATHSIG, SET_DUMPABLE, SET_KEEPCAPS, SET_SECCOMP = 1, 4, 8, 22
CAPBSET_DROP, SET_NO_NEW_PRIVS = 24, 38

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(what: str, option: int, *args: int | bytes) -> None:
    """Args: what: for the message of the OSError that a refusal raises."""
    padded = (*args, 0, 0, 0, 0)[:4]
    values = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in padded]
    if _libc.prctl(option, *values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """Asks the kernel to SIGKILL this process when the thread that started it ends."""
    prctl("PR_SET_PDEATHSIG", SET_PDEATHSIG, signal.SIGKILL)
