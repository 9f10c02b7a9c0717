"""How a worker shuts itself away from the machine, and each program away from the worker.

Three rungs, the first being the strongest:

- `namespaces`: the worker is in namespaces of its own (namespaces.py); each program is the first
  process of a process namespace of its own, with a mount of /tmp of its own.
- `namespaces-flat`: the worker is, the programs are not: between two of them the worker kills
  what is left and empties /tmp, or is replaced if that takes long.
- `landlock`: no namespaces (landlock.py).

In all of them a program has no capability, resource limits and a filter of system calls, and gives
way to the trainer where both want a core.
"""

import _signal
import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Literal, NoReturn

from cir_jax.prctl import die_with_parent
from cir_jax.sandbox import landlock, linux, namespaces, runtime, seccomp
from cir_jax.sandbox.limits import Limits

Rung = Literal["namespaces", "namespaces-flat", "landlock"]

_SIGNALS: dict[str, seccomp.Signals] = {
    "namespaces": "first_process",
    "namespaces-flat": "namespace",
    "landlock": "own",
}
# What ends a process by default and does not stand for a fault of its own (for those, the filter
# ends it).
_ENDING_SIGNALS = ("HUP", "QUIT", "USR1", "USR2", "ALRM", "TERM", "STKFLT", "XCPU", "VTALRM")
_ENDING_SIGNALS += ("PROF", "IO", "PWR")
_SIGINT = int(signal.SIGINT)
_WIPE_S = 0.2
# The kernel gives a program a third of what it gives a thread of the trainer's that wants the same
# core (weights of 335 and 1024). Much less, and time limits would strike where the trainer computes
# on the CPU.
NICENESS = 5
# Of a file: the number that the next process of this one's namespace gets is one higher.
_LAST_PID = "/proc/sys/kernel/ns_last_pid"
_PROGRAMS_PID = b"100"

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p


class Isolation:
    """A rung, inside: of the process that is copied for each program; made by `enter`."""

    def __init__(self, rung: Rung, limits: Limits, last_pid: int, capabilities: bytes):
        """See `enter`.

        Args:
          last_pid: descriptor of _LAST_PID, or -1.
          capabilities: what programs keep of this process's.
        """
        self.rung = rung
        self._limits = limits
        self._last_pid = last_pid
        self._capabilities = capabilities
        if rung == "namespaces":
            self._own = os.pidfd_open(os.getpid())
        # What a program's process can inherit is done here, once: each page of memory that it
        # writes to has to be copied first.
        if rung == "namespaces":
            _die_of_signals(restore_in_children=limits.allow_processes)
        # A program that shares its worker's namespace can send it signals. Only this one has a
        # handler, so that the kernel would deliver it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Without namespaces the program's own number is part of the filter.
        self._filter = None if rung == "landlock" else self._make_filter(0)
        self._scratch = namespaces.scratch(limits)
        linux.set_no_new_privileges()

    def _make_filter(self, pid: int) -> linux.Filter:
        allow = self._limits.allow_processes
        return linux.Filter(seccomp.build(_SIGNALS[self.rung], allow_processes=allow, pid=pid))

    def set_limits(self) -> None:
        """Sets most of a program's limits for this process; each program inherits them."""
        limits = self._limits
        for kind, value in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_NOFILE, limits.num_open_files),
            # Too small for a file. Where the kernel hands crashed processes to a program instead,
            # which runs as the host's root, it does so at 0, too, but not at 1 (fs/coredump.c).
            (resource.RLIMIT_CORE, 1),
            (resource.RLIMIT_MEMLOCK, 2**16),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _limit(kind, value)

    def fork(self) -> int:
        """Forks the calling process; the child is the program's and has to call `confine`.

        In the caller it makes no object that outlives the call, and neither does `wait`.
        """
        if self.rung != "namespaces":
            return linux.fork()
        if self._last_pid >= 0:
            # Else a program's number in /proc would say how many have been before it.
            os.pwrite(self._last_pid, _PROGRAMS_PID, 0)
        # A process may leave its namespace for its children once; but it may also go back.
        linux.setns(self._own, linux.CLONE_NEWPID)
        linux.unshare(linux.CLONE_NEWPID)
        return linux.fork()

    def wait(self, pid: int, end: linux.End) -> None:
        """Waits for a program's process, and ends what it has left."""
        end.wait(pid)
        if self.rung == "namespaces-flat":
            linux.kill_all()  # elsewhere the kernel has done it, or there can be nothing

    def confine(self) -> None:
        """In the program's process: takes all rights away for good.

        But for the number of its tasks: `limit_tasks` is for when it begins.
        """
        # Else kill(0) would reach the worker. It stays in the worker's session, as the kernel may
        # give each session an equal share of the cores.
        os.setpgid(0, 0)
        if self.rung == "namespaces":
            linux.unshare(linux.CLONE_NEWNS)
            self._scratch.make()
        if self.rung != "landlock":
            os.chdir("/tmp")
        # Of the module below `signal`, which takes plain numbers: less memory is touched.
        _signal.signal(_SIGINT, _signal.default_int_handler)
        _limit(resource.RLIMIT_CPU, cpu_limit_s(self._limits))
        linux.set_capabilities(self._capabilities)
        if self.rung == "landlock":
            die_with_parent()
            self._filter = self._make_filter(os.getpid())
        linux.set_dumpable(True)  # it may look at itself in /proc
        self._filter.install()

    def limit_tasks(self, num_others: int) -> None:
        """In the program's process. Args: num_others: see Outside.count_tasks."""
        # Not of the worker: where it is counted by user, the trainer's threads could keep it from
        # forking.
        _limit(resource.RLIMIT_NPROC, self._limits.num_tasks + num_others)


class Outside:
    """A rung, seen from outside of its process namespace: of the worker's first process."""

    def __init__(self, rung: Rung, load: int, *, counts_apart: bool):
        """See `enter`.

        Args:
          load: descriptor of /proc/loadavg, or -1.
          counts_apart: whether the kernel counts the tasks in the worker's namespaces apart from
            the user's others.
        """
        self.rung = rung
        self.files = [] if load < 0 else [load]
        """Descriptors that have to stay open."""
        self._load = load
        self._counts_apart = counts_apart
        self._scratch: tuple = ()

    def look(self) -> None:
        """Once the inside is ready: how /tmp should be."""
        self._scratch = _describe("/tmp")

    def count_tasks(self) -> int:
        """What the kernel counts against a program's number of tasks besides its own."""
        return _NUM_WORKER_TASKS if self._counts_apart else _count_tasks(self._load) + _MORE_TASKS

    def clear_up(self) -> bool:
        """After the end of a program's processes: whether nothing of it is left."""
        if self.rung != "namespaces-flat":
            return True  # the kernel has done it, or there can be nothing
        return _empty("/tmp", time.monotonic() + _WIPE_S) and _describe("/tmp") == self._scratch


def cpu_limit_s(limits: Limits) -> int:
    """Of one process; the deadline comes first unless the worker is lost or there are threads."""
    return int(limits.timeout_s) + 3


def enter(
    rung: Rung,
    limits: Limits,
    libraries: runtime.Runtime,
    stay_outside: Callable[[int, Outside], NoReturn],
) -> Isolation:
    """Isolates the calling process, which must have one thread.

    It returns in a child of the caller: on the rungs with namespaces, process 1 of the new one. The
    caller itself goes on with `stay_outside`, which gets the child's number, and from whose end the
    child dies. It shares the child's mounts, user and lack of rights.

    Raises:
      OSError: this machine does not let it; the message says what.
    """
    os.umask(0o022)
    _prefer_for_oom_kills()
    _have_session_give_way()
    # Opened while this process sees the host's /proc, with rights to use it.
    last_pid = _open(_LAST_PID, os.O_WRONLY) if rung == "namespaces" else -1
    load = _open("/proc/loadavg", os.O_RDONLY)
    own_users, capabilities = False, linux.NO_CAPABILITIES
    if rung == "landlock":
        capabilities = _enter_landlock(libraries)
        child = os.fork()
        if child:
            linux.set_capabilities()
    else:
        flat = rung == "namespaces-flat"
        child, own_users = _enter_namespaces(libraries, flat=flat, limits=limits)
    if child:
        counts_apart = own_users and _counts_by_namespace()
        linux.set_dumpable(False)
        stay_outside(child, Outside(rung, load, counts_apart=counts_apart))
    die_with_parent()
    linux.set_dumpable(False)  # programs of the same user can neither trace nor read it
    return Isolation(rung, limits, last_pid, capabilities)


def _enter_namespaces(
    libraries: runtime.Runtime, *, flat: bool, limits: Limits
) -> tuple[int, bool]:
    """Forks. Returns the child's number (0 in the child), and whether the new namespaces include
    one of users."""
    uid = namespaces.dedicated_uid()
    as_root = namespaces.can_change_user(uid)
    if as_root:
        os.setgroups([])
    else:
        uid = os.geteuid()
    try:
        namespaces.enter_user_namespace(uid)
        last_user = None
    except OSError:
        if not (flat and as_root):
            raise
        namespaces.enter_as_root()
        last_user = uid
    inner = last_user is None
    child = os.fork()
    if child:
        namespaces.become(namespaces.INNER_ID if inner else uid)
        linux.set_capabilities()
        die_with_parent()  # a change of user forgets it, so it is asked for after that
        return child, inner
    namespaces.build_root(libraries, namespaces.INNER_ID if inner else None)
    linux.drop_bounding_set()
    if flat:
        namespaces.scratch(limits).make()
        if last_user is not None:
            namespaces.become(last_user)
        linux.set_capabilities()
    return 0, inner


def _enter_landlock(libraries: runtime.Runtime) -> bytes:
    """Returns the capabilities that programs need to read what they import."""
    uid = namespaces.dedicated_uid()
    capabilities = linux.NO_CAPABILITIES
    if namespaces.can_change_user(uid):
        os.setgroups([])
        if any(runtime.is_closed(path) for path in libraries.folders):
            # Such as below root's home. What can be read with it, Landlock bounds.
            capabilities = linux.READ_SEARCH
        linux.become_with(uid, capabilities)
    die_with_parent()
    os.chdir("/")
    landlock.restrict(libraries)
    return capabilities


def _prefer_for_oom_kills() -> None:
    """If memory runs out, the kernel should take this and not the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not everywhere allowed, and only a preference


def give_way() -> None:
    """Cores are first the trainer's, for this process and those that it starts."""
    os.nice(NICENESS)


def _have_session_give_way() -> None:
    if os.getsid(0) != os.getpid():
        return  # the session is another's
    try:
        # Where each session gets an equal share, niceness counts among its processes only.
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(NICENESS))
    except OSError:
        pass  # not everywhere to be had


def _open(path: str, flags: int) -> int:
    """A descriptor, or -1 where there is no such file, or it is closed to this process."""
    try:
        return os.open(path, flags)
    except OSError:
        return -1


_NUM_WORKER_TASKS = 2
"""The process outside, and the one that is copied for each program."""
_MORE_TASKS = 1024
"""How many a user's other processes may start while a program runs."""


def _count_tasks(load: int) -> int:
    """Threads on this machine now. Args: load: descriptor of /proc/loadavg, or -1."""
    try:
        return int(os.pread(load, 200, 0).split()[3].split(b"/")[1])
    except (OSError, IndexError, ValueError):
        return 2**15


def _limit(kind: int, value: int) -> None:
    """Of this process and those that it starts, unless a lower limit holds already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _counts_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts a user namespace's processes only: from Linux 5.14 on."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (5, 14)


def _die_of_signals(*, restore_in_children: bool) -> None:
    """For a worker: signals that would end its programs elsewhere do so, too, in a namespace.

    The kernel spares a namespace's first process from what has no handler, so they inherit the C
    library's abort as one.

    Args:
      restore_in_children: whether processes that python forks from here on get the default back.
    """
    abort = ctypes.cast(_libc.abort, ctypes.c_void_p)
    numbers = [getattr(signal, f"SIG{name}") for name in _ENDING_SIGNALS]
    for number in numbers:
        _libc.signal(number, abort)

    def restore() -> None:
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                _libc.signal(number, None)

    if restore_in_children:
        os.register_at_fork(after_in_child=restore)


def _describe(folder: str) -> tuple:
    """What a program can change of a folder that belongs to its user, besides what is in it."""
    try:
        state = os.stat(folder)
        names = os.listxattr(folder)
        return (
            state.st_mode,
            state.st_uid,
            state.st_gid,
            [(n, os.getxattr(folder, n)) for n in names],
        )
    except OSError:
        return ()


def _empty(folder: str, deadline: float) -> bool:
    """Removes what a program usually leaves; False if it left more than time allows."""
    try:
        for path, folders, files in os.walk(folder, topdown=False):
            for name in folders + files:
                full = os.path.join(path, name)
                if name in folders and not os.path.islink(full):
                    os.rmdir(full)
                else:
                    os.unlink(full)
                if time.monotonic() > deadline:
                    return False
        return not os.listdir(folder)
    except (OSError, RecursionError):
        return False  # closed or very deep folders
