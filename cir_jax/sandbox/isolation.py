"""How a worker shuts itself away from the machine, and each program away from the worker.

Three rungs, the first being the strongest:

- `namespaces`: the worker is in namespaces of its own (namespaces.py); each program is the first
  process of a process namespace of its own, with a mount of /tmp of its own.
- `namespaces-flat`: the worker is, the programs are not: between two of them the worker kills
  what is left and empties /tmp, or is replaced if that takes long.
- `landlock`: no namespaces (landlock.py).

In all of them a program has no capability, resource limits and a filter of system calls.
"""

import ctypes
import os
import resource
import signal
import time
from typing import Literal

from cir_jax.channel import die_with_parent
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
_WIPE_S = 0.2

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p


class Isolation:
    """The worker's side of a rung; made by `enter`."""

    def __init__(self, rung: Rung, limits: Limits, num_other_tasks: int):
        """Args: num_other_tasks: what the kernel counts against a program's number of tasks."""
        self.rung = rung
        self._limits = limits
        self._num_tasks = limits.num_tasks + num_other_tasks
        # What a program's process can inherit is done here, once: each page of memory that it
        # writes to has to be copied first.
        if rung == "namespaces":
            self._own_processes = os.pidfd_open(os.getpid())
            _die_of_signals(limits.allow_processes)
        # Without namespaces the program's own number is part of the filter.
        self._filter = None if rung == "landlock" else self._make_filter(0)
        self._set_limits()
        linux.set_no_new_privileges()

    def _make_filter(self, pid: int) -> linux.Filter:
        allow = self._limits.allow_processes
        return linux.Filter(seccomp.build(_SIGNALS[self.rung], allow_processes=allow, pid=pid))

    def _set_limits(self) -> None:
        limits = self._limits
        for kind, value in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_NPROC, self._num_tasks),
            (resource.RLIMIT_NOFILE, limits.num_open_files),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 2**16),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        cpu_s = cpu_limit_s(limits)
        self._cpu_s = cpu_s if hard == resource.RLIM_INFINITY else min(cpu_s, hard)

    def fork(self) -> int:
        """Forks the worker; the child is the program's process and has to call `confine`."""
        if self.rung != "namespaces":
            return linux.fork()
        linux.unshare(linux.CLONE_NEWPID)
        pid = -1
        try:
            pid = linux.fork()
            return pid
        finally:
            if pid:
                linux.setns(self._own_processes, linux.CLONE_NEWPID)

    def confine(self) -> None:
        """In the program's process: takes all rights away for good."""
        os.setsid()  # or kill(0) would reach the worker
        if self.rung == "namespaces":
            linux.unshare(linux.CLONE_NEWNS)
            namespaces.mount_scratch(self._limits)
        if self.rung != "landlock":
            os.chdir("/tmp")
        resource.setrlimit(resource.RLIMIT_CPU, (self._cpu_s, self._cpu_s))
        linux.drop_capabilities()
        if self.rung == "landlock":
            die_with_parent()
            self._filter = self._make_filter(os.getpid())
        linux.set_dumpable(True)  # it may look at itself in /proc
        self._filter.install()

    def clear_up(self) -> bool:
        """After a program's end: whether nothing of it is left."""
        if self.rung != "namespaces-flat":
            return True  # the kernel has done it, or there can be nothing
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return _empty("/tmp", time.monotonic() + _WIPE_S)
            os.kill(-1, signal.SIGKILL)  # all but the caller, in its own namespace
            time.sleep(0.001)


def cpu_limit_s(limits: Limits) -> int:
    """Of one process; the deadline comes first unless the worker is lost or there are threads."""
    return int(limits.timeout_s) + 3


def enter(rung: Rung, limits: Limits) -> Isolation:
    """Isolates the calling process, which must have one thread and not yet be large.

    On the rungs with namespaces it returns in a child of the caller: process 1 of the new
    namespace. The caller itself only waits for that child and ends with it.

    Raises:
      OSError: this machine does not let it; the message says what.
      ModuleNotFoundError: the interpreter lacks numpy or sympy.
    """
    os.umask(0o022)
    _prefer_for_oom_kills()
    libraries = runtime.find()
    num_tasks = _count_tasks()
    own_users = False
    if rung == "landlock":
        _enter_landlock(libraries)
    else:
        flat = rung == "namespaces-flat"
        own_users = _enter_namespaces(libraries, flat=flat, limits=limits)
    if own_users and _counts_by_namespace():
        num_tasks = 2  # the process that waits for this one, and this one
    libraries.use(moved=rung != "landlock")
    linux.set_dumpable(False)  # programs of the same user can neither trace nor read it
    return Isolation(rung, limits, num_tasks)


def _enter_namespaces(libraries: runtime.Runtime, *, flat: bool, limits: Limits) -> bool:
    """Returns whether the new namespaces include one of users."""
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
        linux.drop_capabilities()
        die_with_parent()  # a change of user forgets it, so it is asked for after that
        namespaces.guard(child)
    namespaces.build_root(libraries, namespaces.INNER_ID if inner else None)
    die_with_parent()
    if flat:
        namespaces.mount_scratch(limits)
        linux.drop_bounding_set()
        if last_user is not None:
            namespaces.become(last_user)
            die_with_parent()
        linux.drop_capabilities()
    return last_user is None


def _enter_landlock(libraries: runtime.Runtime) -> None:
    uid = namespaces.dedicated_uid()
    if namespaces.can_change_user(uid):
        for path in libraries.folders:
            if blocked := runtime.blocking_folder(path):
                raise PermissionError(
                    f"programs run as a user for whom {blocked} is closed: sandbox.runtime, and "
                    f"the python that it was built with, have to be elsewhere than {path}"
                )
        os.setgroups([])
        namespaces.become(uid)
    die_with_parent()
    os.chdir("/")
    landlock.restrict(libraries)


def _prefer_for_oom_kills() -> None:
    """If memory runs out, the kernel should take this and not the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not everywhere allowed, and only a preference


def _count_tasks() -> int:
    """Threads on this machine."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].split("/")[1])
    except OSError:
        return 2**15


def _counts_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts a user namespace's processes only: from Linux 5.14 on."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (5, 14)


def _die_of_signals(has_children: bool) -> None:
    """For a worker: signals that would end its programs elsewhere do so, too, in a namespace.

    The kernel spares a namespace's first process from what has no handler, so they inherit the C
    library's abort as one.
    """
    abort = ctypes.cast(_libc.abort, ctypes.c_void_p)
    numbers = [getattr(signal, f"SIG{name}") for name in _ENDING_SIGNALS]
    for number in numbers:
        _libc.signal(number, abort)

    def restore() -> None:
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                _libc.signal(number, None)

    if has_children:
        os.register_at_fork(after_in_child=restore)


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
    except (OSError, RecursionError):
        return False  # closed or very deep folders
    return not os.listdir(folder)
