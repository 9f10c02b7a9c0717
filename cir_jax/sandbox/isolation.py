"""How a sandbox worker shuts itself, and with it its programs, away from the machine.

Three modes, the strongest that is to be had being taken:

- `namespaces` (root with CAP_SYS_ADMIN): process, mount, IPC and network namespaces of the
  worker's own. Its programs see no other process, have no network, can write only to a small
  file system of the worker's own, and all end with the worker. They run as an unprivileged user.
- `uid` (root): programs run as an unprivileged user that no other worker has.
- `process` (any other user): programs run as the trainer's user.
"""

import ctypes
import dataclasses
import os
import pwd
import random
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

from cir_jax.sandbox.limits import Limits
from cir_jax.workers import die_with_parent

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x8000000, 0x20000000, 1 << 30
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

# Below the range of unprivileged container mappings (65536), above that of people's accounts on
# most machines; a uid that has an account is skipped.
_UIDS = range(40000, 60000)
_SCRATCH = "/dev/shm"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = (None if x is None else x.encode() for x in (source, target, kind))
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()))


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What a worker has around its programs."""

    mode: str
    uid: int | None
    """The programs' user and group; None: the trainer's own."""
    scratch: str
    """Folder for the programs' folders; nothing of a program stays in it."""
    lease: socket.socket | None = None
    """Keeps other workers off the uid for as long as it is open."""

    def drop(self, limits: Limits) -> None:
        """In a program's process: takes its privileges away for good, and sets its limits."""
        import resource

        num_processes = limits.num_processes
        if self.uid is None:
            # The kernel counts the trainer's own threads too; the number of all tasks on the
            # machine is an upper bound for those.
            with open("/proc/loadavg") as file:
                num_processes += int(file.read().split()[3].split("/")[1])
        for kind, value in (
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_CPU, int(limits.timeout_s) + 3),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_NPROC, num_processes),
            (resource.RLIMIT_NOFILE, limits.num_open_files),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        die_with_parent()  # a change of user forgets it, so it is asked for after that

    def sweep(self) -> None:
        """Kills and reaps every process that a program left, until there are none."""
        pause_s = 0.0
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            if self.mode == "namespaces":
                os.kill(-1, signal.SIGKILL)  # all but the caller, in its own namespace
            elif self.mode == "uid":
                self.kill_user()
            for pid in _descendants() if self.mode != "namespaces" else ():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(pause_s)
            pause_s = min(0.05, pause_s + 0.002)

    def kill_user(self) -> None:
        """kill(-1) as the programs' user: one system call, so that no fork slips through."""
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(self.uid, self.uid, self.uid)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)

    def make_folder(self) -> str:
        """An empty folder for one program."""
        folder = tempfile.mkdtemp(dir=self.scratch)
        if self.uid is not None:
            os.chown(folder, self.uid, self.uid)
        return folder

    def wipe(self) -> None:
        """Removes what a program left in the scratch folder."""
        for name in os.listdir(self.scratch):
            path = os.path.join(self.scratch, name)
            try:
                os.rmdir(path)  # the usual case: empty
            except OSError:
                _remove(path)


def _remove(path: str) -> None:
    # rm copes with any depth, which shutil.rmtree does not.
    subprocess.run(["chmod", "-R", "u+rwX", "--", path], stderr=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", "--", path], stderr=subprocess.DEVNULL)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended since
            children.setdefault(parent, []).append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        todo = [child for pid in todo for child in children.get(pid, ())]
        found += todo
    return found


def enter(limits: Limits) -> Isolation:
    """Isolates the calling process, which must be single-threaded and not yet large.

    In mode `namespaces` it returns in a child of the caller: process 1 of the new namespace. The
    caller itself only waits for that child and ends with it.

    Raises:
      PermissionError: the interpreter cannot be read by the user that programs would run as.
    """
    die_with_parent()
    os.umask(0o022)
    try:
        # If memory runs out, the kernel should take this and not the trainer.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not everywhere allowed, and only a preference
    if os.geteuid() != 0:
        return _without_namespaces(Isolation("process", None, _temporary_scratch()))
    uid, lease = _lease_uid()
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    if os.path.isdir(_SCRATCH) and _libc.unshare(flags) == 0:
        _become_first_process()
        _arrange_mounts(limits)
        isolation = Isolation("namespaces", uid, _SCRATCH, lease)
    else:
        isolation = _without_namespaces(Isolation("uid", uid, _temporary_scratch(), lease))
    for path in _interpreter_paths():
        if blocked := _blocking_folder(path):
            raise PermissionError(
                f"programs run as an unprivileged user, for whom {blocked} is closed: use an "
                f"interpreter outside of it, not {sys.executable}"
            )
    return isolation


def _without_namespaces(isolation: Isolation) -> Isolation:
    """Arranges for what a namespace would do: adopting orphans, and an end for all.

    A process apart waits for the end of this one, then kills the programs' user's processes and
    removes the scratch folder. It is no child of this one, which reaps all of its children.
    """
    worker = os.pidfd_open(os.getpid())
    if child := os.fork():
        os.waitpid(child, 0)
        os.close(worker)
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        return isolation
    if os.fork():
        os._exit(0)
    try:
        os.setsid()
        kept = {worker} if isolation.lease is None else {worker, isolation.lease.fileno()}
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in kept:
                os.closerange(int(name), int(name) + 1)
        select.select([worker], [], [])
        if isolation.uid is not None:
            isolation.kill_user()
        _remove(isolation.scratch)
    finally:
        os._exit(0)


def _lease_uid() -> tuple[int, socket.socket]:
    """A uid that no account and no other worker has, and the socket that holds it."""
    for uid in random.SystemRandom().sample(_UIDS, 1000):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            lease = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                lease.bind(f"\0cir_jax-sandbox-uid-{uid}")
            except OSError:
                lease.close()
            else:
                return uid, lease
    raise OSError("found no free uid for the sandbox")


def _become_first_process() -> None:
    child = os.fork()
    if child == 0:
        die_with_parent()
        return
    os.closerange(3, 2**16)  # the pool must see the end of the child's socket, not of this copy
    os.waitpid(child, 0)
    os._exit(1)


def _arrange_mounts(limits: Limits) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _uncover(_interpreter_paths())
    # Everything read-only, in one call that newer kernels (5.12) have; without it a program can
    # still write where any user may, such as /tmp.
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))
    size = f"size={limits.scratch_bytes},nr_inodes={limits.num_scratch_files},mode=1777"
    _mount("tmpfs", _SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    try:
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    except OSError:
        pass  # refused in some containers: then /proc shows processes, which stay out of reach


def _interpreter_paths() -> list[str]:
    return sorted({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)})


def _blocking_folder(path: str) -> str | None:
    """The outermost folder on the way to `path` that other users may not enter."""
    parts = path.split(os.sep)
    for i in range(2, len(parts) + 1):
        folder = os.sep.join(parts[:i])
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return folder
    return None


def _uncover(paths: list[str]) -> None:
    """Makes an interpreter under a closed folder (such as root's home) readable, and only it."""
    closed: dict[str, list[str]] = {}
    for path in paths:
        if folder := _blocking_folder(path):
            closed.setdefault(folder, []).append(path)
    for folder, inner in closed.items():
        descriptors = [os.open(path, os.O_PATH) for path in inner]
        _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
        for path, descriptor in zip(inner, descriptors, strict=True):
            os.makedirs(path, exist_ok=True)
            _mount(f"/proc/self/fd/{descriptor}", path, None, _MS_BIND | _MS_REC)
            os.close(descriptor)


def _temporary_scratch() -> str:
    path = tempfile.mkdtemp(prefix="cir-sandbox-")
    os.chmod(path, 0o711)
    return path
