"""Linux system calls that the standard library lacks, by ctypes."""

import ctypes
import os
import resource
import signal
import struct

from cir_jax.prctl import (
    CAPBSET_DROP,
    SET_DUMPABLE,
    SET_KEEPCAPS,
    SET_NO_NEW_PRIVS,
    SET_SECCOMP,
    prctl,
)

CLONE_NEWTIME = 0x80
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_THREAD = 0x10000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_SECCOMP_MODE_FILTER = 2
_ADDR_NO_RANDOMIZE = 0x0040000
_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITIES_OF_ITSELF = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
NO_CAPABILITIES = bytes(24)
# Effective, permitted and inheritable ones, the lower 32 of each first.
READ_SEARCH = struct.pack("6I", 1 << 2, 1 << 2, 0, 0, 0, 0)
"""Capabilities: CAP_DAC_READ_SEARCH alone, to read files and enter folders that are closed."""

# Numbers of calls without a wrapper in older C libraries; they are the same on all architectures.
_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_capset = _libc.capset  # looked up here, and not in each program's process
_python = ctypes.PyDLL(None, use_errno=True)  # its calls keep the interpreter's lock


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *args) -> int:
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_libc.syscall(ctypes.c_long(number), *longs), what)


def fork() -> int:
    """Like os.fork, without what python does around it, for a process of one thread.

    Those hooks renew locks that nobody holds and the seeds of random numbers, and touch so much
    memory that a child costs a fifth more. The child is the same interpreter with another number.
    """
    return _check(_python.fork(), "fork")


def set_hostname(name: str) -> None:
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


class End:
    """How a process ended, as the kernel reports it, and what all waited for so far have used."""

    # The wait status, then struct rusage, whose first fields are user and system time, each in
    # whole seconds and microseconds.
    _FIELDS = struct.Struct("i4x4q")
    NUM_BYTES = 8 + 144

    def __init__(self):
        self.memory = bytearray(self.NUM_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._status, self._usage = ctypes.c_void_p(address), ctypes.c_void_p(address + 8)

    def wait(self, pid: int) -> None:
        """Waits for a child. Leaves the memory that objects are made in exactly as it was."""
        # With two pointers in one call, ctypes would make and free two objects in the same order:
        # the next call would find their places exchanged.
        _check(_libc.waitpid(pid, self._status, 0), "waitpid")
        _check(_libc.getrusage(resource.RUSAGE_CHILDREN, self._usage), "getrusage")

    @classmethod
    def parse(cls, memory: bytes) -> tuple[int, float]:
        """The wait status, and seconds of processor time of all children so far and of theirs."""
        status, *times = cls._FIELDS.unpack_from(memory)
        return status, times[0] + times[2] + (times[1] + times[3]) / 1e6


def kill_all() -> None:
    """Ends all other processes of the caller's namespace, whose first it is, and waits for them.

    Makes no object that outlives the call.
    """
    while True:
        _libc.kill(-1, signal.SIGKILL)
        if _libc.waitpid(-1, None, 0) < 0:
            return  # there is none left


class Mount:
    """A mount, ready to be made."""

    def __init__(self, source: str, target: str, kind: str | None, flags: int, data: str = ""):
        texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
        self._args = (*texts, ctypes.c_ulong(flags), data.encode() or None)
        self._what = f"mount {kind or 'bind'} on {target}"

    def make(self) -> None:
        _check(_libc.mount(*self._args), self._what)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    Mount(source, target, kind, flags, data).make()


def make_read_only(path: str, *, recursive: bool = True, devices: bool = False) -> None:
    """Read-only, no set-user-id and (unless `devices`) no devices, for the mounts at `path`."""
    attributes = _ATTR_RDONLY | _ATTR_NOSUID | (0 if devices else _ATTR_NODEV)
    data = struct.pack("4Q", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    what = f"mount_setattr of {path}"
    _syscall(what, _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, data, len(data))


def enter_root(path: str) -> None:
    """Makes the mount at `path` the root and lets go of the old one."""
    os.chdir(path)
    _syscall("pivot_root", _SYS_PIVOT_ROOT[os.uname().machine], b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may trace this one and read its /proc entries."""
    prctl("PR_SET_DUMPABLE", SET_DUMPABLE, int(dumpable))


def set_no_new_privileges() -> None:
    prctl("PR_SET_NO_NEW_PRIVS", SET_NO_NEW_PRIVS, 1)


class Filter:
    """A seccomp filter, ready to be installed."""

    def __init__(self, instructions: bytes):
        self._code = ctypes.create_string_buffer(instructions, len(instructions))
        address = ctypes.addressof(self._code)
        self._program = struct.pack("HxxxxxxP", len(instructions) // 8, address)

    def install(self) -> None:
        """For good; the process must have no_new_privileges."""
        prctl("PR_SET_SECCOMP", SET_SECCOMP, _SECCOMP_MODE_FILTER, self._program)


def set_capabilities(kept: bytes = NO_CAPABILITIES) -> None:
    """Drops all capabilities of the calling thread but those that are kept."""
    _check(_capset(_CAPABILITIES_OF_ITSELF, kept), "capset")


def become_with(user: int, kept: bytes) -> None:
    """As root: becomes a user who has these capabilities."""
    prctl("PR_SET_KEEPCAPS", SET_KEEPCAPS, 1)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    set_capabilities(kept)


def drop_bounding_set() -> None:
    """No program started from here can gain a capability; needs CAP_SETPCAP.

    Those that this process has it keeps.
    """
    for capability in range(64):
        try:
            prctl("PR_CAPBSET_DROP", CAPBSET_DROP, capability)
        except OSError:
            return  # past the last one


def fix_addresses() -> bool:
    """Turns address randomisation off for what is started by exec from here on, if allowed."""
    current = _libc.personality(ctypes.c_ulong(0xFFFFFFFF))
    if current < 0 or current & _ADDR_NO_RANDOMIZE:
        return False
    return _libc.personality(ctypes.c_ulong(current | _ADDR_NO_RANDOMIZE)) >= 0


def set_command_line(text: str) -> None:
    """What /proc and ps show as this process's command line, cut to the length of the present one.

    It lies in the process's memory, from an address on that the kernel tells.
    """
    try:
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        start, end = (int(field) for field in fields[45:47])  # the 48th and 49th of all
    except (OSError, ValueError):
        return  # no /proc: then it is not to be seen either
    if 0 < start < end:
        new = os.fsencode(text)[: end - start - 1].ljust(end - start, b"\0")
        ctypes.memmove(start, new, end - start)


def landlock_version() -> int:
    """Version of Landlock's interface; 0: the kernel has none."""
    try:
        return _syscall("landlock", _SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def landlock_restrict(attributes: bytes, rules: list[tuple[int, int]]) -> None:
    """Restricts this process for good.

    Args:
      attributes: struct landlock_ruleset_attr, or its beginning.
      rules: (access bits, descriptor) of each path under which these accesses stay allowed.
    """
    size = len(attributes)
    ruleset = _syscall("landlock ruleset", _SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        for access, fd in rules:
            rule = struct.pack("=Qi", access, fd)
            _syscall("landlock rule", _SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        _syscall("landlock restrict", _SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
